"""The fp8 matmul on TPUs for 128 x 128 block scales: blocks of fp8 become bf16 in VMEM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels import target as target_lib
from pallas_kernels import tiles as tiles_lib
from pallas_kernels.dispatch import Impl
from pallas_kernels.fp8_matmul.base import Fp8Spec, rows_of_scales
from pallas_kernels.quant_matmul.base import FP8_DTYPES, shape_kn
from pallas_kernels.quant_matmul.mosaic_tpu import block_matmul, largest_block
from pallas_kernels.tiles import QuantMatmulTpuTiles

OP = "fp8_matmul.mosaic_tpu"


def _why_not(
    target: target_lib.Target, x: Any, w: Any, x_scale: Any, w_scale: Any, spec: Fp8Spec
) -> str | None:
    num_inputs, num_outputs = shape_kn(w, spec.layout)
    if target.kind != "tpu" and not compat.is_interpreting():
        return f"needs a TPU, the target is {target.name}"
    if compat.is_interpreting() and (reason := compat.why_not_interpret("tpu")):
        return reason
    if spec.config is not None and not isinstance(spec.config, QuantMatmulTpuTiles):
        return f"takes QuantMatmulTpuTiles, got {type(spec.config).__name__}"
    if spec.block is None:
        return "scales per tensor, token and channel are left to XLA, which fuses them"
    if spec.layout != "kn":
        return f"reads weights laid out [K, N], got layout {spec.layout!r}; prepare() the weight"
    if jnp.dtype(x.dtype) not in FP8_DTYPES or jnp.dtype(w.dtype) not in FP8_DTYPES:
        return f"multiplies fp8 by fp8, got {x.dtype} by {w.dtype}"
    if x.shape[0] == 0:
        return "x has no rows"
    if spec.block % 128 or num_inputs % spec.block or num_outputs % 128:
        return (
            f"blocks must be a multiple of 128 that divides K, and N one of 128, got block "
            f"{spec.block}, K={num_inputs}, N={num_outputs}"
        )
    return None


def heuristic_tiles(
    num_rows: int, num_inputs: int, num_outputs: int, block: int
) -> QuantMatmulTpuTiles:
    """Returns tiles if none were measured: about a megabyte of weights per step."""
    block_m = min(max(tiles_lib.bucket(num_rows), 32), 256)
    return QuantMatmulTpuTiles(
        block_m=block_m,
        block_n=largest_block(num_outputs, 128, 1024 if block_m <= 64 else 512),
        block_k=largest_block(num_inputs, block, 1024),
    )


def run(
    x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array, spec: Fp8Spec
) -> jax.Array:
    """Computes (x * x_scale) @ (w * w_scale), x [M, K], w [K, N]."""
    assert spec.block is not None
    (num_rows, num_inputs), num_outputs, block = x.shape, w.shape[1], spec.block
    sizes = tiles_lib.choose(
        OP,
        target_lib.current(),
        f"M{tiles_lib.bucket(num_rows)} K{num_inputs} N{num_outputs} b{block}",
        QuantMatmulTpuTiles,
        spec.config,
        lambda: heuristic_tiles(num_rows, num_inputs, num_outputs, block),
    )
    return block_matmul(
        x,
        w,
        rows_of_scales(w_scale, num_outputs, block),
        x_scale=x_scale.astype(jnp.float32).T,
        group=block,
        sizes=sizes,
        out_dtype=spec.out_dtype,
    )


IMPL = Impl("mosaic_tpu", _why_not, run)
