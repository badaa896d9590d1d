"""Beam search on the engine's device and page pool, beside its requests; knows nothing of text.

Each search borrows the pages of its prompt's longest cached prefix and as many more as its beams
can ever need, so that it always runs to its end and gives all back at once. One jitted step serves
all searches under way; the host sees the few best continuations of each, never the vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jinfer.config.beam_params import BeamSearchParams
from jinfer.config.fields import read_int
from jinfer.config.sampling_params import SamplingParams
from jinfer.engine.beam.hypotheses import Candidate, Finished, Search, num_pages
from jinfer.engine.device import buckets
from jinfer.engine.device.packing import BeamRow, Chunk
from jinfer.engine.device.programs import BeamSizes
from jinfer.engine.engine import Engine
from jinfer.engine.request import Request
from jinfer.engine.token_masks import TokenMasks, fill_masks
from jinfer.sampling.state import pack_bits


@dataclasses.dataclass(eq=False)
class _Job:
    """A prompt; once it is under way, `request` holds all pages that `search` deals out.

    Number n of the search's own pool is page `request.pages[n]` of the engine's.
    """

    idx: int
    request: Request
    num_pages: int
    token_masks: TokenMasks | None
    search: Search | None = None


class BeamSearcher:
    """Searches for the best continuations of prompts, several prompts at a time.

    Args:
      engine: whose model, pool and cache are used. Its requests may go on between the steps.
      params: of all searches.
      concurrency_limit: most prompts at a time; None = as many as `max_num_seqs` beams are.

    Raises:
      ValueError: the engine cannot hold so many beams, or a token id is foreign.
    """

    def __init__(
        self, engine: Engine, params: BeamSearchParams, *, concurrency_limit: int | None = None
    ) -> None:
        config, vocab_size = engine.config, engine.runner.vocab_size
        width = params.beam_width
        if width > config.max_num_seqs:
            raise ValueError(
                f"beam_width={width} is more than max_num_seqs={config.max_num_seqs}: raise "
                "max_num_seqs when the engine is made"
            )
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(params, name) or ():
                if token >= vocab_size:
                    raise ValueError(f"{name} holds {token}: expected ids in 0..{vocab_size - 1}")
        if concurrency_limit is not None:
            concurrency_limit = read_int("concurrency_limit", concurrency_limit)
            if concurrency_limit < 1:
                raise ValueError(f"concurrency_limit must be positive, got {concurrency_limit}")
        self.engine = engine
        self.params = params
        most = config.max_num_seqs // width
        most = most if concurrency_limit is None else min(most, concurrency_limit)
        self._sizes = buckets.ladder(1, most, 2)
        ends = () if params.ignore_eos else engine.eos_token_ids
        self.end_token_ids = tuple(dict.fromkeys((*ends, *params.stop_token_ids)))
        # Enough that beam_width of them end no text, whatever the others do.
        self._num_candidates = min(max(2, 1 + len(self.end_token_ids)) * width, width * vocab_size)
        self._waiting: collections.deque[_Job] = collections.deque()
        self._active: list[_Job] = []
        self._num_added = 0
        self._num_failed_steps = engine.num_failed_steps
        self._has_failed = False
        self.is_stuck = False  # whether the last step could start no search and none was under way

    @property
    def sizes(self) -> BeamSizes:
        """What its programs depend on beside the engine."""
        return BeamSizes(self.params.beam_width, self._num_candidates, self._sizes)

    def add(
        self,
        prompt_token_ids: Sequence[int],
        *,
        cache_salt: str | None = None,
        token_masks: TokenMasks | None = None,
    ) -> int:
        """Queues a prompt and returns its number.

        Args:
          prompt_token_ids: as for `Engine.make_request`.
          cache_salt: as for `Engine.make_request`.
          token_masks: restricts each beam by its tokens; beside `params.allowed_token_ids`.

        Raises:
          ValueError: the prompt is empty, too long or has foreign ids, or the pool is too small.
        """
        config, runner, params = self.engine.config, self.engine.runner, self.params
        self.engine.check(prompt_token_ids, SamplingParams())
        request = Request(
            request_id=f"beam-{self._num_added}",
            prompt_token_ids=list(prompt_token_ids),
            params=SamplingParams(max_tokens=params.max_tokens, detokenize=False),
            seed=0,
            arrival=0,
            max_model_len=config.max_model_len,
            cache_salt=cache_salt,
            kv_format=runner.cache.dtype,
        )
        page_size, max_tokens = runner.cache.page_size, request.max_output_tokens
        needed = num_pages(
            params, request.num_prompt_tokens, max_tokens=max_tokens, page_size=page_size
        )
        if needed > runner.cache.num_pages:
            raise ValueError(
                f"{params.beam_width} beams of {request.num_prompt_tokens} + {max_tokens} tokens "
                f"may need {needed} pages of {page_size} tokens, the KV cache has "
                f"{runner.cache.num_pages}: lower beam_width or max_tokens, or give it more memory"
            )
        self._waiting.append(_Job(self._num_added, request, needed, token_masks))
        self._num_added += 1
        return self._num_added - 1

    def has_work(self) -> bool:
        """Whether a search is not over."""
        return bool(self._waiting or self._active)

    def step(self) -> list[tuple[int, list[Finished]]]:
        """Starts the searches for which there is room and advances all under way by a token.

        Returns:
          (number, finished texts) of the searches that are over, best first. Without room for any
          search nothing happens: the engine's requests must end first.

        Raises:
          RuntimeError: logits are not finite. After this or any other exception call `close`.
          ValueError: a weight was donated or deleted.
        """
        self._has_failed = True  # until the end is reached
        over = self._step()
        self._has_failed = False
        return over

    def _step(self) -> list[tuple[int, list[Finished]]]:
        if self._active and self.engine.num_failed_steps != self._num_failed_steps:
            raise RuntimeError("a step of the engine failed and took the beams' KV along")
        self._num_failed_steps = self.engine.num_failed_steps
        self.engine.runner.check_weights()
        while self._waiting and len(self._active) < self._sizes[-1]:
            if not self._start(self._waiting[0]):
                break
            self._waiting.popleft()
        self.is_stuck = bool(self._waiting) and not self._active
        if not self._active:
            return []
        self._advance()
        over = [(job, job.search) for job in self._active if job.search and job.search.is_over]
        for job, _ in over:
            self._give_back(job)
        return [(job.idx, search.finished) for job, search in over]

    def close(self) -> None:
        """Ends all searches and gives their pages back; to be called after an exception, too.

        A step that fails takes the pool along that was donated to it: a new one is made, and the
        engine's requests are computed again.
        """
        if self._has_failed:
            self.engine.lose_steps()
        self._has_failed = False
        for job in tuple(self._active):
            self._give_back(job)
        self._waiting.clear()

    # ------------------------------------------------------------------ pages

    def _start(self, job: _Job) -> bool:
        """Borrows pages and computes the prompt but for its last token; False if pages are few.

        As when a request is admitted, a page is left for each running one.
        """
        scheduler, request = self.engine.scheduler, job.request
        num_more = job.num_pages - scheduler.holdings.num_pages(request.num_tokens)
        spare = num_more + scheduler.num_running
        if not scheduler.holdings.take(request, num_spare=spare):
            return False
        request.pages += scheduler.prefix.alloc(num_more)
        scheduler.reserved.append(request)
        self._active.append(job)
        self.engine.runner.move_pages(scheduler.holdings.take_moves())
        self._prefill(request)
        # Not the page in which the prompt ends: the search may hand its place to a later one.
        scheduler.holdings.fill(request, (), with_part=False)
        job.search = Search(
            self.params,
            num_prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.max_output_tokens,
            end_token_ids=self.end_token_ids,
            page_size=scheduler.page_size,
        )
        return True

    def _give_back(self, job: _Job) -> None:
        self._active.remove(job)
        scheduler = self.engine.scheduler
        if job.request in scheduler.reserved:  # or lost with a step
            scheduler.reserved.remove(job.request)
            scheduler.holdings.give_back(job.request, with_part=False)

    # ------------------------------------------------------------------ the device

    def _prefill(self, request: Request) -> None:
        """Computes what is missing of the prompt's KV but for its last token, in chunks."""
        most, end = self.engine.config.max_num_batched_tokens, request.num_prompt_tokens - 1
        for begin in range(request.num_computed_tokens, end, most):
            count = min(end - begin, most)
            self.engine.runner.prefill(Chunk(request, begin, count))
            request.num_computed_tokens += count

    def _advance(self) -> None:
        """Runs one step of all searches under way."""
        runner, width = self.engine.runner, self.params.beam_width
        size = buckets.fit(self._sizes, len(self._active)) * width
        rows = []
        for group, job in enumerate(self._active):
            assert job.search is not None
            position = job.search.num_computed
            for i, beam in enumerate(job.search.beams):
                last = job.request.prompt_token_ids[-1] if beam.last is None else beam.last.token
                pages = [job.request.pages[n] for n in beam.pages]
                row = BeamRow(job.request, last, position, pages, beam.total)
                rows.append((group * width + i, row))
        temperature = self.params.temperature or 1.0
        inputs = runner.packer.pack_beams(rows, size, temperature, self._token_mask(size))
        out = runner.continue_beams(inputs, num_beams=width, k=self._num_candidates)
        which, best, own = map(np.asarray, out)
        self._take_in(which, best, own, size)

    def _take_in(self, which: Any, best: Any, own: Any, size: int) -> None:
        """Gives each search its continuations, and copies the pages that are shared no longer."""
        runner = self.engine.runner
        pages = []
        for group, job in enumerate(self._active):
            assert job.search is not None
            if np.isnan(best[group]).any():
                raise RuntimeError(
                    f"beam search over prompt {job.idx} met logits that are not finite; look for "
                    "NaN or infinity in the weights, or try dtype='float32'"
                )
            beams, tokens = np.divmod(which[group], runner.vocab_size)
            rows = zip(beams.tolist(), tokens.tolist(), own[group].tolist(), best[group].tolist())
            copies = job.search.advance([Candidate(*row) for row in rows if row[-1] > -np.inf])
            pages += [(job.request.pages[a], job.request.pages[b]) for a, b in copies]
        if pages:
            runner.copy_beam_pages(pages, size)

    def _token_mask(self, size: int) -> Any:
        """Returns the beams' masks, or None where nothing is banned."""
        constant = self.params.allowed_token_ids
        if constant is None and all(job.token_masks is None for job in self._active):
            return None
        vocab_size, width = self.engine.runner.vocab_size, self.params.beam_width
        everything = np.arange(vocab_size) if constant is None else np.asarray(constant)
        always = pack_bits(everything, vocab_size)
        mask = np.tile(always, (size, 1))
        for group, job in enumerate(self._active):
            assert job.search is not None
            if job.token_masks is None:
                continue
            for i, beam in enumerate(job.search.beams):
                found = [] if beam.last is None else [x.token for x in beam.last.path()]
                own = np.tile(always, (1, 1))
                fill_masks(own, job.token_masks, found)
                mask[group * width + i] &= own[0]
        return mask
