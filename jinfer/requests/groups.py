"""Makes a `RequestOutput` from the engine's requests: the n samples of one prompt.

All of this runs in the reader's thread, beside the engine's thread. It reads only the tokens and
logprobs that the news count, which do not change any more. So an output whose making was
interrupted (Ctrl-C) can be made again, from the first token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from jinfer.config.outputs import CompletionOutput, Logprob, RequestOutput
from jinfer.config.sampling_params import RequestOutputKind, SamplingParams
from jinfer.engine.device.results import TokenLogprobs
from jinfer.engine.loop import News
from jinfer.engine.request import Request
from jinfer.text.detokenizer import Detokenizer


class LogprobFormatter:
    """Turns device logprobs into dicts from token id to `Logprob`.

    Args:
      tokenizer: for `Logprob.decoded_token`; None leaves it out.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, entry: TokenLogprobs, params: SamplingParams) -> dict[int, Logprob]:
        """Returns the sampled token's entry first, then the most likely tokens, best first."""
        is_text = params.detokenize and self._tokenizer is not None
        entries = {
            entry.token_id: Logprob(
                entry.logprob, entry.rank, self._text(entry.token_id) if is_text else None
            )
        }
        for rank, (token, logprob) in enumerate(
            zip(entry.ids.tolist(), entry.logprobs.tolist(), strict=True), start=1
        ):
            if token not in entries:
                entries[token] = Logprob(logprob, rank, self._text(token) if is_text else None)
        return entries

    def _text(self, token: int) -> str:
        if token not in self._texts:
            assert self._tokenizer is not None
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


@dataclasses.dataclass(eq=False)
class SampleReader:
    """One sample: the tokens and text read so far, and how much of them was handed out.

    Attributes:
      request: the engine's.
      tokenizer: decodes the text; None if the engine does (stop strings) or no text is wanted.
      news: the latest.
      num_tokens: tokens read.
      num_pieces: pieces read of the engine's text.
      text: all text so far.
      logprobs: of the tokens whose logprobs have been formatted.
      cumulative: the sum of the logprobs of those tokens.
      is_finished: whether the sample has ended.
      sent: tokens and characters handed out (output kind DELTA).
    """

    request: Request
    tokenizer: Any | None
    detokenizer: Detokenizer | None = dataclasses.field(init=False)
    news: News | None = None
    num_tokens: int = 0
    num_pieces: int = 0
    text: str = ""
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    cumulative: float = 0.0
    is_finished: bool = False
    sent: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Reads the latest news again from the first token; `sent` stays."""
        params = self.request.params
        self.detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer, params)
        self.num_tokens = self.num_pieces = 0
        self.text, self.logprobs, self.cumulative = "", [], 0.0
        if self.news is not None:
            self.read(self.news)

    def read(self, news: News) -> None:
        """Notes how far the request is and decodes the text up to there."""
        self.news = news
        request, begin = self.request, self.num_tokens
        self.num_tokens = max(begin, news.num_tokens)
        self.is_finished |= news.is_finished
        if news.detokenizer is not None:
            self.text += news.detokenizer.text_between(self.num_pieces, news.num_pieces)
            self.num_pieces = max(self.num_pieces, news.num_pieces)
        elif self.detokenizer is not None:
            end = self.num_tokens
            # The token that ends a text (end of text, or a stop token) is not part of it.
            is_stopped = news.is_finished and request.finish_reason == "stop"
            end -= is_stopped and not request.params.include_stop_str_in_output
            for token_id in request.output_token_ids[begin:end]:
                self.detokenizer.push(token_id)
            if news.is_finished:
                self.detokenizer.finish()
            self.text += self.detokenizer.take()

    def completion(
        self, idx: int, params: SamplingParams, format_logprobs: LogprobFormatter
    ) -> CompletionOutput:
        """Returns the sample's next output: all so far, or only what is new (DELTA)."""
        request, end = self.request, self.num_tokens
        is_delta = params.output_kind is RequestOutputKind.DELTA
        begin, begin_text = self.sent if is_delta else (0, 0)
        logprobs = cumulative = None
        if request.logprobs is not None:
            for entry in request.logprobs[len(self.logprobs) : end]:
                self.logprobs.append(format_logprobs(entry, params))
                self.cumulative += entry.logprob
            logprobs, cumulative = self.logprobs[begin:], self.cumulative
        return CompletionOutput(
            index=idx,
            text=self.text[begin_text:],
            token_ids=request.output_token_ids[begin:end],
            cumulative_logprob=cumulative,
            logprobs=logprobs,
            finish_reason=request.finish_reason if self.is_finished else None,
            stop_reason=request.stop_reason if self.is_finished else None,
            error=request.error if self.is_finished else None,
        )


class RequestGroup:
    """The `n` samples of one prompt, and how much of them has been read and handed out.

    Args:
      request_id: the user's.
      prompt: as text, or None.
      params: the user's.
      requests: one for each sample.
      tokenizer: makes the text of those whose text the engine does not make; None for token ids.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        requests: list[Request],
        tokenizer: Any | None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.requests = requests
        reads_text = params.detokenize and not params.stop
        self._samples = [
            SampleReader(request, tokenizer if reads_text else None) for request in requests
        ]
        self._prompt_rows: list[dict[int, Logprob] | None] = []
        self._is_reading = False  # True when `output` begins: its last call was interrupted

    @property
    def is_finished(self) -> bool:
        """Whether the end of every sample has been read."""
        return all(sample.is_finished for sample in self._samples)

    def output(
        self, news: Iterable[News], format_logprobs: LogprobFormatter
    ) -> RequestOutput | None:
        """Returns the next output of the kind `params.output_kind`; None if there is nothing new.

        After an interruption it may be called again with the same news.
        """
        if self._is_reading:
            self._prompt_rows = []
            for sample in self._samples:
                sample.restart()
        self._is_reading = True
        for entry in news:
            self._samples[entry.idx].read(entry)
        output = self._make_output(format_logprobs)
        for sample in self._samples:
            sample.sent = sample.num_tokens, len(sample.text)
        self._is_reading = False
        return output

    def _make_output(self, format_logprobs: LogprobFormatter) -> RequestOutput | None:
        kind = self.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not self.is_finished:
            return None
        outputs = [
            sample.completion(idx, self.params, format_logprobs)
            for idx, sample in enumerate(self._samples)
        ]
        if kind is RequestOutputKind.DELTA:
            outputs = [o for o in outputs if o.token_ids or o.text or o.finish_reason]
            if not outputs:
                return None
        first = self.requests[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=outputs,
            finished=self.is_finished,
            prompt_logprobs=self._prompt_logprobs(first, format_logprobs),
            metrics=first.metrics,
            num_cached_tokens=first.num_cached_tokens,
        )

    def _prompt_logprobs(
        self, first: Request, format_logprobs: LogprobFormatter
    ) -> list[dict[int, Logprob] | None] | None:
        if first.prompt_logprobs is None:
            return None
        self._prompt_rows += [
            None if entry is None else format_logprobs(entry, self.params)
            for entry in first.prompt_logprobs[len(self._prompt_rows) :]
        ]
        return list(self._prompt_rows)
