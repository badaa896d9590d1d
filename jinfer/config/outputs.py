"""Results of generation, with vLLM's names.

Fields of vLLM for features that do not exist here (encoder prompts, KV transfer) are absent rather
than always None.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token at one position.

    Attributes:
      logprob: natural logarithm of the model's probability, before temperature and filters.
      rank: 1 for the most likely token of the vocabulary.
      decoded_token: the token alone as text, None when `detokenize` is False.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(kw_only=True)
class RequestMetrics:
    """Times of one request in seconds of one monotonic clock; None until the event happens.

    Attributes:
      arrival_time: the request entered the waiting queue.
      first_scheduled_time: its first chunk was planned.
      first_token_time: its first token reached the host.
      finished_time: it finished, for any reason.
      num_preemptions: how often its pages were taken and its tokens recomputed.
      num_decode_steps, num_decode_tokens: (with speculation) steps after the prompt, and the
        tokens that they yielded.
      num_drafted_tokens, num_accepted_tokens: (with speculation) drafts, and accepted drafts.
      num_drafted_at, num_accepted_at: the same by position: the first drafts of all steps, the
        second ones, and so on.
    """

    arrival_time: float | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_decode_steps: int = 0
    num_decode_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_drafted_at: list[int] = dataclasses.field(default_factory=list)
    num_accepted_at: list[int] = dataclasses.field(default_factory=list)

    def note_drafts(self, num_drafted: int, num_accepted: int) -> None:
        """Counts the drafts of one step, of which the first `num_accepted` were accepted."""
        self.num_drafted_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        for counts in (self.num_drafted_at, self.num_accepted_at):
            counts += [0] * (num_drafted - len(counts))
        for i in range(num_drafted):
            self.num_drafted_at[i] += 1
            self.num_accepted_at[i] += i < num_accepted

    @property
    def acceptance_at(self) -> tuple[float, ...]:
        """Shares of the first, second, ... drafts that were accepted; empty without drafts.

        Drafts after a rejected one count as rejected.
        """
        pairs = zip(self.num_accepted_at, self.num_drafted_at, strict=True)
        return tuple(accepted / max(1, drafted) for accepted, drafted in pairs)

    @property
    def tokens_per_step(self) -> float | None:
        """Average number of tokens per step, or None without speculation."""
        return self.num_decode_tokens / self.num_decode_steps if self.num_decode_steps else None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token, or None before it."""
        return _difference(self.arrival_time, self.first_token_time)

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the end, or None before it."""
        return _difference(self.arrival_time, self.finished_time)


def _difference(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin


@dataclasses.dataclass(kw_only=True)
class CompletionOutput:
    """One of the `n` completions of a prompt.

    Attributes:
      index: 0 .. n - 1.
      text: the text so far, or what is new when `output_kind` is DELTA.
      token_ids: sampled tokens likewise; an end-of-sequence token is kept here, not in `text`.
      cumulative_logprob: sum of the sampled tokens' logprobs; None unless they were asked for.
      logprobs: for each token a dict from token id to `Logprob`; None unless asked for.
      finish_reason: "stop", "length", "abort" or "error"; None while generation goes on.
      stop_reason: the stop string or stop token id that ended it; None for end of sequence.
      error: description of the error, with finish reason "error".
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    def finished(self) -> bool:
        """Whether generation of this completion has ended."""
        return self.finish_reason is not None


@dataclasses.dataclass(kw_only=True)
class RequestOutput:
    """Result of one prompt.

    Attributes:
      request_id: unique in the engine.
      prompt: the prompt as text, of a chat in its template; None when it was given as token ids.
      prompt_token_ids: the prompt as the model saw it.
      prompt_logprobs: for each prompt token a dict from token id to `Logprob`, None for the first
        token, which nothing predicts; None unless asked for.
      outputs: the `n` completions by index.
      finished: whether all of them have ended.
      metrics: times of the first completion; None when not recorded.
      num_cached_tokens: prompt tokens whose KV the first completion found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0


@dataclasses.dataclass(kw_only=True)
class BeamSearchSequence:
    """One text that beam search found.

    Attributes:
      tokens: the prompt and what was found; an end token is kept here.
      logprobs: for each token found a dict from its id to its `Logprob` (without rank).
      cum_logprob: the sum of their log probabilities.
      score: that over (tokens found) ** length_penalty, by which texts are ranked.
      num_prompt_tokens: where in `tokens` the prompt ends.
      text: of `tokens`, the prompt included, as in vLLM; None without a tokenizer.
      output_text: of the tokens found alone; None without a tokenizer.
      finish_reason: "stop" at an end token, "length" at `max_tokens`.
      stop_reason: the id of `stop_token_ids` that ended it; None for the model's end tokens.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float
    score: float
    num_prompt_tokens: int
    text: str | None = None
    output_text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens found, without the prompt's."""
        return self.tokens[self.num_prompt_tokens :]


@dataclasses.dataclass(kw_only=True)
class BeamSearchOutput:
    """Result of beam search for one prompt.

    Attributes:
      sequences: best first; fewer than requested only where masks leave no more.
      error: the reason if masks leave no text at all; None otherwise.
    """

    sequences: list[BeamSearchSequence]
    error: str | None = None
