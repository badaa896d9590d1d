"""Quantized weights as a pytree, knowing nothing of models or files.

`w[i, o] = (q[i, o] - zero[i // g, o]) * scale[i // g, o]`; the grids are in `grids`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jinfer.config.fields import require, shown
from jinfer.config.quant_format import CODEBOOKS, TENSOR, QFormat
from jinfer.linear.grids import FP8_DTYPES, Grid, decode, divide, encode, expand_groups, find_scales
from jinfer.linear.xla import XlaWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoubleScale:
    """Scales [..., G, O] kept as 8-bit codes: `map[codes] * absmax[i // 256] + offset`.

    i counts the scales output by output ([O, G] row-major), as bitsandbytes lays them.
    """

    codes: Array  # uint8 [..., G, O]
    absmax: Array  # f32 [..., ceil(G * O / 256)]
    offset: Array  # f32 [...]

    def decode(self) -> Array:
        """f32 [..., G, O]."""
        *lead, num_groups, num_outputs = self.codes.shape
        flat = jnp.asarray(DYNAMIC_MAP)[jnp.swapaxes(self.codes, -1, -2)]
        flat = flat.reshape(*lead, num_groups * num_outputs)
        absmax = jnp.repeat(self.absmax, 256, axis=-1)[..., : flat.shape[-1]]
        flat = flat * absmax + self.offset[..., None]
        return jnp.swapaxes(flat.reshape(*lead, num_outputs, num_groups), -1, -2)

    @classmethod
    def encode(cls, scale: Array) -> DoubleScale:
        """Rounds f32 scales [G, O] to 8 bits in blocks of 256, around their mean."""
        flat = scale.T.reshape(-1).astype(jnp.float32)
        offset = jnp.mean(flat)
        num_blocks = -(-flat.size // 256)
        blocks = jnp.pad(flat - offset, (0, num_blocks * 256 - flat.size)).reshape(-1, 256)
        absmax = jnp.max(jnp.abs(blocks), axis=1)
        ratio = divide(blocks, jnp.where(absmax == 0, 1.0, absmax)[:, None])
        middles = jnp.asarray((DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2)
        codes = jnp.searchsorted(middles, ratio.reshape(-1), side="left")[: flat.size]
        codes = codes.astype(jnp.uint8).reshape(scale.shape[::-1]).T
        return cls(codes, absmax, offset)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor(XlaWeight):
    """A quantized weight [..., I, O]: codes, scales and their format; a pytree of plain arrays.

    Attributes:
      q: the codes. int8 [..., I, O] at 8 bits, native int4 at 4 bits (XLA packs two a byte on GPU
        and TPU), an fp8 dtype, or for other widths a dense little-endian bit stream along I,
        uint8 [..., ceil(I * bits / 8), O].
      scale: [..., G, O] (see QFormat.scale_shape) or DoubleScale.
      zero: None, or codes (int8, int4) or floats of the scale's shape, in the codes' signed units.
      act_scale: f32 [] scale of the inputs, only for act = "static".
      perm: i32 [I] or None: row r of the stored matrix multiplies input perm[r] (GPTQ act-order).
      fmt: the format (static).
      pad: unused codes at the end of a bit stream (static).
    """

    q: Array
    scale: Array | DoubleScale
    zero: Array | None = None
    act_scale: Array | None = None
    perm: Array | None = None
    fmt: QFormat = dataclasses.field(default=QFormat(), metadata={"static": True})
    pad: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., I, O]."""
        *lead, rows, num_outputs = self.q.shape
        num_inputs = rows * 8 // self.fmt.bits - self.pad if self.fmt.is_packed else rows
        return (*lead, num_inputs, num_outputs)

    @property
    def dtype(self) -> Any:
        """Dtype of the scales: what the weight is worth in float."""
        return jnp.dtype(jnp.float32) if isinstance(self.scale, DoubleScale) else self.scale.dtype

    def scales(self) -> Array:
        """f32 scales [..., G, O]."""
        if isinstance(self.scale, DoubleScale):
            return self.scale.decode()
        return self.scale.astype(jnp.float32)

    def codes(self) -> Array:
        """Codes [..., I, O]: int8 for int, index 0..15 for codebooks, fp8 numbers for fp8."""
        if self.fmt.kind in FP8_DTYPES:
            return self.q
        if not self.fmt.is_packed:
            codes = self.q.astype(jnp.int8)
            return codes + jnp.int8(8) if self.fmt.kind in CODEBOOKS else codes
        unsigned = unpack_bits(self.q, self.fmt.bits, self.shape[-2])
        return unsigned.astype(jnp.int8) + jnp.int8(self.fmt.code_range[0])

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The dense weight [..., I, O], inputs in their original order; computed in f32."""
        *_, num_inputs, num_outputs = self.shape
        rows = expand_groups(self.scales(), self.fmt, num_inputs, num_outputs)
        zeros = self.zero
        if zeros is not None:
            zeros = expand_groups(zeros, self.fmt, num_inputs, num_outputs)
        w = decode(self.codes(), rows, zeros, self.fmt)
        if self.perm is not None:
            places = jnp.argsort(self.perm, axis=-1).astype(jnp.int32)
            w = jnp.take_along_axis(w, places[..., None], axis=-2)
        return w.astype(dtype)


def pack_bits(codes: Array, bits: int) -> Array:
    """Packs unsigned codes [..., I, O] into a little-endian bit stream along I.

    Code i takes bits i * b .. i * b + b - 1. Example, 3 bits, codes a..h of one output:

        byte 0  c1c0 b2b1b0 a2a1a0    byte 1  f0 e2e1e0 d2d1d0 c2    byte 2  h2h1h0 g2g1g0 f2f1

    Returns:
      uint8 [..., ceil(I * b / 8), O].
    """
    *lead, num_inputs, num_outputs = codes.shape
    chunks = -(-num_inputs // 8)
    widths = [(0, 0)] * len(lead) + [(0, chunks * 8 - num_inputs), (0, 0)]
    c = jnp.pad(codes.astype(jnp.uint8), widths).reshape(*lead, chunks, 8, num_outputs)
    rows = []
    for byte in range(bits):
        row = jnp.zeros((*lead, chunks, num_outputs), jnp.uint8)
        for j in range(8):
            shift = j * bits - 8 * byte
            if 0 <= shift < 8:
                row = row | jnp.left_shift(c[..., j, :], jnp.uint8(shift))
            elif -bits < shift < 0:
                row = row | jnp.right_shift(c[..., j, :], jnp.uint8(-shift))
        rows.append(row)
    stream = jnp.stack(rows, axis=-2).reshape(*lead, chunks * bits, num_outputs)
    return stream[..., : -(-num_inputs * bits // 8), :]


def unpack_bits(stream: Array, bits: int, num_inputs: int) -> Array:
    """Inverse of `pack_bits`: uint8 codes [..., num_inputs, O]."""
    *lead, num_bytes, num_outputs = stream.shape
    chunks = -(-num_inputs // 8)
    widths = [(0, 0)] * len(lead) + [(0, chunks * bits - num_bytes), (0, 0)]
    s = jnp.pad(stream, widths).reshape(*lead, chunks, bits, num_outputs)
    codes = []
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        code = jnp.right_shift(s[..., byte, :], jnp.uint8(shift))
        if shift + bits > 8:
            code = code | jnp.left_shift(s[..., byte + 1, :], jnp.uint8(8 - shift))
        codes.append(code & jnp.uint8(2**bits - 1))
    out = jnp.stack(codes, axis=-2).reshape(*lead, chunks * 8, num_outputs)
    return out[..., :num_inputs, :]


def from_codes(
    codes: Array,
    scale: Array | DoubleScale,
    zero: Array | None,
    fmt: QFormat,
    *,
    act_scale: Array | None = None,
    perm: Array | None = None,
) -> QTensor:
    """Packs codes [..., I, O] (as `codes()` gives them) into a QTensor; checks the shapes."""
    *_, num_inputs, num_outputs = codes.shape
    shape = (scale.codes if isinstance(scale, DoubleScale) else scale).shape[-2:]
    expected = fmt.scale_shape(num_inputs, num_outputs)
    require(
        shape == expected,
        f"{fmt} of [{num_inputs}, {num_outputs}] needs scales {list(expected)}, got {list(shape)}",
    )
    require((zero is None) == fmt.symmetric, f"{fmt} and zero = {zero} disagree")
    require(
        zero is None or zero.shape[-2:] == expected,
        f"{fmt} of [{num_inputs}, {num_outputs}] needs zero points {list(expected)}, "
        f"got {[] if zero is None else list(zero.shape[-2:])}",
    )
    require((act_scale is None) == (fmt.act != "static"), f"{fmt} and act_scale disagree")
    pad = 0
    if fmt.is_packed:
        q = pack_bits(codes.astype(jnp.int8) - jnp.int8(fmt.code_range[0]), fmt.bits)
        pad = q.shape[-2] * 8 // fmt.bits - num_inputs
    elif fmt.kind in FP8_DTYPES:
        q = codes
    elif fmt.bits == 4:
        offset = 8 if fmt.kind in CODEBOOKS else 0
        q = (codes - jnp.int8(offset)).astype(jnp.int4)
        zero = zero if zero is None or fmt.float_zero else zero.astype(jnp.int4)
    else:
        q = codes.astype(jnp.int8)
    return QTensor(q, scale, zero, act_scale, perm, fmt, pad)


def split_outputs(x: QTensor, widths: Sequence[int]) -> list[QTensor]:
    """Cuts a weight into pieces of `widths` outputs: undoes a concatenation along the last axis.

    Double scales become plain f32 ones, since their blocks would be cut.

    Raises:
      ValueError: widths do not add up, or cut a block of outputs that shares a scale.
    """
    require(sum(widths) == x.shape[-1], f"widths {list(widths)} do not sum to {x.shape[-1]}")
    block, scale = x.fmt.block, x.scale
    if isinstance(scale, DoubleScale):
        fmt = dataclasses.replace(x.fmt, double_quant=False)
        scale, x = scale.decode(), dataclasses.replace(x, fmt=fmt)
    pieces, start = [], 0
    for width in widths:
        require(start % block == 0, f"{x.fmt}: a cut at output {start} divides a block")
        stop = start + width
        piece, zero = scale, x.zero
        if x.fmt.group != TENSOR:
            cut = slice(start // block, -(-stop // block))
            piece, zero = scale[..., cut], None if zero is None else zero[..., cut]
        pieces.append(dataclasses.replace(x, q=x.q[..., start:stop], scale=piece, zero=zero))
        start = stop
    return pieces


def concat_outputs(weights: Sequence[QTensor]) -> QTensor:
    """Joins weights of one format side by side, [..., I, O1 + O2 + ..]; undoes `split_outputs`.

    Raises:
      ValueError: formats differ, or a scale is shared by outputs.
    """
    first = weights[0]
    for x in weights:
        require(
            x.fmt == first.fmt and x.fmt.group != TENSOR and not x.fmt.double_quant,
            f"{x.fmt} and {first.fmt} cannot be joined: one format with scales by output is needed",
        )
        require(x.shape[-1] % x.fmt.block == 0, f"{x.fmt}: a block would lie in two weights")
        require(x.perm is None and x.act_scale is None, f"{x.fmt}: inputs are not the same")
    fields = {}
    for name in ("q", "scale") if first.zero is None else ("q", "scale", "zero"):
        fields[name] = jnp.concatenate([getattr(x, name) for x in weights], axis=-1)
    return dataclasses.replace(first, **fields)


def check_weight(w: Any, name: str = "weight") -> None:
    """Raises TypeError unless `w` is an array of floats, ValueError if it is no [..., I, O]."""
    is_array = isinstance(w, (Array, np.ndarray))
    if not is_array or not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{name} must be an array of floats, got {shown(w)}")
    require(w.ndim >= 2, f"a {name} is [..., I, O], got shape {list(w.shape)}")
    require(w.size > 0, f"{name} is empty: {list(w.shape)}")
    is_gone = isinstance(w, Array) and not isinstance(w, Tracer) and w.is_deleted()
    require(not is_gone, f"{name} was donated or deleted: its values are gone")


def read_target(fmt: Any, scale_dtype: Any, grid: Any = "full") -> jnp.dtype:
    """Checks what a weight is to be rounded to; returns the dtype of its scales.

    Raises:
      TypeError: `fmt` is no QFormat, or `scale_dtype` no dtype of floats.
      ValueError: an unknown grid.
    """
    if not isinstance(fmt, QFormat):
        raise TypeError(
            f'fmt must be a QFormat such as QFormat.parse("int4-g64"), got {shown(fmt)}'
        )
    is_known = isinstance(grid, str) and grid in ("full", "restricted")
    require(is_known, f"grid must be full or restricted, got {shown(grid)}")
    try:
        found = (
            None if isinstance(scale_dtype, Array | np.ndarray | None) else jnp.dtype(scale_dtype)
        )
    except (TypeError, ValueError):
        found = None
    if found is None or found not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"scale_dtype must be float16, bfloat16 or float32, got {shown(scale_dtype)}"
        )
    return found


def check_scales(x: QTensor) -> QTensor:
    """Returns a quantized weight; raises ValueError where its scales do not hold its size.

    Those that do not are the largest number of their dtype, see `qformat.scales_from_range`.
    """
    scales = x.scale if isinstance(x.scale, Array) else x.scales()
    if not isinstance(scales, Tracer):
        most = float(jnp.max(scales.astype(jnp.float32), initial=0.0))
        require(
            most < float(jnp.finfo(scales.dtype).max),
            f"weight is too large for scales of {scales.dtype}: give scale_dtype float32, or scale "
            "the weight down",
        )
    return x


def check_finite(x: Array, what: str) -> None:
    """Raises ValueError if a concrete array holds NaN or infinity (integer casts would hide it)."""
    if not isinstance(x, Tracer):
        bad = int(jnp.sum(~jnp.isfinite(x)))
        require(bad == 0, f"{what} holds {bad} NaN or infinite values of {x.size}")


def quantize(
    w: Array, fmt: QFormat, *, grid: Grid = "full", scale_dtype: Any = jnp.float32
) -> QTensor:
    """Rounds `w` [..., I, O] to the nearest code; scales from each group's extremes.

    Args:
      w: the dense weight, any float dtype.
      fmt: the target; activation "static" needs calibration and is refused here.
      grid: symmetric integer grid, see `find_scales`.
      scale_dtype: storage dtype of the scales.

    Raises:
      ValueError: `w` holds NaN or infinity (checked when not traced), or has fewer than 2 axes.
    """
    check_weight(w)
    scale_dtype = read_target(fmt, scale_dtype, grid)
    check_finite(w, "weight")
    w = jnp.asarray(w).astype(jnp.float32)
    scale, zero = find_scales(w, fmt, grid=grid, scale_dtype=scale_dtype)
    stored = DoubleScale.encode(scale) if fmt.double_quant else scale
    if isinstance(stored, DoubleScale):
        scale = stored.decode()
    *_, num_inputs, num_outputs = w.shape
    rows = expand_groups(scale, fmt, num_inputs, num_outputs)
    zeros = None if zero is None else expand_groups(zero, fmt, num_inputs, num_outputs)
    codes = encode(w, rows, zeros, fmt)
    return check_scales(from_codes(codes, stored, zero, fmt))


def dequantize(x: QTensor, dtype: Any = jnp.float32) -> Array:
    """The dense weight [..., I, O], inputs in their original order; computed in f32."""
    return x.dequantize(dtype)


def _dynamic_map() -> np.ndarray:
    # 8-bit dynamic exponent map of Dettmers 2022 (arXiv:2110.02861), section 2.2: for exponents
    # 10^-6 .. 10^0 the middles of 1, 2, .. 64 equal parts of 0.1..1, both signs, and 0 and 1.
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        part = np.float32(10.0 ** (i - 6)) * middles
        values += [*part.tolist(), *(-part).tolist()]
    return np.sort(np.array(values, np.float32))


DYNAMIC_MAP = _dynamic_map()
