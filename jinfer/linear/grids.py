"""The grids that weights are rounded to: scales, zero points, codes. Knows no pytree or file.

`w[i, o] = (q[i, o] - zero[i // g, o]) * scale[i // g, o]` with signed codes q. Integer grids follow
GPTQ (Frantar et al. 2022), NF4 Dettmers et al. 2023, FP8 Micikevicius et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from jinfer.config.quant_format import CODEBOOKS, FP8_MAX, TENSOR, QFormat

Grid = Literal["full", "restricted"]


FP8_DTYPES = {"fp8-e4m3": jnp.float8_e4m3fn, "fp8-e5m2": jnp.float8_e5m2}


def split_groups(x: Array, group: int) -> Array:
    """[..., I, O] -> [..., G, g, O]; a short last group is padded with zeros."""
    *lead, num_inputs, num_outputs = x.shape
    num_groups = -(-num_inputs // group)
    pad = num_groups * group - num_inputs
    if pad:
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, pad), (0, 0)])
    return x.reshape(*lead, num_groups, group, num_outputs)


def expand_groups(per_group: Array, fmt: QFormat, num_inputs: int, num_outputs: int) -> Array:
    """Scales or zeros [..., G, O'] -> one a row, [..., I, O'] (O' = 1 stays for TENSOR)."""
    if fmt.block > 1:
        per_group = jnp.repeat(per_group, fmt.block, axis=-1)[..., :num_outputs]
    if per_group.shape[-2] == 1:
        return per_group
    return jnp.repeat(per_group, fmt.group_size(num_inputs), axis=-2)[..., :num_inputs, :]


def reduce_groups(x: Array, fmt: QFormat, reduce: Callable[..., Array]) -> Array:
    """Reduces [..., I, O] over the weights that share a scale, to the scale's shape."""
    *_, num_inputs, num_outputs = x.shape
    out = reduce(split_groups(x, fmt.group_size(num_inputs)), axis=-2)  # [..., G, O]
    if fmt.block == 1 and fmt.group != TENSOR:
        return out
    width = fmt.block if fmt.block > 1 else num_outputs
    out = reduce(split_groups(jnp.swapaxes(out, -1, -2), width), axis=-2)
    return jnp.swapaxes(out, -1, -2)


def find_scales(
    w: Array, fmt: QFormat, *, grid: Grid = "full", scale_dtype: Any = jnp.float32
) -> tuple[Array, Array | None]:
    """Scales and zero points of `w` from the extremes of each group; no search.

    Integers: symmetric "full" s = 2 amax / (2^b - 1), "restricted" s = amax / (2^(b-1) - 1);
    asymmetric s = (max - min) / (2^b - 1) with the range widened to hold 0, zero rounded to a code
    (GPTQ and compressed-tensors). fp8: amax / 448 (57344). Codebooks: amax. An all-zero group takes
    the range -1..1.

    Args:
      w: [..., I, O] f32.
      fmt: the target.
      grid: which symmetric integer grid.
      scale_dtype: storage dtype; codes must be found with the rounded scale, so round it here.

    Returns:
      scale of `fmt.scale_shape`, and zero (int8, signed; floats if fmt.float_zero) or None.
    """
    # A short last group is padded with zeros: they change nothing, since the range holds 0 anyway.
    low, high = reduce_groups(w, fmt, jnp.min), reduce_groups(w, fmt, jnp.max)
    return scales_from_range(low, high, fmt, grid=grid, scale_dtype=scale_dtype)


def scales_from_range(
    low: Array, high: Array, fmt: QFormat, *, grid: Grid = "full", scale_dtype: Any = jnp.float32
) -> tuple[Array, Array | None]:
    """As `find_scales`, from given extremes (of any shape)."""
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    empty = (low == 0) & (high == 0)
    # A float zero point may lie between codes: there 0..1 keeps an empty group exactly 0.
    low = jnp.where(empty, 0.0 if fmt.float_zero else -1.0, low)
    high = jnp.where(empty, 1.0, high)
    amax = jnp.maximum(-low, high)
    if fmt.kind in FP8_DTYPES:
        return _round_scale(divide(amax, FP8_MAX[fmt.kind]), scale_dtype), None
    if fmt.kind in CODEBOOKS:
        return _round_scale(amax, scale_dtype), None
    steps = 2**fmt.bits - 1
    if fmt.symmetric:
        restricted = grid == "restricted"
        scale = divide(amax, 2 ** (fmt.bits - 1) - 1) if restricted else divide(2 * amax, steps)
        return _round_scale(scale, scale_dtype), None
    scale = _round_scale(divide(high - low, steps), scale_dtype)
    least, most = fmt.code_range
    zero = least - divide(low, scale.astype(jnp.float32))
    if fmt.float_zero:
        return scale, zero
    return scale, jnp.clip(jnp.round(zero), least, most).astype(jnp.int8)


def divide(a: Array, b: Array | float) -> Array:
    """a / b, correctly rounded in jitted code too, for finite `a`.

    XLA turns a division by a constant or a broadcast into a product with a rounded reciprocal. One
    ulp decides at the ties that every symmetric group has (its largest weight / s = -7.5), so codes
    would depend on the context that a program is compiled in. `a * 0` makes b neither.
    """
    return a / (b + a * 0.0)


def _round_scale(scale: Array, dtype: Any) -> Array:
    # A scale that underflows would divide by zero; one that overflows is a weight past 1e5.
    info = jnp.finfo(dtype)
    smallest = float(info.smallest_subnormal) if dtype == jnp.float16 else float(info.tiny)
    return jnp.clip(scale, smallest, float(info.max)).astype(dtype)


def encode(w: Array, scale: Array, zero: Array | None, fmt: QFormat) -> Array:
    """Nearest codes of `w` (ties to even), clipped to the format's range; the form of `codes()`.

    Args:
      w: [..., I, O] f32.
      scale: one a row and output, or broadcastable: use `expand_groups`.
      zero: likewise, or None.
      fmt: the format.
    """
    ratio = divide(w, scale.astype(jnp.float32))
    if fmt.kind in FP8_DTYPES:
        # XLA turns an overflowing cast into NaN (e4m3) or infinity (e5m2): clip first.
        return jnp.clip(ratio, -FP8_MAX[fmt.kind], FP8_MAX[fmt.kind]).astype(FP8_DTYPES[fmt.kind])
    if fmt.kind in CODEBOOKS:
        book = CODEBOOKS[fmt.kind]
        order = np.argsort(book, kind="stable")
        middles = (book[order][1:] + book[order][:-1]) / 2
        rank = jnp.zeros(ratio.shape, jnp.int8)
        for middle in middles:
            rank = rank + (ratio > middle).astype(jnp.int8)
        return jnp.asarray(order.astype(np.int8))[rank]
    least, most = fmt.code_range
    if zero is None:
        codes = jnp.round(ratio)
    elif fmt.float_zero:
        codes = jnp.round(ratio + zero)
    else:
        codes = jnp.round(ratio) + zero.astype(jnp.float32)
    return jnp.clip(codes, least, most).astype(jnp.int8)


def decode(codes: Array, scale: Array, zero: Array | None, fmt: QFormat) -> Array:
    """f32 values of `codes` (as `codes()` gives them); scale and zero broadcastable to them."""
    if fmt.kind in CODEBOOKS:
        values = jnp.asarray(CODEBOOKS[fmt.kind])[codes]
    else:
        values = codes.astype(jnp.float32)
    if zero is not None:
        values = values - zero.astype(jnp.float32)
    return values * scale.astype(jnp.float32)
