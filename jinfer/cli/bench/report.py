"""The report format of all benches: rows of case, metric and value, with a peer and a goal."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinfer.cli.flags import result_file

PACKAGES = ("jax", "jaxlib", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number.

    Attributes:
      case, metric, unit: what was measured.
      value: our result.
      peer, peer_value: what it is compared with, if anything.
      ratio: how many times better than the peer.
      goal: the ratio aimed at.
      limit: bound on the value, from the hardware or a stated requirement.
      own: name of our variant, if a bench compares several.
      parts: components of the value, such as the acceptance of the first, the second, ... draft.
    """

    case: str
    metric: str
    unit: str
    value: float
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    goal: float | None = None
    limit: float | None = None
    own: str | None = None
    parts: tuple[float, ...] | None = None


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Declares `--json`."""
    parser.add_argument(
        "--json", type=result_file, metavar="FILE", help="write the results to this file"
    )


def finish(
    rows: Sequence[Row],
    *,
    command: str,
    json_file: Path | None,
    is_printed: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Prints the rows, writes the report if `json_file` is given, and returns it.

    Args:
      rows: the measurements.
      command: the command line that repeats them.
      json_file: where to write, or None.
      is_printed: False: only write, for an unfinished report.
      more: further keys of the report, such as raw times.
    """
    report = {
        "device": device_name(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": [dataclasses.asdict(row) for row in rows],
        **more,
    }
    if is_printed:
        _print(report, rows)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _print(report: dict[str, Any], rows: Sequence[Row]) -> None:
    print(f"{report['device']}; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    last = None
    for row in rows:
        if row.case != last:
            print(f"\n{row.case}")
        last = row.case
        print(_line(row))


def _line(row: Row) -> str:
    text = f"  {row.metric:<36} {row.value:.4g} {row.unit}"
    if row.own:
        text += f" ({row.own})"
    if row.parts:
        text += f" ({', '.join(f'{part:.4g}' for part in row.parts)})"
    if row.peer is not None and row.peer_value is not None:
        text += f"; {row.peer} {row.peer_value:.4g}"
    if row.ratio is not None:
        text += f": {row.ratio:.3g}x"
    if row.goal is not None and row.ratio is not None:
        text += f" (goal {row.goal:g}x {'met' if row.ratio >= row.goal else 'MISSED'})"
    if row.limit is not None:
        text += f", limit {row.limit:.4g}"
    return text


def device_name() -> str:
    """Returns the name of jax's accelerator, or of the CPU and its number of cores."""
    import jax

    if jax.default_backend() != "cpu":
        return str(jax.devices()[0].device_kind)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
