"""Chooses a width for each group of linears by the effect of its rounding on the model.

The cost of each group is measured alone and at the lowest width: the KL divergence from the float
model. At other widths it is assumed proportional to the squared error of the weights, and costs of
groups are assumed to add up. Widths then grow where a byte reduces the cost most, up to the budget.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jinfer.config.fields import require
from jinfer.config.quant_format import QFormat
from jinfer.config.typing import Params
from jinfer.linear.qtensor import dequantize, quantize
from jinfer.models.model import Model
from jinfer.quant import calibrate
from jinfer.quant.evaluate import divergence, embed, logits_from
from jinfer.quant.layer import GROUPS
from jinfer.quant.recipe import Method, Recipe

WIDTHS = (3, 4, 5, 6, 8)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Linears that read one input and get one width.

    Attributes:
      modules: their names in the params tree.
      num_bytes: resident bytes at each width, scales included.
      kl: divergence from the float model at each width, in nats; measured at the first, scaled by
        the weights' squared error at the others.
    """

    modules: tuple[str, ...]
    num_bytes: tuple[int, ...]
    kl: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Result for one unit: its modules, format, and the measured KL at the lowest width."""

    modules: tuple[str, ...]
    format: str
    lowest_kl: float


def grow(units: Sequence[Unit], budget: float) -> list[int]:
    """Returns for each unit the place of its width, all bytes together at most `budget`.

    Starts at the lowest widths and repeatedly takes the step up with the largest reduction of KL
    per byte among those that fit. A step may skip widths.

    Raises:
      ValueError: the lowest widths are more than the budget.
    """
    chosen = [0] * len(units)
    used = sum(unit.num_bytes[0] for unit in units)
    require(used <= budget, f"the lowest widths take {used} bytes, more than {budget:.0f}")
    while True:
        best, best_rate = None, 0.0
        for i, unit in enumerate(units):
            here = chosen[i]
            for there in range(here + 1, len(unit.num_bytes)):
                more = unit.num_bytes[there] - unit.num_bytes[here]
                rate = (unit.kl[here] - unit.kl[there]) / max(more, 1)
                if used + more <= budget and rate > best_rate:
                    best, best_rate = (i, there), rate
        if best is None:
            return chosen
        i, there = best
        used += units[i].num_bytes[there] - units[i].num_bytes[chosen[i]]
        chosen[i] = there


def measure(
    model: Model,
    params: Params,
    method: Method,
    windows: np.ndarray,
    *,
    on_unit: Callable[[int], None] | None = None,
) -> list[Unit]:
    """Measures every group of linears of every layer, rounded to nearest, at each of `WIDTHS`.

    Args:
      model, params: the float model.
      method: of an integer format, whose bits are replaced.
      windows: i32 [n, T] tokens to measure on; a forward pass from its layer on for each group.
      on_unit: called with the number of units done.

    Raises:
      ValueError: a parameter of a block is not finite.
    """
    formats = [dataclasses.replace(method.format, bits=bits) for bits in WIDTHS]
    calibrate.check_layers(params)
    xs = [embed(model, params, jnp.asarray(w, jnp.int32)) for w in windows]
    references = [logits_from(model, params, 0, x) for x in xs]
    units = []
    for i, layer in enumerate(params["layers"]):
        for block, parts in GROUPS:
            weights = {part: layer[block][part]["w"] for part in parts}
            errors = [sum(float(_squared_error(w, f)) for w in weights.values()) for f in formats]
            rounded = {
                part: {**layer[block][part], "w": _round(w, formats[0])}
                for part, w in weights.items()
            }
            changed = {**layer, block: {**layer[block], **rounded}}
            layers = (*params["layers"][:i], changed, *params["layers"][i + 1 :])
            new = {**params, "layers": layers}
            kl = np.mean(
                [
                    float(divergence(reference, logits_from(model, new, i, x))[0])
                    for reference, x in zip(references, xs, strict=True)
                ]
            )
            shares = [error / errors[0] if errors[0] else 0.0 for error in errors]
            units.append(
                Unit(
                    tuple(f"layers.{i}.{block}.{part}" for part in parts),
                    tuple(
                        sum(_num_bytes(w.shape, method, bits) for w in weights.values())
                        for bits in WIDTHS
                    ),
                    tuple(max(float(kl), 0.0) * share for share in shares),
                )
            )
            if on_unit is not None:
                on_unit(len(units))
        xs = [calibrate.run_block(model, model.config.kind_of(i), layer, x) for x in xs]
    return units


def choose(
    model: Model,
    params: Params,
    method: Method,
    target_bits: float,
    windows: np.ndarray,
    *,
    on_unit: Callable[[int], None] | None = None,
) -> tuple[Recipe, list[Choice]]:
    """Returns a recipe of `method` in several widths, and what each group of linears got.

    Args:
      model, params: the float model.
      method: what every linear gets; of its format all but the bits is kept.
      target_bits: most resident bits a quantized weight on average, scales included.
      windows: i32 [n, T] tokens to measure on.
      on_unit: called with the number of groups measured.

    Raises:
      ValueError: a format that has one width only or quantizes inputs, or a target that the widths
        cannot reach.
    """
    check(model, method, target_bits)
    units = measure(model, params, method, windows, on_unit=on_unit)
    total = sum(math.prod(shape) for shape in _shapes(model))
    rules, choices = [], []
    for unit, place in zip(units, grow(units, target_bits * total / 8)):
        fmt = dataclasses.replace(method.format, bits=WIDTHS[place])
        rules += [(name, dataclasses.replace(method, format=fmt)) for name in unit.modules]
        choices.append(Choice(unit.modules, str(fmt), unit.kl[0]))
    return Recipe(tuple(rules)), choices


def mixed(method: Method) -> Recipe:
    """Returns a recipe with several widths, to check exports before the widths are chosen."""
    rules = []
    for (block, parts), bits in zip(GROUPS, (WIDTHS[0], *WIDTHS[-3:])):
        fmt = dataclasses.replace(method.format, bits=bits)
        one = dataclasses.replace(method, format=fmt)
        rules += [(f"layers.*.{block}.{part}", one) for part in parts]
    return Recipe(tuple(rules))


def check(model: Model, method: Method, target_bits: float) -> None:
    """Raises the ValueErrors of `choose` before anything is measured."""
    fmt = method.format
    require(
        fmt.kind == "int" and fmt.act is None,
        f"target bits choose among integer widths of weights such as int4-g64, got {fmt}",
    )
    shapes = _shapes(model)
    total = sum(math.prod(shape) for shape in shapes)
    least, most = (
        8 * sum(_num_bytes(shape, method, bits) for shape in shapes) / total
        for bits in (WIDTHS[0], WIDTHS[-1])
    )
    require(
        least <= target_bits <= most,
        f"target bits must lie in {least:.2f}..{most:.2f} for {fmt} with widths of {WIDTHS[0]} to "
        f"{WIDTHS[-1]} bits, scales included, got {target_bits:g}",
    )


def _shapes(model: Model) -> list[tuple[int, ...]]:
    layers = model.abstract_params()["layers"]
    return [p[block][part]["w"].shape for p in layers for block, parts in GROUPS for part in parts]


@functools.cache
def _num_bytes(shape: tuple[int, ...], method: Method, bits: int) -> int:
    """Resident bytes of a weight at another width, scales and zero points included."""
    fmt = dataclasses.replace(method.format, bits=bits)
    round_it = functools.partial(quantize, fmt=fmt, scale_dtype=jnp.dtype(method.scale_dtype))
    return jax.eval_shape(round_it, jax.ShapeDtypeStruct(shape, jnp.float32)).nbytes


@functools.partial(jax.jit, static_argnums=1)
def _round(w: jax.Array, fmt: QFormat) -> jax.Array:
    return dequantize(quantize(w, fmt)).astype(w.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _squared_error(w: jax.Array, fmt: QFormat) -> jax.Array:
    delta = _round(w, fmt).astype(jnp.float32) - w.astype(jnp.float32)
    return jnp.sum(delta * delta)
