"""The quantized matmul on Hopper: codes become bf16 in registers and feed `wgmma` as its A operand.

fp8 codes, and then also rows of x, become f16 instead: the GPU converts fp8 to nothing else.
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
from pallas_kernels.quant_matmul.base import FP8_DTYPES, QuantSpec, describe, shape_kn
from pallas_kernels.quant_matmul.mosaic_gpu_kernel import persistent_matmul
from pallas_kernels.quant_matmul.schedule import Shape, num_bits
from pallas_kernels.tiles import QuantMatmulGpuTiles

OP = "quant_matmul.mosaic_gpu"
F32 = jnp.float32
CODES = (jnp.dtype(jnp.int4), jnp.dtype(jnp.int8), *FP8_DTYPES)


def _why_not(
    target: target_lib.Target, x: Any, q: Any, scale: Any, zero: Any, spec: QuantSpec
) -> str | None:
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    if not target.is_hopper and not compat.is_interpreting():
        return f"needs a Hopper GPU (sm_90a), the target is {target.name} ({target.arch})"
    if compat.is_interpreting() and (reason := compat.why_not_interpret("gpu")):
        return reason
    if spec.config is not None and not isinstance(spec.config, QuantMatmulGpuTiles):
        return f"takes QuantMatmulGpuTiles, got {type(spec.config).__name__}"
    if jnp.dtype(q.dtype) not in CODES:
        return f"reads int4, int8, e4m3 and e5m2 codes, got {q.dtype}; prepare() the weight"
    if spec.layout != "nk":
        return f"reads codes laid out [N, K], got layout {spec.layout!r}; prepare() the weight"
    if x.dtype != jnp.bfloat16 and not (x.dtype == jnp.float16 and q.dtype in FP8_DTYPES):
        return f"multiplies bf16 rows (f16 as well with fp8 codes), got {describe(x)}; cast x"
    if x.shape[0] == 0:
        return "x has no rows"
    if scale.dtype == jnp.float16:
        return "reads f32 and bf16 scales, got f16"
    if num_inputs % 64 or num_outputs % 32:
        return f"K must be a multiple of 64 and N of 32, got K={num_inputs}, N={num_outputs}"
    if scale.shape[0] > 1 and spec.group != 32 and spec.group % 64:
        return f"groups must be 32 or a multiple of 64 inputs, got {spec.group}"
    return None


def case_name(num_rows: int, q: Any, spec: QuantSpec, num_groups: int) -> str:
    """Returns the key in the table of measured tiles."""
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    group = f"g{spec.group}" if num_groups > 1 else "channel"
    rows = tiles_lib.bucket(num_rows)
    return f"M{rows} K{num_inputs} N{num_outputs} {jnp.dtype(q.dtype).name} {group}"


def ranked_tiles(
    num_rows: int, q: Any, spec: QuantSpec, num_groups: int, target: target_lib.Target
) -> list[QuantMatmulGpuTiles]:
    """Returns the tiles that fit, fastest by the model first."""
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    shape = Shape(
        num_rows=num_rows,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        w_bits=num_bits(q.dtype),
        group=spec.group if num_groups > 1 else num_inputs,
        instructions=2.7 if num_bits(q.dtype) == 4 else 2.2,
    )
    return shape.ranked(candidate_tiles(shape, jnp.dtype(q.dtype) in FP8_DTYPES), target)


def candidate_tiles(shape: Shape, is_fp8: bool) -> Iterator[QuantMatmulGpuTiles]:
    """Enumerates the tiles that fit the registers, for the model and for `scripts/autotune.py`.

    Of a thread's 232 registers, the accumulator takes rows * block_m / 128, twice that if products
    are scaled. Scaled weights could exceed f16's range, so with fp8 codes the products are scaled.
    """
    largest = min(tiles_lib.bucket(shape.num_rows), 256)
    for block_m, rows, block_k, splits in itertools.product(
        {largest, min(largest, 128), min(largest, 64)}, (64, 128), (256, 128, 64), (1, 2, 4, 8, 16)
    ):
        scale_weights = block_m >= 128 and not is_fp8
        accumulators = rows * block_m // 128 * (1 if scale_weights else 2)
        operand = rows * min(block_k, 128) // 256
        row_bytes = block_k * shape.w_bits // 8
        fits = accumulators + operand <= 192 and row_bytes <= 128
        group = shape.group
        if fits and shape.num_inputs % block_k == 0 and not (block_k % group and group % block_k):
            yield QuantMatmulGpuTiles(
                block_m=block_m,
                rows=rows,
                block_k=block_k,
                scale_weights=scale_weights,
                splits=splits,
            )


def run(
    x: jax.Array, q: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
    """Computes x [M, K] @ dequant(q [N, K])^T."""
    target = target_lib.current()
    target = target if target.is_hopper else target_lib.TARGETS["h100"]  # simulated on a CPU
    num_rows, num_groups = x.shape[0], scale.shape[0]
    sizes = tiles_lib.choose(
        OP,
        target,
        case_name(num_rows, q, spec, num_groups),
        QuantMatmulGpuTiles,
        spec.config,
        lambda: ranked_tiles(num_rows, q, spec, num_groups, target)[0],
    )
    exponent = None
    if jnp.dtype(q.dtype) in FP8_DTYPES:
        x, exponent = _to_f16(x)
    if num_rows > 8 and num_rows % 8:  # the copy engine's tiles are 8 rows high
        x = jnp.pad(x, ((0, -num_rows % 8), (0, 0)))
    if zero is not None and not jnp.issubdtype(zero.dtype, jnp.floating):
        zero = zero.astype(jnp.bfloat16)
    out_dtype = F32 if exponent is not None else spec.out_dtype
    y = persistent_matmul(
        x,
        q,
        scale,
        zero=zero,
        group=spec.group if num_groups > 1 else q.shape[1],
        sizes=sizes,
        target=target,
        out_dtype=out_dtype,
    )[:num_rows]
    if exponent is not None:
        y = jnp.ldexp(y, exponent)
    return y.astype(spec.out_dtype)


def _to_f16(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scales each row by a power of two to a largest entry in [1, 2), which f16 can represent."""
    if x.dtype == jnp.float16:
        return x, None
    x = x.astype(F32)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    return jnp.ldexp(x, 1 - exponent).astype(jnp.float16), exponent - 1


IMPL = Impl("mosaic_gpu", _why_not, run)
