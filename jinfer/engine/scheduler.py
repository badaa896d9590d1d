"""Decides what each step computes: continuous batching over a pool of KV pages.

`plan` returns the next step and counts its tokens as computed at once; `commit` brings the sampled
values later. Further plans may be made in between, since decoding needs positions and no values.
Plans are executed and committed in the order in which they were made.

    plan 7   plan 8   commit 7   plan 9   commit 8 ...      (the engine holds two plans in flight)

Pages and rows may change owners while older plans are in flight, because the device executes plans
in order. Say request A ends at commit 7 while plan 8 still decodes it, and plan 9 gives A's pages
and row to B. Plan 8 has read and written them before plan 9 starts. Plan 9 first initializes the
row again (`is_new_row`), and it writes each place of B's pages before it is read, since attention
reads only positions below `kv_lens`. What plan 8 sampled for A is dropped at commit 8.
"""

from __future__ import annotations

import bisect
import collections
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
from jinfer.engine.safety.trust import TrustEvent

logger = logging.getLogger(__name__)


class Scheduler:
    """Continuous batching with chunked prefill.

    A step fills `max_num_batched_tokens` in this order. Every running decode gets a token; running
    prefills continue; waiting requests are admitted in the order of `queue`, until one does not
    fit. Admission takes the pages of all known tokens at once and leaves one page for each running
    sequence that may need more, so that it does not cause a preemption soon.

    When a decode finds no free page, the least urgent running request is preempted: it gives up its
    pages and row, keeps its tokens, and is computed again once its tokens in flight are known.

    A sequence is never longer than the pool allows: `add` lowers `max_output_tokens` to what fits,
    so that a request that runs alone always ends (finish reason "length").

    With speculation, the budget that decodes leave goes to drafts first (a step with trees does not
    prefill). A sequence whose drafts are in flight waits for their commit, which takes back the
    positions of rejected drafts: later tokens overwrite their KV before it is read, and no page
    with them is cached.

    Args:
      config: limits.
      num_pages: pages in the pool.
      page_size: tokens in a page.
      now: clock of the requests' metrics.
      max_cached_tokens: KV at or beyond this position, or of a longer prompt, depends on the
        length as well (see `models.rope`) and is never shared; None: no such limit.

    Attributes:
      running: requests that hold pages and a row, most urgent first.
      reserved: requests of beam searches, which hold pages and run outside plans.
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
        self.running: list[Request] = []
        self.waiting = WaitingQueue()
        self.free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self.reserved: list[Request] = []
        self._in_flight: collections.deque[Plan] = collections.deque()

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
        """Plans that are not committed yet."""
        return len(self._in_flight)

    @property
    def is_drafting(self) -> bool:
        """Whether the next plan should wait for the tokens of the last one, to draft from them."""
        return self.speculation is not None and not self.speculation.is_next_paused

    def has_work(self) -> bool:
        """Whether a request is live or a plan is not committed yet."""
        return bool(self._requests or self._in_flight)

    def requests(self) -> Iterator[Request]:
        """Live requests in order of arrival."""
        return iter(self._requests.values())

    # ------------------------------------------------------------------ arrivals and ends

    def check_fits(self, request: Request) -> None:
        """Lowers `max_output_tokens` to what the page pool holds; needs no other request's state.

        Raises:
          ValueError: the prompt does not fit into the page pool.
        """
        capacity = self.pool.num_pages * self.page_size
        if request.num_prompt_tokens > capacity:
            raise ValueError(
                f"request {request.request_id}: a prompt of {request.num_prompt_tokens} tokens "
                f"does not fit into the KV cache of {self.pool.num_pages} pages of "
                f"{self.page_size} tokens; give the cache more memory or shorten the prompt"
            )
        # The last token needs no place in the cache: no step reads it.
        room = capacity + 1 - request.num_prompt_tokens
        request.max_output_tokens = min(request.max_output_tokens, room)

    def add(self, request: Request) -> None:
        """Puts a request into the waiting queue.

        Raises:
          ValueError: the id is in use, or the prompt does not fit into the page pool.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is in use by a live request")
        self.check_fits(request)
        if request.metrics.arrival_time is None:
            request.metrics.arrival_time = self._now()
        self._requests[request.request_id] = request
        self.waiting.add(request)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Request | None:
        """Ends a live request and frees its pages and row; returns it, None if no such one is live.

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
        """Ends a live request with an error and discards the KV that it computed from `start` on.

        Requests that share some of that KV are queued again and computed without it.

        Args:
          request: the request.
          message: its error.
          start: first position whose KV is not kept.
          written: pages of the step that went wrong.
        """
        self._discard(request, start, written)
        request.error = message
        request.end("error")
        self.retire(request)
        return Progress(request, [], request.take_text(), True)

    def _discard(self, request: Request, start: int, written: Sequence[int]) -> None:
        for other in self.holdings.discard(request, start, written, self.running):
            self.send_back(other)

    def _isolate(self, seq: ScheduledSeq) -> None:
        """Queues a request again that computed NaN from cached KV; it reads that cache no more.

        The cached KV may have held the NaN, so the request that wrote it ends with an error. This
        one does, too, if it computes NaN without cached KV.
        """
        request = seq.request
        self._discard(request, seq.start, seq.pages)
        if request.status is RequestStatus.RUNNING:
            self.send_back(request)
        request.trust = request.trust.after(TrustEvent.NAN_FROM_CACHE)
        request.first_valid_step = self.stats.num_plans
        request.num_in_flight -= seq.num_samples

    def send_back(self, request: Request) -> None:
        """Queues a running request again and keeps nothing that it has computed."""
        self.holdings.invalidate(request)
        self._preempt(request)

    def forget_plans(self) -> None:
        """Drops all plans in flight; they are never committed."""
        self._in_flight.clear()

    def retire(self, request: Request) -> None:
        """Removes an ended request from every list and frees its pages and row."""
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
        planned_at, budget = self._now(), self.config.max_num_batched_tokens
        decodes = self._reserve_decodes()
        budget -= len(decodes)
        is_mixed = any(request.is_prefilling for request in self.running)
        drafts = draft(self.speculation, decodes, budget, self.holdings, is_mixed=is_mixed)
        budget -= sum(map(len, drafts))
        chunks = self._schedule_chunks(budget)
        budget -= sum(chunk.num_tokens for chunk in chunks)
        if not decodes and not chunks:
            return None
        if not chunks and not any(drafts):
            drafts = draft(self.speculation, decodes, budget, self.holdings, is_tree=True)
        num_steps = 1 if chunks or self.is_drafting else self._num_decode_steps(decodes)
        seqs = [
            self._schedule_decode(request, num_steps, d) for request, d in zip(decodes, drafts)
        ] + chunks
        plan = Plan(
            seqs=tuple(seqs),
            num_steps=num_steps,
            is_decode=all(seq.num_tokens == 1 for seq in seqs),
            step_id=self.stats.num_plans,
            moves=self.holdings.take_moves(),
            is_speculation_paused=self.speculation is not None and self.speculation.is_paused,
            planned_at=planned_at,
        )
        self._in_flight.append(plan)
        self.stats.num_plans += 1
        self.stats.num_scheduled_tokens += plan.num_tokens
        return plan

    def _schedule_chunks(self, budget: int) -> list[ScheduledSeq]:
        """Continues the running prefills, then admits waiting requests, within `budget` tokens."""
        chunks: list[ScheduledSeq] = []
        for request in self.running:
            if request.is_prefilling and budget > 0:
                chunks.append(self._schedule_chunk(request, budget))
                budget -= chunks[-1].num_tokens
        # A request that this plan has preempted is not admitted again: its pages are in use now.
        for request in self._next_admissions(budget):
            is_whole = request.num_tokens <= budget
            if budget <= 0 or not (is_whole or self.config.enable_chunked_prefill):
                break
            if not may_join(request, self.running) or not self._admit(request):
                break
            chunks.append(self._schedule_chunk(request, budget))
            budget -= chunks[-1].num_tokens
        return chunks

    def _reserve_decodes(self) -> list[Request]:
        """Returns the requests that decode now, each with a page for its next position.

        Preempts from the end of the running list, so never a request that is already returned.
        """
        decodes = []
        for request in tuple(self.running):
            if request.is_prefilling or request.num_unplanned_outputs <= 0:
                continue
            # Its next position, or the mask of its next token, depends on the commit in flight.
            if request.num_unverified or (
                request.token_masks is not None and request.num_in_flight
            ):
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
        """Returns how many decode steps to run in one program, and takes the pages for them.

        One where a request wants logprobs, which the host fetches after each step. Requests with
        token masks take part in the first step only.
        """
        free = [request for request in decodes if request.token_masks is None]
        if not free or any(request.params.logprobs is not None for request in decodes):
            return 1
        return self.holdings.extend(free, self.config.num_decode_steps)

    def _schedule_decode(self, request: Request, num_steps: int, drafts: Drafts) -> ScheduledSeq:
        is_masked = request.token_masks is not None
        num_steps = 1 if is_masked else num_steps
        num_samples = min(num_steps + drafts.depth, request.num_unplanned_outputs)
        start = request.num_computed_tokens
        written = self.holdings.written_pages(request, start, max(num_samples, 1 + len(drafts)))
        seq = ScheduledSeq(
            request=request,
            start=start,
            num_tokens=1 + len(drafts),
            num_samples=num_samples,
            is_new_row=False,
            is_prefill=False,
            pages=written,
            uses_cached_kv=request.num_found_tokens > 0,
            drafts=drafts,
            is_masked=is_masked,
        )
        request.num_computed_tokens += num_samples
        request.num_in_flight += num_samples
        request.num_unverified = len(drafts)
        return seq

    def _schedule_chunk(self, request: Request, budget: int) -> ScheduledSeq:
        start = request.num_computed_tokens
        n = min(request.num_prefill_tokens - start, budget)
        is_last = start + n == request.num_prefill_tokens
        written = self.holdings.written_pages(request, start, n)
        seq = ScheduledSeq(
            request=request,
            start=start,
            num_tokens=n,
            num_samples=int(is_last),
            is_new_row=not request.has_used_row,
            is_prefill=True,
            pages=written,
            uses_cached_kv=request.num_found_tokens > 0,
            is_masked=is_last and request.token_masks is not None,
        )
        request.has_used_row = True
        request.num_computed_tokens += n
        request.num_in_flight += seq.num_samples
        self.holdings.fill(request, written)
        return seq

    # ------------------------------------------------------------------ pages and rows

    def _next_admissions(self, budget: int) -> list[Request]:
        """Returns the waiting requests in the order of admission; none if no row is free."""
        if budget <= 0 or not self.waiting or not self.free_rows:
            return []
        return self.waiting.ranked(self.holdings.num_cached_pages, self.prefix.version)

    def _admit(self, request: Request) -> bool:
        """Moves a waiting request to the running ones, if a row and pages are free."""
        # The outputs of a preempted request are its input now, so none may be in flight.
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
        """Gives back the row and the pages of a running request; the cache keeps filled pages."""
        assert request.row is not None
        self.holdings.give_back(request)
        self.free_rows.append(request.row)
        request.row = None

    def _preempt(self, request: Request) -> None:
        """Queues a running request again, to be computed from its tokens."""
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
        """Appends what the oldest plan in flight sampled, and ends the requests that stop.

        Args:
          plan: the oldest plan in flight.
          samples: for each of `plan.seqs` its `num_samples` tokens; with drafts at least one token:
            the accepted drafts and the one after them.
          logprobs: for each of `plan.seqs` one object per token, kept in `Request.logprobs`; None
            for none.
          is_sound: for each of `plan.seqs` whether all that it computed is finite. If not, its
            samples are dropped; it ends with an error, or is computed again if it used cached KV.
            None: all are.

        Returns:
          One entry for each request that got tokens or ended, none for those that had ended before.

        Raises:
          ValueError: the plan is not the oldest one, or the samples do not fit it.
        """
        self._check_commit(plan, samples)
        self._in_flight.popleft()
        progress = []
        for i, (seq, tokens) in enumerate(zip(plan.seqs, samples)):
            is_bad = is_sound is not None and not is_sound[i]
            is_dropped = seq.request.is_finished or plan.step_id < seq.request.first_valid_step
            if is_dropped:
                self._drop_samples(seq, tokens, is_bad=is_bad)
            elif is_bad and seq.uses_cached_kv:
                self._isolate(seq)
            elif is_bad:
                message = f"request {seq.request.request_id}: the model computed NaN or infinity"
                progress.append(self.fail(seq.request, message, seq.start, seq.pages))
            else:
                seq.request.trust = seq.request.trust.after(TrustEvent.STEP_COMMITTED)
                if tokens:
                    objects = logprobs[i] if logprobs is not None else None
                    progress.append(self._append(seq, tokens, objects))
        if self.speculation is not None:
            self.speculation.note(plan, samples, is_sound, progress)
        return progress

    def _check_commit(self, plan: Plan, samples: Sequence[Sequence[int]]) -> None:
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

    def _drop_samples(self, seq: ScheduledSeq, tokens: Sequence[int], *, is_bad: bool) -> None:
        """Drops what a step sampled for a request that has ended or must not use the step's KV."""
        if seq.request.is_finished:
            self.stats.num_discarded_tokens += len(tokens)
        else:
            seq.request.num_in_flight -= seq.num_samples
        if is_bad:
            self._discard(seq.request, seq.start, seq.pages)

    def _append(
        self, seq: ScheduledSeq, tokens: Sequence[int], logprobs: Sequence[Any] | None
    ) -> Progress:
        """Appends sampled tokens to a request, and ends it if it stops with one of them."""
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
