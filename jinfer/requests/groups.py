"""From engine requests to what the user sees: n samples of a prompt as one RequestOutput."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Collection
from typing import Any

from jinfer.config.fields import read_int, require, shown
from jinfer.config.outputs import CompletionOutput, Logprob, RequestOutput
from jinfer.config.sampling_params import RequestOutputKind, SamplingParams
from jinfer.engine.device.results import TokenLogprobs
from jinfer.engine.engine import Engine
from jinfer.engine.request import Request
from jinfer.text.prompts import Prompt


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


class OpenRequests:
    """The requests under way, and the outputs that nobody has taken yet.

    Whoever runs a step may bring outputs that others wait for: another iterator of `LLM.stream`,
    another thread. They are kept here. Those of ids from `new_id` are for whoever asks for them by
    name, all others for `LLM.step`.

    Args:
      engine: computes them.
      format_logprobs: for the outputs.

    Attributes:
      lock: to be held by whoever changes the engine.
    """

    def __init__(self, engine: Engine, format_logprobs: LogprobFormatter) -> None:
        self._engine = engine
        self._format_logprobs = format_logprobs
        self._groups: dict[str, RequestGroup] = {}
        self._group_of: dict[Request, RequestGroup] = {}
        self._outputs: dict[str, list[RequestOutput]] = {}
        self._num_named = itertools.count()
        self._named: set[str] = set()
        self.lock = threading.RLock()
        self._to_abort: list[str] = []
        self._is_torn = False  # whether a step was broken off before all its outputs were here

    def __bool__(self) -> bool:
        with self.lock:
            names = itertools.chain(self._outputs, self._groups)
            return any(name not in self._named for name in names)

    def new_id(self, kind: str) -> str:
        """Returns an id that is not in use; to be given back by `abort`."""
        names = (f"{kind}-{number}" for number in self._num_named)
        name = next(name for name in names if name not in self._groups)
        self._named.add(name)
        return name

    def add(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int
    ) -> None:
        """Queues the samples of a prompt.

        Raises:
          ValueError: the id is in use or no text, the priority no integer, or the engine cannot
            serve them; none is queued.
        """
        require(isinstance(request_id, str), f"request_id must be a text, got {shown(request_id)}")
        priority = read_int("priority", priority)
        requests: list[Request] = []
        others = params
        if params.prompt_logprobs is not None and params.n > 1:  # one computes them for all
            others = dataclasses.replace(params, prompt_logprobs=None)
        with self.lock:
            if request_id in self._groups:
                raise ValueError(f"request id {request_id!r} is in use")
            try:
                for idx in range(params.n):
                    request = self._engine.add(
                        f"{request_id}/{idx}",
                        prompt.token_ids,
                        others if idx else params,
                        sample_idx=idx,
                        priority=priority,
                        cache_salt=prompt.cache_salt,
                    )
                    requests.append(request)
                group = RequestGroup(request_id, prompt.text, params, requests)
                self._group_of.update(dict.fromkeys(requests, group))
                self._groups[request_id] = group
            except BaseException:
                for request in requests:
                    self._engine.abort(request.request_id)
                raise

    def abort(self, request_id: str) -> None:
        """Ends a request: at once, or after a change of the engine in the middle of which it comes.

        Python may collect an iterator of `LLM.stream`, and so end its requests, at any moment.
        """
        require(isinstance(request_id, str), f"request_id must be a text, got {shown(request_id)}")
        self._to_abort.append(request_id)
        self._end_aborted()

    def _end_aborted(self) -> None:
        with self.lock:
            while self._to_abort and not self._engine.is_changing:
                self._end(self._to_abort[0])
                del self._to_abort[0]

    def _end(self, request_id: str) -> None:
        group = self._groups.get(request_id)
        if group is not None:
            for request in group.requests:
                self._engine.abort(request.request_id)
            self._forget(group)
        self._outputs.pop(request_id, None)
        self._named.discard(request_id)

    def _forget(self, group: RequestGroup) -> None:
        for request in group.requests:
            self._group_of.pop(request, None)
        self._groups.pop(group.request_id, None)

    def advance(self) -> None:
        """Runs a step of the engine and keeps the outputs that it brings."""
        with self.lock:
            was_torn, self._is_torn = self._is_torn, True
            progress = self._engine.step()
            self._end_aborted()
            touched = [self._group_of.get(p.request) for p in progress]
            touched = dict.fromkeys(group for group in touched if group is not None)
            if was_torn:  # who ended then was not told
                touched |= dict.fromkeys(g for g in self._groups.values() if g.is_finished)
            for group in touched:
                output = group.output(self._format_logprobs)
                if output is not None:
                    self._outputs.setdefault(group.request_id, []).append(output)
                if group.is_finished:
                    self._forget(group)
            self._is_torn = False

    def take(self, wanted: Collection[str] | None = None) -> list[RequestOutput]:
        """Hands out the outputs that are here, of some requests or of all that have no owner."""
        with self.lock:
            names = [
                name
                for name in self._outputs
                if (name not in self._named if wanted is None else name in wanted)
            ]
            return [output for name in names for output in self._outputs.pop(name)]

    def bring(self, wanted: Collection[str]) -> list[RequestOutput]:
        """Hands out the outputs of some requests, after a step if none is here.

        Raises:
          RuntimeError: there will never be any, for someone has aborted the requests.
        """
        with self.lock:
            outputs = self.take(wanted)
            if not outputs:
                self.advance()
                outputs = self.take(wanted)
            if not outputs and not self._engine.has_work():
                raise RuntimeError("requests were aborted while someone waited for their outputs")
            return outputs
