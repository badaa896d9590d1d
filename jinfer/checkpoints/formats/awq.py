"""AWQ "gemm" files, as AutoAWQ and GPTQModel write them: `qweight`, `qzeros`, `scales`.

Eight outputs share a word, in the order 0 2 4 6 1 3 5 7: codes 0..7 make 0x75316420.

    qweight int32 [I, O / 8]    qzeros int32 [G, O / 8]    scales f16 or bf16 [G, O]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jinfer.checkpoints.formats.bitpack import pack_words, unpack_words
from jinfer.checkpoints.formats.interop import (
    Sign,
    Tensors,
    Weight,
    check_dtype,
    check_writable,
    group_of,
    half_scale,
    make_qtensor,
    unsigned_parts,
)
from jinfer.config.fields import require
from jinfer.config.quant_format import QFormat
from jinfer.linear.qtensor import QTensor

GROUPS = (16, 32, 64, 128, 256)  # sizes to propose
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # nibble j of a word holds output ORDER[j]


@dataclasses.dataclass(frozen=True)
class AWQReader:
    """An AWQ checkpoint of version "gemm", 4 bits."""

    group: int
    leaves: tuple[str, ...] = ("qweight", "qzeros", "scales")
    scales: tuple[tuple[str, Sign], ...] = (("scales", "any"),)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> AWQReader:
        """Reads a `quantization_config`."""
        stated = [config.get(key) for key in ("version", "checkpoint_format", "format")]
        version = str(next(filter(None, stated), "gemm")).lower()
        require(
            version == "gemm",
            f"AWQ version {version!r} has another layout and is not supported; supported: gemm",
        )
        bits = config.get("bits") or config.get("w_bit")
        require(bits == 4, f"AWQ bits must be 4, got {bits!r}")
        size = config.get("group_size") or config.get("q_group_size")
        return cls(group=group_of(size, "AWQ"))

    def shape(self, module: str, tensors: Tensors) -> tuple[int, int]:
        num_inputs, words = tensors["qweight"].shape
        return words * 8, num_inputs

    def read(self, module: str, tensors: Tensors) -> Weight:
        scales, zeros = tensors.get("scales"), tensors.get("qzeros")
        require(scales is not None, f"{module} has qweight but no scales")
        assert scales is not None
        check_dtype(module, "qweight", tensors["qweight"], np.int32)
        num_outputs, num_inputs = self.shape(module, tensors)
        fmt = QFormat(bits=4, group=self.group)
        expected = (fmt.num_groups(num_inputs), num_outputs)
        require(
            scales.shape == expected,
            f"{module}: scales must be {list(expected)}, got {list(scales.shape)}",
        )
        zero = None if zeros is None else _unpack(zeros)
        return make_qtensor(_unpack(tensors["qweight"]), scales, zero, fmt)


def _unpack(words: np.ndarray) -> np.ndarray:
    nibbles = unpack_words(words[..., None], 4, 8)  # [rows, O / 8, 8]
    codes = np.empty_like(nibbles)
    codes[..., ORDER] = nibbles
    return codes.reshape(words.shape[0], -1)


def _pack(codes: np.ndarray) -> np.ndarray:
    return pack_words(codes.reshape(codes.shape[0], -1, 8)[..., ORDER], 4)[..., 0]


def write_awq(x: QTensor) -> dict[str, np.ndarray]:
    """Returns `qweight`, `qzeros`, `scales` of one module.

    Raises:
      ValueError: not 4 bits, a permutation, a short last group, or outputs no multiple of 8.
    """
    check_writable(x, "AWQ", (4,), has_groups=True)
    _check_groups({"": x})
    require(x.perm is None, "AWQ has no g_idx: quantize with static groups or group order")
    require(x.shape[1] % 8 == 0, f"AWQ packs 8 outputs to a word, got {x.shape[1]} outputs")
    codes, scale, zero = unsigned_parts(x)
    return {"qweight": _pack(codes), "qzeros": _pack(zero), "scales": half_scale(scale, "AWQ")}


def awq_config(weights: Mapping[str, QTensor], *, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the `quantization_config`; all weights must have one group size.

    Raises:
      ValueError: the group sizes differ, or do not divide the inputs of a module.
    """
    _check_groups(weights)
    groups = {x.fmt.group if x.fmt.group > 0 else -1 for x in weights.values()}
    require(len(groups) == 1, f"an AWQ file has one group size, got {sorted(groups)}")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": groups.pop(),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(skipped) or None,
    }


def _check_groups(weights: Mapping[str, QTensor]) -> None:
    """Raises ValueError for a short last group, which AWQ kernels such as GPTQModel's refuse."""
    sizes = {x.shape[0] for x in weights.values()}
    for module, x in weights.items():
        if x.fmt.group > 0 and x.shape[0] % x.fmt.group:
            fitting = [str(g) for g in GROUPS if not any(size % g for size in sizes)]
            raise ValueError(
                f"{module + ': ' if module else ''}AWQ's readers take whole groups only, and "
                f"{x.fmt.group} does not divide {x.shape[0]} inputs; groups of "
                f"{', '.join([*fitting, 'a whole channel'])} work"
            )
