"""The engine: scheduler, runner and the steps in flight between them; knows nothing of text in.

Up to two steps are under way: step n + 1 is dispatched before the tokens of step n are read, unless
drafts are to be made of these.
"""

from __future__ import annotations

import collections
import enum
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jinfer.config.engine import EngineConfig
from jinfer.config.model import ModelConfig
from jinfer.config.sampling_params import SamplingParams, child_seed
from jinfer.config.typing import Params
from jinfer.engine.device.results import Launched
from jinfer.engine.device.runner import Runner
from jinfer.engine.drafting.trees import TreeSpeculation
from jinfer.engine.plan import Plan, Progress
from jinfer.engine.request import Request
from jinfer.engine.safety import integrity, recovery
from jinfer.engine.safety.watchdog import Watchdog
from jinfer.engine.scheduler import Scheduler
from jinfer.engine.token_masks import TokenMaskError, TokenMasks
from jinfer.models.rope import needs_context_lens
from jinfer.sampling.check import check_request
from jinfer.steps.tracing import refuse_tracing
from jinfer.text.bad_words import encode_bad_word

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_STEPS_IN_FLIGHT = 2
MAX_IDLE_STEPS = 100  # in a row, with requests that wait


class Bookkeeping(enum.Enum):
    """What may be relied on of the scheduler's lists, pages and rows.

    CONSISTENT -> CHANGING when a change begins -> CONSISTENT when it ends. A change that is found
    in CHANGING has followed one that was interrupted: all is made anew from the live requests.
    """

    CONSISTENT = "consistent"
    CHANGING = "changing"


class Engine:
    """Serves requests of token ids, continuously batched.

    Args:
      runner: owns the device.
      config: limits and policies.
      tokenizer: for stop strings and bad words; None serves token ids only.
      eos_token_ids: tokens that end a request unless it ignores them.

    Attributes:
      in_flight: steps that were dispatched and not read, oldest first.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        tokenizer: Any | None,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.runner = runner
        self.config = config
        self.tokenizer = tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self.scheduler = Scheduler(
            config,
            runner.cache.num_pages,
            runner.cache.page_size,
            max_cached_tokens=_max_cached_tokens(runner.model.config),
        )
        self.tier = self.scheduler.prefix.tier
        if self.tier is not None:
            self.tier.costs = runner.measure_host()
        self.watchdog = Watchdog(self.scheduler)
        self.num_failed_steps = 0
        self._num_idle_steps = 0
        self._bookkeeping = Bookkeeping.CONSISTENT
        self.in_flight: collections.deque[Launched] = collections.deque()
        self._arrivals = itertools.count()
        self._seeds = random.Random(config.seed)

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        sample_idx: int = 0,
        priority: int = 0,
        cache_salt: str | None = None,
        token_masks: TokenMasks | None = None,
    ) -> Request:
        """Checks and returns a request for `queue`; may be called from any thread at any time.

        Args:
          request_id: unique among live requests.
          prompt_token_ids: at least one id, all inside the vocabulary.
          params: how to sample. The text is made here only where a stop string needs it.
          sample_idx: which of `params.n` samples this is; it enters the seed.
          priority: lower is served first.
          cache_salt: cached prefixes are shared only among requests with the same one.
          token_masks: restricts each token by those before it.

        Raises:
          ValueError: the prompt is empty, too long or has foreign ids, or a field cannot be met.
        """
        bad_words = self._bad_words(params)
        self.check(prompt_token_ids, params, bad_words)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            params=params,
            seed=child_seed(seed, sample_idx),
            arrival=next(self._arrivals),
            priority=priority,
            cache_salt=cache_salt,
            kv_format=self.runner.cache.dtype,
            eos_token_ids=self.eos_token_ids,
            tokenizer=self.tokenizer if params.stop else None,
            bad_words_token_ids=bad_words,
            token_masks=token_masks,
            max_model_len=self.config.max_model_len,
        )
        request.metrics.arrival_time = time.monotonic()
        self.scheduler.check_fits(request)
        return request

    def queue(self, request: Request) -> None:
        """Puts a request into the waiting queue.

        Raises:
          ValueError: its id is in use by a live request.
        """
        self.scheduler.add(request)

    def check(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        bad_words_token_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        """Raises ValueError if the request cannot be served."""
        refuse_tracing()
        self.runner.check_weights()
        vocab_size = self.runner.vocab_size
        if not len(prompt_token_ids):
            raise ValueError("the prompt is empty: it must have at least one token")
        bad = next(
            (t for t in prompt_token_ids if isinstance(t, bool) or not 0 <= t < vocab_size), None
        )
        if bad is not None:
            raise ValueError(
                f"token id {bad} is outside the vocabulary: expected 0..{vocab_size - 1}"
            )
        if len(prompt_token_ids) >= self.config.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt_token_ids)} tokens and leaves no room for output in "
                f"a context of max_model_len={self.config.max_model_len}: shorten it or raise "
                "max_model_len"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self.config.max_logprobs:
                raise ValueError(
                    f"{name}={value} is more than max_logprobs={self.config.max_logprobs}: "
                    "raise max_logprobs when the engine is made, or ask for -1 (all)"
                )
        check_request(
            params,
            vocab_size,
            eos_token_ids=self.eos_token_ids,
            bad_words_token_ids=bad_words_token_ids,
        )

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Tokenizes bad words, each in all the ways in which it may begin in a text."""
        if not params.bad_words:
            return []
        if self.tokenizer is None:
            raise ValueError("bad_words are found in the text, and the engine has no tokenizer")
        return [ids for word in params.bad_words for ids in encode_bad_word(self.tokenizer, word)]

    def abort(self, request_id: str) -> Request | None:
        """Ends a request and frees what it holds; returns it, or None if it is not live."""
        return self._change(lambda: self.scheduler.abort(request_id))

    def reset_prefix_cache(self) -> None:
        """Forgets the KV of all past texts; running requests keep their own."""
        refuse_tracing()
        self._change(self.scheduler.prefix.reset)

    def update_weights(self, params: Params) -> None:
        """Serves `params` from the next step on; see `Runner.update_weights`."""
        self.reset_prefix_cache()  # first: whatever may come between, no old KV meets new weights
        self.runner.update_weights(params)

    def metrics(self) -> dict[str, float]:
        """Returns counts since the engine was made, and what is held now.

        The hit rate is the share of prompt tokens found in the prefix cache, among the prompts of
        requests that may read it; preempted requests that find their own pages do not raise it.
        """
        scheduler = self.scheduler
        stats = scheduler.stats
        speculation = scheduler.speculation
        return {
            **vars(stats),
            **({} if speculation is None else speculation.metrics()),
            "prefix_cache_hit_rate": stats.num_cached_tokens / max(1, stats.num_looked_up_tokens),
            "num_failed_steps": self.num_failed_steps,
            "num_stuck": len(self.watchdog.stuck),
            "num_cached_pages": scheduler.prefix.num_cached,
            "num_evicted_pages": scheduler.prefix.num_evicted,
            "num_running": scheduler.num_running,
            "num_waiting": scheduler.num_waiting,
            "num_free_pages": scheduler.pool.num_free,
            "num_pages": scheduler.pool.num_pages,
            "kv_cache_bytes": self.runner.kv_bytes,
            **(
                {}
                if self.tier is None
                else self.tier.metrics(self.runner.kv_bytes // scheduler.pool.num_pages)
            ),
        }

    def has_work(self) -> bool:
        """Whether any request is unfinished or any step is under way."""
        return self.scheduler.has_work() or bool(self.in_flight)

    def check_integrity(self) -> None:
        """Raises PageError if pages, rows and requests do not agree with each other."""
        integrity.check(self.scheduler)
        if self.tier is not None:
            self.runner.host.check(self.tier.filled_slots())

    def step(self) -> list[Progress]:
        """Dispatches what can be dispatched, then waits for the oldest step under way.

        A step that fails is survived: see `recovery`. So is an interrupt (or a defect of the host's
        own work): it is raised, and all requests that are left are computed again.

        Returns:
          What each of that step's requests gained, and which requests ended with an error.

        Raises:
          ValueError: a weight was donated or deleted, or JAX is tracing.
        """
        refuse_tracing()
        self.watchdog.observe()
        return self._change(self._step)

    def _change(self, change: Callable[[], T]) -> T:
        """Makes a change of the bookkeeping; if it is interrupted, all is made anew.

        If that is interrupted, too, the next change does it first. (No context manager: one that is
        interrupted while it is left would be left by the garbage collector, at any time.)
        """
        if self._bookkeeping is Bookkeeping.CHANGING:
            self.lose_steps()
        self._bookkeeping = Bookkeeping.CHANGING
        try:
            result = change()
        except BaseException as error:
            logger.info("%r came in between: what was under way is computed again", error)
            self.lose_steps()
            raise
        self._bookkeeping = Bookkeeping.CONSISTENT
        return result

    def _step(self) -> list[Progress]:
        most = 1 if self.scheduler.is_drafting else MAX_STEPS_IN_FLIGHT
        while len(self.in_flight) < most:
            plan = self.scheduler.plan()
            if plan is None:
                break
            try:
                launched = self.runner.launch(plan)
            except Exception as error:
                return self._finish_in_flight(plan, error)
            self.in_flight.append(launched)
            if self.tier is not None:
                self.tier.costs.begin(plan)
        if not self.in_flight:
            return self._end_deadlock() if self.scheduler.has_work() else []
        self._num_idle_steps = 0
        return self._finish_oldest()

    def _finish_in_flight(self, plan: Plan, error: Exception) -> list[Progress]:
        """Brings in the steps that were dispatched before `plan`, which could not be."""
        progress, num_failed = [], self.num_failed_steps
        while self.in_flight:
            progress += self._finish_oldest()
        if self.num_failed_steps > num_failed:
            return progress  # an earlier step was the one that failed
        return progress + self._recover(plan, error)

    def _finish_oldest(self) -> list[Progress]:
        launched = self.in_flight.popleft()
        try:
            result = self.runner.fetch(launched)
        except Exception as error:
            return self._recover(launched.plan, error)
        if self.tier is not None:
            self.tier.costs.end(launched.plan)
        for seq, entries in zip(launched.plan.seqs, result.prompt_logprobs, strict=True):
            for position, entry in entries:
                seq.request.set_prompt_logprob(position, entry)
        speculation = self.scheduler.speculation
        if result.guesses is not None and isinstance(speculation, TreeSpeculation):
            speculation.take_guesses(launched.plan, result.samples, result.guesses)
        return self.scheduler.commit(
            launched.plan, result.samples, result.logprobs, result.is_sound
        )

    def _recover(self, plan: Plan, error: Exception) -> list[Progress]:
        """Makes pool and bookkeeping anew after a step that failed; donated weights are raised."""
        self.runner.check_weights()
        if isinstance(error, TokenMaskError):
            return self.lose_steps() + self._fail(error)
        reason = _in_one_line(error)
        logger.warning("step %d failed and is repeated: %s", plan.step_id, reason, exc_info=error)
        return self.lose_steps(plan, reason)

    def _fail(self, error: TokenMaskError) -> list[Progress]:
        """Ends the request whose provider of token masks failed; nothing runs at this time."""
        logger.warning("%s", error, exc_info=error.__cause__)
        found = [r for r in self.scheduler.requests() if r.request_id == error.request_id]
        message = f"{error}: {_in_one_line(error.__cause__)}"
        return [self.scheduler.fail(request, message) for request in found]

    def lose_steps(self, failed: Plan | None = None, reason: str = "") -> list[Progress]:
        """Makes the pool and the sampler state anew, and queues again all that were being computed.

        Args:
          failed: the step whose requests are suspects; None: no request is.
          reason: what happened.

        Returns:
          One entry for each request that ended with an error.
        """
        self._bookkeeping = Bookkeeping.CHANGING
        self.in_flight.clear()
        self.num_failed_steps += 1
        ended = recovery.lose_steps(self.scheduler, failed, reason)
        self.runner.reset()
        self._bookkeeping = Bookkeeping.CONSISTENT
        return ended

    def _end_deadlock(self) -> list[Progress]:
        """Ends the first request with an error when no step can be planned for a long time.

        This would be a defect of the scheduler; an error is better than a silent hang.
        """
        self._num_idle_steps += 1
        if self._num_idle_steps < MAX_IDLE_STEPS:
            return []
        self._num_idle_steps = 0
        request = next(iter(self.scheduler.requests()))
        return [self.scheduler.fail(request, f"{request} cannot go on: no step can be planned")]


def _in_one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _max_cached_tokens(config: ModelConfig) -> int | None:
    """Returns up to which length the KV of a token depends on the tokens before it alone.

    Ropes that choose frequencies by max(prompt length, position + 1) keep one choice up to the
    context they were trained on; None for all other ropes, which have no such limit.
    """
    ropes = [rope for rope in (config.rope, config.rope_local) if rope is not None]
    limits = [rope.original_max_position for rope in ropes if needs_context_lens(rope)]
    return min((limit or 0 for limit in limits), default=None)
