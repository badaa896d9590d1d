"""Number formats of quantized weights, and the parser and printer of their names."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from jinfer.config.fields import check_fields, require

CHANNEL = -1  # QFormat.group: one scale for each output


TENSOR = 0  # QFormat.group: one scale for the whole matrix


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
    """Format of a weight and of its inputs; hashable, printed and parsed.

    Examples: int4-g128, int4-g64-asym, int8-channel:dyn, fp8-e4m3-block128:dyn, nf4-g64-dq.

    Attributes:
      bits: bits of one code.
      kind: how a code is read: a signed integer, an fp8 number, or an index into a codebook.
      group: inputs that share a scale; CHANNEL (-1) all of them, TENSOR (0) one scale in all.
      symmetric: no zero point.
      act: quantization of the inputs: None (float); "dyn", one scale per token found at run time,
        amax / 127 (int8) or amax / 448 (fp8), one per token and group if block > 1; "dyn-full",
        the same with amax / 127.5; "static", the scale stored with the weight; "outlier",
        LLM.int8(): "dyn", but features with any |x| >= 6 are multiplied in float.
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
            self.kind == "int" or self.kind in FP8_MAX or self.kind in CODEBOOKS,
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
        takes_act = self.kind in FP8_MAX or (self.kind == "int" and self.symmetric)
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
