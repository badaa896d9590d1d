"""GPTQ files, as AutoGPTQ and GPTQModel write them: `qweight`, `qzeros`, `scales`, `g_idx`.

    qweight int32 [I * b / 32, O]   inputs packed along the words of an output's column
    qzeros  int32 [G, O * b / 32]   outputs packed along a row; "gptq" (v1) stores zero - 1,
    scales  f16   [G, O]            "gptq_v2" stores zero
    g_idx   int32 [I]               the group of each input

Fields outside int4, such as the 3-bit stream, are those of `bitpack`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jinfer.checkpoints.formats.bitpack import pack_words, unpack_words
from jinfer.checkpoints.formats.interop import (
    Dense,
    Sign,
    Tensors,
    Weight,
    check_dtype,
    check_writable,
    group_indices,
    group_of,
    half_scale,
    make_qtensor,
    sort_groups,
    unsigned_parts,
)
from jinfer.config.fields import require
from jinfer.config.quant_format import QFormat
from jinfer.linear.qtensor import QTensor, dequantize

BITS = (2, 3, 4, 8)
SAMPLED_OUTPUTS = 256  # outputs of a module from which the version is inferred
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GPTQReader:
    """A GPTQ checkpoint; where its label contradicts the tensors, the tensors decide.

    Attributes:
      bits: of one code, where `dynamic` does not say otherwise.
      group: inputs of a group, or CHANNEL.
      symmetric: as the config says.
      version: 1 or 2, as the config says.
      dynamic: GPTQModel's overrides: regular expression of module names -> changed fields.
    """

    bits: int
    group: int
    symmetric: bool
    version: int
    dynamic: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    leaves: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    scales: tuple[tuple[str, Sign], ...] = (("scales", "any"),)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> GPTQReader:
        """Reads a `quantization_config` (or quantize_config.json)."""
        label = config.get("checkpoint_format") or config.get("format") or "gptq"
        require(
            label in ("gptq", "gptq_v2"),
            f"GPTQ checkpoint_format {label!r} is not supported; supported: gptq, gptq_v2",
        )
        words = config.get("pack_dtype") or "int32"
        require(words == "int32", f"GPTQ pack_dtype {words!r} is not supported; supported: int32")
        bits, dynamic = config.get("bits"), config.get("dynamic") or {}
        for pattern in dynamic:
            re.compile(pattern[2:] if pattern[:2] in ("-:", "+:") else pattern)
        require(bits in BITS, f"GPTQ bits must be one of {BITS}, got {bits!r}")
        return cls(
            bits=int(bits or 0),
            group=group_of(config.get("group_size", -1), "GPTQ"),
            symmetric=bool(config.get("sym", True)),
            version=2 if label == "gptq_v2" else 1,
            dynamic=tuple(dynamic.items()),
        )

    def of(self, module: str) -> GPTQReader:
        """Returns this reader with the first override whose pattern fits `module`."""
        for pattern, change in self.dynamic:
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                group, bits = change.get("group_size", self.group), change.get("bits", self.bits)
                require(bits in BITS, f"{module}: GPTQ bits must be one of {BITS}, got {bits!r}")
                return dataclasses.replace(
                    self,
                    bits=bits,
                    group=group_of(group, module),
                    symmetric=change.get("sym", self.symmetric),
                )
        return self

    def believed(self, samples: Iterable[tuple[str, Tensors]]) -> GPTQReader:
        """Returns this reader with the other version, if the zero points of all samples show it.

        In asymmetric modules of few bits the mean of codes minus zeros is about 0, as that of
        weights is, and the wrong version is off by one. One module alone is not conclusive.
        """
        offsets = [o for m, tensors in samples if (o := self.of(m)._offset(tensors)) is not None]
        one = 1 if self.version == 1 else -1
        if offsets and all(abs(o) > 0.75 and abs(o + one) < 0.25 for o in offsets):
            _warn_label(self.version, 3 - self.version)
            return dataclasses.replace(self, version=3 - self.version)
        return self

    def _offset(self, tensors: Tensors) -> float | None:
        """Returns the mean of codes minus zeros by the label; None if it is not conclusive."""
        stored, q = tensors.get("qzeros"), tensors["qweight"]
        num_outputs, num_inputs = q.shape[1], q.shape[0] * 32 // self.bits
        if self.bits > 4 or stored is None or stored.shape[-1] * 32 < num_outputs * self.bits:
            return None
        as_v1, as_v2 = _both_versions(stored, self.bits, num_outputs)
        if np.all(as_v2 == as_v2.flat[0]):
            return None
        q = q[:, :SAMPLED_OUTPUTS]
        zero = (as_v2 if self.version == 2 else as_v1)[:, :SAMPLED_OUTPUTS]
        return float(unpack_words(q.T, self.bits, num_inputs).mean()) - float(zero.mean())

    def shape(self, module: str, tensors: Tensors) -> tuple[int, int]:
        rows, num_outputs = tensors["qweight"].shape
        g_idx = tensors.get("g_idx")
        num_inputs = rows * 32 // self.of(module).bits if g_idx is None else g_idx.shape[0]
        return num_outputs, num_inputs

    def read(self, module: str, tensors: Tensors) -> Weight:
        own = self.of(module)
        q, scales = tensors["qweight"], tensors.get("scales")
        stored = tensors.get("qzeros")
        if scales is None or stored is None:
            raise ValueError(f"{module} has qweight but no scales or no qzeros")
        check_dtype(module, "qweight", q, np.int32)
        check_dtype(module, "qzeros", stored, np.int32)
        num_outputs, num_inputs = self.shape(module, tensors)
        group = own.group if own.group > 0 else num_inputs
        num_groups = -(-num_inputs // group)
        require(
            scales.shape == (num_groups, num_outputs),
            f"{module}: scales must be [{num_groups}, {num_outputs}] for groups of {group} in "
            f"{num_inputs} inputs, got {list(scales.shape)}",
        )
        words = (-(-num_inputs * own.bits // 32), -(-num_outputs * own.bits // 32))
        for name, want in (
            ("qweight", (words[0], num_outputs)),
            ("qzeros", (num_groups, words[1])),
        ):
            require(
                tensors[name].shape == want,
                f"{module}: {name} must be {list(want)} for {own.bits} bits of [{num_inputs}, "
                f"{num_outputs}], got {list(tensors[name].shape)}",
            )
        unsigned = unpack_words(q.T, own.bits, num_inputs).T  # [I, O]
        zero = own.zeros(stored, num_outputs)
        perm, reason = sort_groups(module, tensors.get("g_idx"), num_inputs, group)
        fmt = QFormat(bits=own.bits, group=own.group)
        if reason is not None:
            g_idx = tensors["g_idx"]
            values = (unsigned.astype(np.float32) - zero[g_idx]) * scales[g_idx].astype(np.float32)
            return Dense(values, reason, own.bits)
        unsigned = unsigned if perm is None else unsigned[perm]
        return make_qtensor(unsigned, scales, zero, fmt, perm=perm)

    def zeros(self, stored: np.ndarray, num_outputs: int) -> np.ndarray:
        """Returns the zero points [G, O], by the label unless the numbers contradict it.

        All zero points of a symmetric file are equal: the middle (v2) or one less (v1).
        """
        middle = 2 ** (self.bits - 1)
        as_v1, as_v2 = _both_versions(stored, self.bits, num_outputs)
        version = self.version
        if self.symmetric and np.all(as_v2 == middle):
            version = 2
        elif self.symmetric and np.all(as_v1 == middle):
            version = 1
        if version != self.version:
            _warn_label(self.version, version)
        zero = as_v2 if version == 2 else as_v1
        return zero.astype(np.int16)


@functools.lru_cache
def _warn_label(said: int, found: int) -> None:
    _log.warning("this GPTQ checkpoint is labelled v%d, but its zero points are v%d's", said, found)


def _both_versions(
    stored: np.ndarray, bits: int, num_outputs: int
) -> tuple[np.ndarray, np.ndarray]:
    return _add_one(stored, bits, num_outputs), unpack_words(stored, bits, num_outputs)


def _add_one(stored: np.ndarray, bits: int, num_outputs: int) -> np.ndarray:
    """Returns v1's zeros + 1, added by whole words so that a zero of 0 gets its borrow back.

    4-bit zeros 0 and 5 as v2: 0x50; v1 subtracts 0x11 from the word: 0x3f; adding gives 0x50 back,
    where nibble by nibble the zeros would be 16 and 4. A 3-bit field wraps by itself (GPTQModel).
    """
    if bits == 3:
        return (unpack_words(stored, bits, num_outputs) + 1) & 7
    ones = int(sum(1 << i for i in range(0, 32, bits)))
    words = (np.ascontiguousarray(stored).view(np.uint32).astype(np.uint64) + ones).astype(
        np.uint32
    )
    return unpack_words(words, bits, num_outputs)


def write_gptq(x: QTensor, *, version: int = 2) -> dict[str, np.ndarray]:
    """Returns `qweight`, `qzeros`, `scales`, `g_idx` of one module.

    Raises:
      ValueError: the format or the shape does not fit; or version 1 with a zero point of 0.
    """
    check_writable(x, "GPTQ", BITS, has_groups=True)
    bits, (num_inputs, num_outputs) = x.fmt.bits, x.shape
    require(
        num_inputs * bits % 32 == 0 and num_outputs * bits % 32 == 0,
        f"GPTQ packs whole words: {bits} bits need inputs and outputs in multiples of 32, got "
        f"{list(x.shape)}",
    )
    codes, scale, zero = unsigned_parts(x)
    if x.perm is not None:
        codes = codes[np.argsort(np.asarray(x.perm))]
    if version == 1:
        require(
            bool(np.all(zero > 0)), "GPTQ v1 cannot hold a zero point of 0 safely: write version 2"
        )
        zero = zero - 1
    return {
        "qweight": np.ascontiguousarray(pack_words(codes.T, bits).T),
        "qzeros": pack_words(zero, bits),
        "scales": half_scale(scale, "GPTQ"),
        "g_idx": group_indices(x),
    }


def gptq_config(
    weights: Mapping[str, QTensor], *, version: int = 2, skipped: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Returns the `quantization_config` of modules; the most common format becomes the default.

    Other formats, and skipped linears of the blocks, become `dynamic` overrides, as GPTQModel
    writes them.
    """

    def fields(x: QTensor) -> dict[str, Any]:
        group = x.fmt.group if x.fmt.group > 0 else -1
        return {"bits": x.fmt.bits, "group_size": group, "sym": x.fmt.symmetric}

    rows = {module: fields(x) for module, x in weights.items()}
    common = dict(collections.Counter(tuple(r.items()) for r in rows.values()).most_common(1)[0][0])
    label = "gptq_v2" if version == 2 else "gptq"
    config = {
        "quant_method": "gptq",
        **common,
        "desc_act": any(x.perm is not None for x in weights.values()),
        "checkpoint_format": label,
        "format": label,
        "pack_dtype": "int32",
        "lm_head": "lm_head" in weights,
        "true_sequential": True,
    }
    others = {rf"+:^{re.escape(m)}$": r for m, r in rows.items() if r != common}
    others |= {rf"-:^{re.escape(m)}$": {} for m in skipped if m != "lm_head"}
    return config | ({"dynamic": others} if others else {})


def dense(weight: Weight) -> np.ndarray:
    """Returns a reader's weight as f32 [I, O]."""
    return weight.w if isinstance(weight, Dense) else np.asarray(dequantize(weight))
