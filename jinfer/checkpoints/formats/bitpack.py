"""Packs codes into bit streams of words, as quantized checkpoints store them.

Code i takes bits i * b .. i * b + b - 1 of a little-endian stream: eight 4-bit codes 0..7 make the
word 0x76543210, and a 3-bit code may lie in two words.
"""

from __future__ import annotations

import numpy as np


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs unsigned codes [..., n] densely along the last axis: int32 [..., ceil(n * bits / 32)].

    Raises:
      ValueError: a code does not fit `bits`.
    """
    if codes.size and (codes.min() < 0 or codes.max() >= 2**bits):
        raise ValueError(f"codes must lie in 0..{2**bits - 1}, got {codes.min()}..{codes.max()}")
    *lead, count = codes.shape
    num_words = -(-count * bits // 32)
    stream = np.unpackbits(
        codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little"
    ).reshape(*lead, count * bits)
    padded = np.zeros((*lead, num_words * 32), np.uint8)
    padded[..., : count * bits] = stream
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4")


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverse of `pack_words`: uint8 codes [..., count]; words of any integer width will do.

    Raises:
      ValueError: there are fewer than `count` codes.
    """
    raw = np.ascontiguousarray(words).view(np.uint8)
    if raw.shape[-1] * 8 < count * bits:
        raise ValueError(
            f"{count} codes of {bits} bits need {-(-count * bits // 32)} words, "
            f"got {words.shape[-1]} of {words.dtype.itemsize * 8} bits"
        )
    stream = np.unpackbits(raw, axis=-1, count=count * bits, bitorder="little")
    stream = stream.reshape(*words.shape[:-1], count, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def unpack_padded_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Like `unpack_words`, for words with floor(32 / bits) codes each and unused bits.

    compressed-tensors before 0.18 stored 3, 5, 6 and 7 bits this way: ten 3-bit codes per word.
    """
    a_word = 32 // bits
    if words.shape[-1] * a_word < count:
        raise ValueError(f"{count} codes, {a_word} to a word, do not fit {words.shape[-1]} words")
    flat = unpack_words(words[..., None], bits, a_word)
    return flat.reshape(*words.shape[:-1], -1)[..., :count]


def pack_padded_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `unpack_padded_words`."""
    *lead, count = codes.shape
    a_word = 32 // bits
    padded = np.zeros((*lead, -(-count // a_word) * a_word), np.uint8)
    padded[..., :count] = codes
    return pack_words(padded.reshape(*lead, -1, a_word), bits)[..., 0]
