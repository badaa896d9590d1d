"""`jinfer chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from jinfer.cli import flags
from jinfer.cli.terminal import GenerationError, chat_prompt, one_line, print_stream, say

SUMMARY = "talk to a model in the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer chat`."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    flags.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs a conversation with a model over stdin and stdout.

    /reset starts a new conversation, /exit (or the end of the input) leaves; Ctrl-C stops an
    answer. A turn that fails is dropped from the conversation, and the exit status is then 1.
    """
    params = flags.make_text_params(flags.sampling_fields(args))
    if params.n != 1:
        raise ValueError(f"a chat has one answer a turn, got n={params.n}")
    llm = flags.load_llm(args)
    if not getattr(llm.get_tokenizer(), "chat_template", None):
        raise ValueError(f"{args.model} has no chat template; use jinfer generate --raw")
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages, status = list(start), 0
    for text in _read_turns():
        if text == "/exit":
            break
        if text == "/reset":
            messages = list(start)
            continue
        turn = {"role": "user", "content": text}
        pieces: list[str] = []
        try:
            prompt = chat_prompt(llm, [*messages, turn])
            print(print_stream(llm, prompt, params, pieces), file=sys.stderr)
        except (ValueError, GenerationError) as error:  # too long, NaN: this turn is dropped
            if args.debug:
                raise
            say(f"error: {one_line(error)}; /reset starts anew")
            status = 1
            continue
        except KeyboardInterrupt:
            say("stopped")
        messages += [turn, {"role": "assistant", "content": "".join(pieces)}]
    return status


def _read_turns() -> Iterator[str]:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history in input()
    while True:
        try:
            text = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if text:
            yield text
