"""Calls one door of the library with valid and invalid values for some minutes, and judges it.

    python scripts/fuzz.py --door python --minutes 60 --seed 0 --report fuzz-python.json

A refusal must be a ValueError, TypeError or FileNotFoundError of one line that names its cause; an
accepted call must give what a simple reference gives; after each the engine must answer a fixed
request as before. Findings are grouped by exception and innermost frame. Exit status 1: there are
some.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOORS = ("jax", "python", "cli")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--door", required=True, choices=DOORS)
    parser.add_argument("--minutes", type=float, default=1.0, help="(1)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--report", type=Path, metavar="FILE", help="JSON, also while it runs")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Compiling dominates: programs are small, and need not be fast.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests" / "helpers")]
    from fuzzing import loop

    door = importlib.import_module(f"fuzzing.{args.door}_door").make()
    if args.case is not None:
        case = loop.make_case(door, args.seed, args.case)
        print(case.text(case.fields))
    summary = loop.run(
        door,
        seed=args.seed,
        seconds=60 * args.minutes if args.case is None else 600,
        first=args.first if args.case is None else args.case,
        most=None if args.case is None else 1,
        report_file=args.report,
    )
    print(json.dumps({k: v for k, v in summary.items() if k != "signatures"}, indent=1))
    for signature, entry in summary["signatures"].items():
        print(f"{entry['count']} x {signature}")
    return 1 if summary["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
