"""Quantizes linears that share an input, and describes each result in a row for the report."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jinfer.config.quant_format import QFormat
from jinfer.linear.grids import Grid
from jinfer.linear.qtensor import QTensor, check_finite, dequantize, split_outputs
from jinfer.quant.calibrate import InputStats
from jinfer.quant.methods.awq import clip_weights
from jinfer.quant.methods.correction import correct_weight
from jinfer.quant.methods.gptq import GPTQInfo, quantize_gptq
from jinfer.quant.methods.hqq import quantize_hqq
from jinfer.quant.methods.rtn import quantize_rtn, with_static_inputs
from jinfer.quant.recipe import Method


@dataclasses.dataclass(frozen=True)
class Row:
    """Result of quantizing one linear.

    Attributes:
      module: its name in the params tree.
      method: the preset's name, and the method that replaced it after a fallback.
      format: of the result, as `QFormat` prints it; "float" if not quantized.
      shape: [I, O], or [E, I, O].
      bits: resident bits per weight, scales included.
      error: relative output error on calibration inputs; None without them.
      rtn_error: the same for round-to-nearest of the unscaled weight in the same format.
      seconds: time of the solver.
      notes: fallbacks, retries of damping, dead inputs, skipped folds.
      fold_error: relative change of the block's float outputs by folding alone; None without folds.
    """

    module: str
    method: str
    format: str
    shape: tuple[int, ...]
    bits: float
    error: float | None
    rtn_error: float | None
    seconds: float
    notes: tuple[str, ...] = ()
    fold_error: float | None = None


def solve_group(
    weights: Mapping[str, Array],
    stats: InputStats | None,
    method: Method,
    *,
    originals: Mapping[str, Array] | None = None,
    original_stats: InputStats | None = None,
) -> tuple[dict[str, QTensor], list[Row]]:
    """Quantizes weights [I, O] (or [E, I, O]) that read one input.

    Args:
      weights: module -> weight, scaled if something was folded.
      stats: of their inputs; None for methods without data.
      method: for all of them.
      originals: unscaled weights, for the comparison with round-to-nearest; default: `weights`.
      original_stats: of the unscaled inputs.

    Returns:
      module -> QTensor, and one row per module.
    """
    start = time.perf_counter()
    names = list(weights)
    for name in names:
        check_finite(weights[name], f"{name}: weight")
    notes: dict[str, list[str]] = {name: [] for name in names}
    if method.solver == "gptq":
        assert stats is not None
        found, info = _gptq([weights[n] for n in names], stats, method)
        for name in names:
            notes[name] += describe(info)
    else:
        found = [_alone(name, weights[name], stats, method) for name in names]
    out = dict(zip(names, found))
    if method.format.act == "static":
        assert stats is not None
        out = {n: with_static_inputs(x, jnp.max(stats.abs_max)) for n, x in out.items()}
    out = jax.block_until_ready(out)
    seconds = (time.perf_counter() - start) / len(names)

    rows = []
    for name in names:
        error = rtn_error = None
        base_stats = original_stats if original_stats is not None else stats
        if stats is not None and base_stats is not None:
            is_folded = method.fold != "none"
            error, rtn_error = map(
                float,
                _errors(
                    weights[name],
                    out[name],
                    stats.gram,
                    (originals or weights)[name] if is_folded else None,
                    base_stats.gram if is_folded else None,
                    _weight_only(method),
                    method.grid,
                ),
            )
        row = _row(name, out[name], method, tuple(notes[name]))
        rows.append(dataclasses.replace(row, error=error, rtn_error=rtn_error, seconds=seconds))
    return out, rows


def _row(name: str, x: QTensor, method: Method, notes: tuple[str, ...]) -> Row:
    """Returns the row of a quantized weight, without errors and time."""
    fell_back = any("fell back" in note for note in notes)
    return Row(
        module=name,
        method=method.name + (" -> rtn" if fell_back else ""),
        format=str(x.fmt),
        shape=x.shape,
        bits=x.nbytes * 8 / x.size,
        error=None,
        rtn_error=None,
        seconds=0.0,
        notes=notes,
    )


def describe(info: GPTQInfo) -> list[str]:
    """Returns notes for the report; none if there was nothing unusual."""
    notes = []
    if bool(info.fell_back):
        notes.append("hessian is not positive definite at any damping: fell back to rtn")
    elif int(info.num_retries):
        notes.append(f"damping raised to {float(info.damp):.3g}")
    if int(info.num_dead):
        notes.append(f"{int(info.num_dead)} inputs never fired")
    return notes


def _weight_only(method: Method) -> Any:
    """The format without static input scales, which are added afterwards."""
    fmt = method.format
    return dataclasses.replace(fmt, act=None) if fmt.act == "static" else fmt


def _gptq(
    weights: list[Array], stats: InputStats, method: Method
) -> tuple[list[QTensor], GPTQInfo]:
    """Solves weights of one input at once, side by side; experts too, output by output."""
    flat = [w if w.ndim == 2 else jnp.moveaxis(w, 0, 1).reshape(w.shape[1], -1) for w in weights]
    together = jnp.concatenate(flat, axis=1)
    if method.correct:
        assert stats.drift is not None
        together = correct_weight(
            together, stats.gram, stats.drift, strength=method.correct, damp=method.damp
        )
    together, info = quantize_gptq(
        together,
        stats.gram,
        _weight_only(method),
        order=method.order,  # pyright: ignore[reportArgumentType]
        static_groups=method.static_groups,
        damp=method.damp,
        scales=method.scales,  # pyright: ignore[reportArgumentType]
        grid=method.grid,  # pyright: ignore[reportArgumentType]
        scale_dtype=jnp.dtype(method.scale_dtype),
    )
    pieces = split_outputs(together, [w.shape[1] for w in flat])
    return [
        piece if w.ndim == 2 else stack(split_outputs(piece, [w.shape[2]] * w.shape[0]))
        for w, piece in zip(weights, pieces)
    ], info


def _alone(name: str, w: Array, stats: InputStats | None, method: Method) -> QTensor:
    if w.ndim == 3:
        return stack([_alone(name, expert, stats, method) for expert in w])
    dtype = jnp.dtype(method.scale_dtype)
    if method.solver == "hqq":
        return quantize_hqq(w, method.format, scale_dtype=dtype)
    # The product of q and k meets clipping badly: AWQ leaves both out.
    may_clip = method.fold == "awq" and method.clip and name.rpartition(".")[2] not in "qk"
    if may_clip and stats is not None:
        w = clip_weights(w, stats.gram, method.format)
    return quantize_rtn(
        w,
        _weight_only(method),
        mse=method.scales == "mse",
        grid=method.grid,  # pyright: ignore[reportArgumentType]
        scale_dtype=dtype,
    )


def stack(weights: list[QTensor]) -> QTensor:
    """Stacks weights [I, O] of one format into [E, I, O]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)


def stand_in(shape: tuple[int, ...], method: Method) -> QTensor:
    """Returns a weight as `method` would make it, with other values; for checks of exports."""
    w = jnp.full(shape[-2:], 0.1, jnp.float32)
    x = quantize_rtn(w, _weight_only(method), scale_dtype=jnp.dtype(method.scale_dtype))
    if method.format.act == "static":
        x = with_static_inputs(x, 1.0)
    if method.solver == "gptq" and method.order == "act" and not method.static_groups:
        x = dataclasses.replace(x, perm=jnp.arange(shape[-2], dtype=jnp.int32))
    if len(shape) == 2:
        return x
    return jax.tree.map(lambda a: np.broadcast_to(np.asarray(a), (*shape[:-2], *a.shape)), x)


def merge_rows(rows: list[Row], weight: QTensor) -> Row:
    """Returns one row for experts that were solved one by one; errors are root mean squares."""

    def rms(values: list[float | None]) -> float | None:
        known = [v * v for v in values if v is not None]
        return (sum(known) / len(known)) ** 0.5 if known else None

    notes = {note: sum(note in row.notes for row in rows) for row in rows for note in row.notes}
    return dataclasses.replace(
        rows[0],
        method=max((row.method for row in rows), key=len),
        shape=weight.shape,
        error=rms([row.error for row in rows]),
        rtn_error=rms([row.rtn_error for row in rows]),
        seconds=sum(row.seconds for row in rows),
        notes=tuple(f"{note} ({count} of {len(rows)} experts)" for note, count in notes.items()),
    )


@functools.partial(jax.jit, static_argnums=(5, 6))
def _errors(
    w: Array,
    x: QTensor,
    gram: Array,
    original: Array | None,
    original_gram: Array | None,
    fmt: QFormat,
    grid: Grid,
) -> tuple[Array, Array]:
    """Returns output errors of x, and of the original (None: `w`, `gram`) rounded to nearest."""
    original = w if original is None else original
    original_gram = gram if original_gram is None else original_gram
    plain = dequantize(quantize_rtn(original, fmt, grid=grid))
    return _output_error(w, dequantize(x), gram), _output_error(original, plain, original_gram)


def output_error(w: Array, x: QTensor, gram: Array) -> float:
    """Returns ||X (W - Q)|| / ||X W|| from X^T X; for experts, over all of them."""
    return float(_output_error(w, dequantize_jit(x), gram))


@jax.jit
def _output_error(w: Array, q: Array, gram: Array) -> Array:
    flat = [jnp.moveaxis(m, -2, 0).reshape(m.shape[-2], -1) for m in (w, q)]
    w, q = (m.astype(jnp.float32) for m in flat)

    def energy(m: Array) -> Array:
        product = jnp.dot(gram, m, precision=lax.Precision.HIGHEST)
        return jnp.sum(jnp.sum(m * product, axis=0))

    return jnp.sqrt(jnp.maximum(energy(w - q), 0.0) / jnp.maximum(energy(w), 1e-30))


dequantize_jit = jax.jit(dequantize)
