"""HQQ: half-quadratic quantization, without data; on one matrix.

Badri and Shaji 2023 (mobiusml.github.io/hqq_blog). Finds a float zero point per group that
minimizes |W - Q|_p with p = 0.7: many exact weights and few far off, rather than all a little off.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jinfer.config.fields import require
from jinfer.config.quant_format import TENSOR, QFormat
from jinfer.linear.grids import expand_groups, find_scales, reduce_groups
from jinfer.linear.qtensor import QTensor, check_finite, check_scales, check_weight, read_target
from jinfer.quant.methods.rtn import round_with

NUM_STEPS = 20
NORM = 0.7
BETA = 10.0
KAPPA = 1.01


def quantize_hqq(w: Array, fmt: QFormat, *, scale_dtype: Any = jnp.float32) -> QTensor:
    """Rounds with zero points fitted to the weights.

    Alternates W_e = shrink(W - W_q), which takes up the largest errors, and z = mean over the group
    of (q - (W - W_e) / s); stops when the mean error does not decrease.

    Args:
      w: [I, O].
      fmt: an asymmetric format; `-asym` is read as `-asymf`, since zero points are floats.
      scale_dtype: storage dtype of scales and zero points.

    Raises:
      ValueError: a symmetric format, or NaN in `w`.
    """
    check_weight(w)
    require(w.ndim == 2, f"a weight is [I, O], got shape {list(w.shape)}")
    scale_dtype = read_target(fmt, scale_dtype)
    require(
        fmt.kind == "int" and not fmt.symmetric and fmt.block == 1 and fmt.group != TENSOR,
        f"HQQ fits zero points: it takes an asymmetric format such as int4-g64-asymf, got {fmt}",
    )
    check_finite(w, "weight")
    fmt = dataclasses.replace(fmt, float_zero=True)
    return check_scales(_solve(w, fmt, scale_dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _solve(w: Array, fmt: QFormat, scale_dtype: Any) -> QTensor:
    w = w.astype(jnp.float32)
    num_inputs, num_outputs = w.shape
    least, most = fmt.code_range
    group = fmt.group_size(num_inputs)
    scale, zero = find_scales(w, fmt, scale_dtype=scale_dtype)
    assert zero is not None
    if fmt.bits == 4:
        zero = jnp.round(zero)  # as in its code: a start on the grid
    rows = expand_groups(scale.astype(jnp.float32), fmt, num_inputs, num_outputs)
    sizes = reduce_groups(
        jnp.ones((num_inputs, 1), jnp.float32), dataclasses.replace(fmt, group=group), jnp.sum
    )

    def spread(z: Array) -> Array:
        return expand_groups(z, fmt, num_inputs, num_outputs)

    def codes_of(z: Array) -> Array:
        return jnp.clip(jnp.round(w / rows + spread(z)), least, most)

    def error_of(z: Array) -> Array:
        return jnp.mean(jnp.mean(jnp.abs(w - (codes_of(z) - spread(z)) * rows), axis=0))

    def step(i: Array, state):
        zero, best, error, is_done = state
        codes = codes_of(zero)
        residual = w - (codes - spread(zero)) * rows
        size = jnp.abs(residual)
        beta = BETA * KAPPA ** i.astype(jnp.float32)
        threshold = jnp.where(size == 0, 0.0, size ** (NORM - 1)) / beta
        explained = jnp.sign(residual) * jnp.maximum(size - threshold, 0.0)
        new = reduce_groups(codes - (w - explained) / rows, fmt, jnp.sum) / sizes
        new_error = error_of(new)
        is_better = ~is_done & (new_error < error)
        best = jnp.where(is_better, new, best)
        return new, best, jnp.where(is_better, new_error, error), is_done | ~is_better

    state = (zero, zero, error_of(zero), jnp.bool_(False))
    _, best, _, _ = lax.fori_loop(0, NUM_STEPS, step, state)
    return round_with(w, scale, best.astype(scale_dtype).astype(jnp.float32), fmt)
