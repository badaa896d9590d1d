"""Measures tiles on the accelerator of this machine and writes pallas_kernels/tuned/<device>.json.

    python scripts/autotune.py [--op quant_matmul fp8_matmul] [--codes int4] [--group 128]
                               [--only TEXT] [--candidates 12] [--seconds 600]

Each candidate is checked against the plain XLA form on fresh random inputs before it is timed. The
table is written after every shape, so that a run that is cut short loses nothing. Without an
accelerator it says so and exits 0.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
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

CACHE_BYTES = 150 << 20  # the inputs of a shape are rotated until together they exceed any cache
MAX_RELATIVE_ERROR = 2e-2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = ("quant_matmul", "fp8_matmul")
    parser.add_argument("--op", nargs="+", choices=ops, default=list(ops))
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
    for tunable in enumerate_tunables(args, target):
        if args.only not in tunable.case:
            continue
        best, wrong = tune(tunable, args.candidates)
        num_wrong += wrong
        if best is not None:
            tiles_lib.write_table(target, {tunable.op: {tunable.case: best}}, path)
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            print(f"stopped after {args.seconds:.0f} s as asked")
            break
    if num_wrong:
        print(f"{num_wrong} candidates gave WRONG RESULTS and were left out: see above")
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


def tune(tunable: tiles_lib.Tunable, num_candidates: int) -> tuple[Any, int]:
    """Returns the fastest correct tiles, or None, and how many candidates were wrong."""
    sets = [tunable.inputs(0)]
    size = sum(x.nbytes for x in jax.tree.leaves(sets[0]))
    sets += [tunable.inputs(seed) for seed in range(1, min(32, max(3, CACHE_BYTES // size + 1)))]
    expected = tunable.reference(*sets[-1])
    timed, num_wrong = [], 0
    for sizes in tunable.candidates[:num_candidates]:

        def call(*inputs: Any, sizes: Any = sizes) -> jax.Array:
            return tunable.run(sizes, *inputs)

        error = relative_error(jax.jit(call)(*sets[-1]), expected)
        if not error < MAX_RELATIVE_ERROR:  # NaN is wrong too
            num_wrong += 1
            print(f"  WRONG {tunable.case}: relative error {error:.2g} with {sizes}")
            continue
        timed.append((timing.measure(call, sets, samples=10).seconds, sizes))
    if not timed:
        return None, num_wrong
    seconds, best = min(timed, key=lambda pair: pair[0])
    guess = timed[0][0] * 1e6
    print(
        f"  {tunable.op} {tunable.case}: {seconds * 1e6:.1f} us (first guess {guess:.1f}), {best}"
    )
    return best, num_wrong


def relative_error(y: jax.Array, expected: jax.Array) -> float:
    difference = y.astype(jnp.float32) - expected.astype(jnp.float32)
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected.astype(jnp.float32)))


if __name__ == "__main__":
    sys.exit(main())
