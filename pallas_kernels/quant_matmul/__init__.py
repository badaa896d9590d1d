"""x @ dequant(q): int4, int8 and fp8 weights with scales per group or channel.

`prepare` converts a weight once, at load, to the layout that a target's kernels read;
`quant_matmul` runs in each step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import target as target_lib
from pallas_kernels.quant_matmul import mosaic_gpu, mosaic_tpu, xla
from pallas_kernels.quant_matmul.base import (
    FP8_DTYPES,
    Layout,
    QuantSpec,
    check_arguments,
    check_weight,
)
from pallas_kernels.quant_matmul.base import QuantWeight as QuantWeight

IMPLS = (mosaic_gpu.IMPL, mosaic_tpu.IMPL, xla.IMPL)
# XLA fuses a scale per output channel into its own product on every target, group scales on none.
CHANNEL_IMPLS = (xla.IMPL, mosaic_gpu.IMPL, mosaic_tpu.IMPL)


def quant_matmul(
    x: jax.Array,
    q: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    group: int | None = None,
    layout: Layout = "kn",
    out_dtype: Any = None,
    config: Any = None,
    impl: str = dispatch.AUTO,
) -> jax.Array:
    """Multiplies rows by a quantized weight: y[m, n] = sum_k x[m, k] w[k, n], with

        w[k, n] = (q[k, n] - zero[k // group, n]) * scale[k // group, n]

    Sums are f32. The kernels take bf16 rows and convert integer codes to bf16 (exact: 8 bits fit);
    on a GPU they convert fp8 codes, and then the rows, to f16, scaled by powers of two. From 128
    rows on they may scale weights before the product, which rounds them to bf16.

    Args:
      x: [..., K] f32, bf16 or f16.
      q: codes, int4, uint4, int8, e4m3 or e5m2: [K, N] in layout "kn", [N, K] in "nk". Which
        layout a target's kernels read: `preferred_layout`.
      scale: [G, N] f32, bf16 or f16; G = ceil(K / group), 1 for a scale per output channel.
      zero: [G, N] zero points in units of the codes, integers or floats; None: symmetric.
      group: inputs that share a scale; None: K / G.
      layout: layout of q.
      out_dtype: dtype of the result; None: x's.
      config: tiles of the named backend, instead of the tuned ones.
      impl: "auto", "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      [..., N].

    Raises:
      ValueError: shapes or dtypes disagree.
      NotImplementedError: the named backend cannot run these arguments here.
    """
    x, q, scale = map(jnp.asarray, (x, q, scale))
    zero = None if zero is None else jnp.asarray(zero)
    group = check_arguments(x, q, scale, zero, layout, group)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    spec = QuantSpec(group=group, layout=layout, out_dtype=out_dtype, config=config)
    *lead, num_inputs = x.shape
    args = (x.reshape(-1, num_inputs), q, scale, zero, spec)
    impls = CHANNEL_IMPLS if scale.shape[0] == 1 else IMPLS
    with jax.named_scope("quant_matmul"):
        y = dispatch.pick("quant_matmul", impls, impl, *args).run(*args)
    return y.reshape(*lead, y.shape[-1])


def preferred_layout(target: target_lib.Target | None = None) -> Layout:
    """Returns the layout of codes that the kernels of `target` (default: the current one) read.

    "nk" on GPUs: the copy engine reads the inputs of an output as one contiguous row. "kn" on
    TPUs, whose tiles run along the outputs, and on CPUs, where a group is then contiguous.
    """
    target = target or target_lib.current()
    return "nk" if target.kind == "gpu" else "kn"


def prepare(
    q: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    group: int | None = None,
    layout: Layout = "kn",
    target: target_lib.Target | None = None,
) -> QuantWeight:
    """Converts a weight, once at load, to the layout that `target` reads.

    Codes are transposed to the preferred layout; uint4 codes become int4 (8 is subtracted from
    codes and zero points); int4 becomes int8 on a CPU, which has no 4-bit arithmetic. The weight's
    values do not change.

    Args:
      q: codes in `layout`; scale, zero, group: as for `quant_matmul`.
      layout: layout of the given `q`.
      target: the chip; None: the current one.

    Raises:
      ValueError: shapes or dtypes disagree.
    """
    q, scale = map(jnp.asarray, (q, scale))
    zero = None if zero is None else jnp.asarray(zero)
    group = check_weight(q, scale, zero, layout, group)
    target = target or target_lib.current()
    if q.dtype == jnp.uint4:
        q = (q.astype(jnp.int8) - jnp.int8(8)).astype(jnp.int4)
        old = jnp.zeros(scale.shape, jnp.float32) if zero is None else zero.astype(jnp.float32)
        zero = old - 8
    if target.kind == "cpu" and jnp.dtype(q.dtype) not in FP8_DTYPES:
        q = q.astype(jnp.int8)
    wanted = preferred_layout(target)
    if wanted != layout:
        q = q.T
    if zero is not None and not jnp.issubdtype(zero.dtype, jnp.floating):
        zero = zero.astype(jnp.bfloat16)  # exact up to 256
    return QuantWeight(q, scale, zero, group, wanted)
