"""fp8 rows times fp8 weights, with scales per tensor, per token and channel, or per block.

XLA's own fp8 GEMM is preferred; the kernels are for scales per block of inputs, which it lacks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import target as target_lib
from pallas_kernels.dispatch import whole_number
from pallas_kernels.fp8_matmul import mosaic_gpu, mosaic_tpu, xla
from pallas_kernels.fp8_matmul.base import (
    Fp8Spec,
    check_arguments,
    check_weight,
    rows_of_scales,
)
from pallas_kernels.fp8_matmul.base import Fp8Weight as Fp8Weight
from pallas_kernels.quant_matmul.base import (
    FLOAT_DTYPES,
    FP8_DTYPES,
    Layout,
    describe,
    shape_kn,
)

IMPLS = (xla.IMPL, mosaic_gpu.IMPL, mosaic_tpu.IMPL)
# XLA has no product with scales per block of inputs: it would write the dequantized weight.
BLOCK_IMPLS = (mosaic_gpu.IMPL, mosaic_tpu.IMPL, xla.IMPL)
# Smaller activations count as zeros, so that scales are normal numbers, which no CPU flushes to 0.
_TINY = 1e-30


def fp8_matmul(
    x: jax.Array,
    w: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    *,
    block: int | None = None,
    layout: Layout = "kn",
    out_dtype: Any = jnp.bfloat16,
    config: Any = None,
    impl: str = dispatch.AUTO,
) -> jax.Array:
    """Computes y[m, n] = sum_k x[m, k] x_scale[m, k] w[k, n] w_scale[k, n], sums in f32.

    Example with block = 128, K = 384, N = 256, for one row: x_scale [1, 3], w_scale [3, 2];
    x[0, 130] is worth x[0, 130] * x_scale[0, 1], w[130, 5] is worth w[130, 5] * w_scale[1, 0].

    Args:
      x: [..., K] e4m3 or e5m2, from `quantize_activation`.
      w: e4m3 or e5m2 (a storage format; e4m3 is what the kernels multiply): [K, N], or [N, K] in
        layout "nk". Which one a target reads: `prepare`.
      x_scale: [] or [..., 1] (per token); with `block` [..., ceil(K / block)].
      w_scale: [], [N] or [1, N]; with `block` [ceil(K / block), ceil(N / block)], or expanded along
        the outputs (as `prepare` does once) [ceil(K / block), N].
      block: inputs that share a scale, 128 in DeepSeek's checkpoints; None: no blocks.
      layout: layout of w.
      out_dtype: dtype of the result.
      config: tiles of the named backend, instead of the tuned ones.
      impl: "auto", "xla", "mosaic_gpu" or "mosaic_tpu".

    Returns:
      [..., N].

    Raises:
      ValueError: shapes or dtypes disagree.
      NotImplementedError: the named backend cannot run these arguments here.
    """
    x, w, x_scale, w_scale = map(jnp.asarray, (x, w, x_scale, w_scale))
    check_arguments(x, w, x_scale, w_scale, layout, block)
    spec = Fp8Spec(block=block, layout=layout, out_dtype=jnp.dtype(out_dtype), config=config)
    *lead, num_inputs = x.shape
    if x_scale.ndim:
        x_scale = x_scale.reshape(-1, x_scale.shape[-1])
    args = (x.reshape(-1, num_inputs), w, x_scale, w_scale, spec)
    impls = IMPLS if block is None else BLOCK_IMPLS
    with jax.named_scope("fp8_matmul"):
        y = dispatch.pick("fp8_matmul", impls, impl, *args).run(*args)
    return y.reshape(*lead, y.shape[-1])


def quantize_activation(
    x: jax.Array,
    scale: jax.Array | None = None,
    *,
    block: int | None = None,
    dtype: Any = jnp.float8_e4m3fn,
) -> tuple[jax.Array, jax.Array]:
    """Rounds x to fp8: x ~ q * scale.

    Values are clipped to the largest finite fp8 number before the cast, since XLA's cast turns
    values beyond e4m3's 448 into NaN. NaN stays NaN.

    Args:
      x: [..., K] f32, bf16 or f16.
      scale: a calibrated f32 scale []; None: each row's, or each block's, max |x| / max(dtype).
      block: inputs of a row that share a scale; None: the row.
      dtype: e4m3 or e5m2.

    Returns:
      (q [..., K], scale f32 [..., 1], [..., ceil(K / block)], or [] as given). Rows of zeros,
      or all below 1e-30, get scale 1.

    Raises:
      ValueError: `dtype` is not fp8, x is not a float array, `block` is not positive, or both
        `scale` and `block` are given.
    """
    if jnp.dtype(dtype) not in FP8_DTYPES:
        raise ValueError(f"dtype must be float8_e4m3fn or float8_e5m2, got {jnp.dtype(dtype)}")
    x = jnp.asarray(x)
    if x.ndim < 1 or jnp.dtype(x.dtype) not in FLOAT_DTYPES:
        raise ValueError(f"x must be f32, bf16 or f16 [..., K], got {describe(x)}")
    if block is not None and whole_number("block", block) <= 0:
        raise ValueError(f"block must be positive or None, got {block}")
    scale = None if scale is None else jnp.asarray(scale)
    if scale is not None and (block is not None or scale.ndim):
        raise ValueError(
            f"a calibrated scale is one number for x, got scale {list(scale.shape)} and "
            f"block {block}; pass a scale of shape [], or block, or neither"
        )
    largest = float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    if scale is not None:
        scales = scale.astype(jnp.float32)
        scaled = x / scales
    else:
        *lead, num_inputs = x.shape
        size = block or num_inputs
        padding = [(0, 0)] * len(lead) + [(0, -num_inputs % size)]
        num_blocks = -(-num_inputs // size)
        blocks = jnp.pad(x, padding).reshape(*lead, num_blocks, size)
        top = jnp.max(jnp.abs(blocks), axis=-1)
        scales = jnp.where(top < _TINY, jnp.float32(1), top / largest)
        blocks = blocks / jnp.broadcast_to(scales[..., None], blocks.shape)
        scaled = blocks.reshape(*lead, num_blocks * size)[..., :num_inputs]
    return jnp.clip(scaled, -largest, largest).astype(dtype), scales


def prepare(
    w: jax.Array,
    w_scale: jax.Array,
    *,
    block: int | None = None,
    layout: Layout = "kn",
    target: target_lib.Target | None = None,
) -> Fp8Weight:
    """Converts a weight, once at load, to the layout that `target` (default: the current) reads.

    "nk" on GPUs, whose fp8 products want both operands contiguous along K; "kn" elsewhere. Block
    scales become a row of N scales per block of inputs.

    Raises:
      ValueError: shapes or dtypes disagree.
    """
    w, w_scale = map(jnp.asarray, (w, w_scale))
    check_weight(w, w_scale, layout, block)
    target = target or target_lib.current()
    _, num_outputs = shape_kn(w, layout)
    wanted: Layout = "nk" if target.kind == "gpu" else "kn"
    if block is not None:
        scale = rows_of_scales(w_scale, num_outputs, block)
    else:
        scale = w_scale.astype(jnp.float32)
        scale = scale if scale.ndim == 0 else scale.reshape(1, -1)
    return Fp8Weight(w if wanted == layout else w.T, scale, block, wanted)
