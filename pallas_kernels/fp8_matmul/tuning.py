"""The shapes and candidate tiles of `fp8_matmul` on Hopper that `scripts/autotune.py` measures."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from pallas_kernels.fp8_matmul import fp8_matmul, mosaic_gpu
from pallas_kernels.fp8_matmul.cases import Case
from pallas_kernels.quant_matmul.cases import LINEARS
from pallas_kernels.target import Target
from pallas_kernels.tiles import Tunable

ROWS = (8, 16, 32, 64, 128, 256)


def tunables(target: Target) -> Iterator[Tunable]:
    """Enumerates the models' linear layers at every bucket of rows; nothing except on Hopper."""
    if not target.is_hopper:
        return
    call = functools.partial(fp8_matmul, block=128, layout="nk")

    def run(tiles: Any, *args: Any) -> jax.Array:
        return call(*args, config=tiles, impl="mosaic_gpu")

    for (model, linear, k, n), m in itertools.product(LINEARS, ROWS):
        if k % 128 or n % 128:
            continue
        case = Case(
            model=model, linear=linear, num_rows=m, num_inputs=k, num_outputs=n, scales="block"
        )
        shape = mosaic_gpu.shape_of(m, k, n)
        yield Tunable(
            op=mosaic_gpu.OP,
            case=mosaic_gpu.case_name(m, k, n),
            candidates=tuple(shape.ranked(mosaic_gpu.candidate_tiles(shape), target)),
            inputs=functools.partial(case.random_args, "nk"),
            run=run,
            reference=functools.partial(call, impl="xla"),
        )
