"""Runs the cases of a door for some time and reports; a case is its seed and number."""

from __future__ import annotations

import collections
import faulthandler
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax

from fuzzing.oracle import Case, MismatchError, Verdict, judge, shorten, shrink

LIMIT_S = 60.0  # CPU time of one call
PATIENCE_S = 900.0  # until a case that waits for something ends the process, with a traceback
MAX_MAPS = 30_000
MAX_SHOWN = 3  # examples kept of a signature


class Door(Protocol):
    """Makes cases, and knows whether what they left behind is sound."""

    name: str

    def case(self, rng: random.Random) -> Case:
        """Returns a case; the same one for the same state of `rng`."""
        ...

    def control(self) -> None:
        """Raises MismatchError if the door no longer answers a fixed call as it did."""
        ...

    def renew(self) -> None:
        """Makes anew what a finding may have spoilt."""
        ...


def free_programs() -> None:
    """Frees compiled programs before there are too many.

    XLA maps each into memory in many pieces, of which Linux allows a process 65,530.
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
        gc.collect()


def make_case(door: Door, seed: int, number: int) -> Case:
    """Returns case `number` of a seed."""
    return door.case(random.Random(f"{door.name}:{seed}:{number}"))


def run_case(door: Door, case: Case, seconds: float) -> Verdict:
    """Judges a case and what it left behind."""
    verdict = judge(case, dict(case.fields), seconds)
    if verdict.kind == "hang":
        return verdict
    try:
        after = judge(Case(what="control", fields={}, call=lambda _: door.control()), {}, seconds)
    except MismatchError as error:  # pragma: no cover
        after = Verdict("mismatch", "control", str(error))
    if after.kind != "accepted" and not verdict.is_finding:
        return Verdict("spoilt", f"spoilt by {case.what}: {after.signature}", after.message)
    return verdict


class Report:
    """Counts of verdicts, and the findings by signature."""

    def __init__(self, door: str, seed: int) -> None:
        self.door, self.seed = door, seed
        self.counts: collections.Counter[str] = collections.Counter()
        self.whats: collections.Counter[str] = collections.Counter()
        self.findings: dict[str, dict[str, Any]] = {}
        self.begin = time.monotonic()

    def note(self, verdict: Verdict, number: int, case: Case, minimal: str) -> bool:
        """Counts a verdict; returns whether it is a finding with a new signature."""
        self.counts[verdict.kind if not verdict.is_finding else "finding"] += 1
        self.whats[f"{case.what}: {verdict.kind}"] += 1
        if not verdict.is_finding:
            return False
        is_new = verdict.signature not in self.findings
        entry = self.findings.setdefault(
            verdict.signature,
            {"kind": verdict.kind, "message": verdict.message, "count": 0, "cases": []},
        )
        entry["count"] += 1
        if len(entry["cases"]) < MAX_SHOWN:
            entry["cases"].append({"number": number, "call": minimal})
        return is_new

    def as_json(self) -> dict[str, Any]:
        """Returns the summary."""
        return {
            "door": self.door,
            "seed": self.seed,
            "minutes": round((time.monotonic() - self.begin) / 60, 2),
            "cases": sum(self.counts.values()),
            "accepted": self.counts["accepted"],
            "refused": self.counts["refused"],
            "findings": self.counts["finding"],
            "by_call": dict(sorted(self.whats.items())),
            "signatures": self.findings,
        }


def run(
    door: Door,
    *,
    seed: int,
    seconds: float,
    first: int = 0,
    most: int | None = None,
    report_file: Path | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    limit_s: float = LIMIT_S,
) -> dict[str, Any]:
    """Runs cases from number `first` on until the time is up; returns the summary."""
    report = Report(door.name, seed)
    stop, number, saved = time.monotonic() + seconds, first, time.monotonic()
    while time.monotonic() < stop and (most is None or number < first + most):
        # A call inside compiled code cannot be interrupted: then the process says where, and ends.
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
        if number % 20 == 0:
            free_programs()
        case = make_case(door, seed, number)
        verdict = run_case(door, case, limit_s)
        minimal = ""
        if verdict.is_finding:
            is_known = verdict.signature in report.findings
            fields = case.fields
            if verdict.kind not in ("hang", "spoilt") and not is_known:
                fields = shrink(case, verdict.signature, limit_s)
            minimal = case.text(fields)
            if verdict.kind in ("hang", "spoilt"):
                door.renew()
        if report.note(verdict, number, case, minimal):
            say(
                f"finding {verdict.signature}\n  {shorten(verdict.message, 400)}\n  {minimal}\n"
                f"  again: scripts/fuzz.py --door {door.name} --seed {seed} --case {number}"
            )
        number += 1
        if report_file is not None and time.monotonic() > saved + 10:
            saved = time.monotonic()
            report_file.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    faulthandler.cancel_dump_traceback_later()
    summary = report.as_json()
    if report_file is not None:
        report_file.write_text(json.dumps(summary, indent=1) + "\n")
    return summary
