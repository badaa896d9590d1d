"""Decides what each step computes; knows nothing of devices, arrays or text.

`plan` hands out the next step and counts its tokens as computed at once; `commit` brings the
sampled values later. Between the two, further plans may be made: decoding needs no values, only
positions. Plans are executed and committed in the order in which they were made.

    plan 7   plan 8   commit 7   plan 9   commit 8 ...      (the engine holds two plans in flight)

Why pages and rows may change hands while older plans are in flight: the device executes plans in
order. Say request A ends at commit 7 while plan 8 still decodes it, and plan 9 gives A's pages and
row to B. Plan 8 has read and written them before plan 9 starts; plan 9 re-initialises the row
first (`is_new_row`) and writes each page place of B before anything reads it, since attention reads
positions below `kv_lens` only. What plan 8 sampled for A is dropped at commit 8.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinfer.config.engine import EngineConfig
from jinfer.config.outputs import FinishReason
from jinfer.engine.drafting.trees import draft, make_speculation
from jinfer.engine.pages.holdings import Holdings
from jinfer.engine.pages.pool import PagePool
from jinfer.engine.pages.prefix import PrefixCache
from jinfer.engine.plan import Drafts, Plan, Progress, ScheduledSeq, SchedulerStats
from jinfer.engine.queue import WaitingQueue, arrival_key, may_join
from jinfer.engine.request import Request, RequestStatus

logger = logging.getLogger(__name__)


class Scheduler:
    """Continuous batching with chunked prefill over a page pool.

    Policy of a step, in this order, within `max_num_batched_tokens`: every running decode gets a
    token; running prefills go on; waiting requests are admitted, most urgent first (`priority`,
    then as `queue` says), none overtaking another. Admission takes the pages of all known tokens
    at once and leaves one page for each running sequence that may need more, so that it does not
    cause a preemption soon.
    When a decode finds no page, the least urgent running request is preempted: its pages and row
    go, its tokens stay, and it is computed again from the start once its tokens in flight are in.

    A sequence is never longer than the pool allows: `add` lowers `max_output_tokens` to what fits,
    so that a request alone always runs to an end (finish reason "length").

    With speculation, what the decodes leave of the budget goes to drafts first (trees of them are
    in no step that prefills). A sequence whose drafts are in flight waits for their commit, which
    takes back the positions of those that fell: later tokens overwrite their KV before anything
    reads it, and no page with them is ever cached.

    Args:
      config: limits.
      num_pages: pages in the pool.
      page_size: tokens in a page.
      now: clock of the requests' metrics.
      max_cached_tokens: the KV of a token at or beyond this position, or in a longer prompt,
        depends on more than the tokens before it (on the length: see `models.rope`) and is never
        shared; None where there is no such limit.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        page_size: int,
        now: Callable[[], float] = time.monotonic,
        max_cached_tokens: int | None = None,
    ) -> None:
        self.config = config
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.prefix = PrefixCache(self.pool, page_size, config.num_host_pages)
        self.stats = SchedulerStats()
        self.holdings = Holdings(
            self.prefix, config.enable_prefix_caching, max_cached_tokens, self.stats
        )
        self.speculation = make_speculation(config, now)
        self._now = now
        self._requests: dict[str, Request] = {}  # live ones
        self.running: list[Request] = []  # most urgent first
        self.waiting = WaitingQueue()
        self.free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self.lent: list[Request] = []  # hold pages, and run beside the plans (beam search)
        self._in_flight: collections.deque[Plan] = collections.deque()
        self._step_ids = itertools.count()

    @property
    def num_running(self) -> int:
        """Requests that hold pages and a row."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self.waiting)

    @property
    def num_in_flight(self) -> int:
        """Plans made and not committed."""
        return len(self._in_flight)

    @property
    def is_drafting(self) -> bool:
        """Whether the next plan should wait for the tokens of the last one, to draft after them."""
        return self.speculation is not None and not self.speculation.will_rest

    def has_work(self) -> bool:
        """Whether a request is live or a plan is to be committed."""
        return bool(self._requests or self._in_flight)

    def requests(self) -> Iterator[Request]:
        """Live requests in order of arrival."""
        return iter(self._requests.values())

    # ------------------------------------------------------------------ arrivals and ends

    def add(self, request: Request) -> None:
        """Puts a request into the waiting queue.

        Raises:
          ValueError: the id is in use, or the prompt does not fit into the page pool.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is in use by a live request")
        capacity = self.pool.num_pages * self.page_size
        if request.num_prompt_tokens > capacity:
            raise ValueError(
                f"request {request.request_id}: a prompt of {request.num_prompt_tokens} tokens "
                f"does not fit into the KV cache of {self.pool.num_pages} pages of "
                f"{self.page_size} tokens; give the cache more memory or shorten the prompt"
            )
        # The last token needs no place: nothing comes after it.
        room = capacity + 1 - request.num_prompt_tokens
        request.max_output_tokens = min(request.max_output_tokens, room)
        request.metrics.arrival_time = self._now()
        self._requests[request.request_id] = request
        self.waiting.add(request)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Request | None:
        """Ends a live request now and frees what it holds; returns it, or None if there is none.

        Its tokens in flight are dropped when they arrive.
        """
        request = self._requests.get(request_id)
        if request is not None:
            request.end(reason)
            self.retire(request)
        return request

    def fail(
        self, request: Request, message: str, start: int = 0, written: Sequence[int] = ()
    ) -> Progress:
        """Ends a live request with an error; nothing is kept of what it computed from `start` on.

        Requests that share some of that go back into the queue and are computed without it.
        `written` are the pages of the step that went wrong.
        """
        self._discard(request, start, written)
        request.error = message
        request.end("error")
        self.retire(request)
        return Progress(request, [], request.take_text(), True)

    def _discard(self, request: Request, start: int, written: Sequence[int]) -> None:
        for other in self.holdings.discard(request, start, written, self.running):
            self.send_back(other)

    def _compute_on_its_own(self, seq: ScheduledSeq) -> None:
        """Sends a request back that computed NaN from KV which it found: that may have been NaN.

        Whose it was ends with an error. This one does, too, if it computes NaN without such KV.
        """
        request = seq.request
        self._discard(request, seq.start, seq.pages)
        if request.status is RequestStatus.RUNNING:
            self.send_back(request)
        request.is_on_its_own = True
        request.void_before = self.stats.num_plans
        request.num_in_flight -= seq.num_samples

    def send_back(self, request: Request) -> None:
        """Puts a running request back into the queue and keeps nothing that it has computed."""
        self.holdings.spoil(request)
        self._preempt(request)

    def forget_plans(self) -> None:
        """Gives up all plans in flight: what they sample never comes."""
        self._in_flight.clear()

    def retire(self, request: Request) -> None:
        """Takes an ended request out of every list and frees what it holds."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.num_in_flight = 0
        request.metrics.finished_time = self._now()
        self.stats.num_finished += 1
        if request.error is not None:
            self.stats.num_errors += 1
            logger.warning("%s", request.error)
        del self._requests[request.request_id]

    # ------------------------------------------------------------------ planning

    def plan(self) -> Plan | None:
        """Makes the next step, or returns None if nothing can run before the next commit."""
        began, budget = self._now(), self.config.max_num_batched_tokens
        decodes = self._reserve_decodes()
        budget -= len(decodes)
        is_mixed = any(request.is_prefilling for request in self.running)
        drafts = draft(self.speculation, decodes, budget, self.holdings, is_mixed=is_mixed)
        budget -= sum(map(len, drafts))
        chunks: list[ScheduledSeq] = []
        for request in self.running:
            if request.is_prefilling and budget > 0:
                chunks.append(self._schedule_chunk(request, budget))
                budget -= chunks[-1].num_tokens
        # What was preempted just now does not come back here: it gave up the last page needed.
        for request in self._next_admissions(budget):
            is_whole = request.num_tokens <= budget
            if budget <= 0 or not (is_whole or self.config.enable_chunked_prefill):
                break
            if not may_join(request, self.running) or not self._admit(request):
                break
            chunks.append(self._schedule_chunk(request, budget))
            budget -= chunks[-1].num_tokens
        if not decodes and not chunks:
            return None
        if not chunks and not any(drafts):
            drafts = draft(self.speculation, decodes, budget, self.holdings, is_tree=True)
        is_resting = self.speculation is not None and self.speculation.is_resting
        num_steps = 1 if chunks or self.is_drafting else self._num_decode_steps(decodes)
        seqs = [
            self._schedule_decode(request, num_steps, d) for request, d in zip(decodes, drafts)
        ] + chunks
        is_decode = all(seq.num_tokens == 1 for seq in seqs)
        step_id, moves = next(self._step_ids), self.holdings.take_moves()
        plan = Plan(tuple(seqs), num_steps, is_decode, step_id, moves, is_resting, began)
        self._in_flight.append(plan)
        self.stats.num_plans += 1
        self.stats.num_scheduled_tokens += plan.num_tokens
        return plan

    def _reserve_decodes(self) -> list[Request]:
        """Returns the requests that decode now, each with a page for its next position.

        Victims come from the end of the running list, so none of those already returned is one.
        """
        decodes = []
        for request in tuple(self.running):
            if request.is_prefilling or request.num_unplanned_outputs <= 0:
                continue
            if request.num_unverified:  # how far it is, the next commit tells
                continue
            while request.status is RequestStatus.RUNNING:
                missing = self.holdings.num_missing_pages(request, 1)
                if missing <= self.prefix.num_available:
                    request.pages += self.prefix.alloc(missing)
                    decodes.append(request)
                    break
                self._preempt(self.running[-1])
        return decodes

    def _num_decode_steps(self, decodes: list[Request]) -> int:
        """Returns how many decode steps to run in one program, having taken their pages.

        Several only where nobody's wish for logprobs ties the host to each step.
        """
        if any(request.params.logprobs is not None for request in decodes):
            return 1
        return self.holdings.extend(decodes, self.config.num_decode_steps)

    def _schedule_decode(self, request: Request, num_steps: int, drafts: Drafts) -> ScheduledSeq:
        num_samples = min(num_steps + drafts.depth, request.num_unplanned_outputs)
        start = request.num_computed_tokens
        written = self.holdings.written_pages(request, start, max(num_samples, 1 + len(drafts)))
        seq = ScheduledSeq(
            *(request, start, 1 + len(drafts), num_samples),
            is_new_row=False,
            is_prefill=False,
            pages=written,
            is_on_found=request.num_found_tokens > 0,
            drafts=drafts,
        )
        request.num_computed_tokens += num_samples
        request.num_in_flight += num_samples
        request.num_unverified = len(drafts)
        return seq

    def _schedule_chunk(self, request: Request, budget: int) -> ScheduledSeq:
        start = request.num_computed_tokens
        n = min(request.num_prefill_tokens - start, budget)
        is_last = start + n == request.num_prefill_tokens
        is_new_row = not request.has_used_row
        written = self.holdings.written_pages(request, start, n)
        seq = ScheduledSeq(
            *(request, start, n, int(is_last), is_new_row),
            is_prefill=True,
            pages=written,
            is_on_found=request.num_found_tokens > 0,
        )
        request.has_used_row = True
        request.num_computed_tokens += n
        request.num_in_flight += seq.num_samples
        self.holdings.fill(request, written)
        return seq

    # ------------------------------------------------------------------ pages and rows

    def _next_admissions(self, budget: int) -> list[Request]:
        """Returns whom to admit, in this order, as far as pages and rows go."""
        if budget <= 0 or not self.waiting or not self.free_rows:
            return []
        return self.waiting.ranked(self.holdings.num_cached_pages, self.prefix.version)

    def _admit(self, request: Request) -> bool:
        """Moves a waiting request to the running ones, if a row and pages are free."""
        # A preempted request's outputs are its input now: those in flight must be known first.
        if request.num_in_flight or not self.free_rows:
            return False
        num_spare = sum(map(self.holdings.can_grow, self.running))
        if not self.holdings.take(request, num_spare=num_spare):
            return False
        self.waiting.admit(request)
        self.stats.num_admissions += 1
        request.row = self.free_rows.pop()
        request.has_used_row = False
        request.num_prefill_tokens = request.num_tokens
        request.status = RequestStatus.RUNNING
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = self._now()
        bisect.insort(self.running, request, key=arrival_key)
        return True

    def _release(self, request: Request) -> None:
        """Gives back the row and the pages of a running request, the full ones to the cache."""
        assert request.row is not None
        self.holdings.give_back(request)
        self.free_rows.append(request.row)
        request.row = None

    def _preempt(self, request: Request) -> None:
        """Puts a running request back into the queue, to be computed again."""
        self.running.remove(request)
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        request.metrics.num_preemptions += 1
        self.stats.num_preemptions += 1
        self.waiting.add(request)

    # ------------------------------------------------------------------ results

    def commit(
        self,
        plan: Plan,
        samples: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[Any] | None] | None = None,
        is_sound: Sequence[bool] | None = None,
    ) -> list[Progress]:
        """Takes in what the oldest plan in flight sampled, and ends the requests that stop.

        Args:
          plan: the oldest plan not committed.
          samples: for each of `plan.seqs` its `num_samples` tokens; with drafts one token at
            least: the drafts that stood, and the one after them.
          is_sound: for each of `plan.seqs` whether all that it computed is finite; if not, its
            samples are dropped and it ends with an error. None: all are.
          logprobs: likewise one object a token, kept in `Request.logprobs`; None for none.

        Returns:
          One entry for each request that got tokens or ended. Those that had ended before get none.

        Raises:
          ValueError: the plan is not the oldest one, or the samples do not fit it.
        """
        if not self._in_flight or self._in_flight[0] is not plan:
            expected = self._in_flight[0].step_id if self._in_flight else None
            raise ValueError(f"plans are committed in order: got {plan.step_id}, not {expected}")
        fits = [
            seq.num_samples - seq.drafts.depth <= len(tokens) <= seq.num_samples
            for seq, tokens in zip(plan.seqs, samples, strict=True)
        ]
        if not all(fits):
            raise ValueError(
                f"plan {plan.step_id} samples {[seq.num_samples for seq in plan.seqs]} tokens, got "
                f"{[len(tokens) for tokens in samples]}"
            )
        self._in_flight.popleft()
        progress = []
        for i, (seq, tokens) in enumerate(zip(plan.seqs, samples)):
            is_bad = is_sound is not None and not is_sound[i]
            if seq.request.is_finished:
                self.stats.num_discarded_tokens += len(tokens)
                if is_bad:
                    self._discard(seq.request, seq.start, seq.pages)
                continue
            if plan.step_id < seq.request.void_before:
                seq.request.num_in_flight -= seq.num_samples
                if is_bad:
                    self._discard(seq.request, seq.start, seq.pages)
                continue
            if is_bad and seq.is_on_found:
                self._compute_on_its_own(seq)
                continue
            if is_bad:
                message = f"request {seq.request.request_id}: the model computed NaN or infinity"
                progress.append(self.fail(seq.request, message, seq.start, seq.pages))
                continue
            seq.request.is_suspect = False
            if tokens:
                objects = logprobs[i] if logprobs is not None else None
                progress.append(self._accept(seq, tokens, objects))
        if self.speculation is not None:
            self.speculation.note(plan, samples, is_sound, progress)
        return progress

    def _accept(
        self, seq: ScheduledSeq, tokens: Sequence[int], logprobs: Sequence[Any] | None
    ) -> Progress:
        request = seq.request
        request.num_in_flight -= seq.num_samples
        request.num_unverified = 0
        if request.status is RequestStatus.RUNNING:
            request.num_computed_tokens -= seq.num_samples - len(tokens)
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = self._now()
        num_before = len(request.output_token_ids)
        for i, token in enumerate(tokens):
            if request.accept(token, None if logprobs is None else logprobs[i]):
                self.retire(request)
                break
        num_new = len(request.output_token_ids) - num_before
        self.stats.num_output_tokens += num_new
        self.stats.num_discarded_tokens += len(tokens) - num_new
        return Progress(request, list(tokens[:num_new]), request.take_text(), request.is_finished)
