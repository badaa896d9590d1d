"""From engine requests to what the user sees: n samples of a prompt as one RequestOutput."""

from __future__ import annotations

import dataclasses
from typing import Any

from jinfer.engine.request import Request
from jinfer.engine.results import TokenLogprobs
from jinfer.outputs import CompletionOutput, Logprob, RequestOutput
from jinfer.sampling_params import RequestOutputKind, SamplingParams


class LogprobFormatter:
    """Turns device logprobs into dicts from token id to `Logprob`.

    Args:
      tokenizer: for `Logprob.decoded_token`; None leaves it out.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, entry: TokenLogprobs, params: SamplingParams) -> dict[int, Logprob]:
        """Returns the token itself first, then the most likely ones, best first."""
        is_text = params.detokenize and self._tokenizer is not None
        row = {
            entry.token_id: Logprob(
                entry.logprob, entry.rank, self._text(entry.token_id) if is_text else None
            )
        }
        for rank, (token, logprob) in enumerate(
            zip(entry.ids.tolist(), entry.logprobs.tolist(), strict=True), start=1
        ):
            if token not in row:
                row[token] = Logprob(logprob, rank, self._text(token) if is_text else None)
        return row

    def _text(self, token: int) -> str:
        if token not in self._texts:
            assert self._tokenizer is not None
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


@dataclasses.dataclass(eq=False)
class RequestGroup:
    """The `n` samples of one prompt, and how much of them has been handed out.

    Attributes:
      request_id: the user's.
      prompt: as text, or None.
      params: the user's.
      requests: one for each sample.
      sent: for each sample, tokens and characters handed out (output kind DELTA).
      rows: for each sample, its tokens' logprobs as far as they have been formatted.
      cumulative: for each sample, the sum of its tokens' logprobs in `rows`.
      prompt_rows: the prompt's logprobs as far as they have been formatted.
    """

    request_id: str
    prompt: str | None
    params: SamplingParams
    requests: list[Request]
    sent: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    rows: list[list[dict[int, Logprob]]] = dataclasses.field(default_factory=list)
    cumulative: list[float] = dataclasses.field(default_factory=list)
    prompt_rows: list[dict[int, Logprob] | None] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent = [(0, 0)] * len(self.requests)
        self.rows = [[] for _ in self.requests]
        self.cumulative = [0.0] * len(self.requests)

    @property
    def is_finished(self) -> bool:
        """Whether every sample has ended."""
        return all(request.is_finished for request in self.requests)

    def output(self, format_logprobs: LogprobFormatter) -> RequestOutput | None:
        """Returns what is to be handed out now, under `params.output_kind`; None for nothing."""
        kind = self.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not self.is_finished:
            return None
        is_delta = kind is RequestOutputKind.DELTA
        outputs = [self._completion(i, is_delta, format_logprobs) for i in range(len(self.sent))]
        if is_delta:
            outputs = [o for o in outputs if o.token_ids or o.text or o.finish_reason]
            if not outputs:
                return None
        first = self.requests[0]
        prompt_logprobs = None
        if first.prompt_logprobs is not None:
            self.prompt_rows += [
                None if entry is None else format_logprobs(entry, self.params)
                for entry in first.prompt_logprobs[len(self.prompt_rows) :]
            ]
            prompt_logprobs = list(self.prompt_rows)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=outputs,
            finished=self.is_finished,
            prompt_logprobs=prompt_logprobs,
            metrics=first.metrics,
            num_cached_tokens=first.num_cached_tokens,
        )

    def _completion(
        self, idx: int, is_delta: bool, format_logprobs: LogprobFormatter
    ) -> CompletionOutput:
        request = self.requests[idx]
        text, token_ids = request.text, request.output_token_ids
        begin, begin_text = self.sent[idx] if is_delta else (0, 0)
        self.sent[idx] = (len(token_ids), len(text))
        logprobs = cumulative = None
        if request.logprobs is not None:
            rows = self.rows[idx]
            for entry in request.logprobs[len(rows) :]:
                rows.append(format_logprobs(entry, self.params))
                self.cumulative[idx] += entry.logprob
            logprobs, cumulative = rows[begin:], self.cumulative[idx]
        return CompletionOutput(
            index=idx,
            text=text[begin_text:],
            token_ids=token_ids[begin:],
            cumulative_logprob=cumulative,
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            error=request.error,
        )
