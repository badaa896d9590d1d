"""Converts GGUF's blocks into QTensors, for types whose values are exactly `scale * code`.

Q4_0, Q5_0 and Q8_0 have f16 scales for 32 inputs, Q6_K d * sc for 16, a product that fits f32.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jinfer.config.quant_format import QFormat
from jinfer.linear.qtensor import QTensor, from_codes

FORMATS = {
    **{"Q4_0": "int4-g32", "Q5_0": "int5-g32", "Q8_0": "int8-g32", "Q6_K": "int6-g16"},
}
"""Types that can be kept quantized -> QFormat; the others have float minima."""


def read_blocks(rows: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [..., O, I] and scales [..., O, G] of rows uint8 [..., O, bytes].

    Scales are f16, those of Q6_K f32.
    """
    *lead, num_bytes = rows.shape
    size = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34, "Q6_K": 210}[type_name]
    blocks = np.ascontiguousarray(rows).reshape(-1, size)
    codes, scale = _DECODERS[type_name](blocks)
    num_blocks = num_bytes // size
    return (
        codes.reshape(*lead, num_blocks * codes.shape[1]),
        scale.reshape(*lead, num_blocks * scale.shape[1]),
    )


def qtensor_of(codes: np.ndarray, scale: np.ndarray, type_name: str) -> QTensor:
    """Returns a weight [..., I, O] of codes and scales from `read_blocks`, rows in any order."""
    fmt = QFormat.parse(FORMATS[type_name])
    swapped = (np.ascontiguousarray(a.swapaxes(-1, -2)) for a in (codes, scale))
    q, s = (jnp.asarray(a) for a in swapped)
    return from_codes(q, s, None, fmt)


def _half(bytes_: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bytes_).view("<f2").astype(np.float16)


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """uint8 [n, 16] -> [n, 32]: low nibbles first."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8), _half(blocks[:, :2])


def _q5_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    codes = _nibbles(blocks[:, 6:]) | high << 4
    return codes.astype(np.int8) - np.int8(16), _half(blocks[:, :2])


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks[:, :2])


def _q6_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    num = len(blocks)
    low = blocks[:, :128].reshape(num, 2, 2, 32)  # halves of 128, bytes of 64
    high = blocks[:, 128:192].reshape(num, 2, 32)
    quarters = [
        (low[:, :, i % 2] >> 4 * (i // 2) & 15) | (high >> 2 * i & 3) << 4 for i in range(4)
    ]
    codes = np.stack(quarters, axis=2).reshape(num, 256).astype(np.int8) - np.int8(32)
    sc = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return codes, sc * _half(blocks[:, 208:]).astype(np.float32)


_DECODERS = {"Q4_0": _q4_0, "Q5_0": _q5_0, "Q8_0": _q8_0, "Q6_K": _q6_k}
