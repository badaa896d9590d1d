"""x @ w for weights of 4 or 8 bits on CPUs, with rows rounded to int8."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.packed_matmul import native, xla
from pallas_kernels.packed_matmul.base import PackedWeight as PackedWeight
from pallas_kernels.packed_matmul.base import pack as pack
from pallas_kernels.packed_matmul.base import unpack as unpack

IMPLS = (native.IMPL, xla.IMPL)


def packed_matmul(x: jax.Array, w: PackedWeight, *, impl: str = dispatch.AUTO) -> jax.Array:
    """Returns x @ w in float32.

    Rows are rounded to int8, 32 inputs with one scale (amax / 127); sums of 32 products are exact,
    all else is f32. For normal inputs the relative rms error of a product is 0.5 %. NaN or infinity
    in a row makes all its results NaN.

    Args:
      x: [..., I] f32, bf16 or f16.
      w: the weight, made by `pack`.
      impl: "auto", "native" or "xla".

    Raises:
      ValueError: x has another number of inputs than w.
      NotImplementedError: the named backend cannot run these arguments here.
    """
    if x.shape[-1] != w.num_inputs:
        raise ValueError(f"x must be [..., {w.num_inputs}], got {list(x.shape)}")
    rows = x.reshape(-1, w.num_inputs)
    with jax.named_scope("packed_matmul"):
        y = dispatch.pick("packed_matmul", IMPLS, impl, rows, w).run(rows, w)
    return y.reshape(*x.shape[:-1], w.num_outputs)
