"""Writes docs/lab/benchmarks.md, with plots, from benchmarks/results/; --check only compares.

Every bench writes the same JSON (see scripts/bench_engine.py); nothing there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmark_plots import draw

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "lab" / "benchmarks.md"
PLOTS = PAGE.parent / "plots"
HEAD = """# Benchmarks

Made by `python scripts/render_benchmarks.py` from `benchmarks/results/*.json`; do not edit. Every
number comes from the command above its table, with peers in the same run. *limit* is what the
hardware would allow, *goal* the ratio that was aimed at. Numbers in brackets are a value's parts:
behind *acceptance*, that of the first, the second, ... draft of a step. In the plots a bar is the
*ratio*, green where it meets the *goal* (the blue mark), red where it misses it, grey without a
goal. For *peak memory* the ratio is ours to the peer's, so that less is better.
"""
COLUMNS = ("case", "metric", "unit", "jinfer", "peer", "peer's value", "ratio", "limit", "goal")


def render(reports: dict[str, dict[str, Any]]) -> str:
    """Returns the page for {name: report}."""
    parts = [HEAD]
    for name, report in sorted(reports.items()):
        versions = ", ".join(
            f"{package} {version}" for package, version in report["versions"].items()
        )
        table = [row_text(COLUMNS), row_text(["---"] * len(COLUMNS))]
        table += [row_text(cells(row)) for row in report["rows"]]
        where = f"{report['date']}, {report['device']}; {versions}."
        head = [f"## {name}", f"`{report['command']}`", where, *filter(None, [report.get("note")])]
        if draw(name, report):
            head.append(f"![ratios of {name}](plots/{plot_name(name)})")
        parts.append("\n\n".join([*head, "\n".join(table)]))
    if not reports:
        parts.append("No results yet.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def plot_name(name: str) -> str:
    """Returns the file name of a report's plot."""
    return name.replace("/", "-") + ".svg"


def cells(row: dict[str, Any]) -> list[str]:
    """Returns the cells of one row in the order of COLUMNS."""
    ratio, goal = row["ratio"], row.get("goal")
    reached = ""
    if goal:
        reached = f"{goal:g}x {'met' if ratio >= goal else 'missed'}"
    return [
        row["case"],
        row["metric"],
        row["unit"],
        number(row["value"]) + variant(row.get("own")) + in_parts(row.get("parts")),
        row["peer"] or "",
        number(row["peer_value"]),
        "" if ratio is None else f"{ratio:.2f}x",
        number(row["limit"]),
        reached,
    ]


def variant(own: str | None) -> str:
    """Prints which variant of ours ran, such as its dtype, where a bench tried several."""
    return f" ({own.removeprefix('jinfer ')})" if own else ""


def in_parts(parts: list[float] | None) -> str:
    """Prints what a value is made of, such as acceptance by position."""
    return f" ({', '.join(map(number, parts))})" if parts else ""


def number(value: float | None) -> str:
    """Prints a value with about four digits; nothing for None."""
    if value is None:
        return ""
    size = abs(value)
    return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 30 else f"{value:.3f}"


def row_text(values: Any) -> str:
    """Joins cells into a Markdown row."""
    return "| " + " | ".join(str(value).replace("|", "\\|") for value in values) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is not up to date")
    args = parser.parse_args()
    files = {str(p.relative_to(RESULTS).with_suffix("")): p for p in RESULTS.rglob("*.json")}
    reports = {name: json.loads(p.read_text()) for name, p in files.items()}
    wanted = {PAGE: render(reports)}
    for name, report in reports.items():
        if plot := draw(name, report):
            wanted[PLOTS / plot_name(name)] = plot
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text() != text]
    stale += [p for p in PLOTS.glob("*") if p not in wanted]
    if args.check:
        for path in stale:
            print(f"{path} is not what benchmarks/results/ gives", file=sys.stderr)
        return 1 if stale else 0
    PLOTS.mkdir(exist_ok=True)
    for path in stale:
        if path in wanted:
            path.write_text(wanted[path])
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
