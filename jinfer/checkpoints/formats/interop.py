"""Interfaces and helpers shared by readers and writers of foreign quantized formats.

A reader turns one module's tensors (numpy, as stored) into a QTensor, or into `Dense` with the
reason if a QTensor cannot represent them. A writer is the inverse.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

import jax.numpy as jnp
import numpy as np

from jinfer.config.fields import require
from jinfer.config.quant_format import CHANNEL, QFormat
from jinfer.linear.qtensor import QTensor, from_codes


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dequantized weight f32 [I, O], why it is not kept quantized, and its stored bits."""

    w: np.ndarray
    reason: str
    bits: int


Weight: TypeAlias = QTensor | Dense
Tensors: TypeAlias = Mapping[str, np.ndarray]
Sign: TypeAlias = Literal["any", "not negative", "positive"]
"""Allowed signs of a scale; it must always be finite."""


class Reader(Protocol):
    """One checkpoint's format, read from its `quantization_config`."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of a module's tensors in this format, such as "qweight"."""
        ...

    @property
    def scales(self) -> tuple[tuple[str, Sign], ...]:
        """Names of the leaves that scale codes, whether used or not, with their allowed signs.

        "any" where files have negative scales: AutoRound gives a group's scale the sign of its
        largest weight, in GPTQ, AWQ and compressed-tensors files. A group of zeros, or one whose
        scale is too small for f16, has the scale zero.
        """
        ...

    def shape(self, module: str, tensors: Tensors) -> tuple[int, int]:
        """Returns [O, I] of a module, mostly from the tensors' shapes."""
        ...

    def read(self, module: str, tensors: Tensors) -> Weight:
        """Returns a module's weight; raises ValueError, naming the module, if they do not fit."""
        ...


def check_scales(module: str, tensors: Tensors, leaves: Iterable[tuple[str, Sign]]) -> None:
    """Raises ValueError, naming module and leaf, if a scale is not finite or of a wrong sign."""
    for leaf, sign in leaves:
        if leaf not in tensors or not jnp.issubdtype(tensors[leaf].dtype, jnp.floating):
            continue  # not there, or codes of double scales
        with np.errstate(over="ignore", invalid="ignore"):  # f64 that f32 cannot hold is infinite
            values = np.asarray(tensors[leaf]).astype(np.float32)
        is_bad = ~np.isfinite(values)
        if sign != "any":
            is_bad |= values < 0 if sign == "not negative" else values <= 0
        if np.any(is_bad):
            must = "finite" if sign == "any" else f"{sign} and finite"
            raise ValueError(
                f"{module}: {leaf} must be {must}, got {values[is_bad].flat[0]:.3g} "
                f"({int(is_bad.sum())} of {values.size}): the file is damaged, make it again"
            )


def make_qtensor(
    unsigned: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    fmt: QFormat,
    *,
    act_scale: np.ndarray | None = None,
    perm: np.ndarray | None = None,
) -> QTensor:
    """Builds a QTensor from unsigned codes [I, O] and zero points [G, O].

    If all zero points are in the middle they are dropped and the format is symmetric.
    """
    middle = 2 ** (fmt.bits - 1)
    if zero is not None and np.all(zero == middle):
        zero = None
    if zero is not None:
        require(
            zero.min() >= 0 and zero.max() < 2 * middle,
            f"zero points must lie in 0..{2 * middle - 1}, got {zero.min()}..{zero.max()}",
        )
    fmt = dataclasses.replace(fmt, symmetric=zero is None)
    signed = (unsigned.astype(np.int16) - middle).astype(np.int8)
    return from_codes(
        jnp.asarray(signed),
        jnp.asarray(scale),
        None if zero is None else jnp.asarray((zero.astype(np.int16) - middle).astype(np.int8)),
        fmt,
        act_scale=None if act_scale is None else jnp.asarray(act_scale, jnp.float32).reshape(()),
        perm=None if perm is None else jnp.asarray(perm, jnp.int32),
    )


def unsigned_parts(x: QTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns unsigned codes [I, O], scales and unsigned zero points [G, O] of an int QTensor."""
    middle = 2 ** (x.fmt.bits - 1)
    scale = np.asarray(x.scale)
    codes = (np.asarray(x.codes(), np.int16) + middle).astype(np.uint8)
    if x.zero is None:
        return codes, scale, np.full(scale.shape, middle, np.uint8)
    zero = (np.asarray(x.zero.astype(jnp.int8), np.int16) + middle).astype(np.uint8)
    return codes, scale, zero


def check_writable(x: QTensor, what: str, bits: tuple[int, ...], *, has_groups: bool) -> None:
    """Raises ValueError unless `what` can store `x`: integers of `bits`, [I, O], integer zeros."""
    fmt = x.fmt
    require(x.ndim == 2, f"{what} holds weights [I, O] one by one, got {list(x.shape)}")
    require(
        fmt.kind == "int" and fmt.bits in bits and not fmt.float_zero,
        f"{what} holds integers of {', '.join(map(str, bits))} bits, got {fmt}",
    )
    require(
        not has_groups or fmt.act is None,
        f"{what} stores no input quantization, got {fmt}; write compressed-tensors",
    )
    require(
        not has_groups or (fmt.group != 0 and fmt.block == 1),
        f"{what} needs scales by group or channel, got {fmt}",
    )


def check_dtype(module: str, leaf: str, tensor: np.ndarray, dtype: Any) -> None:
    """Raises ValueError unless codes have the right type: floats would be rounded."""
    require(
        tensor.dtype == dtype,
        f"{module}: {leaf} must be {np.dtype(dtype).name}, got {tensor.dtype}",
    )


def half_scale(scale: np.ndarray, what: str) -> np.ndarray:
    """Returns scales in 16 bits: unchanged, or f32 ones that f16 represents exactly.

    Raises:
      ValueError: f32 scales that rounding would change.
    """
    if scale.dtype.itemsize == 2:
        return scale
    half = scale.astype(np.float16)
    require(
        bool(np.all(half.astype(np.float32) == scale)),
        f"{what} holds 16-bit scales and these are f32; quantize with scale_dtype=float16",
    )
    return half


def sort_groups(
    module: str, g_idx: np.ndarray | None, num_inputs: int, group: int
) -> tuple[np.ndarray | None, str | None]:
    """Returns an order of inputs in which groups are runs of `group`.

    Returns:
      (None, None) if they are already; (perm, None) if sorting by group gives such runs, with
      perm[row] = input; (perm, reason) if groups are uneven and no QTensor can represent them.
    """
    if g_idx is None or np.all(g_idx < 0):
        return None, None
    require(
        g_idx.shape == (num_inputs,) and g_idx.dtype.kind in "iu",
        f"{module}: g_idx must be [{num_inputs}] integers, got {g_idx.dtype}{list(g_idx.shape)}",
    )
    places = np.arange(num_inputs) // group
    require(
        g_idx.min() >= 0 and g_idx.max() <= places[-1],
        f"{module}: g_idx must lie in 0..{places[-1]}, got {g_idx.min()}..{g_idx.max()}",
    )
    if np.array_equal(g_idx, places):
        return None, None
    perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    if np.array_equal(g_idx[perm], places):
        return perm, None
    return perm, f"its groups (g_idx) are not of {group} inputs each"


def group_indices(x: QTensor) -> np.ndarray:
    """Returns int32 [I], the group of each input; the inverse of `sort_groups`."""
    num_inputs = x.shape[0]
    places = (np.arange(num_inputs) // x.fmt.group_size(num_inputs)).astype(np.int32)
    if x.perm is None:
        return places
    return places[np.argsort(np.asarray(x.perm))]


def group_of(group_size: Any, where: str) -> int:
    """Reads a config's `group_size`: -1 or None is one group, else positive."""
    if group_size in (-1, None):
        return CHANNEL
    require(
        isinstance(group_size, int) and group_size > 0,
        f"{where}: group_size must be -1 or positive, got {group_size!r}",
    )
    return group_size


def matches(target: str, module: str, class_name: str = "Linear") -> bool:
    """Whether a target or ignore entry matches `module`: its class, its name's end, or "re:..."."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (class_name, module) or module.endswith("." + target)
