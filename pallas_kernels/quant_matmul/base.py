"""Shared by all backends of the quantized matmul: the static part of a call, and its checks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import whole_number

Layout = Literal["kn", "nk"]

INT_DTYPES = tuple(jnp.dtype(t) for t in (jnp.int4, jnp.uint4, jnp.int8))
FP8_DTYPES = tuple(jnp.dtype(t) for t in (jnp.float8_e4m3fn, jnp.float8_e5m2))
FLOAT_DTYPES = tuple(jnp.dtype(t) for t in (jnp.float32, jnp.bfloat16, jnp.float16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The static part of a call; see `quant_matmul` for the meaning of each field."""

    group: int
    layout: Layout
    out_dtype: Any
    config: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantWeight:
    """A quantized weight in the layout that a target's kernels read; made once by `prepare`.

    Attributes:
      q: codes, [K, N] (layout "kn") or [N, K] ("nk": the inputs of one output are contiguous).
      scale: [G, N].
      zero: [G, N] or None.
      group: inputs that share a scale (static).
      layout: layout of q (static).
    """

    q: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    group: int = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})


def describe(x: Any) -> str:
    """Returns an array's type for messages: "bfloat16[8, 4096]"."""
    return f"{x.dtype}{list(x.shape)}"


def shape_kn(q: Any, layout: str) -> tuple[int, int]:
    """Returns (K, N) of codes stored in `layout`."""
    return (q.shape[0], q.shape[1]) if layout == "kn" else (q.shape[1], q.shape[0])


def find_group(num_inputs: int, num_groups: int, group: int | None) -> int:
    """Returns the given group size, or K / G if none is given.

    Raises:
      ValueError: none is given and G does not divide K, or it does not make G groups of K inputs.
    """
    if group is None:
        if 0 in (num_groups, num_inputs) or num_inputs % num_groups:
            raise ValueError(
                f"scale has {num_groups} groups, which do not divide K={num_inputs}; pass group="
            )
        return num_inputs // num_groups
    group = whole_number("group", group)
    if group <= 0 or -(-num_inputs // group) != num_groups:
        raise ValueError(
            f"K={num_inputs} inputs in groups of {group} need {-(-num_inputs // max(group, 1))} "
            f"rows of scales, got {num_groups}; pass the group that the weight was quantized with"
        )
    return group


def check_weight(q: Any, scale: Any, zero: Any, layout: str, group: int | None) -> int:
    """Returns the group size, or raises a ValueError that says what is wrong with the weight."""
    if layout not in ("kn", "nk"):
        raise ValueError(f"layout must be 'kn' ([K, N]) or 'nk' ([N, K]), got {layout!r}")
    if q.ndim != 2 or jnp.dtype(q.dtype) not in INT_DTYPES + FP8_DTYPES:
        raise ValueError(
            f"q must be int4, uint4, int8, float8_e4m3fn or float8_e5m2 with 2 axes, "
            f"got {describe(q)}; a weight per expert needs a call each, or jax.vmap"
        )
    num_inputs, num_outputs = shape_kn(q, layout)
    for name, x in (("scale", scale), ("zero", zero)):
        if x is not None and (x.ndim != 2 or x.shape[1] != num_outputs):
            raise ValueError(
                f"{name} must be [G, N={num_outputs}] for q {describe(q)} in layout {layout!r}, "
                f"got {describe(x)}; per channel is [1, N]"
            )
    if jnp.dtype(scale.dtype) not in FLOAT_DTYPES:
        raise ValueError(f"scale must be f32, bf16 or f16, got {describe(scale)}")
    if zero is not None:
        if zero.shape != scale.shape:
            raise ValueError(f"zero must have the shape of scale {list(scale.shape)}, "
                             f"got {describe(zero)}")  # fmt: skip
        if not any(jnp.issubdtype(zero.dtype, t) for t in (jnp.integer, jnp.floating)):
            raise ValueError(f"zero must be integers or floats, got {describe(zero)}")
        if jnp.dtype(q.dtype) in FP8_DTYPES:
            raise ValueError(f"fp8 weights have no zero points, got {describe(zero)}; pass None")
    return find_group(num_inputs, scale.shape[0], group)


def check_arguments(x: Any, q: Any, scale: Any, zero: Any, layout: str, group: int | None) -> int:
    """Returns the group size, or raises a ValueError that says what is wrong."""
    group = check_weight(q, scale, zero, layout, group)
    num_inputs, _ = shape_kn(q, layout)
    if x.ndim < 1 or jnp.dtype(x.dtype) not in FLOAT_DTYPES or x.shape[-1] != num_inputs:
        raise ValueError(
            f"x must be f32, bf16 or f16 [..., K={num_inputs}] for q {describe(q)} in layout "
            f"{layout!r}, got {describe(x)}"
        )
    return group
