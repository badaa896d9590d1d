"""Finds, takes, fills and gives back the pages of a request.

When a page enters the prefix cache:

- A page of a prefill chunk: as soon as the chunk is planned. Other requests read it in a later plan
  or in the same one, where each layer writes the KV of all tokens before any of them attends.
- A page of generated tokens: when its request ends or is preempted, up to the last known token but
  one. Committed steps have written everything up to there. Steps in flight write only behind it, so
  that the KV of a cached token never changes.

Whole pages are shared; the page in which a known prefix ends is copied. A plan's copies are done
before its step, so a page that this plan writes to is no source. The source is held until the plan
is made; later plans may overwrite it. Places behind the copied tokens are set to zero, since other
requests may have left NaN there. No copy is made if the source is the last page that the request
needs.

Why a hit gives the same tokens as computing the prompt, wherever in a page it ends: chunks have no
fixed borders. A chunk is what the budget leaves, so batch mates move its borders anyway, and the
kernels give the same sums for any border (they sum over keys in blocks at absolute positions). A
hit is one more way of cutting a prompt, and a copy has the bits of its source. The result is exact
up to the rounding between programs of different padded size, as with any change of batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinfer.engine.pages.prefix import PrefixCache
from jinfer.engine.pages.radix import PageKey
from jinfer.engine.plan import PageMoves, SchedulerStats
from jinfer.engine.request import Request, RequestStatus

# A copy must save at least an eighth of a page. A single common token, such as the begin token of
# most tokenizers, is computed as fast as it is copied.
MIN_COPIED_PART = 8


class Holdings:
    """Gives requests their pages and takes them back.

    Args:
      prefix: the cache through which pages are taken and given back.
      is_caching: whether pages are kept for other requests.
      max_cached_tokens: see `Scheduler`.
      stats: counts hits.
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
        self._to_clear: set[int] = set()  # pages that may hold NaN, to be zeroed by the next plan
        self._copies: list[tuple[int, int, int]] = []  # (from, to, tokens) of the next plan
        self._being_filled: set[int] = set()  # pages that the next plan writes to

    def num_pages(self, num_tokens: int) -> int:
        """Returns how many pages `num_tokens` tokens need."""
        return -(-num_tokens // self.page_size)

    def written_pages(self, request: Request, start: int, num_tokens: int) -> tuple[int, ...]:
        """Returns the pages of `num_tokens` positions from `start` on."""
        return tuple(request.pages[start // self.page_size : self.num_pages(start + num_tokens)])

    def num_missing_pages(self, request: Request, num_steps: int) -> int:
        """Returns how many more pages `num_steps` decode steps of a running request need."""
        num_steps = min(num_steps, request.num_unplanned_outputs)
        return max(0, self.num_pages(request.num_computed_tokens + num_steps) - len(request.pages))

    def can_grow(self, request: Request) -> bool:
        """Whether a running request may need more pages: its last token needs no place."""
        num_places = request.num_prompt_tokens + request.max_output_tokens - 1
        return len(request.pages) < self.num_pages(num_places)

    def extend(self, decodes: list[Request], num_steps: int) -> int:
        """Takes pages for several decode steps of running requests; returns the number of steps.

        As many steps as available pages allow, at most `num_steps`, and at most as many as one of
        the sequences can use. The requests already hold the pages of one step.
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
        """Gives a request the pages of all its known tokens; False if too few are available.

        Whole pages of its longest cached prefix are shared and count as computed; a copy of the
        last, partly common page is planned. At least the last token is computed, for its logits.

        Args:
          request: a request without pages.
          num_spare: pages that must stay available.
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
        """Takes `n` pages; the first ones are loaded from the host before the next step."""
        tier = self.prefix.tier
        # Pinned first: `alloc` evicts pages, and to save them the tier may evict slots.
        slots = [] if tier is None else tier.pin(saved)
        pages = self.prefix.alloc(n)
        if tier is not None:
            tier.load(slots, pages[: len(slots)])
        return pages

    def fill(self, request: Request, written: Sequence[int], *, with_part: bool = True) -> None:
        """Puts the pages of a prefill chunk into the prefix cache.

        Args:
          request: its tokens up to `num_computed_tokens` are written, or the chunk writes them.
          written: pages that the chunk writes to, if it belongs to the plan being made.
          with_part: whether to include a last page that is filled in part.
        """
        self._being_filled.update(written)
        if self._can_fill_cache(request):
            tokens = self._cacheable_tokens(request, request.num_computed_tokens, with_part)
            self.prefix.insert(request.cache_namespace, tokens, request.pages)

    def give_back(self, request: Request, *, with_part: bool = True) -> None:
        """Takes the pages of a request away; the cache keeps those that it has filled."""
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
        """Returns the operations on whole pages before the next step, and plans them no more.

        The sources of copies are freed: only later steps can write to them now.
        """
        cleared, self._to_clear = self._to_clear, set()
        copies, self._copies = self._copies, []
        for source, _, _ in copies:
            self.prefix.free([source])
        self._being_filled.clear()
        moves = PageMoves(cleared=tuple(sorted(cleared)), copied=tuple(copies))
        return moves if self.prefix.tier is None else self.prefix.tier.take(moves)

    # ------------------------------------------------------------------ after errors

    def clear(self) -> None:
        """Frees all pages, whatever their counts, and forgets their content."""
        self.prefix.clear()
        self._to_clear.clear()
        self._copies.clear()
        self._being_filled.clear()

    def discard(
        self, request: Request, start: int, written: Sequence[int], running: list[Request]
    ) -> list[Request]:
        """Discards the KV that `request` computed from position `start` on, and all based on it.

        KV before `start` was computed by other requests, or by earlier steps with finite results.

        Args:
          request: it holds no pages if it has ended or was preempted.
          start: first position whose KV is discarded.
          written: pages that its step wrote to. Those that are free now are cleared. A request that
            holds one of them by now writes each place before reading it.
          running: all running requests.

        Returns:
          The other running requests that hold discarded pages, and must give them back.
        """
        first = start // self.page_size
        # A request that ended may have left a page in the cache in part, with NaN in the rest.
        pool = self.prefix.pool
        left = {p for p in written if self.prefix.is_cached(p) and pool.count(p) == 1}
        discarded = {*request.pages[first:], *left}
        discarded.update(
            self.prefix.forget(request.cache_namespace, request.known_token_ids, start, discarded)
        )
        self._to_clear |= discarded
        self._to_clear.update(page for page in written if pool.count(page) == 0)
        self.invalidate(request)
        return [r for r in running if r is not request and not discarded.isdisjoint(r.pages)]

    def invalidate(self, request: Request) -> None:
        """Keeps the pages that only `request` holds from being cached, and clears them later."""
        request.cache_epoch = -1
        pool = self.prefix.pool
        alone = (p for p in request.pages if pool.count(p) == 1 and not self.prefix.is_cached(p))
        self._to_clear.update(alone)

    # ------------------------------------------------------------------ inside

    def _is_reading(self, request: Request) -> bool:
        return self._can_share(request) and request.reads_prefix_cache

    def _find_whole(self, request: Request) -> list[int]:
        max_pages = (request.num_tokens - 1) // self.page_size
        return self.prefix.find(request.cache_namespace, request.known_token_ids, max_pages)

    def _find_part(self, request: Request, hit: list[int]) -> tuple[int, int]:
        """Returns (page, number of its first tokens) to copy behind `hit`; (-1, 0) for none."""
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
        """Whether the KV of a request's prompt depends on its tokens alone, and caching is on."""
        limit = self.max_cached_tokens
        return self.is_caching and (limit is None or request.num_prompt_tokens <= limit)

    def _can_fill_cache(self, request: Request) -> bool:
        """Whether a running request's pages may be cached: not if older weights computed them."""
        return self._can_share(request) and request.cache_epoch == self.prefix.epoch

    def _cacheable_tokens(self, request: Request, num_tokens: int, with_part: bool) -> list[int]:
        if self.max_cached_tokens is not None:
            num_tokens = min(num_tokens, self.max_cached_tokens)
        if not with_part:
            num_tokens -= num_tokens % self.page_size
        return request.known_token_ids[:num_tokens]
