"""Shared by all backends of the fp8 matmul: the static part of a call, and its checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import whole_number
from pallas_kernels.quant_matmul.base import FP8_DTYPES, Layout, describe, shape_kn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Spec:
    """The static part of a call; see `fp8_matmul` for the meaning of each field."""

    block: int | None
    layout: Layout
    out_dtype: Any
    config: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """An fp8 weight in the layout that a target reads; made once by `prepare`.

    Attributes:
      w: [K, N] (layout "kn") or [N, K] ("nk").
      scale: f32 [], [1, N], or with `block` [K / block, N]: a row per block of inputs.
      block: inputs that share a scale, or None (static).
      layout: layout of w (static).
    """

    w: jax.Array
    scale: jax.Array
    block: int | None = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})


def scale_shapes(num_inputs: int, num_outputs: int, block: int | None) -> list[tuple[int, ...]]:
    """Returns the shapes that a weight's scale may have."""
    if block is None:
        return [(), (num_outputs,), (1, num_outputs)]
    rows = -(-num_inputs // block)
    return [(rows, -(-num_outputs // block)), (rows, num_outputs)]


def check_weight(w: Any, w_scale: Any, layout: str, block: int | None) -> None:
    """Raises a ValueError that says what is wrong with the weight."""
    if layout not in ("kn", "nk"):
        raise ValueError(f"layout must be 'kn' ([K, N]) or 'nk' ([N, K]), got {layout!r}")
    if w.ndim != 2 or jnp.dtype(w.dtype) not in FP8_DTYPES:
        raise ValueError(f"w must be float8_e4m3fn or float8_e5m2 with 2 axes, got {describe(w)}")
    if block is not None and whole_number("block", block) <= 0:
        raise ValueError(f"block must be positive or None, got {block}")
    shapes = scale_shapes(*shape_kn(w, layout), block)
    if w_scale.shape not in shapes or not jnp.issubdtype(w_scale.dtype, jnp.floating):
        raise ValueError(
            f"w_scale must be a float array of shape {' or '.join(str(list(s)) for s in shapes)} "
            f"for w {describe(w)}, layout {layout!r}, block {block}; got {describe(w_scale)}"
        )


def check_arguments(
    x: Any, w: Any, x_scale: Any, w_scale: Any, layout: str, block: int | None
) -> None:
    """Raises a ValueError that says what is wrong."""
    check_weight(w, w_scale, layout, block)
    num_inputs, _ = shape_kn(w, layout)
    if x.ndim < 1 or jnp.dtype(x.dtype) not in FP8_DTYPES or x.shape[-1] != num_inputs:
        raise ValueError(
            f"x must be float8_e4m3fn or float8_e5m2 [..., K={num_inputs}], got {describe(x)}; "
            "make it with quantize_activation()"
        )
    *lead, _ = x.shape
    shapes = [(), (*lead, 1)] if block is None else [(*lead, -(-num_inputs // block))]
    if x_scale.shape not in shapes or not jnp.issubdtype(x_scale.dtype, jnp.floating):
        raise ValueError(
            f"x_scale must be a float array of shape {' or '.join(str(list(s)) for s in shapes)} "
            f"for x {describe(x)}, block {block}; got {describe(x_scale)}"
        )


def rows_of_scales(w_scale: jax.Array, num_outputs: int, block: int) -> jax.Array:
    """Returns scales per block of inputs and per output, f32 [K / block, N]."""
    w_scale = w_scale.astype(jnp.float32)
    if w_scale.shape[1] == num_outputs:
        return w_scale
    return jnp.repeat(w_scale, block, axis=1)[:, :num_outputs]
