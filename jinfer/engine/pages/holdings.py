"""The pages of a request from admission to its end: found, taken, filled, given back. No order.

When a page goes into the prefix cache. A page of a prefill chunk: as soon as the chunk is planned.
Who finds it reads it in a later plan, or in this very one, where each layer writes the KV of all
tokens of the step before any of them attends. A page of generated tokens: when its request leaves
the device, as far as the last token but one that the host knows. Everything up to there has been
written by steps that are committed; what steps in flight still write for a request that has ended
or was preempted lies beyond, so that no cached token changes ever again.

Whole pages are shared; the page in which a known prefix ends is copied. A plan's copies are done
before its step, so a page that the very plan writes to is none to copy from, and the source is
held until the plan is made: what is given its page then is written by later plans. Places behind
the shared tokens come out as zeros, whatever NaN others may have left there. Where the source
itself is the last page that the request needs, its place is worth more than its tokens.

Why hits give the tokens of a cold run, wherever in a page they end: there is no fixed grid of
chunks to align them to. A chunk is what the budget leaves, so company moves its borders to any
token in cold runs, too, and the kernels must not care (they sum over keys in blocks at absolute
positions, wherever queries begin). A hit is one more way of cutting a prompt, and a copy holds the
bits of its source. It is exact up to the rounding between programs of different padded size, as is
any change of company.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinfer.engine.pages.prefix import PrefixCache
from jinfer.engine.pages.radix import PageKey
from jinfer.engine.plan import PageMoves, SchedulerStats
from jinfer.engine.request import Request, RequestStatus

# A copy must save an eighth of a page: a first token in common (most tokenizers begin with one) is
# computed as quickly as it is copied.
MIN_COPIED_PART = 8


class Holdings:
    """Gives requests their pages and takes them back.

    Args:
      prefix: the pages and what is known of their content.
      is_caching: whether pages are kept for other requests.
      max_cached_tokens: see `Scheduler`.
      stats: where hits are counted.
    """

    def __init__(
        self,
        prefix: PrefixCache,
        is_caching: bool,
        max_cached_tokens: int | None,
        stats: SchedulerStats,
    ) -> None:
        self.prefix = prefix
        self.page_size = prefix.page_size
        self.is_caching = is_caching
        self.max_cached_tokens = max_cached_tokens
        self.stats = stats
        self._spoilt: set[int] = set()  # pages to clear before anyone computes with them
        self._copies: list[tuple[int, int, int]] = []  # (from, to, tokens) of the next plan
        self._being_filled: set[int] = set()  # by the next plan

    def num_pages(self, num_tokens: int) -> int:
        """Returns how many pages `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.page_size)

    def written_pages(self, request: Request, start: int, num_tokens: int) -> tuple[int, ...]:
        """Returns the pages of `num_tokens` positions from `start` on."""
        return tuple(request.pages[start // self.page_size : self.num_pages(start + num_tokens)])

    def num_missing_pages(self, request: Request, num_steps: int) -> int:
        """Returns how many more pages `num_steps` decode steps of a running request need."""
        num_steps = min(num_steps, request.num_unplanned_outputs)
        return max(0, self.num_pages(request.num_computed_tokens + num_steps) - len(request.pages))

    def can_grow(self, request: Request) -> bool:
        """Whether a running request has fewer pages than all its tokens but the last fill."""
        num_places = request.num_prompt_tokens + request.max_output_tokens - 1
        return len(request.pages) < self.num_pages(num_places)

    def extend(self, decodes: list[Request], num_steps: int) -> int:
        """Gives running requests the pages of several decode steps; returns of how many.

        As many as the free pages allow, at most `num_steps`, and no more than the sequence with
        most tokens to go can use. The pages of one step they hold already.
        """
        most = max(request.num_unplanned_outputs for request in decodes)
        for n in range(min(num_steps, most), 1, -1):
            missing = [self.num_missing_pages(request, n) for request in decodes]
            if sum(missing) <= self.prefix.num_available:
                for request, count in zip(decodes, missing):
                    request.pages += self.prefix.alloc(count)
                return n
        return 1

    def num_cached_pages(self, request: Request) -> int:
        """Returns how many pages `take` would find now."""
        return len(self._find_whole(request)) if self._is_reading(request) else 0

    def take(self, request: Request, *, num_spare: int) -> bool:
        """Gives a request the pages of all its known tokens; False if too few are free.

        The whole pages of its longest cached prefix are taken by reference, as if computed, and of
        a last part a copy is planned; at least the last token is computed in any case, for its
        logits.

        Args:
          request: holds no pages yet.
          num_spare: pages that must stay available beside.
        """
        is_reading = self._is_reading(request)
        hit = self._find_whole(request) if is_reading else []
        saved = found = self._find_saved(request, hit) if is_reading else []
        tier = self.prefix.tier
        if tier is not None and not tier.costs.is_worth_loading(len(found)):
            saved = []
        source, num_copied = -1, 0
        if is_reading and not saved:
            source, num_copied = self._find_part(request, hit)
        needed = self.num_pages(request.num_tokens) - len(hit)
        if needed + num_spare > self.prefix.num_available_beside(hit):
            return False
        if num_copied and needed + num_spare > self.prefix.num_available_beside([*hit, source]):
            num_copied = 0
        request.pages = self.prefix.share(hit)
        if num_copied:
            self.prefix.share([source])
        request.pages += self._alloc(needed, saved)
        if num_copied:
            self._copies.append((source, request.pages[len(hit)], num_copied))
            self.stats.num_copied_pages += 1
        num_found = (len(hit) + len(saved)) * self.page_size + num_copied
        request.num_computed_tokens = request.num_found_tokens = num_found
        request.cache_epoch = self.prefix.epoch
        if saved:
            self.fill(request, request.pages[len(hit) :][: len(saved)], with_part=False)
        if tier is not None:
            tier.note_admission(
                is_resumed=request.status is RequestStatus.PREEMPTED,
                num_found=len(found),
                num_loaded=len(saved),
                is_computed=2 * num_found < request.num_tokens,
            )
        if is_reading and request.metrics.first_scheduled_time is None:
            request.num_cached_tokens = request.num_computed_tokens
            self.stats.num_looked_up_tokens += request.num_prompt_tokens
            self.stats.num_cached_tokens += request.num_cached_tokens
        return True

    def _alloc(self, n: int, saved: Sequence[PageKey]) -> list[int]:
        """Takes `n` pages, the first of which are loaded from the host before the next step."""
        tier = self.prefix.tier
        slots = [] if tier is None else tier.pin(saved)  # before what is evicted now is saved
        pages = self.prefix.alloc(n)
        if tier is not None:
            tier.load(slots, pages[: len(slots)])
        return pages

    def fill(self, request: Request, written: Sequence[int], *, with_part: bool = True) -> None:
        """Lets others find what a prefill chunk writes.

        Args:
          request: its tokens up to `num_computed_tokens` are written, or the chunk writes them.
          written: pages that the chunk writes to, if it is part of the plan being made.
          with_part: whether the page that it fills in part is to be found, too.
        """
        self._being_filled.update(written)
        if self._can_fill_cache(request):
            tokens = self._cacheable_tokens(request, request.num_computed_tokens, with_part)
            self.prefix.insert(request.cache_namespace, tokens, request.pages)

    def give_back(self, request: Request, *, with_part: bool = True) -> None:
        """Takes the pages of a request away, and keeps those in the cache that it has filled."""
        if self._can_fill_cache(request):
            num_known = request.num_prompt_tokens + len(request.output_token_ids)
            num_written = min(request.num_computed_tokens, num_known - 1)
            tokens = self._cacheable_tokens(request, num_written, with_part)
            self.prefix.release(request.cache_namespace, tokens, request.pages)
        else:
            self.prefix.free(request.pages)
        request.pages = []
        request.num_computed_tokens = request.num_prefill_tokens = 0

    def take_moves(self) -> PageMoves:
        """Returns, once, what is to be done with whole pages before the next step.

        From here on nothing but later steps may write to the sources: they are let go.
        """
        spoilt, self._spoilt = self._spoilt, set()
        copies, self._copies = self._copies, []
        for source, _, _ in copies:
            self.prefix.free([source])
        self._being_filled.clear()
        moves = PageMoves(cleared=tuple(sorted(spoilt)), copied=tuple(copies))
        return moves if self.prefix.tier is None else self.prefix.tier.take(moves)

    # ------------------------------------------------------------------ after errors

    def clear(self) -> None:
        """Takes all pages from whoever holds them; nothing of them is known any more."""
        self.prefix.clear()
        self._spoilt.clear()
        self._copies.clear()
        self._being_filled.clear()

    def discard(
        self, request: Request, start: int, written: Sequence[int], running: list[Request]
    ) -> list[Request]:
        """Forgets what `request` computed from position `start` on, and all that builds on it.

        What lies before was computed by others, or by steps of its own that are known to be sound.

        Args:
          request: its pages are gone already if it has ended or was preempted.
          start: first position that is not to be trusted.
          written: pages that its step wrote to. Those that are free now are cleared; who has been
            given one since writes each place before reading it.
          running: all running requests.

        Returns:
          Those of the other running requests that hold such pages, and must give them back.
        """
        first = start // self.page_size
        # Who has left part of a page behind may have computed NaN in the rest of it.
        pool = self.prefix.pool
        left = {p for p in written if self.prefix.is_cached(p) and pool.count(p) == 1}
        spoilt = {*request.pages[first:], *left}
        spoilt.update(
            self.prefix.forget(request.cache_namespace, request.known_token_ids, start, spoilt)
        )
        self._spoilt |= spoilt
        self._spoilt.update(page for page in written if pool.count(page) == 0)
        self.spoil(request)
        return [r for r in running if r is not request and not spoilt.isdisjoint(r.pages)]

    def spoil(self, request: Request) -> None:
        """Sees to it that nobody else ever reads what `request` has computed alone."""
        request.cache_epoch = -1
        pool = self.prefix.pool
        alone = (p for p in request.pages if pool.count(p) == 1 and not self.prefix.is_cached(p))
        self._spoilt.update(alone)

    # ------------------------------------------------------------------ inside

    def _is_reading(self, request: Request) -> bool:
        return self._can_share(request) and request.reads_prefix_cache

    def _find_whole(self, request: Request) -> list[int]:
        max_pages = (request.num_tokens - 1) // self.page_size
        return self.prefix.find(request.cache_namespace, request.known_token_ids, max_pages)

    def _find_part(self, request: Request, hit: list[int]) -> tuple[int, int]:
        """Returns the page to copy the beginning of behind `hit`, and how much of it: perhaps 0."""
        tokens = request.known_token_ids[: request.num_tokens - 1]
        page, count = self.prefix.find_part(request.cache_namespace, tokens, hit)
        is_worth_it = count * MIN_COPIED_PART >= self.page_size
        return (page, count) if is_worth_it and page not in self._being_filled else (-1, 0)

    def _find_saved(self, request: Request, hit: list[int]) -> list[PageKey]:
        """Returns the whole pages that the host has behind `hit`."""
        max_pages = (request.num_tokens - 1) // self.page_size
        known = request.known_token_ids
        return self.prefix.find_saved(request.cache_namespace, known, hit, max_pages)

    def _can_share(self, request: Request) -> bool:
        """Whether the KV of a request's prompt is that of any text which begins with it."""
        limit = self.max_cached_tokens
        return self.is_caching and (limit is None or request.num_prompt_tokens <= limit)

    def _can_fill_cache(self, request: Request) -> bool:
        """Whether a running request's pages may be kept: not what older weights have computed."""
        return self._can_share(request) and request.cache_epoch == self.prefix.epoch

    def _cacheable_tokens(self, request: Request, num_tokens: int, with_part: bool) -> list[int]:
        if self.max_cached_tokens is not None:
            num_tokens = min(num_tokens, self.max_cached_tokens)
        if not with_part:
            num_tokens -= num_tokens % self.page_size
        return request.known_token_ids[:num_tokens]
