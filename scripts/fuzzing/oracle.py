"""Judges the outcome of one call of the library.

A refusal is a ValueError, TypeError or FileNotFoundError of one line that names what it refuses.
Any other exception is a finding, and so is a result that differs from the reference or a call that
does not end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

ALLOWED = (ValueError, TypeError, FileNotFoundError)
MAX_MESSAGE = 2000  # characters: more is no line that anyone reads
ROOT = Path(__file__).resolve().parents[2]


class MismatchError(Exception):
    """An accepted call whose result is not that of the reference, or a state that is not sound."""


class HangError(BaseException):
    """A call that did not end within its limit."""


def expect(condition: Any, rule: str, *details: Any) -> None:
    """Raises MismatchError with a rule, by which findings are grouped, and details."""
    if not condition:
        raise MismatchError(rule, *details)


@dataclasses.dataclass(kw_only=True)
class Case:
    """One call and what is known about its result.

    Attributes:
      what: the kind of call.
      fields: its arguments; a finding is tried again without each of them.
      call: makes the call.
      check: raises MismatchError unless the result is right.
      names: what a refusal may name beside the fields, such as a file.
      show: prints the call; by default what and fields.
      also_allowed: further exceptions that are refusals here, if they name something.
    """

    what: str
    fields: dict[str, Any]
    call: Callable[[dict[str, Any]], Any]
    check: Callable[[dict[str, Any], Any], None] = lambda fields, result: None
    names: Collection[str] = ()
    show: Callable[[dict[str, Any]], str] | None = None
    also_allowed: tuple[type[BaseException], ...] = ()

    def text(self, fields: Mapping[str, Any]) -> str:
        """Prints the call with these arguments."""
        if self.show is not None:
            return self.show(dict(fields))
        return f"{self.what}({', '.join(f'{k}={shorten(v)}' for k, v in fields.items())})"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a call.

    Attributes:
      kind: "accepted", "refused", or that of a finding.
      signature: kind, exception and innermost frame of the library; groups findings.
      message: the refusal, or what is wrong.
    """

    kind: str
    signature: str = ""
    message: str = ""

    @property
    def is_finding(self) -> bool:
        """Whether the library was at fault."""
        return self.kind not in ("accepted", "refused")


def shorten(value: Any, limit: int = 120) -> str:
    """Prints a value in one line of limited length."""
    try:
        text = " ".join(repr(value).split())
    except Exception as error:
        text = f"<{type(value).__name__} without repr: {type(error).__name__}>"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises HangError in what runs inside once it has used so much CPU time; main thread only.

    CPU time: a loaded machine must not make findings. What waits for ever is the loop's business.
    The handler stays: a signal that comes late must neither raise elsewhere nor end the process.
    """
    is_inside = True

    def ring(*_: Any) -> None:
        if is_inside:
            raise HangError(f"no end after {seconds:g} s of CPU time")

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        is_inside = False
        signal.setitimer(signal.ITIMER_PROF, 0)


def frame_of(error: BaseException) -> str:
    """Names the innermost frame of the library in an exception, as file:function."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        for package in ("jinfer", "pallas_kernels"):
            if path.is_relative_to(ROOT / package):
                return f"{path.relative_to(ROOT)}:{frame.name}"
    return "outside"


def fault_of_refusal(error: BaseException, names: Collection[str], allowed: tuple) -> str | None:
    """Returns what is wrong with a refusal, or None."""
    if type(error) not in (*ALLOWED, *allowed):
        return "other exception"
    text = str(error)
    if not text.strip():
        return "no message"
    if len(text.splitlines()) > 1:
        return "several lines"
    if len(text) > MAX_MESSAGE:
        return "endless line"
    spelt = {form.lower() for name in names for form in (name, repr(name)[1:-1])}
    file = getattr(error, "filename", None)
    names = [*names, str(file)] if file is not None else names
    if names and not any(name in text.lower() for name in spelt):
        return "names no cause"
    return None


def judge(case: Case, fields: dict[str, Any], seconds: float) -> Verdict:
    """Makes the call and its check; returns what became of it."""
    try:
        with limited(seconds):
            result = case.call(fields)
    except HangError as error:
        return Verdict("hang", f"hang {case.what} {frame_of(error)}", str(error))
    except MismatchError as error:
        return _mismatch(case, error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        names = {*fields, *case.names}
        fault = fault_of_refusal(error, names, case.also_allowed)
        message = f"{type(error).__name__}: {str(error)[:MAX_MESSAGE]}"
        if fault is None:
            return Verdict("refused", "", message)
        signature = f"{fault}: {type(error).__name__} in {frame_of(error)}"
        if fault == "names no cause":
            signature += f" ({case.what})"
        return Verdict(fault, signature, message)
    try:
        with limited(seconds):
            case.check(fields, result)
    except MismatchError as error:
        return _mismatch(case, error)
    except HangError as error:
        return Verdict("hang", f"hang in check of {case.what} {frame_of(error)}", str(error))
    except Exception as error:  # a result that the check cannot even look at
        what = f"{type(error).__name__} in {frame_of(error)}"
        return Verdict("odd result", f"odd result: {case.what}: {what}", str(error))
    return Verdict("accepted")


def _mismatch(case: Case, error: MismatchError) -> Verdict:
    rule = error.args[0]
    return Verdict("mismatch", f"mismatch: {case.what}: {rule}", " ".join(map(str, error.args)))


def shrink(case: Case, signature: str, seconds: float) -> dict[str, Any]:
    """Returns the fewest arguments found, dropped one at a time, that give the same finding."""
    fields = dict(case.fields)
    for name in list(fields):
        fewer = {k: v for k, v in fields.items() if k != name}
        try:
            verdict = judge(case, fewer, seconds)
        except Exception:
            continue  # the case needs this argument
        if verdict.signature == signature:
            fields = fewer
    return fields
