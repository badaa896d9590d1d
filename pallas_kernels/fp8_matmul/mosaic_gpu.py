"""The fp8 matmul on Hopper for 128 x 128 block scales, which XLA's GEMM does not support.

`wgmma` reads both operands from shared memory. Each block's product is scaled and added in f32,
which also makes up for the tensor core's short fp8 accumulator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels import target as target_lib
from pallas_kernels import tiles as tiles_lib
from pallas_kernels.dispatch import Impl
from pallas_kernels.fp8_matmul.base import Fp8Spec, rows_of_scales
from pallas_kernels.quant_matmul.base import shape_kn
from pallas_kernels.quant_matmul.mosaic_gpu_kernel import persistent_matmul
from pallas_kernels.quant_matmul.schedule import Shape
from pallas_kernels.tiles import QuantMatmulGpuTiles

OP = "fp8_matmul.mosaic_gpu"


def _why_not(
    target: target_lib.Target, x: Any, w: Any, x_scale: Any, w_scale: Any, spec: Fp8Spec
) -> str | None:
    num_inputs, num_outputs = shape_kn(w, spec.layout)
    if not target.is_hopper and not compat.is_interpreting():
        return f"needs a Hopper GPU (sm_90a), the target is {target.name} ({target.arch})"
    if compat.is_interpreting() and (reason := compat.why_not_interpret("gpu")):
        return reason
    if spec.config is not None and not isinstance(spec.config, QuantMatmulGpuTiles):
        return f"takes QuantMatmulGpuTiles, got {type(spec.config).__name__}"
    if spec.layout != "nk":
        return f"reads weights laid out [N, K], got layout {spec.layout!r}; prepare() the weight"
    if x.dtype != jnp.float8_e4m3fn or w.dtype != jnp.float8_e4m3fn:
        return f"multiplies e4m3 by e4m3, got {x.dtype} by {w.dtype}"
    if x.shape[0] == 0:
        return "x has no rows"
    if spec.block not in (None, 128):
        return f"blocks must be of 128 inputs, got {spec.block}"
    if num_inputs % 128 or num_outputs % 32:
        return f"K must be a multiple of 128 and N of 32, got K={num_inputs}, N={num_outputs}"
    return None


def case_name(num_rows: int, num_inputs: int, num_outputs: int) -> str:
    """Returns the key in the table of measured tiles."""
    return f"M{tiles_lib.bucket(num_rows)} K{num_inputs} N{num_outputs}"


def shape_of(num_rows: int, num_inputs: int, num_outputs: int) -> Shape:
    """Returns the product described for the model of its time."""
    return Shape(
        num_rows=num_rows,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        w_bits=8,
        x_bits=8,
        group=128,
        instructions=0,
        speed=2.0,
    )


def candidate_tiles(shape: Shape) -> Iterator[QuantMatmulGpuTiles]:
    """Enumerates the tiles that fit the registers: two accumulators of rows * block_m / 128."""
    largest = min(tiles_lib.bucket(shape.num_rows), 128)
    for block_m, rows, splits in itertools.product(
        {largest, min(largest, 64)}, (64, 128), (1, 2, 4, 8, 16)
    ):
        if rows * block_m <= 64 * 128:
            yield QuantMatmulGpuTiles(block_m=block_m, rows=rows, block_k=128, splits=splits)


def run(
    x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array, spec: Fp8Spec
) -> jax.Array:
    """Computes (x * x_scale) @ (w * w_scale)^T, x [M, K], w [N, K]."""
    target = target_lib.current()
    target = target if target.is_hopper else target_lib.TARGETS["h100"]  # simulated on a CPU
    (num_rows, num_inputs), num_outputs = x.shape, w.shape[0]
    shape = shape_of(num_rows, num_inputs, num_outputs)
    sizes = tiles_lib.choose(
        OP,
        target,
        case_name(num_rows, num_inputs, num_outputs),
        QuantMatmulGpuTiles,
        spec.config,
        lambda: shape.ranked(candidate_tiles(shape), target)[0],
    )
    if spec.block is None:
        group = num_inputs
        by_output = jnp.broadcast_to(w_scale.astype(jnp.float32).reshape(1, -1), (1, num_outputs))
        by_row = jnp.broadcast_to(x_scale.astype(jnp.float32).reshape(1, -1), (1, num_rows))
    else:
        group = spec.block
        by_output = rows_of_scales(w_scale, num_outputs, spec.block)
        by_row = x_scale.astype(jnp.float32).T
    padding = -num_rows % 8  # the copy engine's tiles are 8 rows high
    y = persistent_matmul(
        jnp.pad(x, ((0, padding), (0, 0))),
        w,
        by_output,
        x_scale=jnp.pad(by_row, ((0, 0), (0, padding))),
        group=group,
        sizes=sizes,
        target=target,
        out_dtype=spec.out_dtype,
    )
    return y[:num_rows]


IMPL = Impl("mosaic_gpu", _why_not, run)
