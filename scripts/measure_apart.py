"""Runs measurements in processes of their own, and survives their crashes.

A process gets a file {"cases": what is left, "found": so far} and writes {"device", "results":
{case: result}, ...} after each case. A fault on the device ends a process's use of it, and a kernel
that waits for itself never ends: either costs its case, the others are measured in a new process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEVICE_LOST = 3  # the status of a process that has written of a fault and cannot go on


def run_apart(
    command: list[str],
    cases: list[dict[str, Any]],
    out: Path,
    seconds: float | None,
    patience: float,
    report: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """Runs `command CASES OUT` until all cases have a result; returns what it wrote.

    Args:
      command: of the measuring process. The GPU's memory is not preallocated.
      cases: each has a name.
      out: where it writes.
      seconds: for all cases, None: no limit. Those that are left then have no result.
      patience: seconds that a case may take.
      report: called with what was found whenever there is more of it.

    Returns:
      What the process wrote, with {"failure": why} for cases that it did not survive; {} if it
      ended before it wrote anything.
    """
    found: dict[str, Any] = {}
    stop = time.monotonic() + (math.inf if seconds is None else seconds)
    while left := [c for c in cases if c["name"] not in found.get("results", {})]:
        listing = out.with_suffix(".cases")
        listing.write_text(json.dumps({"cases": left, "found": found}))
        process = subprocess.Popen(
            [*command, str(listing), str(out)],
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        status, seen = None, time.monotonic()
        while status is None and time.monotonic() < min(stop, seen + patience):
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=0.2)
            if out.exists() and (now := json.loads(out.read_text())) != found:
                found, seen = now, time.monotonic()
                report(found)
        if status is None:
            process.kill()
            process.wait()
        if status == 0 or time.monotonic() >= stop or "results" not in found:
            break
        left = [c["name"] for c in cases if c["name"] not in found["results"]]
        if status != DEVICE_LOST and left:
            how = "it hung" if status is None else f"its process ended with status {status}"
            print(f"{left[0]}: {how}", flush=True)
            found["results"][left[0]] = {"failure": how}
            write_whole(out, found)
    return found


def write_whole(out: Path, found: dict[str, Any]) -> None:
    """Writes the file in one piece: another process reads it."""
    part = out.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(out)
