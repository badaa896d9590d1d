"""GPTQ on one matrix and its Hessian (Frantar et al. 2022, arXiv:2210.17323).

One jitted program factors the Hessians of a size, and one rounds the weights of a shape: a scan
over blocks of inputs, inside it one over parts, inside it one over inputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, TypeAlias

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

BLOCK = 128  # inputs whose errors are passed on to later blocks together
PART = 32  # inputs whose errors are passed on one by one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GPTQInfo:
    """Facts on the solution for one weight.

    Attributes:
      damp: f32 [], fraction of mean(diag H) that made H positive definite.
      num_retries: i32 [], failed tries before.
      fell_back: bool [], no damping helped and the result is round-to-nearest.
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
    Outputs are independent, so weights that share an input may be concatenated along O and solved
    together. Pure and bit-deterministic; `solve` is the same without checks, for vmap.

    Args:
      w: [I, O], the dense weight.
      hessian: [I, I] f32, sum of x x^T over calibration tokens (its scale does not matter).
      fmt: target format, groups or channel; the last group may be short.
      order: "none": as stored; "act": by falling diag H; "group": by falling diag H inside each
        group and groups by their largest value (GPTQModel's group-aware order), so that groups
        stay together.
      static_groups: find the scales from the original weight, before any error is passed on. With
        order "act" and no static groups, the result carries a permutation.
      damp: fraction of mean(diag H) added to the diagonal.
      scales: how a group's range is chosen. "extremes": its largest weights; "mse": least error,
        `rtn.search_scales`; "hessian": least squared error weighted by its cost to the solver: an
        error e of the t-th input costs e^2 / U_tt^2 after the inputs still open have compensated
        for it.
      grid: symmetric integer grid, see `qformat.find_scales`.
      scale_dtype: storage dtype of the scales.

    Returns:
      QTensor of logical shape [I, O], and `GPTQInfo`. Inputs that never fired (diag H = 0) get zero
      weights. If no damping makes H positive definite, weights are rounded to nearest instead
      (`fell_back`).

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
        f"{fmt}: GPTQ needs one scale per output and group, with an integer zero point or none",
    )
    require(
        fmt.act != "static",
        f"{fmt}: static input scales come from calibration; quantize without :static, then add it",
    )
    check_finite(w, "weight")
    check_finite(hessian, "hessian")
    num_groups = fmt.num_groups(num_inputs)
    turns = _take_turns_jit(hessian, order, fmt.group_size(num_inputs), num_groups, damp)
    q = _round_jit(w, turns, fmt, Options(order, static_groups, scales, grid, dtype))
    return check_scales(q), turns.info


@dataclasses.dataclass(frozen=True)
class Options:
    """How `solve` rounds; the fields are described at `quantize_gptq`. Hashable, for jit."""

    order: Order = "act"
    static_groups: bool = True
    scales: Scales = "extremes"
    grid: Grid = "full"
    scale_dtype: Any = jnp.float32

    @property
    def is_sequential(self) -> bool:
        """Whether groups hold adjacent inputs as stored, so that no permutation is needed."""
        return self.static_groups or self.order != "act"

    def find_scales(self, w: Array, fmt: QFormat, costs: Array) -> tuple[Array, Array | None]:
        """Returns scales and zero points of `w`, or of one group; costs: of an error, per input."""
        keywords: dict[str, Any] = {"grid": self.grid, "scale_dtype": self.scale_dtype}
        if self.scales == "mse":
            return search_scales(w, fmt, **keywords)
        if self.scales == "hessian":
            return search_scales(w, fmt, importance=costs, norm=2, **keywords)
        return find_scales(w, fmt, **keywords)


def solve(
    w: Array, hessian: Array, fmt: QFormat, options: Options = Options(), damp: float = 0.01
) -> tuple[QTensor, GPTQInfo]:
    """Like `quantize_gptq` without its checks: safe under jit and vmap (weights of one shape)."""
    num_inputs = w.shape[0]
    num_groups = fmt.num_groups(num_inputs)
    turns = _take_turns(hessian, options.order, fmt.group_size(num_inputs), num_groups, damp)
    return _round(w, turns, fmt, options), turns.info


class Turns(NamedTuple):
    """What depends on the Hessian alone; compiled apart, since weights of many widths share one.

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


class _Padded(NamedTuple):
    """A weight and its factor in the order of turns, padded to whole blocks and groups.

    Padding has zero weights and an identity factor, so that it changes nothing.

    Attributes:
      rows: f32 [P, O], the weight.
      upper: f32 [P, P], see `Turns`.
      ids: i32 [P], the group of each turn.
      costs: f32 [P], what an error of each input costs.
    """

    rows: Array
    upper: Array
    ids: Array
    costs: Array


Table: TypeAlias = tuple[Array, Array | None]  # scales and zero points, [G, O]


def _round(w: Array, turns: Turns, fmt: QFormat, options: Options) -> QTensor:
    """Rounds input after input, in the order of turns."""
    num_inputs, num_outputs = w.shape
    w = jnp.where(turns.is_dead[:, None], 0.0, w.astype(jnp.float32))
    costs = 1 / jnp.square(jnp.diagonal(turns.upper))
    table, ids = _first_scales(w, turns, costs, fmt, options)
    padded = _pad(w[turns.perm], turns.upper, ids, costs, fmt)
    codes, (scale, zero) = _run_blocks(padded, table, num_inputs, fmt, options)
    codes = codes.reshape(-1, num_outputs)[:num_inputs]
    if options.is_sequential:
        return from_codes(codes[jnp.argsort(turns.perm)], scale, zero, fmt)
    return from_codes(codes, scale, zero, fmt, perm=turns.perm.astype(jnp.int32))


_round_jit = jax.jit(_round, static_argnums=(2, 3))


def _first_scales(
    w: Array, turns: Turns, costs: Array, fmt: QFormat, options: Options
) -> tuple[Table, Array]:
    """Returns the scales with static groups, else placeholders; and the group of each turn."""
    num_inputs, num_outputs = w.shape
    if options.static_groups:
        stored = jnp.zeros(num_inputs, jnp.float32).at[turns.perm].set(costs)
        table = options.find_scales(w, fmt, stored)
        is_moved = options.order == "act"
        return table, turns.perm // fmt.group_size(num_inputs) if is_moved else turns.group_ids
    shape = (fmt.num_groups(num_inputs), num_outputs)
    scale = jnp.ones(shape, options.scale_dtype)
    return (scale, None if fmt.symmetric else jnp.zeros(shape, jnp.int8)), turns.group_ids


def _pad(rows: Array, upper: Array, ids: Array, costs: Array, fmt: QFormat) -> _Padded:
    num_inputs = rows.shape[0]
    num_groups = fmt.num_groups(num_inputs)
    size = max(num_inputs, num_groups * fmt.group_size(num_inputs))
    size = -(-size // BLOCK) * BLOCK
    pad = size - num_inputs
    upper = jnp.pad(upper, ((0, pad), (0, pad)))
    is_padding = jnp.arange(size, dtype=jnp.int32) >= num_inputs
    return _Padded(
        rows=jnp.pad(rows, ((0, pad), (0, 0))),
        upper=upper + jnp.diag(is_padding.astype(jnp.float32)),
        ids=jnp.pad(ids, (0, pad), constant_values=num_groups - 1),
        costs=jnp.pad(costs, (0, pad)),
    )


def _run_blocks(
    padded: _Padded, table: Table, num_inputs: int, fmt: QFormat, options: Options
) -> tuple[Array, Table]:
    """Returns the codes of all turns, by block and part, and the scales and zero points used."""
    size, num_outputs = padded.rows.shape
    group = fmt.group_size(num_inputs)
    is_one_group = options.static_groups or fmt.num_groups(num_inputs) == 1
    part_size = PART if is_one_group else math.gcd(group, PART)

    def run_block(carry, index):
        rows, table = carry
        first = index * BLOCK
        upper_rows = lax.dynamic_slice(padded.upper, (first, jnp.int32(0)), (BLOCK, size))

        def run_part(inner, part_index):
            # Inside a block, parts of few inputs: each step of their loop then reads few rows.
            current, table = inner
            begin = part_index * part_size
            turn = first + begin
            if not options.static_groups:  # a group starts where a part does

                def refit(table: Table) -> Table:
                    updated = lax.dynamic_update_slice(rows, current, (first, jnp.int32(0)))
                    return _refit(padded._replace(rows=updated), turn, table, group, fmt, options)

                is_start = (turn % group == 0) & (turn < num_inputs)
                table = lax.cond(is_start, refit, lambda t: t, table)
            part_rows = lax.dynamic_slice(upper_rows, (begin, first), (part_size, BLOCK))
            factor = lax.dynamic_slice(part_rows, (jnp.int32(0), begin), (part_size, part_size))
            part_ids = lax.dynamic_slice(padded.ids, (turn,), (part_size,))
            grids = jax.tree.map(lambda t: t[part_ids], table)
            part = lax.dynamic_slice(current, (begin, jnp.int32(0)), (part_size, num_outputs))
            codes, errors = _run_columns(part, factor, grids, fmt)
            current = current - pass_on(part_rows, begin + part_size, errors)
            return (current, table), (codes, errors)

        current = lax.dynamic_slice(rows, (first, jnp.int32(0)), (BLOCK, num_outputs))
        (_, table), (codes, errors) = lax.scan(
            run_part, (current, table), jnp.arange(BLOCK // part_size, dtype=jnp.int32)
        )
        rows = rows - pass_on(upper_rows, first + BLOCK, errors.reshape(BLOCK, num_outputs))
        return (rows, table), codes

    (_, table), codes = lax.scan(
        run_block, (padded.rows, table), jnp.arange(size // BLOCK, dtype=jnp.int32)
    )
    return codes, table


def _refit(
    padded: _Padded, start: Array, table: Table, group: int, fmt: QFormat, options: Options
) -> Table:
    """Finds the scales of the group that begins at turn `start` from its current weights."""
    num_outputs = padded.rows.shape[1]
    fresh = lax.dynamic_slice(padded.rows, (start, jnp.int32(0)), (group, num_outputs))
    costs = lax.dynamic_slice(padded.costs, (start,), (group,))
    new = options.find_scales(fresh, dataclasses.replace(fmt, group=-1), costs)
    return jax.tree.map(lambda t, n: t.at[padded.ids[start]].set(n[0]), table, new)


def _run_columns(part: Array, factor: Array, grids: Table, fmt: QFormat) -> tuple[Array, Array]:
    """Rounds the inputs of one part [B, O] in turn; returns codes and errors over pivots, [B, O].

    Args:
      part: f32 [B, O], their weights.
      factor: f32 [B, B], the part's block of U.
      grids: scale and zero point of each input.
      fmt: the target.
    """
    part_size, num_outputs = part.shape
    pivots = jnp.diagonal(factor)

    def run_column(state, column):
        # The last input's error is passed on here and not where it arises: XLA would compute it
        # again for every row.
        part, ratios, error = state
        part = part - ratios[:, None] * error[None, :]
        i, ratios, (s, z) = column
        row = lax.dynamic_index_in_dim(part, i, keepdims=False)
        code = encode(row, s, z, fmt)
        error = row - decode(code, s, z, fmt)
        return (part, ratios, error), (code, error)

    state = (part, jnp.zeros(part_size, jnp.float32), jnp.zeros(num_outputs, jnp.float32))
    columns = (jnp.arange(part_size, dtype=jnp.int32), factor / pivots[:, None], grids)
    _, (codes, errors) = lax.scan(run_column, state, columns)
    return codes, errors / pivots[:, None]


def pass_on(upper_rows: Array, start: Array, errors: Array) -> Array:
    """Returns what `errors` [B, O] subtract from later rows: upper_rows[:, start:]^T errors."""
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
