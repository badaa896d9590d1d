"""Measures tiles on the accelerator of this machine and writes pallas_kernels/tuned/<device>.json.

    python scripts/autotune.py [--op quant_matmul] [--codes int4] [--group 128]
                               [--only TEXT] [--candidates 12] [--seconds 600]

Each candidate is checked against the plain XLA form on fresh random inputs before it is timed. The
table is written after every shape, so that a run that is cut short loses nothing. Without an
accelerator it says so and exits 0.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from pallas_kernels import target as target_lib
from pallas_kernels import tiles as tiles_lib
from pallas_kernels import timing

OPS = ("paged_attention", "quant_matmul", "fp8_matmul")
CACHE_BYTES = 150 << 20  # the inputs of a shape are rotated until together they exceed any cache
MAX_RELATIVE_ERROR = 2e-2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--codes", default="int4", help="codes of quant_matmul (int4)")
    parser.add_argument("--group", type=int, default=128, help="its group (128)")
    parser.add_argument("--only", default="", help="cases whose key contains this")
    parser.add_argument("--candidates", type=int, default=12, help="tile sets tried per case (12)")
    parser.add_argument("--seconds", type=float, help="stop after the case that passes this time")
    parser.add_argument("--out", type=pathlib.Path, help="instead of pallas_kernels/tuned/")
    args = parser.parse_args(argv)
    device = timing.describe_accelerator()
    if device is None:
        print("no accelerator here: nothing was measured, no table was written")
        return 0
    target = target_lib.current()
    path = args.out or tiles_lib.FOLDER / tiles_lib.table_name(target)
    print(f"{device}: writing {path}")
    start = time.monotonic()
    num_wrong = 0
    by_key: dict[tuple[str, str], list[tiles_lib.Tunable]] = {}
    for tunable in enumerate_tunables(args, target):
        if args.only in tunable.case:
            by_key.setdefault((tunable.op, tunable.case), []).append(tunable)
    for (op, case), calls in by_key.items():
        best, wrong = tune(calls, args.candidates)
        num_wrong += wrong
        if best is not None:
            tiles_lib.write_table(target, {op: {case: best}}, path)
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            print(f"stopped after {args.seconds:.0f} s as asked")
            break
    if num_wrong:
        print(f"{num_wrong} candidates gave wrong results or none and were left out: see above")
    return 1 if num_wrong else 0


def enumerate_tunables(
    args: argparse.Namespace, target: target_lib.Target
) -> Iterator[tiles_lib.Tunable]:
    for op in args.op:
        module = importlib.import_module(f"pallas_kernels.{op}.tuning")
        if op == "quant_matmul":
            yield from module.tunables(target, codes=jnp.dtype(args.codes), group=args.group)
        else:
            yield from module.tunables(target)


def tune(calls: list[tiles_lib.Tunable], num_candidates: int) -> tuple[Any, int]:
    """Returns the fastest correct tiles, or None, and how many candidates were wrong.

    Args:
      calls: calls that share a key of the table: the least mean of the logarithms of their times
        wins, so that a long call counts no more than a short one.
      num_candidates: tile sets tried of those that all of them have.
    """
    first, *others = calls
    candidates = [c for c in first.candidates if all(c in o.candidates for o in others)]
    seconds: dict[Any, list[float]] = {c: [] for c in candidates[:num_candidates]}
    num_wrong = 0
    for call in calls:
        for sizes in wrong_ones(call, seconds):
            num_wrong += 1
            del seconds[sizes]
    if not seconds:
        return None, num_wrong

    def mean_log(sizes: Any) -> float:
        return statistics.fmean(math.log(t) for t in seconds[sizes])

    best, guess = min(seconds, key=mean_log), next(iter(seconds))
    micros = [f"{t * 1e6:.1f} ({g * 1e6:.1f})" for t, g in zip(seconds[best], seconds[guess])]
    print(f"  {first.op} {first.case}: us (first guess's) {', '.join(micros)}; {best}")
    return best, num_wrong


def wrong_ones(call: tiles_lib.Tunable, seconds: dict[Any, list[float]]) -> list[Any]:
    """Times each candidate of `seconds` that gives the right result; returns the others.

    Exits if a kernel's fault has ended this process's use of the device.
    """
    sets = [call.inputs(0)]
    size = sum(x.nbytes for x in jax.tree.leaves(sets[0]))
    sets += [call.inputs(seed) for seed in range(1, min(32, max(3, CACHE_BYTES // size + 1)))]
    expected = timing.jit_untuned(call.reference)(*sets[-1])
    wrong = []
    for sizes, times in seconds.items():
        f = functools.partial(call.run, sizes)
        try:
            error = relative_error(jax.jit(f)(*sets[-1]), expected)
            if error < MAX_RELATIVE_ERROR:
                times.append(timing.measure(f, sets, samples=10).seconds)
                continue
            reason = f"relative error {error:.2g}"  # NaN is wrong too
        except Exception as e:  # does not build, say: the other candidates may
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            if not timing.device_works():
                sys.exit(f"  {call.case}: {reason} with {sizes}; the device was lost, start again")
        wrong.append(sizes)
        print(f"  WRONG {call.case}: {reason} with {sizes}")
    return wrong


def relative_error(y: jax.Array, expected: jax.Array) -> float:
    difference = y.astype(jnp.float32) - expected.astype(jnp.float32)
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected.astype(jnp.float32)))


if __name__ == "__main__":
    sys.exit(main())
