"""The thread that owns an engine and its device; all other threads send it messages.

Adding or aborting a request puts a message into the inbox and returns. The thread handles messages
between two steps, steps the engine while there is work, and posts each step's results to the
mailboxes of the requests' readers. It neither detokenizes nor formats: readers do, in their
threads, while the next step runs. An idle thread holds a reference to the inbox only, so that an
unused engine is freed at once.
"""

from __future__ import annotations

import atexit
import collections
import contextvars
import dataclasses
import enum
import logging
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from jinfer.engine.engine import Engine
from jinfer.engine.mailbox import Mailbox, wake
from jinfer.engine.plan import Progress
from jinfer.engine.request import Request
from jinfer.text.detokenizer import Detokenizer
from pallas_kernels.compat import capture_contexts
from pallas_kernels.dispatch import CONTEXTS

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NOT_HERE = "the engine's thread is not in this process: make the engine after the fork"
EXIT_TIMEOUT_S = 10.0  # how long an exiting interpreter waits for the current step


class LoopState(enum.Enum):
    """State of a loop.

    RUNNING -> DRAINING (`drain`) -> CLOSED (`close`); FAILED after an error outside a step.
    """

    RUNNING = "running"
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"


class QueueFullError(RuntimeError):
    """The queue of waiting requests is full: add this one again later."""


class News(NamedTuple):
    """How far one request of a submission is.

    Attributes:
      idx: which request of the submission.
      num_tokens: output tokens that it has so far.
      detokenizer: the engine's, which has made the text; None where the reader makes it.
      num_pieces: pieces of text that this detokenizer had shown by then.
      is_finished: whether the request has ended.
    """

    idx: int
    num_tokens: int
    detokenizer: Detokenizer | None
    num_pieces: int
    is_finished: bool


class Failure:
    """An error in place of news or of a task's result; it is raised once."""

    def __init__(self, error: BaseException) -> None:
        self._error: BaseException | None = error
        self._traceback = error.__traceback__

    def take(self) -> BaseException:
        """Returns the error to raise, with the traceback that it had in the loop's thread.

        It is deleted here: frames of the traceback refer to this object, and the cycle would keep
        their variables alive until the next garbage collection.
        """
        error, traceback = self._error, self._traceback
        assert error is not None, "an error is raised once"
        self._error = self._traceback = None
        return error.with_traceback(traceback)


@dataclasses.dataclass(eq=False)
class Submission:
    """Requests whose news go to one mailbox as (submission, list of `News` or a `Failure`).

    Attributes:
      requests: made by `Engine.make_request`; the samples of one prompt.
      mailbox: where their news are posted.
      is_final_only: news are posted once, when all have ended.
      is_manual: these requests alone do not make the engine step; `EngineLoop.step` does.
    """

    requests: Sequence[Request]
    mailbox: Mailbox
    is_final_only: bool = False
    is_manual: bool = False
    told: list[tuple[int, bool]] = dataclasses.field(init=False)  # last (num_tokens, is_finished)
    num_left: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.told = [(0, False)] * len(self.requests)
        self.num_left = len(self.requests)

    def news_of(self, idx: int) -> News:
        """Returns how far a request is, and records that its reader knows."""
        request = self.requests[idx]
        num_tokens, is_finished = len(request.output_token_ids), request.is_finished
        self.num_left -= is_finished and not self.told[idx][1]
        self.told[idx] = num_tokens, is_finished
        detokenizer = request.detokenizer
        num_pieces = 0 if detokenizer is None else detokenizer.num_pieces
        return News(idx, num_tokens, detokenizer, num_pieces, is_finished)


class Task:
    """A call that the loop's thread is asked to make, and its result."""

    def __init__(self, function: Callable[[], Any] | None = None) -> None:
        self.function = function
        self.mailbox = Mailbox()

    def end(self, result: Any) -> None:
        """Posts the result or a `Failure` to the waiting caller."""
        self.function = None
        self.mailbox.put((result,))
        wake((self.mailbox,))

    def run(self) -> None:
        """Calls the function; what it raises is raised by `result`."""
        assert self.function is not None
        try:
            result = self.function()
        except BaseException as error:
            result = Failure(error)
        self.end(result)

    def result(self) -> Any:
        """Waits for the result and returns or raises it."""
        self.mailbox.wait()
        return self._take()

    async def result_async(self) -> Any:
        """As `result`, for asyncio."""
        await self.mailbox.wait_async()
        return self._take()

    def _take(self) -> Any:
        (result,) = self.mailbox.take()
        if isinstance(result, Failure):
            raise result.take()
        return result


class EngineLoop:
    """Serves an engine from a thread of its own.

    The thread runs in the contexts that are active where the loop is made: JAX's
    (`jax.default_device`, `jax.enable_x64`, `jax.default_matmul_precision`, `jax.set_mesh`, ...),
    those of `pallas_kernels` and Python's context variables. Contexts of a caller of `step` or
    `call` have no effect on it.

    An error of a step that the engine cannot recover from ends every submission that is not manual,
    and `step` raises it. The loop continues.

    Args:
      engine: from now on only the loop's thread uses it, except for `make_request` and `check`.
      max_queued_requests: most requests that wait to be admitted; None for no limit.
    """

    def __init__(self, engine: Engine, *, max_queued_requests: int | None = None) -> None:
        self.engine = engine
        self.max_queued_requests = max_queued_requests
        self.state = LoopState.RUNNING
        self._error: BaseException | None = None
        self._lock = threading.RLock()  # of `state` and what must not change while it is read
        self._num_in_inbox = 0  # requests
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # Below: used by the thread only.
        self._open: dict[Request, tuple[Submission, int]] = {}
        self._submissions: dict[Submission, None] = {}
        self._num_served = 0  # submissions that are not manual
        self._tickets: collections.deque[Task] = collections.deque()  # of `step`
        self._drains: list[Task] = []
        enter = capture_contexts(CONTEXTS)
        self.thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(_serve, self._inbox, weakref.ref(self), enter, sys.gettrace()),
            name="jinfer-engine",
            daemon=True,
        )
        self.thread.start()
        weakref.finalize(self, self._inbox.put, None).atexit = False
        _live_loops.add(self)

    # ------------------------------------------------------------------ from any thread

    @property
    def num_queued(self) -> int:
        """Requests that wait to be admitted."""
        return self._num_in_inbox + self.engine.scheduler.num_waiting

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Queues requests, all in one step, and returns at once.

        Raises:
          QueueFullError: more would wait than `max_queued_requests`; none is queued.
          RuntimeError: the loop takes no requests any more.
        """
        count = sum(len(submission.requests) for submission in submissions)
        with self._lock:
            self._check_is(LoopState.RUNNING)
            limit = self.max_queued_requests
            if limit is not None and self.num_queued + count > limit:
                raise QueueFullError(
                    f"{self.num_queued} requests wait and max_queued_requests is {limit}: "
                    f"{count} more cannot be queued now, add them later"
                )
            self._num_in_inbox += count
            self._inbox.put((EngineLoop._take_in, submissions))

    def abort(self, submission: Submission) -> None:
        """Asks the thread to end requests and returns at once; their last news say so.

        Safe in finalizers, which may run at any time in any thread, even after the interpreter has
        cleared this module.
        """
        self._inbox.put((type(self)._abort, submission))

    def start(self, function: Callable[[], Any]) -> Task:
        """Asks the thread to call a function between two steps; the task holds its result."""
        return self._send(EngineLoop._run, Task(function))

    def call(self, function: Callable[[], T]) -> T:
        """Has the thread call a function between two steps, and returns its result."""
        if threading.current_thread() is self.thread:
            return function()
        return self.start(function).result()

    def step(self) -> None:
        """Waits until the engine has made another step and posted its news."""
        self.refuse_own_thread()
        self._send(EngineLoop._take_ticket, Task()).result()

    def drain(self) -> Task:
        """Refuses new requests; the returned task ends when all open requests have ended."""
        with self._lock:
            if self.state is LoopState.RUNNING:
                self.state = LoopState.DRAINING
        return self._send(EngineLoop._take_drain, Task())

    def close(self, timeout: float | None = None) -> None:
        """Ends all requests with an error, and the thread after the current step."""
        with self._lock:
            if self.state in (LoopState.RUNNING, LoopState.DRAINING):
                self.state = LoopState.CLOSED
                self._inbox.put(None)
        if threading.current_thread() is not self.thread:
            self.thread.join(timeout)

    def check_can_wait(self, mailbox: Mailbox) -> None:
        """Raises if waiting for an item of a mailbox would never end.

        Raises:
          RuntimeError: in the loop's own thread, or in a forked child process.
        """
        self.refuse_own_thread()
        if not self.thread.is_alive() and mailbox.first() is None:  # in this order
            raise RuntimeError(_NOT_HERE)

    def refuse_own_thread(self) -> None:
        """Raises RuntimeError in the loop's own thread, which would wait for itself."""
        if threading.current_thread() is self.thread:
            raise RuntimeError(
                "the engine's own thread cannot wait for the engine: a function that is called "
                "during a step may add requests, but not read their outputs"
            )

    def _send(self, handler: Callable[[EngineLoop, Task], None], task: Task) -> Task:
        with self._lock:
            self._check_is(LoopState.RUNNING, LoopState.DRAINING)
            self._inbox.put((handler, task))
        return task

    def _check_is(self, *states: LoopState) -> None:
        if self.state not in states:
            raise RuntimeError(
                f"the engine is {self.state.value} and takes no more requests: make another one"
            ) from self._error
        if not self.thread.is_alive():
            raise RuntimeError(_NOT_HERE)

    # ------------------------------------------------------------------ in the thread

    def work(self, message: tuple[Callable[[EngineLoop, Any], None], Any]) -> bool:
        """Handles a message, then further messages and steps until there is no more work.

        Returns:
          Whether the loop continues.
        """
        try:
            self._handle(message)
            while self.state is not LoopState.CLOSED:
                while not self._inbox.empty():
                    self._handle(self._inbox.get())
                if not (self._tickets or self._num_served or (self._drains and self._submissions)):
                    break
                self._advance()
        except BaseException as error:
            logger.exception("the engine's loop failed")
            self._end(LoopState.FAILED, error)
            return False
        if self.state is LoopState.CLOSED:
            self._end(self.state, RuntimeError("the engine was closed: its requests have ended"))
            return False
        return True

    def _handle(self, message: tuple[Callable[[EngineLoop, Any], None], Any] | None) -> None:
        if message is not None:
            handler, argument = message
            handler(self, argument)

    def _take_in(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:  # first all of them, so that whatever fails reaches all
            self._submissions[submission] = None
            self._num_served += not submission.is_manual
            for idx, request in enumerate(submission.requests):
                self._open[request] = submission, idx
        for submission in submissions:
            with self._lock:  # so that `submit` counts each request once
                self._num_in_inbox -= len(submission.requests)
                error = self._queue(submission)
            if error is not None:
                self._fail(submission, error)

    def _queue(self, submission: Submission) -> Exception | None:
        try:
            for request in submission.requests:
                self.engine.queue(request)
        except Exception as error:
            return error
        return None

    def _abort(self, submission: Submission) -> None:
        if submission in self._submissions:
            self._abort_requests(submission)
            submission.mailbox.put((submission, self._all_news(submission)))
            self._forget(submission)
            wake((submission.mailbox,))

    def _run(self, task: Task) -> None:
        task.run()

    def _take_ticket(self, task: Task) -> None:
        self._tickets.append(task)

    def _take_drain(self, task: Task) -> None:
        self._drains.append(task)
        self._end_drains()

    def _advance(self) -> None:
        """Makes a step and posts its news."""
        ticket = self._tickets[0] if self._tickets else None  # there, it is told of all errors
        try:
            self._post(self.engine.step())
        except BaseException as error:
            logger.info("a step failed with %r, which ends the requests that are served", error)
            for submission in tuple(self._submissions):
                if submission.is_manual:  # of its requests some may have ended in that step
                    self._tell(submission, self._all_news(submission))
                else:
                    self._fail(submission, error)
            if ticket is not None:
                self._tickets.popleft().end(Failure(error))
            return
        if ticket is not None:
            self._tickets.popleft().end(None)
        if (self._num_served or self._drains) and not self.engine.has_work():
            lost = RuntimeError("requests were aborted while a caller waited for their outputs")
            for submission in tuple(self._submissions):
                self._fail(submission, lost)

    def _post(self, progress: Iterable[Progress]) -> None:
        news: dict[Submission, list[News]] = {}
        for gain in progress:
            found = self._open.get(gain.request)
            if found is not None:
                submission, idx = found
                news.setdefault(submission, []).append(submission.news_of(idx))
        mailboxes: dict[Mailbox, None] = {}
        for submission, some in news.items():
            if submission.num_left == 0:
                self._forget(submission)
            if submission.is_final_only:
                if submission.num_left:
                    continue
                some = self._all_news(submission)
            submission.mailbox.put((submission, some))
            mailboxes[submission.mailbox] = None
        wake(mailboxes)

    def _all_news(self, submission: Submission) -> list[News]:
        return [submission.news_of(idx) for idx in range(len(submission.requests))]

    def _tell(self, submission: Submission, news: list[News]) -> None:
        """Posts news of a manual submission that a failed step may have left unposted."""
        if submission.num_left and submission.is_final_only:
            return
        submission.mailbox.put((submission, news))
        if not submission.num_left:
            self._forget(submission)

    def _fail(self, submission: Submission, error: BaseException) -> None:
        if submission in self._submissions:
            self._abort_requests(submission)
            self._forget(submission)
        submission.mailbox.put((submission, Failure(error)))
        wake((submission.mailbox,))

    def _abort_requests(self, submission: Submission) -> None:
        for request in submission.requests:
            try:
                self.engine.abort(request.request_id)
            except BaseException as error:  # the engine is consistent again: once more
                logger.info("aborting %s again after %r", request, error)
                self.engine.abort(request.request_id)

    def _forget(self, submission: Submission) -> None:
        del self._submissions[submission]
        self._num_served -= not submission.is_manual
        for request in submission.requests:
            del self._open[request]
        self._end_drains()

    def _end_drains(self) -> None:
        if not self._submissions:
            while self._drains:
                self._drains.pop().end(None)

    def _end(self, state: LoopState, error: BaseException) -> None:
        """Ends all requests, tasks and messages still in the inbox with an error."""
        with self._lock:
            self.state, self._error = state, error
        while not self._inbox.empty():  # no later messages: senders check the state first
            message = self._inbox.get()
            if message is not None and message[0] is EngineLoop._take_in:
                for submission in message[1]:
                    self._fail(submission, error)
            elif message is not None and isinstance(message[1], Task):
                message[1].end(Failure(error))
        for task in (*self._tickets, *self._drains):
            task.end(Failure(error))
        self._tickets.clear()
        self._drains.clear()
        for submission in tuple(self._submissions):
            self._forget(submission)
            self._fail(submission, error)
            if state is LoopState.CLOSED:
                try:
                    self._abort_requests(submission)
                except BaseException:
                    logger.exception("the requests of a closed engine could not be aborted")


def _serve(
    inbox: queue.SimpleQueue[Any],
    loop_of: weakref.ref[EngineLoop],
    enter_contexts: Callable[[], None],
    trace: Any,
) -> None:
    """The thread's function: passes messages to the loop as long as the loop exists."""
    enter_contexts()
    if trace is not None:  # of a debugger, so that its breakpoints hold here
        sys.settrace(trace)
    while True:
        message = inbox.get()
        loop = loop_of()
        if loop is None or not loop.work(message):
            return
        del message, loop  # idle, the thread keeps nothing alive


_live_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends all threads before the interpreter exits, which would stop them inside XLA."""
    for loop in tuple(_live_loops):
        loop.close(EXIT_TIMEOUT_S)
