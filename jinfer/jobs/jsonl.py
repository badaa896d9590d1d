"""Batch jobs: prompts from one JSONL file, results into another; resumable after any kill.

The output file is the only state. Whole lines are appended and synced; each names its input line
and has a hash (key) of that line and the job's settings. A restart drops an incomplete last line,
checks every key and continues.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import errno
import fcntl
import functools
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
MAX_REPORTED_LINES = 20
_RECORD_START = b'{"line": '
_GZIP = b"\x1f\x8b"
_MAX_UNPACKED = 1040  # bytes that a byte of gzip can become
_OTHER_KINDS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"PK\x03\x04": "a zip archive",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Session(Protocol):
    """The part of `requests.session.Session` that a batch job uses."""

    def add(self, request_id: str, prompt: Any, params: Any) -> Any: ...

    def read(self) -> list[Any]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """The part of `LLM` that a batch job uses."""

    def session(self) -> Session: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One parsed input line; exactly one of the three prompts is set."""

    id: str | int
    prompt: str | None
    messages: list[dict[str, Any]] | None
    prompt_token_ids: list[int] | None
    sampling_params: dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class Summary:
    """Counts of a run; `failed_lines` has the first few of the `num_failed` lines."""

    num_done: int = 0
    num_failed: int = 0
    num_output_tokens: int = 0
    failed_lines: list[int] = dataclasses.field(default_factory=list)

    def note_failure(self, number: int) -> None:
        """Counts a line without a result."""
        self.num_failed += 1
        if len(self.failed_lines) < MAX_REPORTED_LINES:
            self.failed_lines.append(number)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, raw line) of every line that is not blank, unpacked from gzip.

    Raises:
      ValueError: the file is compressed in another way, damaged, or not text in UTF-8.
    """
    with path.open("rb") as file:
        is_packed = file.read(2) == _GZIP
        file.seek(0)
        with gzip.open(file) if is_packed else contextlib.nullcontext(file) as lines:
            try:
                _refuse_other_kinds(path, lines.read(6))
                lines.seek(0)
                for number, raw in enumerate(lines, 1):
                    raw = raw.strip()
                    if raw:
                        yield number, raw
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is damaged, or cut short: {error}") from None


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    kind = next((kind for magic, kind in _OTHER_KINDS.items() if start.startswith(magic)), None)
    if kind is None and b"\0" in start[:4]:
        kind = "UTF-16 or UTF-32"
    if kind is not None:
        raise ValueError(f"{path} is {kind}: it must be JSON lines in UTF-8, plain or .gz")


def line_key(raw: bytes, settings: bytes) -> int:
    """Returns a 63-bit hash, never 0, of an input line and a job's settings."""
    digest = hashlib.blake2b(raw, key=hashlib.blake2b(settings).digest(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(raw: bytes) -> Any:
    """Reads one line of JSON in UTF-8; raises ValueError for anything else."""
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def parse_line(raw: bytes, number: int) -> Line:
    """Reads one input line; its id defaults to its line number.

    Raises:
      ValueError: the line is not a JSON object with the known keys.
    """
    fields = parse_json(raw)
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    unknown = [key for key in fields if key not in (*PROMPT_KEYS, "id", "sampling_params")]
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]!r}; a line has one of {', '.join(PROMPT_KEYS)}, and may have "
            f"id and sampling_params"
        )
    given = [key for key in PROMPT_KEYS if fields.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of {', '.join(PROMPT_KEYS)}, got {given or 'none'}")
    prompt, messages, token_ids = (fields.get(key) for key in PROMPT_KEYS)
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {type(prompt).__name__}")
    if messages is not None and not (
        isinstance(messages, list)
        and messages
        and all(isinstance(message, dict) and "role" in message for message in messages)
    ):
        raise ValueError("messages must be a list of objects with role and content")
    if token_ids is not None and not (
        isinstance(token_ids, list) and all(type(token) is int for token in token_ids)
    ):
        raise ValueError("prompt_token_ids must be a list of integers")
    line_id = number if fields.get("id") is None else fields["id"]
    if not isinstance(line_id, (str, int)) or isinstance(line_id, bool):
        raise ValueError(f"id must be a string or an integer, got {line_id!r}")
    params = fields.get("sampling_params")
    params = {} if params is None else params
    if not isinstance(params, dict):
        raise ValueError(f"sampling_params must be an object, got {type(params).__name__}")
    if "output_kind" in params:
        raise ValueError("output_kind cannot be chosen in a batch job: it writes whole results")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string holds half a surrogate pair") from None
    return Line(
        id=line_id,
        prompt=prompt,
        messages=messages,
        prompt_token_ids=token_ids,
        sampling_params=params,
    )


class Job:
    """An input and an output file; the output is locked, checked and cut back to complete lines.

    Attributes:
      num_lines: input lines that are not blank.
      num_done: of those, lines with a result in the output file.
      num_appended: lines appended to the input later; another run processes them.
    """

    def __init__(self, input_path: Path, output_path: Path, settings: Mapping[str, Any]) -> None:
        """Opens the job; creates the output file when there is none.

        Args:
          input_path: a regular file (it is read twice: to check and count, and to run).
          output_path: the results; an existing file is continued.
          settings: JSON values that change results (model, dtype, sampling defaults).

        Raises:
          ValueError: the output file has unknown content, or results of another job.
          OSError: a file cannot be opened.
        """
        self.input_path, self.output_path = input_path, output_path
        self._settings = json.dumps(settings, sort_keys=True).encode()
        self._done = array.array("Q")  # [line number] -> key, 0 while open
        if not input_path.exists():
            raise ValueError(f"{input_path}: no such file")
        if not input_path.is_file():
            raise ValueError(f"{input_path}: not a regular file; a batch job reads it twice")
        if output_path.suffix == ".gz":
            raise ValueError(
                f"{output_path}: results are written uncompressed, so that a job can resume after "
                f"a kill: name a file without .gz"
            )
        if output_path.exists() and output_path.samefile(input_path):
            raise ValueError(f"{output_path}: the output would overwrite the input")
        self._fd = os.open(output_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self._end = 0
            if self._is_regular:
                self._lock()
                self._recover()
            self._last_number = self.num_appended = 0
            self.num_lines, self.num_done = self._check_input()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def open_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields (number, raw line) of the counted lines without a result."""
        self.num_appended = 0
        for number, raw in read_lines(self.input_path):
            if number > self._last_number:
                self.num_appended += 1
            elif number >= len(self._done) or not self._done[number]:
                yield number, raw

    def key(self, raw: bytes) -> int:
        """Key of an input line under this job's settings."""
        return line_key(raw, self._settings)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes records and syncs them; after a failure none of them is partly written.

        Raises:
          OSError: the records cannot be written; the file stays resumable.
        """
        lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
        view = memoryview("".join(f"{line}\n" for line in lines).encode())
        size = len(view)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            if self._is_regular and size:
                os.fsync(self._fd)
        except BaseException as error:
            if self._is_regular:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._end)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise OSError(
                    error.errno,
                    f"{os.strerror(error.errno or 0)}; the lines written so far are complete: "
                    f"free some space and run the same command again",
                    str(self.output_path),
                ) from None
            raise
        self._end += size

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.output_path}: another process is writing it") from None

    def _recover(self) -> None:
        """Reads which lines are done; cuts an incomplete last line once all keys are checked."""
        tail = b""
        with open(self._fd, "rb", closefd=False) as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    tail = raw
                    break
                self._note_record(number, raw)
                self._end += len(raw)
        if tail:
            start = _RECORD_START[: len(tail)]
            if not tail.startswith(start):
                raise self._foreign(f"its end {tail[:20]!r}... is not a record")
            os.ftruncate(self._fd, self._end)

    def _note_record(self, number: int, raw: bytes) -> None:
        try:
            record = json.loads(raw)
            line, key = record["line"], int(record["key"], 16)
            if line < 1 or not 0 < key < 2**63 or not isinstance(line, int):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise self._foreign(f"line {number} is not a record") from None
        if line > self._most_lines:
            raise self._foreign(f"line {number} answers input line {line}, which does not exist")
        if line >= len(self._done):
            self._done.frombytes(bytes(8 * (line + 1 - len(self._done))))
        if self._done[line]:
            raise self._foreign(f"line {number} answers input line {line} a second time")
        self._done[line] = key

    @functools.cached_property
    def _most_lines(self) -> int:
        """Upper bound of the input's line count, to refuse huge line numbers before allocating."""
        with self.input_path.open("rb") as file:
            is_packed = file.read(2) == _GZIP
        return self.input_path.stat().st_size * (_MAX_UNPACKED if is_packed else 1)

    def _foreign(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.output_path}: not the output of this job: {reason}; "
            f"name another --output or move the file away"
        )

    def _check_input(self) -> tuple[int, int]:
        """Returns the numbers of lines and of done lines.

        Raises:
          ValueError: the output was made from other lines or settings.
        """
        num_lines = num_done = 0
        for number, raw in read_lines(self.input_path):
            num_lines += 1
            self._last_number = number
            done = self._done[number] if number < len(self._done) else 0
            if done and done != self.key(raw):
                raise self._foreign(
                    f"it was made from another line {number}, or with another model or settings"
                )
            num_done += bool(done)
        if num_done != sum(map(bool, self._done)):
            raise self._foreign("it answers lines that the input does not have")
        return num_lines, num_done


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None  # JSON has no infinities and no NaN


def _logprobs_json(positions: Iterable[Mapping[int, Any] | None]) -> list[Any]:
    return [
        position
        and [
            {
                "token_id": token_id,
                "logprob": _finite(entry.logprob),
                "rank": entry.rank,
                "token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        ]
        for position in positions
    ]


def make_record(output: Any, *, number: int, line_id: str | int, key: int) -> dict[str, Any]:
    """Turns a finished `RequestOutput` into the JSON object of one output line."""
    record: dict[str, Any] = {"line": number, "id": line_id, "key": f"{key:016x}"}
    record["num_prompt_tokens"] = len(output.prompt_token_ids)
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = _logprobs_json(output.prompt_logprobs)
    record["outputs"] = []
    for completion in output.outputs:
        fields = {
            "text": completion.text,
            "token_ids": [int(token) for token in completion.token_ids],
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None:
            fields["cumulative_logprob"] = _finite(completion.cumulative_logprob)
            fields["logprobs"] = _logprobs_json(completion.logprobs)
        record["outputs"].append(fields)
    return record


def run(
    engine: Engine,
    job: Job,
    *,
    make_request: Callable[[Line], tuple[Any, Any]],
    max_in_flight: int,
    on_error: Callable[[int, str], None],
    on_progress: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """Runs every line without a result through the engine and appends results as they finish.

    At most `max_in_flight` lines are in memory, however long the input. The engine keeps running
    while lines are read and results written.

    Args:
      engine: an `LLM`.
      job: the open job.
      make_request: turns a line into (prompt, sampling params); a ValueError or TypeError from it
        or from `Session.add` fails only this line.
      max_in_flight: requests that the engine holds, running and waiting.
      on_error: called with line number and message of each line that fails, when it is added or
        later; it gets no result, so another run of the job tries it again.
      on_progress: called whenever lines have finished, and for failed lines.

    Raises:
      OSError: the output cannot be written; it stays resumable.
    """
    state = _Run(engine.session(), job, on_error, on_progress)
    lines = job.open_lines()
    try:
        while True:
            while len(state.in_flight) < max_in_flight:
                number, raw = next(lines, (0, b""))
                if not number:
                    break
                state.add(number, raw, make_request)
            if not state.in_flight:
                return state.summary
            state.write(state.session.read())
    finally:
        state.session.close()


@dataclasses.dataclass
class _Run:
    """A running job; `in_flight` maps request ids to (line number, line id, key)."""

    session: Session
    job: Job
    on_error: Callable[[int, str], None]
    on_progress: Callable[[Summary], None]
    summary: Summary = dataclasses.field(default_factory=Summary)
    in_flight: dict[str, tuple[int, str | int, int]] = dataclasses.field(default_factory=dict)

    def add(self, number: int, raw: bytes, make_request: Callable[[Line], tuple[Any, Any]]) -> None:
        """Queues a line, or counts it as failed."""
        request_id = str(number)
        try:
            line = parse_line(raw, number)
            self.session.add(request_id, *make_request(line))
        except (ValueError, TypeError) as error:
            self._fail(number, str(error))
        else:
            self.in_flight[request_id] = (number, line.id, self.job.key(raw))

    def write(self, outputs: Iterable[Any]) -> None:
        """Appends the results of the lines that have ended."""
        records = []
        for output in outputs:
            if not output.finished:
                continue
            number, line_id, key = self.in_flight.pop(output.request_id)
            error = next((c.error for c in output.outputs if c.finish_reason == "error"), None)
            if error is not None:
                self._fail(number, error)
                continue
            records.append(make_record(output, number=number, line_id=line_id, key=key))
            self.summary.num_output_tokens += sum(len(c.token_ids) for c in output.outputs)
        if records:
            self.job.append(records)
            self.summary.num_done += len(records)
            self.on_progress(self.summary)

    def _fail(self, number: int, message: str) -> None:
        self.summary.note_failure(number)
        self.on_error(number, message)
        self.on_progress(self.summary)
