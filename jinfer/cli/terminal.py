"""Terminal output of the commands: messages, rates, streamed text."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jinfer.config.fields import one_line as shorten

PROG = "jinfer"


def say(message: str) -> None:
    """Prints a line to stderr under the command's name."""
    print(f"{PROG}: {message}", file=sys.stderr)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints the wall and CPU time of the code inside the context."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    yield
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    say(f"{what}: {seconds:.1f} s, {cpu_seconds:.1f} s of CPU time")


@contextlib.contextmanager
def progress(
    total: int, what: str, unit: str, *, initial: int = 0, seconds: float = 10.0
) -> Iterator[Any]:
    """Returns a progress bar (tqdm) on a terminal, or one that prints lines to a log file.

    Args:
      total: number of units.
      what: name of the work, such as "quantizing".
      unit: name of a unit, such as "layer".
      initial: number of units that an earlier run has done.
      seconds: least time between two lines of a log; 0: a line for each update.
    """
    from tqdm import tqdm

    if sys.stderr is not None and sys.stderr.isatty():
        with tqdm(total=total, initial=initial, desc=what, unit=unit) as bar:
            yield bar
    else:
        yield _Log(total, what, unit, initial, seconds)


class _Log:
    """A progress bar with tqdm's interface that prints lines."""

    def __init__(self, total: int, what: str, unit: str, n: int, seconds: float) -> None:
        self.total, self.what, self.unit, self.n, self.seconds = total, what, unit, n, seconds
        self.begin = self.last = time.perf_counter()
        self.postfix = ""

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """Sets the end of the next lines; `refresh` prints one now."""
        self.postfix = f", {text}"
        if refresh:
            self._print()

    def update(self, n: int = 1) -> None:
        """Counts `n` more units; prints a line at the end, and if the last one is old enough."""
        self.n += n
        if self.n >= self.total or time.perf_counter() - self.last >= self.seconds:
            self._print()

    def _print(self) -> None:
        self.last = time.perf_counter()
        elapsed = f"{self.last - self.begin:.0f} s"
        say(f"{self.what}: {self.unit} {self.n} of {self.total}, {elapsed}{self.postfix}")


class GenerationError(RuntimeError):
    """A request ended with an error of the engine, such as NaN in the weights."""


def check(outputs: Sequence[Any]) -> Sequence[Any]:
    """Returns outputs of `generate`, `step` or `beam_search` unchanged.

    Raises:
      GenerationError: one of them ended with an error.
    """
    for output in outputs:
        of_completions = [c.error for c in getattr(output, "outputs", ())]
        error = next(filter(None, of_completions), None) or getattr(output, "error", None)
        if error is not None:
            raise GenerationError(error)
    return outputs


def one_line(error: Exception) -> str:
    """Describes an error for a user in one line; names its type if it is unexpected."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        return shorten(f"{where}{error.strerror}")
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, OSError, GenerationError)):
        return shorten(text)
    return f"{type(error).__name__}: {text[:500]} (--debug shows where)"


def format_rate(num_tokens: int, seconds: float) -> str:
    """Returns a count of tokens and their rate as text."""
    return f"{num_tokens} tokens, {num_tokens / max(seconds, 1e-9):.1f} tokens/s"


def chat_prompt(llm: Any, messages: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Turns messages into a prompt of token ids, through the model's chat template."""
    from jinfer.text.prompts import apply_chat_template

    tokens = apply_chat_template(llm.get_tokenizer(), messages, add_generation_prompt=True)
    return {"prompt_token_ids": tokens}


def print_stream(llm: Any, prompt: Any, params: Any, pieces: list[str]) -> str:
    """Prints deltas as they come and appends them to `pieces`; returns a summary line.

    Raises:
      GenerationError: the request ended with an error; the text so far has been printed.
    """
    begin = time.perf_counter()
    first_s = 0.0
    num_tokens = 0
    error = None
    with contextlib.closing(llm.stream(prompt, params)) as stream:  # closing frees the request
        try:
            for output in stream:
                delta = output.outputs[0]
                if not num_tokens:
                    first_s = time.perf_counter() - begin
                num_tokens += len(delta.token_ids)
                pieces.append(delta.text)
                print(delta.text, end="", flush=True)
                error = error or delta.error
        finally:
            if any(pieces) or (pieces and error is None):
                print(flush=True)
    if error is not None:
        raise GenerationError(error)
    rate = format_rate(num_tokens, time.perf_counter() - begin)
    return f"{rate}, first token after {first_s:.2f} s"
