"""One request on its way through the engine: its tokens, pages, state and end.

Token positions: 0 .. P - 1 are the prompt's, P + i is that of output token i. The KV of a token is
written by the step that takes it as input, so the newest sampled token has none yet:

    prompt P = 3, outputs known [a b], one more in flight [?]
    position   0 1 2 3 4 5
    token      p p p a b ?       num_tokens = 6
    KV         * * * * * .       num_computed_tokens = 5, the next step starts at 5
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

from jinfer.config.outputs import FinishReason, RequestMetrics
from jinfer.config.sampling_params import NO_TOKEN, SamplingParams
from jinfer.engine.safety.trust import Trust
from jinfer.engine.token_masks import TokenMasks
from jinfer.text.detokenizer import Detokenizer


class RequestStatus(enum.Enum):
    """Where a request is. PREEMPTED ones wait like WAITING ones, with tokens to recompute.

    FINISHED covers every end, errors and aborts included: `Request.finish_reason` says which.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class Request:
    """One sequence to generate. Mutable; only the scheduler changes it.

    Attributes:
      request_id: unique among the live requests of a scheduler.
      prompt_token_ids: at least one token.
      params: sampling parameters of this one sequence (`n` is resolved by the caller).
      seed: key of the request's random draws; seed and position decide each draw.
      max_model_len: longest sequence, prompt included.
      eos_token_ids: tokens that end the sequence unless `params.ignore_eos`.
      arrival: number in the order of arrival.
      priority: smaller is served first; equal ones in order of arrival.
      cache_salt: KV is shared only with requests of the same salt; None counts as a salt.
      kv_format: format of the KV pool.
      bad_words_token_ids: the token sequences of `params.bad_words`, for the sampler.
      token_masks: restricts each token by those before it; None: none is restricted in this way.
      tokenizer: (argument only) makes the detokenizer, if `params.detokenize`.
      detokenizer: turns the output into text; None for token ids only.
      max_output_tokens: limit of generated tokens: the least of `params.max_tokens`, what
        `max_model_len` leaves, and (set by `Scheduler.add`) what the whole page pool can hold.
      output_token_ids: sampled tokens that the host knows.
      num_accepted: number of output tokens that `accept` has processed: all of them, unless it was
        interrupted.
      num_in_flight: sampled tokens that the host does not know yet; drafts under verification
        count as if all of them were accepted.
      num_unverified: drafts under verification; while there are any, no further step is planned.
      num_computed_tokens: tokens whose KV is written, or will be by steps in flight.
      num_cached_tokens: prompt tokens found in the prefix cache at the first admission.
      num_overtaken: requests of equal priority that came later and were admitted earlier.
      cache_epoch: epoch of the prefix cache at the last admission; -1: its pages are not kept.
      num_prefill_tokens: tokens to compute after the last admission before sampling: those that
        were known at admission.
      pages: page numbers in order of position; page i holds positions i * B .. i * B + B - 1.
      row: sampler-state row while running.
      has_used_row: whether a step was planned since the last admission; it initializes the row.
      logprobs: what `commit` was given for each output token; None unless asked for.
      prompt_logprobs: one entry per prompt token, None for the first; None unless asked for.
      num_found_tokens: tokens whose KV was found in the prefix cache at the last admission.
      trust: whether errors of its steps restrict how it runs.
      first_valid_step: samples of steps with smaller ids are dropped, since they may come from
        cached KV with NaN.
      num_failed_steps: failed steps that it is blamed for; see `recovery`.
      finish_reason, stop_reason, error: as in `CompletionOutput`.
      metrics: times on the scheduler's clock.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    arrival: int
    max_model_len: int
    priority: int = 0
    cache_salt: str | None = None
    kv_format: str | None = None
    eos_token_ids: Sequence[int] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    token_masks: TokenMasks | None = None
    tokenizer: dataclasses.InitVar[Any] = None
    detokenizer: Detokenizer | None = dataclasses.field(default=None, init=False)
    max_output_tokens: int = dataclasses.field(init=False)
    output_token_ids: list[int] = dataclasses.field(default_factory=list, init=False)
    num_in_flight: int = dataclasses.field(default=0, init=False)
    num_unverified: int = dataclasses.field(default=0, init=False)
    num_computed_tokens: int = dataclasses.field(default=0, init=False)
    num_prefill_tokens: int = dataclasses.field(default=0, init=False)
    num_cached_tokens: int = dataclasses.field(default=0, init=False)
    num_overtaken: int = dataclasses.field(default=0, init=False)
    num_found_tokens: int = dataclasses.field(default=0, init=False)
    trust: Trust = dataclasses.field(default=Trust.TRUSTED, init=False)
    first_valid_step: int = dataclasses.field(default=0, init=False)
    cache_epoch: int = dataclasses.field(default=0, init=False)
    pages: list[int] = dataclasses.field(default_factory=list, init=False)
    row: int | None = dataclasses.field(default=None, init=False)
    has_used_row: bool = dataclasses.field(default=False, init=False)
    status: RequestStatus = dataclasses.field(default=RequestStatus.WAITING, init=False)
    num_accepted: int = dataclasses.field(default=0, init=False)
    finish_reason: FinishReason | None = dataclasses.field(default=None, init=False)
    stop_reason: str | int | None = dataclasses.field(default=None, init=False)
    error: str | None = dataclasses.field(default=None, init=False)
    num_failed_steps: int = dataclasses.field(default=0, init=False)

    logprobs: list[Any] | None = dataclasses.field(default=None, init=False)
    prompt_logprobs: list[Any] | None = dataclasses.field(default=None, init=False)
    metrics: RequestMetrics = dataclasses.field(default_factory=RequestMetrics, init=False)

    def __post_init__(self, tokenizer: Any) -> None:
        prompt_len = len(self.prompt_token_ids)
        if prompt_len == 0:
            raise ValueError(f"request {self.request_id}: the prompt has no tokens")
        room = self.max_model_len - prompt_len
        if room < 1:
            raise ValueError(
                f"request {self.request_id}: a prompt of {prompt_len} tokens leaves no room for an "
                f"output token in max_model_len {self.max_model_len}; shorten the prompt"
            )
        wanted = self.params.max_tokens
        self.max_output_tokens = room if wanted is None else min(room, wanted)
        self._stop_token_ids = frozenset(self.params.stop_token_ids or ())
        self._tokenizer = tokenizer
        if self.params.detokenize and tokenizer is not None:
            self.detokenizer = Detokenizer(tokenizer, self.params)
        elif self.params.stop:
            raise ValueError(
                f"request {self.request_id}: stop strings are searched in the text, and the engine "
                "has no tokenizer to make text; use stop_token_ids"
            )
        if self.params.logprobs is not None:
            self.logprobs = []
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, {len(self.prompt_token_ids)} + "
            f"{len(self.output_token_ids)} + {self.num_in_flight} tokens)"
        )

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, including those in flight."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_in_flight

    @property
    def known_token_ids(self) -> list[int]:
        """Prompt and output tokens that the host knows."""
        return self.prompt_token_ids + self.output_token_ids

    @property
    def cache_namespace(self) -> tuple[str | None, ...]:
        """What two requests must have in common, besides tokens, to share KV.

        The format of K and V, and the caller's salt.
        """
        return (self.kv_format, self.cache_salt)

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached KV may be used instead of computing tokens.

        Not while prompt logprobs are missing: they come from computing the tokens.
        """
        is_complete = (
            self.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt_tokens
        )
        is_allowed = not (self.params.skip_reading_prefix_cache or self.trust.is_isolated)
        return is_complete and is_allowed

    @property
    def num_unplanned_outputs(self) -> int:
        """Output tokens that may still be planned."""
        return self.max_output_tokens - len(self.output_token_ids) - self.num_in_flight

    @property
    def is_prefilling(self) -> bool:
        """Whether known tokens are still to be computed before the device can sample."""
        return self.num_computed_tokens < self.num_prefill_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, for any reason."""
        return self.status is RequestStatus.FINISHED

    @property
    def text(self) -> str:
        """Text that can be shown so far; empty without a detokenizer."""
        return self.detokenizer.text if self.detokenizer is not None else ""

    def take_text(self) -> str:
        """Returns the text that became available since the last call."""
        return self.detokenizer.take() if self.detokenizer is not None else ""

    def accept(self, token_id: int, logprob: Any = None) -> bool:
        """Appends one sampled token and decides whether the sequence ends with it.

        NO_TOKEN is not appended: the sequence ends with an error that names the constraints which
        left no token.

        The tests run in vLLM's order: end of sequence, stop tokens, stop strings, length. The
        token that ends a sequence stays in `output_token_ids`; its text is left out unless
        `include_stop_str_in_output`. Before `min_tokens` only the length ends a sequence: the
        sampler bans end and stop tokens, and this method ignores stop strings.

        Returns:
          True when the sequence has ended; `finish_reason` and `stop_reason` are then set.
        """
        params = self.params
        if token_id == NO_TOKEN:
            self._end_without_token()
            return True
        self.output_token_ids.append(token_id)
        if self.logprobs is not None:
            self.logprobs.append(logprob)
        num_outputs = len(self.output_token_ids)
        can_stop = num_outputs >= params.min_tokens
        is_eos = can_stop and not params.ignore_eos and token_id in self.eos_token_ids
        is_stop = is_eos or (can_stop and token_id in self._stop_token_ids)
        matched = None
        if self.detokenizer is not None and (not is_stop or params.include_stop_str_in_output):
            matched = self.detokenizer.push(token_id)
        if is_stop:
            self.end("stop", None if is_eos else token_id)
        elif matched is not None:
            self.end("stop", matched)
        elif num_outputs >= self.max_output_tokens:
            self.end("length")
        self.num_accepted = num_outputs
        return self.finish_reason is not None

    def _end_without_token(self) -> None:
        params, num_outputs = self.params, len(self.output_token_ids)
        fields = {
            "allowed_token_ids": params.allowed_token_ids is not None,
            "bad_words": bool(params.bad_words),
            "min_tokens": num_outputs < params.min_tokens,
            "the token mask": self.token_masks is not None,
        }
        names = " and ".join(name for name, is_set in fields.items() if is_set)
        self.error = (
            f"request {self.request_id}: {names} left no token to sample after "
            f"{num_outputs} output tokens; allow more of them"
        )
        self.end("error")

    def start_over(self) -> None:
        """Resets the request so that it can be queued and computed again from its tokens.

        It works from any state that an exception may leave. A token whose `accept` was interrupted
        is removed, to be sampled again.
        """
        self.pages, self.row = [], None
        self.num_computed_tokens = self.num_prefill_tokens = 0
        self.num_in_flight = self.num_unverified = 0
        if self.status is RequestStatus.RUNNING:
            self.status = RequestStatus.PREEMPTED
            self.metrics.num_preemptions += 1
        if len(self.output_token_ids) > self.num_accepted:
            del self.output_token_ids[self.num_accepted :]
            if self.logprobs is not None:
                del self.logprobs[self.num_accepted :]
            if self.detokenizer is not None:
                self.detokenizer = Detokenizer(self._tokenizer, self.params)
                for token_id in self.output_token_ids:
                    self.detokenizer.push(token_id)
                self.detokenizer.take()
            self.finish_reason = self.stop_reason = None

    def end(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """Ends the sequence and releases the text that was held back."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self.detokenizer is not None:
            self.detokenizer.finish()

    def set_prompt_logprob(self, position: int, entry: Any) -> None:
        """Records the logprobs of the prompt token at `position`; positions come in order.

        Entries from before a preemption are kept.
        """
        if self.prompt_logprobs is not None and position == len(self.prompt_logprobs):
            self.prompt_logprobs.append(entry)
