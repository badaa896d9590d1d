"""Hooks of the documentation site: writes the flags of every command into reference/cli.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the mark in a page with the reference of all commands; called by mkdocs."""
    return markdown.replace(PLACE, render_commands()) if PLACE in markdown else markdown


def render_commands() -> str:
    """Returns a section of Markdown for each command, made from the parser itself."""
    sys.path.insert(0, str(ROOT))
    from jinfer.cli.main import build_parser

    parts = []
    for name, parser in _subparsers(build_parser()).items():
        parts.append(f"## jinfer {name}\n\n{parser.description or ''}")
        parts.append(_flags(parser))
        for sub_name, sub in _subparsers(parser).items():
            parts.append(f"### jinfer {name} {sub_name}\n\n{sub.description or ''}")
            parts.append(_flags(sub))
    return "\n\n".join(parts)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the commands below a parser by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _flags(parser: argparse.ArgumentParser) -> str:
    """Returns a table of the flags of one command."""
    rows = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest}`"
        rows.append(
            f"| {names} | {_values(action)} | {_default(action)} | {_help(parser, action)} |"
        )
    return "\n".join(rows) if len(rows) > 2 else ""


def _values(action: argparse.Action) -> str:
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    return "" if action.nargs == 0 else f"`{action.metavar or action.dest.upper()}`"


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    is_none = action.default is None or action.default is argparse.SUPPRESS
    return "" if is_none or action.default is False else f"`{action.default}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Returns the help text of a flag as one cell of a table."""
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
