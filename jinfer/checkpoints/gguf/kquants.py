"""Encodes rows of numbers as GGUF's block types.

    Q8_0, Q4_0, Q5_0   blocks of 32: f16 d, codes; w = d q
    Q4_1               blocks of 32: f16 d, f16 m, codes; w = d q + m
    Q4_K               256 in 8 blocks of 32: f16 d, f16 dmin, 6-bit sc and m; w = d sc q - dmin m
    Q6_K               256 in 16 blocks of 16: f16 d, int8 sc; w = d sc q

A scale is searched among candidates, each optimized by weighted least squares for the codes that it
gives, as llama.cpp does. The weights are the importance of the inputs: with the mean of x^2 the
search minimizes the expected error of the output, sum_i E[x_i^2] (w_i - w'_i)^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from jinfer.config.fields import require

BLOCK = {"Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q4_K": 256, "Q6_K": 256}
"""Inputs per block; rows must consist of whole blocks."""
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""llama.cpp's fallback types for rows that are no multiple of 256."""
LARGEST = 65504.0
"""Largest f16 number, which bounds scales and minima."""
CHUNK_BLOCKS = 1 << 14
"""Weights encoded at once, in units of 32; bounds the temporaries."""


def fitting_type(name: str, num_inputs: int) -> str:
    """Returns the type for rows of `num_inputs`: the named one or its fallback.

    Raises:
      ValueError: not one of `BLOCK`, or the rows are not whole blocks of 32.
    """
    require(name in BLOCK, f"GGUF type must be one of {', '.join(BLOCK)}, got {name!r}")
    if num_inputs % BLOCK[name]:
        name = FALLBACK.get(name, name)
    require(
        num_inputs % BLOCK[name] == 0,
        f"{name} holds rows of whole blocks of {BLOCK[name]}, got {num_inputs} inputs",
    )
    return name


def encode_rows(w: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Encodes rows [..., I] as uint8 [..., bytes].

    Args:
      w: finite floats, outputs first.
      name: one of `BLOCK`, whose block divides I.
      importance: [I] not negative, the mean square of each input; None: equal weights, and ggml's
        own plain rounding for the legacy types.

    Raises:
      ValueError: NaN, infinity or a number beyond f16, an unknown type, or rows or importance of
        another length.
    """
    *lead, num_inputs = w.shape
    require(fitting_type(name, num_inputs) == name, f"rows of {num_inputs} are no {name} blocks")
    require(
        importance is None or importance.shape == (num_inputs,),
        f"importance must be [{num_inputs}]",
    )
    size = BLOCK[name]
    blocks = np.asarray(w, np.float32).reshape(-1, size)
    require(bool(np.isfinite(blocks).all()), f"{name} takes finite weights only")
    require(
        blocks.size == 0 or float(np.abs(blocks).max()) <= LARGEST,
        f"{name} takes weights up to {LARGEST:g}: its scales are f16",
    )
    if importance is None and name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0"):
        return _reference(blocks, name).reshape(*lead, -1)
    weights = np.ones((1, size), np.float32)
    if importance is not None:
        weights = np.asarray(importance, np.float32).reshape(-1, size)
        # An input that never fires still gets a small weight, so that its values are encoded, too.
        weights = np.maximum(weights, max(float(weights.mean()) * 1e-6, 1e-30))
    encode = _ENCODERS[name]
    step = max(len(weights), CHUNK_BLOCKS * 32 // size // len(weights) * len(weights))
    out = []
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step]
        rows = np.tile(weights, (len(chunk) // len(weights), 1))
        out.append(encode(chunk, rows))
    return np.concatenate(out).reshape(*lead, -1)


def _reference(blocks: np.ndarray, name: str) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(blocks, GGMLQuantizationType[name])


def pack_q4_0(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Blocks of codes -8..7 [n, 32] and f16 scales [n] -> uint8 [n, 18]."""
    unsigned = (codes + 8).astype(np.uint8)
    return np.concatenate([_half(d), unsigned[:, :16] | unsigned[:, 16:] << 4], axis=1)


def pack_q8_0(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Blocks of codes -128..127 [n, 32] and f16 scales [n] -> uint8 [n, 34]."""
    return np.concatenate([_half(d), codes.astype(np.int8).view(np.uint8)], axis=1)


def _half(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.astype("<f2")).reshape(len(x), -1).view(np.uint8)


def _inverse(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 0, 1 / np.where(x == 0, 1, x)).astype(np.float32)


def _fit_scale(x: np.ndarray, weights: np.ndarray, most: int) -> np.ndarray:
    """Scales [n] for codes -most .. most - 1 of blocks [n, g], their largest weight at -most."""
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0]
    best, scale = np.full(len(x), -1.0, np.float32), np.zeros(len(x), np.float32)
    for nudge in range(-9, 10):
        inverse = -(most + 0.1 * nudge) * _inverse(largest)
        codes = np.clip(np.rint(inverse[:, None] * x), -most, most - 1)
        product, square = (weights * x * codes).sum(1), (weights * codes * codes).sum(1)
        gain = product * product * _inverse(square)  # how much of the squared norm is met
        better = gain > best
        best = np.where(better, gain, best)
        scale = np.where(better, product * _inverse(square), scale)
    return scale


def _fit_scale_and_minimum(
    x: np.ndarray, weights: np.ndarray, most: int, *, is_minimum_negative: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima [n] for codes 0 .. most: x is about scale * code + minimum."""
    low, high = x.min(1), x.max(1)
    if is_minimum_negative:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    total, x_sum = weights.sum(1), (weights * x).sum(1)
    scale, minimum = ((high - low) / most).astype(np.float32), low
    best = _squared_error(x, weights, scale, minimum, most)
    for step in range(37):
        inverse = (most - 0.9 + 0.05 * step) * _inverse(high - low)
        codes = np.clip(np.rint(inverse[:, None] * (x - low[:, None])), 0, most)
        c_sum, square = (weights * codes).sum(1), (weights * codes * codes).sum(1)
        product = (weights * codes * x).sum(1)
        # Least squares in (scale, minimum) for these codes; rounding can make it singular.
        inverse_determinant = _inverse(np.maximum(total * square - c_sum * c_sum, 0))
        new_scale = (total * product - x_sum * c_sum) * inverse_determinant
        new_minimum = (square * x_sum - c_sum * product) * inverse_determinant
        if is_minimum_negative:
            is_above = new_minimum > 0
            new_scale = np.where(is_above, product * _inverse(square), new_scale)
            new_minimum = np.where(is_above, 0, new_minimum)
        error = _squared_error(x, weights, new_scale, new_minimum, most)
        better = (error < best) & (new_scale > 0)
        best = np.where(better, error, best)
        scale = np.where(better, new_scale, scale)
        minimum = np.where(better, new_minimum, minimum)
    return scale, minimum


def _codes_above(x: np.ndarray, scale: np.ndarray, minimum: np.ndarray, most: int) -> np.ndarray:
    ratio = (x - minimum[:, None]) * _inverse(scale)[:, None]
    return np.clip(np.rint(ratio), 0, most)


def _squared_error(
    x: np.ndarray, weights: np.ndarray, scale: np.ndarray, minimum: np.ndarray, most: int
) -> np.ndarray:
    codes = _codes_above(x, scale, minimum, most)
    return (weights * (scale[:, None] * codes + minimum[:, None] - x) ** 2).sum(1)


def _nearest(x: np.ndarray, d: np.ndarray, most: int) -> np.ndarray:
    """Codes -most .. most - 1 of blocks [n, g] with scales [n]."""
    return np.clip(np.rint(x * _inverse(d)[:, None]), -most, most - 1).astype(np.int8)


def _encode_symmetric(x: np.ndarray, weights: np.ndarray, most: int) -> tuple[np.ndarray, ...]:
    d = _fit_scale(x, weights, most).astype("<f2")
    return _nearest(x, d.astype(np.float32), most), d


def _encode_q4_0(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return pack_q4_0(*_encode_symmetric(x, weights, 8))


def _encode_q8_0(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return pack_q8_0(*_encode_symmetric(x, weights, 128))


def _encode_q5_0(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    codes, d = _encode_symmetric(x, weights, 16)
    unsigned = (codes + 16).astype(np.uint8)
    nibbles = (unsigned[:, :16] & 15) | (unsigned[:, 16:] & 15) << 4
    high = np.packbits(unsigned >> 4, axis=1, bitorder="little")  # bit i of 32: element i
    return np.concatenate([_half(d), high, nibbles], axis=1)


def _encode_q4_1(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    scale, minimum = _fit_scale_and_minimum(x, weights, 15, is_minimum_negative=False)
    d, m = scale.astype("<f2"), minimum.astype("<f2")
    codes = _codes_above(x, d.astype(np.float32), m.astype(np.float32), 15).astype(np.uint8)
    return np.concatenate([_half(d), _half(m), codes[:, :16] | codes[:, 16:] << 4], axis=1)


def _fit_levels(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f16 d [n] and levels 0..63 of not negative values [n, 8], which are about d * level."""
    largest = values.max(1)
    best, d = np.full(len(values), np.inf, np.float32), np.zeros(len(values), np.float32)
    for nudge in range(-4, 5):
        candidate = largest * _inverse(np.full_like(largest, 63 + 0.1 * nudge))
        levels = np.clip(np.rint(values * _inverse(candidate)[:, None]), 0, 63)
        square = (weights * levels * levels).sum(1)
        candidate = (weights * levels * values).sum(1) * _inverse(square)
        error = (weights * (candidate[:, None] * levels - values) ** 2).sum(1)
        better = error < best
        best, d = np.where(better, error, best), np.where(better, candidate, d)
    d = d.astype("<f2")
    levels = np.clip(np.rint(values * _inverse(d.astype(np.float32))[:, None]), 0, 63)
    return d, levels.astype(np.uint8)


def _encode_q4_k(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    num = len(x)
    sub, sub_weights = x.reshape(-1, 32), weights.reshape(-1, 32)
    scale, minimum = _fit_scale_and_minimum(sub, sub_weights, 15, is_minimum_negative=True)
    importance = sub_weights.sum(1).reshape(num, 8)
    d, sc = _fit_levels(scale.reshape(num, 8), importance)
    dmin, m = _fit_levels(-minimum.reshape(num, 8), importance)
    steps = d.astype(np.float32)[:, None] * sc
    floors = dmin.astype(np.float32)[:, None] * m
    codes = _codes_above(sub, steps.reshape(-1), -floors.reshape(-1), 15).astype(np.uint8)
    # Bytes 0-3 and 4-7: six bits of sc and m 0..3, two upper ones of sc and m 4..7; 8-11: the rest.
    packed = np.concatenate(
        [
            sc[:, :4] | (sc[:, 4:] >> 4) << 6,
            m[:, :4] | (m[:, 4:] >> 4) << 6,
            (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    pairs = codes.reshape(num, 4, 2, 32)  # a chunk of 32 bytes: low nibbles, then high ones
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(num, 128)
    return np.concatenate([_half(d), _half(dmin), packed, nibbles], axis=1)


def _encode_q6_k(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    num = len(x)
    sub = x.reshape(-1, 16)
    scale = _fit_scale(sub, weights.reshape(-1, 16), 32).reshape(num, 16)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)[:, 0]
    d = (largest / np.float32(-128)).astype("<f2")
    steps = d.astype(np.float32)
    sc = np.clip(np.rint(scale * _inverse(steps)[:, None]), -128, 127).astype(np.int8)
    codes = _nearest(sub, (steps[:, None] * sc).reshape(-1), 32)
    q = (codes + 32).astype(np.uint8).reshape(num, 2, 4, 32)  # halves of 128 in quarters
    low = [q[:, :, 0] & 15 | (q[:, :, 2] & 15) << 4, q[:, :, 1] & 15 | (q[:, :, 3] & 15) << 4]
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    ql = np.concatenate(low, axis=2).reshape(num, 128)
    return np.concatenate([ql, high.reshape(num, 64), sc.view(np.uint8), _half(d)], axis=1)


_ENCODERS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Q8_0": _encode_q8_0,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q4_K": _encode_q4_k,
    "Q6_K": _encode_q6_k,
}
