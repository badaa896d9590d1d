"""The `jinfer` command: runs a subcommand and reports failures in one line and a status.

Failures print `jinfer: error: ...` and exit with 2 (bad input) or 1; --debug shows tracebacks.
"""

from __future__ import annotations

import argparse
import inspect
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from jinfer.cli import (
    chat,
    convert,
    doctor,
    evaluate,
    generate,
    plan,
    quantize,
    train_draft,
    train_medusa,
)
from jinfer.cli.bench import main as bench
from jinfer.cli.terminal import PROG, one_line, say
from jinfer.config.fields import one_line as shorten

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "plan": plan,
    "quantize": quantize,
    "convert": convert,
    "eval": evaluate,
    "bench": bench,
    "doctor": doctor,
    "train-medusa": train_medusa,
    "train-draft": train_draft,
}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints `message` alone, without the usage, and exits with 2."""
        self.exit(2, f"{PROG}: error: {shorten(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a model may write characters that the terminal cannot show
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == []:  # argparse turns "--flag=--" into []
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    try:
        status = args.run(args)
        print(end="", flush=True)  # stdout may be None: closed from the start
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader closed the pipe; keep Python from failing again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        say(f"error: {one_line(error)}")
        return 2 if isinstance(error, ValueError) else 1
    return status


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    parser = Parser(prog=PROG, description="Language-model inference in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=inspect.getdoc(module.run),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
