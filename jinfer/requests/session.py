"""Clients of an engine's loop: sessions read several requests together, a handle reads one."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jinfer.config.fields import read_int, require, shown
from jinfer.config.outputs import RequestOutput
from jinfer.config.sampling_params import RequestOutputKind, SamplingParams
from jinfer.engine.loop import EngineLoop, Failure, News, Submission
from jinfer.engine.mailbox import Mailbox, wake
from jinfer.requests.groups import LogprobFormatter, RequestGroup
from jinfer.text.prompts import read_prompt


class Client:
    """State shared by all sessions of one engine: the loop, the ids in use, the tokenizer.

    Args:
      loop: owns the engine.
      tokenizer: encodes prompts and decodes outputs; None for token ids only.
      defaults: fields of the default sampling parameters.
    """

    def __init__(
        self, loop: EngineLoop, tokenizer: Any | None, defaults: Mapping[str, Any]
    ) -> None:
        self.loop = loop
        self.tokenizer = tokenizer
        self.format_logprobs = LogprobFormatter(tokenizer)
        self._defaults = dict(defaults)
        self._lock = threading.RLock()
        self._in_use: dict[str, Submission] = {}
        self._numbers = itertools.count()

    @property
    def num_open(self) -> int:
        """Requests whose last output has not been read."""
        return len(self._in_use)

    def default_params(self) -> SamplingParams:
        """Returns the sampling parameters of a request that gives none."""
        return SamplingParams(**self._defaults)

    def read_params(self, params: Any, kind: RequestOutputKind | None = None) -> SamplingParams:
        """Returns `params` (None: the default ones), with output kind `kind` unless that is None.

        Raises:
          TypeError: `params` is not a `SamplingParams`.
        """
        params = self.default_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
        return params if kind is None else dataclasses.replace(params, output_kind=kind)

    def new_id(self, kind: str) -> str:
        """Returns an unused id."""
        names = (f"{kind}-{number}" for number in self._numbers)
        return next(name for name in names if name not in self._in_use)

    def make_group(
        self, request_id: str, prompt: Any, params: SamplingParams, priority: Any = 0
    ) -> RequestGroup:
        """Checks a prompt with its parameters and makes its requests; queues nothing.

        Raises:
          ValueError: the id is not a string, the priority not an integer, or the engine cannot
            serve the request.
          TypeError: the prompt has an unsupported type.
        """
        read = read_prompt(prompt, self.tokenizer)
        check_id(request_id)
        priority = read_int("priority", priority)
        others = params
        if params.prompt_logprobs is not None and params.n > 1:  # one computes them for all
            others = dataclasses.replace(params, prompt_logprobs=None)
        requests = [
            self.loop.engine.make_request(
                f"{request_id}/{idx}",
                read.token_ids,
                others if idx else params,
                sample_idx=idx,
                priority=priority,
                cache_salt=read.cache_salt,
            )
            for idx in range(params.n)
        ]
        return RequestGroup(request_id, read.text, params, requests, self.tokenizer)

    def claim(self, request_id: str, submission: Submission) -> None:
        """Reserves an id until `release`.

        Raises:
          ValueError: the id is in use.
        """
        with self._lock:
            if request_id in self._in_use:
                raise ValueError(f"request id {request_id!r} is in use")
            self._in_use[request_id] = submission

    def release(self, request_id: str, submission: Submission) -> None:
        """Frees an id if this submission reserved it."""
        with self._lock:
            if self._in_use.get(request_id) is submission:
                del self._in_use[request_id]

    def abort(self, request_id: str) -> None:
        """Ends a request and tells its reader; unknown ids are ignored."""
        check_id(request_id)
        submission = self._in_use.get(request_id)
        if submission is not None:
            self.loop.abort(submission)


class Session:
    """Requests that are read together; only one thread or task may read a session at a time.

    Args:
      client: whose engine serves them.
      is_manual: these requests alone do not make the engine step; `EngineLoop.step` does.
    """

    def __init__(self, client: Client, *, is_manual: bool = False) -> None:
        self._client = client
        self._is_manual = is_manual
        self._mailbox = Mailbox()
        self._groups: dict[Submission, RequestGroup] = {}
        self._ready: list[RequestOutput] = []  # not empty if a reader was interrupted

    def __len__(self) -> int:
        """Requests whose last output has not been read."""
        return len(self._groups) + sum(output.finished for output in self._ready)

    def add(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> None:
        """Queues a request; see `LLM.add_request`.

        Raises:
          ValueError, TypeError: the request cannot be served; nothing is queued.
          QueueFullError: the queue is full.
          RuntimeError: the engine takes no requests any more.
        """
        client = self._client
        params = client.read_params(params)
        self.submit([client.make_group(request_id, prompt, params, priority)])

    def submit(self, groups: Sequence[RequestGroup]) -> None:
        """Queues all of the requests or none, and returns at once."""
        made = []
        try:
            for group in groups:
                submission = Submission(
                    group.requests,
                    self._mailbox,
                    is_final_only=group.params.output_kind is RequestOutputKind.FINAL_ONLY,
                    is_manual=self._is_manual,
                )
                made.append(submission)
                self._groups[submission] = group
                self._client.claim(group.request_id, submission)
            self._client.loop.submit(made)
        except BaseException:
            for submission in made:
                self._drop(submission)
            # Who reads in another thread may have begun to wait for them.
            self._mailbox.put((None, ()))
            wake((self._mailbox,))
            raise

    def read(self) -> list[RequestOutput]:
        """Waits for the next outputs and returns them; an empty list when all have ended.

        Raises:
          RuntimeError: the engine was closed.
          BaseException: an error of the engine that ended a request.
        """
        while self:
            self._client.loop.check_can_wait(self._mailbox)
            if not self._ready:
                self._mailbox.wait()
            if outputs := self.take():
                return outputs
        return []

    async def read_async(self) -> list[RequestOutput]:
        """As `read`, for asyncio."""
        while self:
            self._client.loop.check_can_wait(self._mailbox)
            if not self._ready:
                await self._mailbox.wait_async()
            if outputs := self.take():
                return outputs
        return []

    def take(self) -> list[RequestOutput]:
        """Returns the outputs that are ready, without waiting.

        When interrupted (Ctrl-C), it loses nothing: news stay queued until their output is made.

        Raises:
          BaseException: an error that ended a request or prevented its output.
        """
        while (item := self._mailbox.first()) is not None:
            submission, news = item
            group = self._groups.get(submission)
            if group is not None:  # neither aborted nor failed
                if isinstance(news, Failure):
                    if self._ready:
                        break  # hand out earlier outputs first
                    self._drop(submission)
                    raise news.take()
                self._make_output(submission, group, news)
            self._mailbox.take()
        outputs, self._ready = self._ready, []
        return outputs

    def _make_output(
        self, submission: Submission, group: RequestGroup, news: Sequence[News]
    ) -> None:
        try:
            output = group.output(news, self._client.format_logprobs)
        except Exception:  # would be raised again by each later call
            self._drop(submission)
            raise
        if output is not None:
            self._ready.append(output)
        if group.is_finished:
            self._forget(submission)

    def abort(self, request_id: str) -> None:
        """Ends a request of this session without a last output; other ids are ignored."""
        for submission, group in tuple(self._groups.items()):
            if group.request_id == request_id:
                self._drop(submission)

    def close(self) -> None:
        """Ends all requests of this session."""
        while self._groups:
            for submission in tuple(self._groups):
                self._drop(submission)
        self._ready.clear()

    def _drop(self, submission: Submission) -> None:
        self._client.loop.abort(submission)
        self._forget(submission)

    def _forget(self, submission: Submission) -> None:
        group = self._groups.pop(submission, None)
        if group is not None:
            self._client.release(group.request_id, submission)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Handle:
    """One request: an iterator of its outputs for threads (`for`) and asyncio (`async for`).

    A handle that is garbage collected ends its request.
    """

    def __init__(self, session: Session, request_id: str) -> None:
        self.request_id = request_id
        self._session = session
        self._outputs: collections.deque[RequestOutput] = collections.deque()

    def abort(self) -> None:
        """Ends the request and the iteration."""
        self._session.close()
        self._outputs.clear()

    def __iter__(self) -> Handle:
        return self

    def __next__(self) -> RequestOutput:
        if not self._outputs:
            self._outputs.extend(self._session.read())
        with contextlib.suppress(IndexError):  # none, or aborted just now by another thread
            return self._outputs.popleft()
        raise StopIteration

    def __aiter__(self) -> Handle:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._outputs:
            self._outputs.extend(await self._session.read_async())
        with contextlib.suppress(IndexError):
            return self._outputs.popleft()
        raise StopAsyncIteration


def check_id(request_id: Any) -> None:
    """Raises ValueError if a request id is not a string."""
    require(isinstance(request_id, str), f"request_id must be a string, got {shown(request_id)}")


def refuse_aborted(output: RequestOutput) -> None:
    """Raises RuntimeError if another caller has aborted the request."""
    if any(completion.finish_reason == "abort" for completion in output.outputs):
        raise RuntimeError("requests were aborted while a caller waited for their outputs")
