"""The kernels, shapes and candidate tiles of `quant_matmul` that `scripts/autotune.py` measures."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul import mosaic_gpu, mosaic_tpu, preferred_layout, quant_matmul
from pallas_kernels.quant_matmul.base import QuantSpec
from pallas_kernels.quant_matmul.cases import LINEARS, Case
from pallas_kernels.target import Target
from pallas_kernels.tiles import QuantMatmulTpuTiles, Tunable

ROWS = (8, 16, 32, 64, 128, 256)


def tunables(target: Target, *, codes: Any = jnp.int4, group: int = 128) -> Iterator[Tunable]:
    """Enumerates the models' linear layers at every bucket of rows, for the kernel of `target`."""
    layout = preferred_layout(target)
    for (model, linear, k, n), m in itertools.product(LINEARS, ROWS):
        if k % group:
            continue
        case = Case(
            model=model, linear=linear, num_rows=m, num_inputs=k, num_outputs=n, codes=codes,
            group=group,
        )  # fmt: skip
        x, q, scale, zero = case.abstract_args(layout)
        spec = QuantSpec(group=group, layout=layout, out_dtype=jnp.dtype(x.dtype), config=None)
        backend = mosaic_gpu if target.kind == "gpu" else mosaic_tpu
        impl = backend.IMPL
        if impl.why_not(target, x, q, scale, zero, spec) is not None:
            continue
        if target.kind == "gpu":
            key = mosaic_gpu.case_name(m, q, spec, case.num_groups)
            candidates = mosaic_gpu.ranked_tiles(m, q, spec, case.num_groups, target)
        else:
            key = mosaic_tpu.case_name(m, q, spec)
            candidates = tpu_tiles(case, mosaic_tpu.heuristic_tiles(m, q, spec))
        call = functools.partial(quant_matmul, group=group, layout=layout)

        def run(tiles: Any, *args: Any, call: Any = call, impl: Any = impl) -> jax.Array:
            return call(*args, config=tiles, impl=impl.name)

        yield Tunable(
            op=backend.OP,
            case=key,
            candidates=tuple(candidates),
            inputs=functools.partial(case.random_args, layout),
            run=run,
            reference=functools.partial(call, impl="xla"),
        )


def tpu_tiles(case: Case, first: QuantMatmulTpuTiles) -> Iterator[QuantMatmulTpuTiles]:
    """Enumerates blocks that divide the weight and take at most 4 MB of codes, `first` first."""
    assert case.group is not None
    yield first
    for block_n, block_k, scale_weights in itertools.product(
        (256, 512, 1024, 2048), (512, 1024, 2048, 4096), (False, True)
    ):
        fits = block_n * block_k <= 4 << 20 and block_k % case.group == 0
        if fits and case.num_outputs % block_n == 0 and case.num_inputs % block_k == 0:
            sizes = QuantMatmulTpuTiles(
                block_m=first.block_m,
                block_n=block_n,
                block_k=block_k,
                scale_weights=scale_weights,
            )
            if sizes != first:
                yield sizes
