"""GPTQ on one matrix and its Hessian; knows nothing of models, calibration text or files.

Frantar et al. 2022 (arXiv:2210.17323). One jitted program a shape: a scan over blocks of inputs,
in each a loop over the block's inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from jinfer.config import require
from jinfer.qformat import TENSOR, Grid, QFormat, decode, encode
from jinfer.qtensor import QTensor, check_finite, from_codes
from jinfer.quant.factor import inverse_factor
from jinfer.quant.rtn import pick_scales

Order = Literal["none", "act", "group"]

BLOCK = 128  # inputs whose errors are passed on to the rest together
PART = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GPTQInfo:
    """What happened to one weight.

    Attributes:
      damp: f32 [], fraction of mean(diag H) that made H positive definite.
      num_retries: i32 [], tries that failed before.
      fell_back: bool [], no damping helped: the result is round-to-nearest.
      num_dead: i32 [], inputs that never fired; their weights are zero.
    """

    damp: Array
    num_retries: Array
    fell_back: Array
    num_dead: Array


def quantize_gptq(
    w: Array,
    hessian: Array,
    fmt: QFormat,
    *,
    order: Order = "act",
    static_groups: bool = True,
    damp: float = 0.01,
    mse: bool = False,
    grid: Grid = "full",
    scale_dtype: Any = jnp.float32,
) -> tuple[QTensor, GPTQInfo]:
    """Quantizes `w` input by input, passing each rounding error on to the inputs still open.

    Minimizes ||X (W - Q)||^2 with H = X^T X; Frantar et al. 2022 (arXiv:2210.17323), algorithm 1.
    Outputs are independent: weights that share an input may be concatenated along O and solved at
    once. Pure and bit-deterministic; `solve` is the same without checks, for vmap.

    Args:
      w: [I, O], the dense weight.
      hessian: [I, I] f32, sum of x x^T over calibration tokens (its scale does not matter).
      fmt: target format, groups or channel; the last group may be short.
      order: "none": as stored; "act": by falling diag H; "group": by falling diag H inside each
        group, groups by their largest (GPTQModel's group-aware order), so groups stay together.
      static_groups: find the scales from the original weight, before any error is passed on. Needed
        for "act" if groups are to stay sequential; without it the result carries a permutation.
      damp: fraction of mean(diag H) added to the diagonal.
      mse: search each group's range instead of taking its extremes.
      grid: symmetric integer grid, see `qformat.find_scales`.
      scale_dtype: storage dtype of the scales.

    Returns:
      QTensor of logical shape [I, O], and what happened. Inputs that never fired (diag H = 0) get
      zero weights. Where no damping makes H positive definite, round-to-nearest (`fell_back`).

    Raises:
      ValueError: shapes disagree, NaN or infinity in `w` or `hessian`, or a format whose outputs
        share scales.
    """
    require(w.ndim == 2, f"a weight is [I, O], got shape {list(w.shape)}")
    num_inputs = w.shape[0]
    require(
        hessian.shape == (num_inputs, num_inputs),
        f"hessian must be [{num_inputs}, {num_inputs}] for a weight {list(w.shape)}, "
        f"got {list(hessian.shape)}",
    )
    require(order in ("none", "act", "group"), f"order must be none, act or group, got {order!r}")
    require(damp > 0, f"damp must be positive, got {damp}")
    require(
        fmt.block == 1 and fmt.group != TENSOR and not fmt.double_quant and not fmt.float_zero,
        f"{fmt}: GPTQ needs one scale an output and group, with an integer zero or none",
    )
    require(
        fmt.act != "static",
        f"{fmt}: static input scales come from calibration; quantize without :static, then add it",
    )
    check_finite(w, "weight")
    check_finite(hessian, "hessian")
    return _solve_jit(
        w, hessian, fmt, order, static_groups, damp, mse, grid, jnp.dtype(scale_dtype)
    )


def solve(
    w: Array,
    hessian: Array,
    fmt: QFormat,
    order: Order = "act",
    static_groups: bool = True,
    damp: float = 0.01,
    mse: bool = False,
    grid: Grid = "full",
    scale_dtype: Any = jnp.float32,
) -> tuple[QTensor, GPTQInfo]:
    """`quantize_gptq` without its checks: safe under jit and vmap (over weights of one shape)."""
    num_inputs, num_outputs = w.shape
    group, num_groups = fmt.group_size(num_inputs), fmt.num_groups(num_inputs)
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    is_dead = diagonal == 0
    w = jnp.where(is_dead[:, None], 0.0, w)
    hessian = hessian + jnp.diag(is_dead.astype(jnp.float32))
    find = functools.partial(pick_scales, fmt=fmt, mse=mse, grid=grid, scale_dtype=scale_dtype)

    perm, group_ids = _column_order(diagonal, order, group, num_groups)
    upper, damp_used, num_retries, fell_back = inverse_factor(hessian[perm][:, perm], damp)
    is_sequential = static_groups or order != "act"
    if static_groups:
        scale, zero = find(w)
        ids = group_ids if order != "act" else perm // group
    else:
        shape = (num_groups, num_outputs)
        scale = jnp.ones(shape, scale_dtype)
        zero = None if fmt.symmetric else jnp.zeros(shape, jnp.int8)
        ids = group_ids

    # Pad to whole blocks and groups: zero weights with an identity Hessian touch nothing.
    padded = max(num_inputs, num_groups * group)
    padded = -(-padded // BLOCK) * BLOCK
    pad = padded - num_inputs
    rows = jnp.pad(w[perm], ((0, pad), (0, 0)))
    ids = jnp.pad(ids, (0, pad), constant_values=num_groups - 1)
    upper = jnp.pad(upper, ((0, pad), (0, pad)))
    upper = upper + jnp.diag((jnp.arange(padded) >= num_inputs).astype(jnp.float32))

    code_dtype = jax.eval_shape(
        lambda: encode(w[:1, :1], jnp.ones((1, 1)), None, dataclasses.replace(fmt, symmetric=True))
    ).dtype

    def refit(rows: Array, start: Array, table):
        fresh = lax.dynamic_slice(rows, (start, 0), (group, num_outputs))
        whole = dataclasses.replace(fmt, group=-1)
        new = pick_scales(fresh, whole, mse=mse, grid=grid, scale_dtype=scale_dtype)
        return jax.tree.map(lambda t, n: t.at[ids[start]].set(n[0]), table, new)

    def run_block(carry, index):
        rows, table = carry
        first = index * BLOCK
        upper_rows = lax.dynamic_slice(upper, (first, 0), (BLOCK, padded))

        def run_part(inner, part_index):
            # Inside a block, parts of PART inputs: their loop then works on few rows.
            current, table = inner
            begin = part_index * PART
            part_rows = lax.dynamic_slice(upper_rows, (begin, first), (PART, BLOCK))
            factor = lax.dynamic_slice(part_rows, (0, begin), (PART, PART))
            ratios = factor / jnp.diagonal(factor)[:, None]

            def run_column(i, state):
                part, codes, errors, table = state
                turn = first + begin + i
                if not static_groups:

                    def refit_here(table):
                        now = lax.dynamic_update_slice(current, part, (begin, 0))
                        return refit(lax.dynamic_update_slice(rows, now, (first, 0)), turn, table)

                    is_start = (turn % group == 0) & (turn < num_inputs)
                    table = lax.cond(is_start, refit_here, lambda t: t, table)
                s, z = jax.tree.map(lambda t: t[ids[turn]], table)
                code = encode(part[i], s, z, fmt)
                error = part[i] - decode(code, s, z, fmt)
                part = part - ratios[i][:, None] * error[None, :]
                return part, codes.at[i].set(code), errors.at[i].set(error / factor[i, i]), table

            part = lax.dynamic_slice(current, (begin, 0), (PART, num_outputs))
            state = (part, jnp.zeros(part.shape, code_dtype), jnp.zeros_like(part), table)
            _, codes, errors, table = lax.fori_loop(0, PART, run_column, state)
            current = current - pass_on(part_rows, begin + PART, errors)
            return (current, table), (codes, errors)

        current = lax.dynamic_slice(rows, (first, 0), (BLOCK, num_outputs))
        (_, table), (codes, errors) = lax.scan(
            run_part, (current, table), jnp.arange(BLOCK // PART)
        )
        rows = rows - pass_on(upper_rows, first + BLOCK, errors.reshape(BLOCK, num_outputs))
        return (rows, table), codes

    (_, (scale, zero)), codes = lax.scan(
        run_block, (rows, (scale, zero)), jnp.arange(padded // BLOCK)
    )
    codes = codes.reshape(padded, num_outputs)[:num_inputs]
    if is_sequential:
        codes = codes[jnp.argsort(perm)]
    out = from_codes(
        codes, scale, zero, fmt, perm=None if is_sequential else perm.astype(jnp.int32)
    )
    num_dead = jnp.sum(is_dead).astype(jnp.int32)
    return out, GPTQInfo(damp_used, num_retries, fell_back, num_dead)


_solve_jit = jax.jit(solve, static_argnums=(2, 3, 4, 5, 6, 7, 8))


def pass_on(upper_rows: Array, start: Array, errors: Array) -> Array:
    """What rows from `start` on lose for `errors` [B, O]: upper_rows[:, start:]^T errors."""
    is_later = jnp.arange(upper_rows.shape[1]) >= start
    upper_rows = jnp.where(is_later[None, :], upper_rows, 0.0)
    return jnp.dot(upper_rows.T, errors, precision=lax.Precision.HIGHEST)


def _column_order(
    diagonal: Array, order: Order, group: int, num_groups: int
) -> tuple[Array, Array]:
    """Inputs in the order of their turn, and the group of each turn."""
    num_inputs = diagonal.shape[0]
    places = jnp.arange(num_inputs)
    if order == "none":
        return places, places // group
    if order == "act":
        return jnp.argsort(-diagonal, stable=True), places // group
    # A short last group stays last, so that turn t always belongs to the (t // group)-th group.
    padded = jnp.pad(
        diagonal, (0, num_groups * group - num_inputs), constant_values=-jnp.inf
    ).reshape(num_groups, group)
    inner = jnp.argsort(-padded, axis=1, stable=True)
    peaks = jnp.max(padded, axis=1)
    if num_inputs % group:
        peaks = peaks.at[-1].set(-jnp.inf)
    turns = jnp.argsort(-peaks, stable=True)
    perm = (turns[:, None] * group + inner[turns]).reshape(-1)[:num_inputs]
    return perm, turns[places // group]


@jax.jit
def output_error(w: Array, quantized: Array, hessian: Array) -> Array:
    """Relative output error ||X (W - Q)|| / ||X W|| on the tokens that H = X^T X sums; f32 []."""
    w = w.astype(jnp.float32)
    delta = w - quantized.astype(jnp.float32)

    def energy(m: Array) -> Array:
        return jnp.sum(m * jnp.dot(hessian, m, precision=lax.Precision.HIGHEST))

    return jnp.sqrt(jnp.maximum(energy(delta), 0.0) / energy(w))
