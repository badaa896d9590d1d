"""The grids that weights are rounded to, knowing no pytree, model or file: formats, scales, codes.

`w[i, o] = (q[i, o] - zero[i // g, o]) * scale[i // g, o]` with signed codes q. Integer grids follow
GPTQ (Frantar et al. 2022), NF4 Dettmers et al. 2023, FP8 Micikevicius et al. 2022.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from jinfer.config.fields import check_fields, require

Grid = Literal["full", "restricted"]

CHANNEL = -1  # QFormat.group: one scale for each output
TENSOR = 0  # QFormat.group: one scale for the whole matrix

FP8_DTYPES = {"fp8-e4m3": jnp.float8_e4m3fn, "fp8-e5m2": jnp.float8_e5m2}
FP8_MAX = {"fp8-e4m3": 448.0, "fp8-e5m2": 57344.0}

# Quantiles of a normal distribution with an exact zero (Dettmers et al. 2023, appendix E).
_NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023
1.0"""
# Sign, two bits of exponent, one of fraction, in bitsandbytes' order: not sorted.
_FP4 = "0 0.0625 8 12 4 6 2 3 -0 -0.0625 -8 -12 -4 -6 -2 -3"
CODEBOOKS = {
    "nf4": np.array(_NF4.split(), np.float32),
    "fp4": np.array(_FP4.split(), np.float32) / np.float32(12),
}
ACTS = ("dyn", "dyn-full", "static", "outlier")
_FORMAT = re.compile(
    r"(?:int(?P<bits>[2-8])|(?P<kind>fp8-e4m3|fp8-e5m2|nf4|fp4))"
    r"-(?:g(?P<group>[1-9][0-9]{0,8})|(?P<whole>channel|tensor)|block(?P<block>[1-9][0-9]{0,8}))"
    r"(?P<asym>-asymf|-asym)?(?P<dq>-dq)?(?::(?P<act>[a-z-]+))?"
)


@dataclasses.dataclass(frozen=True)
class QFormat:
    """How a weight is stored and what its inputs go through; hashable, printed and parsed.

    Examples: int4-g128, int4-g64-asym, int8-channel:dyn, fp8-e4m3-block128:dyn, nf4-g64-dq.

    Attributes:
      bits: bits of one code.
      kind: how a code is read: a signed integer, an fp8 number, or an index into a codebook.
      group: inputs that share a scale; CHANNEL (-1) all of them, TENSOR (0) one scale in all.
      symmetric: no zero point.
      act: what happens to the inputs: None (kept in float); "dyn", one scale a token found on the
        fly, amax / 127 (int8) or amax / 448 (fp8), one a token and group if block > 1; "dyn-full",
        the same with amax / 127.5; "static", the scale stored beside the weight; "outlier",
        LLM.int8(): "dyn", but features with any |x| >= 6 multiply in float.
      block: outputs that share a scale (fp8 blocks: group = block = 128).
      float_zero: the zero point is a float (HQQ, GGUF's minimum), not a code.
      double_quant: the scales themselves are 8-bit codes (bitsandbytes).
    """

    bits: int = 4
    kind: str = "int"
    group: int = CHANNEL
    symmetric: bool = True
    act: str | None = None
    block: int = 1
    float_zero: bool = False
    double_quant: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        bits = {"int": range(2, 9), "nf4": (4,), "fp4": (4,)}.get(self.kind, (8,))
        require(
            self.kind == "int" or self.kind in FP8_DTYPES or self.kind in CODEBOOKS,
            f"kind must be int, fp8-e4m3, fp8-e5m2, nf4 or fp4, got {self.kind!r}",
        )
        require(self.bits in bits, f"{self.kind} takes {list(bits)} bits, got {self.bits}")
        require(
            self.group >= CHANNEL,
            f"group must be positive, {CHANNEL} (channel) or {TENSOR} (tensor), got {self.group}",
        )
        require(
            self.symmetric or self.kind == "int", f"{self.kind} has no zero point: use symmetric"
        )
        require(not self.float_zero or not self.symmetric, "float_zero needs an asymmetric format")
        require(self.block > 0, f"block must be positive, got {self.block}")
        largest = max(self.group, self.block)
        require(largest < 10**9, f"group and block must be below 10**9, got {largest}")
        require(
            self.block == 1 or self.group == self.block,
            f"blocks are square: group ({self.group}) must equal block ({self.block})",
        )
        require(
            not self.double_quant or (self.kind in CODEBOOKS and self.group > 0),
            "double_quant is for nf4 and fp4 with groups",
        )
        require(
            self.act is None or self.act in ACTS, f"act must be one of {ACTS}, got {self.act!r}"
        )
        takes_act = self.kind in FP8_DTYPES or (self.kind == "int" and self.symmetric)
        require(
            self.act is None or takes_act,
            f"activations are quantized for symmetric int and fp8 weights only, not {self.kind}",
        )
        require(
            self.act != "static" or self.kind == "int" or self.group <= 0,
            f"{self.kind} in groups or blocks takes dynamic inputs (:dyn), one scale a token and "
            "group",
        )
        require(
            self.act not in ("outlier", "dyn-full") or self.kind == "int",
            f":{self.act} is for integer formats, not {self.kind}",
        )

    @classmethod
    def parse(cls, text: str) -> QFormat:
        """Reads what `str` prints; raises ValueError naming the grammar."""
        found = _FORMAT.fullmatch(text) if isinstance(text, str) else None
        require(
            found is not None,
            f"format {text!r} is not understood; write <int2..int8|fp8-e4m3|fp8-e5m2|nf4|fp4>-"
            "<gN|channel|tensor|blockN>[-asym|-asymf][-dq][:dyn|:dyn-full|:static|:outlier], "
            "for example int4-g128, int8-channel:dyn, fp8-e4m3-block128:dyn",
        )
        assert found is not None
        kind = found["kind"] or "int"
        block = int(found["block"] or 1)
        whole = {"channel": CHANNEL, "tensor": TENSOR}
        return cls(
            bits=int(found["bits"] or (4 if kind in CODEBOOKS else 8)),
            kind=kind,
            group=whole[found["whole"]] if found["whole"] else int(found["group"] or block),
            symmetric=found["asym"] is None,
            act=found["act"],
            block=block,
            float_zero=found["asym"] == "-asymf",
            double_quant=found["dq"] is not None,
        )

    def __str__(self) -> str:
        name = f"int{self.bits}" if self.kind == "int" else self.kind
        share = {CHANNEL: "channel", TENSOR: "tensor"}.get(self.group, f"g{self.group}")
        if self.block > 1:
            share = f"block{self.block}"
        asym = "" if self.symmetric else "-asymf" if self.float_zero else "-asym"
        dq = "-dq" if self.double_quant else ""
        return f"{name}-{share}{asym}{dq}" + (f":{self.act}" if self.act else "")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code of an integer format."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def is_packed(self) -> bool:
        """Whether codes form a dense bit stream of bytes (every width but 4 and 8)."""
        return self.bits not in (4, 8)

    def group_size(self, num_inputs: int) -> int:
        """Inputs that share a scale, for a weight with `num_inputs` of them."""
        return self.group if self.group > 0 else num_inputs

    def num_groups(self, num_inputs: int) -> int:
        """Groups along the inputs; the last may be short."""
        return -(-num_inputs // self.group_size(num_inputs))

    def scale_shape(self, num_inputs: int, num_outputs: int) -> tuple[int, int]:
        """[G, O], [1, 1] for a tensor scale, [ceil(I/128), ceil(O/128)] for 128-blocks."""
        if self.group == TENSOR:
            return 1, 1
        return self.num_groups(num_inputs), -(-num_outputs // self.block)


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
