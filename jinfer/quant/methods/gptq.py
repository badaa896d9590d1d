"""GPTQ on one matrix and its Hessian; knows nothing of models, calibration text or files.

Frantar et al. 2022 (arXiv:2210.17323). One jitted program for the factor of each Hessian's
size and one for each weight's shape: a scan over blocks of inputs, in each one over parts, in each
one over inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jinfer.config.fields import read_bool, read_float, require, shown
from jinfer.config.quant_format import TENSOR, QFormat
from jinfer.linear.grids import Grid, decode, encode, find_scales
from jinfer.linear.qtensor import (
    QTensor,
    check_finite,
    check_scales,
    check_weight,
    from_codes,
    read_target,
)
from jinfer.quant.methods.factor import dot_transposed, inverse_factor
from jinfer.quant.methods.rtn import search_scales

Order = Literal["none", "act", "group"]
Scales = Literal["extremes", "mse", "hessian"]

BLOCK = 128  # inputs whose errors are passed on to the rest together
PART = 32  # inputs of a loop that passes each error on at once


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
    scales: Scales = "extremes",
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
      scales: what sets a group's range. "extremes": its largest weights; "mse": the range of least
        error, `rtn.search_scales`; "hessian": likewise, squared errors weighed as the solver pays
        for them: an error e of the t-th input costs e^2 / U_tt^2 once the inputs still open have
        made up for it.
      grid: symmetric integer grid, see `qformat.find_scales`.
      scale_dtype: storage dtype of the scales.

    Returns:
      QTensor of logical shape [I, O], and what happened. Inputs that never fired (diag H = 0) get
      zero weights. Where no damping makes H positive definite, round-to-nearest (`fell_back`).

    Raises:
      ValueError: shapes disagree, NaN or infinity in `w` or `hessian`, or a format whose outputs
        share scales.
    """
    check_weight(w)
    dtype = read_target(fmt, scale_dtype, grid)
    require(w.ndim == 2, f"a weight is [I, O], got shape {list(w.shape)}")
    check_weight(hessian, "hessian")
    num_inputs = w.shape[0]
    require(
        hessian.shape == (num_inputs, num_inputs),
        f"hessian must be [{num_inputs}, {num_inputs}] for a weight {list(w.shape)}, "
        f"got {list(hessian.shape)}",
    )
    for name, value, known in (
        ("order", order, ("none", "act", "group")),
        ("scales", scales, ("extremes", "mse", "hessian")),
    ):
        is_known = isinstance(value, str) and value in known
        require(is_known, f"{name} must be one of {', '.join(known)}, got {shown(value)}")
    read_bool("static_groups", static_groups)
    damp = read_float("damp", damp)
    require(0 < damp < math.inf, f"damp must be positive and finite, got {damp}")
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
    num_groups = fmt.num_groups(num_inputs)
    turns = _take_turns_jit(hessian, order, fmt.group_size(num_inputs), num_groups, damp)
    q = _round_jit(w, turns, fmt, order, static_groups, scales, grid, dtype)
    return check_scales(q), turns.info


def solve(
    w: Array,
    hessian: Array,
    fmt: QFormat,
    order: Order = "act",
    static_groups: bool = True,
    damp: float = 0.01,
    scales: Scales = "extremes",
    grid: Grid = "full",
    scale_dtype: Any = jnp.float32,
) -> tuple[QTensor, GPTQInfo]:
    """`quantize_gptq` without its checks: safe under jit and vmap (over weights of one shape)."""
    num_inputs = w.shape[0]
    num_groups = fmt.num_groups(num_inputs)
    turns = _take_turns(hessian, order, fmt.group_size(num_inputs), num_groups, damp)
    return _round(w, turns, fmt, order, static_groups, scales, grid, scale_dtype), turns.info


class Turns(NamedTuple):
    """What a Hessian decides: compiled apart, since weights of many widths share one.

    Attributes:
      perm: i32 [I], inputs in the order of their turn.
      group_ids: i32 [I], the group of each turn where groups are filled in that order.
      upper: f32 [I, I], U with U^T U = (H + damping)^-1, in the order of turns.
      is_dead: bool [I], inputs that never fired, as stored.
      info: for the caller.
    """

    perm: Array
    group_ids: Array
    upper: Array
    is_dead: Array
    info: GPTQInfo


def _take_turns(hessian: Array, order: Order, group: int, num_groups: int, damp: float) -> Turns:
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    is_dead = diagonal == 0
    hessian = hessian + jnp.diag(is_dead.astype(jnp.float32))
    perm, group_ids = _column_order(diagonal, order, group, num_groups)
    upper, damp_used, num_retries, fell_back = inverse_factor(hessian[perm][:, perm], damp)
    num_dead = jnp.sum(is_dead).astype(jnp.int32)
    info = GPTQInfo(damp_used, num_retries, fell_back, num_dead)
    return Turns(perm, group_ids, upper, is_dead, info)


_take_turns_jit = jax.jit(_take_turns, static_argnums=(1, 2, 3, 4))


def _round(
    w: Array,
    turns: Turns,
    fmt: QFormat,
    order: Order,
    static_groups: bool,
    scales: Scales,
    grid: Grid,
    scale_dtype: Any,
) -> QTensor:
    """The loop over inputs."""
    num_inputs, num_outputs = w.shape
    group, num_groups = fmt.group_size(num_inputs), fmt.num_groups(num_inputs)
    perm, group_ids, upper = turns.perm, turns.group_ids, turns.upper
    w = jnp.where(turns.is_dead[:, None], 0.0, w.astype(jnp.float32))
    find = functools.partial(_FIND[scales], grid=grid, scale_dtype=scale_dtype)
    costs = 1 / jnp.square(jnp.diagonal(upper))  # of an error, in the order of turns
    is_sequential = static_groups or order != "act"
    if static_groups:
        scale, zero = find(w, fmt, jnp.zeros(num_inputs, jnp.float32).at[perm].set(costs))
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
    upper = upper + jnp.diag(
        (jnp.arange(padded, dtype=jnp.int32) >= num_inputs).astype(jnp.float32)
    )
    costs = jnp.pad(costs, (0, pad))

    def refit(rows: Array, start: Array, table):
        fresh = lax.dynamic_slice(rows, (start, jnp.int32(0)), (group, num_outputs))
        whole = dataclasses.replace(fmt, group=-1)
        new = find(fresh, whole, lax.dynamic_slice(costs, (start,), (group,)))
        return jax.tree.map(lambda t, n: t.at[ids[start]].set(n[0]), table, new)

    part_size = PART if static_groups or num_groups == 1 else math.gcd(group, PART)

    def run_block(carry, index):
        rows, table = carry
        first = index * BLOCK
        upper_rows = lax.dynamic_slice(upper, (first, jnp.int32(0)), (BLOCK, padded))

        def run_part(inner, part_index):
            # Inside a block, parts of few inputs: each step of their loop then works on few rows.
            current, table = inner
            begin = part_index * part_size
            turn = first + begin
            if not static_groups:  # a group starts where a part does

                def refit_here(table):
                    return refit(
                        lax.dynamic_update_slice(rows, current, (first, jnp.int32(0))), turn, table
                    )

                is_start = (turn % group == 0) & (turn < num_inputs)
                table = lax.cond(is_start, refit_here, lambda t: t, table)
            part_rows = lax.dynamic_slice(upper_rows, (begin, first), (part_size, BLOCK))
            factor = lax.dynamic_slice(part_rows, (jnp.int32(0), begin), (part_size, part_size))
            pivots = jnp.diagonal(factor)
            part_ids = lax.dynamic_slice(ids, (turn,), (part_size,))
            grids = jax.tree.map(lambda t: t[part_ids], table)

            def run_column(state, column):
                # The last input's error is passed on here, not where it arises: XLA would compute
                # it anew for every row.
                part, ratios, error = state
                part = part - ratios[:, None] * error[None, :]
                i, ratios, (s, z) = column
                row = lax.dynamic_index_in_dim(part, i, keepdims=False)
                code = encode(row, s, z, fmt)
                error = row - decode(code, s, z, fmt)
                return (part, ratios, error), (code, error)

            part = lax.dynamic_slice(current, (begin, jnp.int32(0)), (part_size, num_outputs))
            state = (part, jnp.zeros(part_size, jnp.float32), jnp.zeros(num_outputs, jnp.float32))
            columns = (jnp.arange(part_size, dtype=jnp.int32), factor / pivots[:, None], grids)
            _, (codes, errors) = lax.scan(run_column, state, columns)
            errors = errors / pivots[:, None]
            current = current - pass_on(part_rows, begin + part_size, errors)
            return (current, table), (codes, errors)

        current = lax.dynamic_slice(rows, (first, jnp.int32(0)), (BLOCK, num_outputs))
        (_, table), (codes, errors) = lax.scan(
            run_part, (current, table), jnp.arange(BLOCK // part_size, dtype=jnp.int32)
        )
        rows = rows - pass_on(upper_rows, first + BLOCK, errors.reshape(BLOCK, num_outputs))
        return (rows, table), codes

    (_, (scale, zero)), codes = lax.scan(
        run_block, (rows, (scale, zero)), jnp.arange(padded // BLOCK, dtype=jnp.int32)
    )
    codes = codes.reshape(padded, num_outputs)[:num_inputs]
    if is_sequential:
        codes = codes[jnp.argsort(perm)]
    return from_codes(
        codes, scale, zero, fmt, perm=None if is_sequential else perm.astype(jnp.int32)
    )


def _from_extremes(w: Array, fmt: QFormat, costs: Array, **options: Any):
    return find_scales(w, fmt, **options)


def _by_mse(w: Array, fmt: QFormat, costs: Array, **options: Any):
    return search_scales(w, fmt, **options)


def _by_hessian(w: Array, fmt: QFormat, costs: Array, **options: Any):
    return search_scales(w, fmt, importance=costs, norm=2, **options)


# Scales of a weight, or of one group as a whole, and what an error of each of its inputs costs.
_FIND = {"extremes": _from_extremes, "mse": _by_mse, "hessian": _by_hessian}

_round_jit = jax.jit(_round, static_argnums=(2, 3, 4, 5, 6, 7))


def pass_on(upper_rows: Array, start: Array, errors: Array) -> Array:
    """What rows from `start` on lose for `errors` [B, O]: upper_rows[:, start:]^T errors."""
    is_later = jnp.arange(upper_rows.shape[1], dtype=jnp.int32) >= start
    upper_rows = jnp.where(is_later[None, :], upper_rows, 0.0)
    return dot_transposed(upper_rows, errors)


def _column_order(
    diagonal: Array, order: Order, group: int, num_groups: int
) -> tuple[Array, Array]:
    """Inputs in the order of their turn, and the group of each turn."""
    num_inputs = diagonal.shape[0]
    places = jnp.arange(num_inputs, dtype=jnp.int32)
    if order == "none":
        return places, places // group
    if order == "act":
        return jnp.argsort(-diagonal, stable=True).astype(jnp.int32), places // group
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
