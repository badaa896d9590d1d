"""Round to nearest, with an optional search of each group's range; on matrices, without data."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jinfer.config.fields import require
from jinfer.config.quant_format import FP8_MAX, QFormat
from jinfer.linear.grids import (
    Grid,
    decode,
    encode,
    expand_groups,
    reduce_groups,
    scales_from_range,
)
from jinfer.linear.qtensor import (
    QTensor,
    check_finite,
    check_scales,
    check_weight,
    from_codes,
    quantize,
    read_target,
)

NUM_SHRINKS = 80  # ranges tried: 100 %, 99 %, .. 21 % of the extremes
SHRINK_STEP = 0.01
NORM = 2.4


def search_scales(
    w: Array,
    fmt: QFormat,
    *,
    importance: Array | None = None,
    norm: float = NORM,
    grid: Grid = "full",
    scale_dtype: Any = jnp.float32,
) -> tuple[Array, Array | None]:
    """Scales and zero points that minimize sum |w - q|^norm of each group, by shrinking its range.

    The search of GPTQ's code (Frantar et al. 2022, arXiv:2210.17323): 80 ranges, from the extremes
    down to 21 % of them; the first of equals wins.

    Args:
      w: [I, O] f32.
      fmt: the target.
      importance: f32 [I], a factor on each input's errors (such as diag of X^T X), or None.
      norm: exponent of an error; 2.4 is that of GPTQ's code.
      grid: as in `find_scales`.
      scale_dtype: likewise.
    """
    num_inputs, num_outputs = w.shape
    low, high = reduce_groups(w, fmt, jnp.min), reduce_groups(w, fmt, jnp.max)

    def attempt(i: Array) -> tuple[Array, Array, Array | None]:
        p = 1 - i.astype(jnp.float32) * SHRINK_STEP
        scale, zero = scales_from_range(low * p, high * p, fmt, grid=grid, scale_dtype=scale_dtype)
        rows = expand_groups(scale, fmt, num_inputs, num_outputs)
        zeros = None if zero is None else expand_groups(zero, fmt, num_inputs, num_outputs)
        error = jnp.abs(decode(encode(w, rows, zeros, fmt), rows, zeros, fmt) - w)
        error = error * error if norm == 2 else error**norm
        if importance is not None:
            error = error * importance[:, None]
        return reduce_groups(error, fmt, jnp.sum), scale, zero

    def step(i: Array, best: tuple[Array, Array, Array | None]):
        new = attempt(i)
        is_better = new[0] < best[0]
        return jax.tree.map(lambda a, b: jnp.where(is_better, a, b), new, best)

    best = jax.lax.fori_loop(1, NUM_SHRINKS, step, attempt(jnp.int32(0)))
    return best[1], best[2]


def quantize_rtn(
    w: Array,
    fmt: QFormat,
    *,
    mse: bool = False,
    importance: Array | None = None,
    grid: Grid = "full",
    scale_dtype: Any = jnp.float32,
) -> QTensor:
    """Rounds each weight to its nearest code.

    Args:
      w: [I, O], any float dtype.
      fmt: the target.
      mse: search each group's range (`search_scales`) instead of taking its extremes.
      importance: see `search_scales`; only with `mse`.
      grid: symmetric integer grid, see `find_scales`.
      scale_dtype: storage dtype of the scales.

    Raises:
      ValueError: NaN or infinity in `w`; `importance` without `mse`; `mse` with double scales.
    """
    require(importance is None or mse, "importance weighs the search: it needs mse=True")
    check_weight(w)
    scale_dtype = read_target(fmt, scale_dtype, grid)
    if not mse:
        check_finite(w, "weight")
        return check_scales(_round(w, fmt, grid, scale_dtype))
    require(not fmt.double_quant, f"{fmt}: double scales round after any search; use mse=False")
    require(w.ndim == 2, f"a weight is [I, O], got shape {list(w.shape)}")
    check_finite(w, "weight")
    return check_scales(_search_and_round(w, importance, fmt, grid, scale_dtype))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _round(w: Array, fmt: QFormat, grid: Grid, scale_dtype: Any) -> QTensor:
    return quantize(w, fmt, grid=grid, scale_dtype=scale_dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _search_and_round(
    w: Array, importance: Array | None, fmt: QFormat, grid: Grid, scale_dtype: Any
) -> QTensor:
    w = w.astype(jnp.float32)
    scale, zero = search_scales(w, fmt, importance=importance, grid=grid, scale_dtype=scale_dtype)
    return round_with(w, scale, zero, fmt)


def round_with(w: Array, scale: Array, zero: Array | None, fmt: QFormat) -> QTensor:
    """Rounds `w` [..., I, O] f32 with given scales."""
    *_, num_inputs, num_outputs = w.shape
    rows = expand_groups(scale, fmt, num_inputs, num_outputs)
    zeros = None if zero is None else expand_groups(zero, fmt, num_inputs, num_outputs)
    return from_codes(encode(w, rows, zeros, fmt), scale, zero, fmt)


def with_static_inputs(x: QTensor, act_max: Array | float) -> QTensor:
    """The same weight with one scale for all of its inputs, found by calibration.

    Args:
      x: int8 or fp8 weight.
      act_max: largest |x| over calibration tokens; larger inputs will saturate.

    Raises:
      ValueError: a format that has no quantized inputs, or an act_max that is not positive.
    """
    act_max = jnp.asarray(act_max, jnp.float32)
    check_finite(act_max, "act_max")
    require(bool(act_max > 0), f"act_max must be positive, got {act_max}")
    fmt = dataclasses.replace(x.fmt, act="static")
    steps = 127.0 if fmt.kind == "int" else FP8_MAX[fmt.kind]
    return dataclasses.replace(x, fmt=fmt, act_scale=act_max / steps)
