"""Rotary tables: RopeConfig and positions -> cos, sin; every scaling as transformers computes it.

Two scalings, "dynamic" and "longrope", choose their frequencies by the length of the sequence.
That length is an argument here (`context_lens`, per token): a table computed from whatever tokens
happen to share a step would make results depend on batch mates and on how prompts are chunked.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jinfer.config.model import RopeConfig


def needs_context_lens(rope: RopeConfig) -> bool:
    """Whether the frequencies depend on the length of the sequence."""
    return rope.scaling in ("dynamic", "longrope")


def tables(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, "*B T"],
    context_lens: Int[Array, "*B T"] | None = None,
) -> tuple[Float[Array, "*B T R"], Float[Array, "*B T R"]]:
    """Returns float32 (cos, sin) with R = head_dim * partial_factor / 2 columns.

    Args:
      rope: base frequency and scaling.
      head_dim: H.
      positions: place of each token in its sequence.
      context_lens: length of the sequence by which "dynamic" and "longrope" choose frequencies for
        this token; the others do not read it. transformers uses, in one forward pass, the length
        of the pass for all its tokens; with a KV cache a key keeps the rotation that it was written
        with, which is max(prompt length, position + 1) (save in Phi-3, see `Model`).

    Raises:
      ValueError: the scaling needs `context_lens` and there are none, or its lists do not fit.
    """
    dim = int(head_dim * rope.partial_factor)
    if needs_context_lens(rope):
        if context_lens is None:
            raise ValueError(
                f"rope scaling {rope.scaling!r} chooses its frequencies by sequence length: pass "
                f"context_lens, for each token max(prompt length, position + 1)"
            )
        lens = context_lens[..., None]
        if rope.scaling == "dynamic":
            frequencies = _dynamic(rope, dim, lens)
        else:
            frequencies = _longrope(rope, dim, lens)
    else:
        frequencies = _align(_static(rope, dim), positions.ndim + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    factor = attention_factor(rope)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def attention_factor(rope: RopeConfig) -> float:
    """Returns the factor on cos and sin by which yarn and longrope sharpen attention."""
    if rope.scaling not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.scaling == "longrope":
        if rope.factor <= 1.0:
            return 1.0
        return math.sqrt(1.0 + math.log(rope.factor) / math.log(_original(rope)))
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _original(rope: RopeConfig) -> int:
    if rope.original_max_position is None:
        raise ValueError(f"rope scaling {rope.scaling!r} needs original_max_position")
    return rope.original_max_position


def _powers(theta: float, dim: int) -> np.ndarray:
    """theta ** (2 i / dim), [dim / 2] f32."""
    return np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


def _static(rope: RopeConfig, dim: int) -> np.ndarray:
    """[R] f32 frequencies of the scalings that do not look at the length."""
    frequencies = np.float32(1.0) / _powers(rope.theta, dim)
    if rope.scaling == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.scaling == "llama3":
        return _llama3(rope, frequencies)
    if rope.scaling == "yarn":
        return _yarn(rope, dim, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated."""
    original = _original(rope)
    waves = 2 * np.float32(math.pi) / frequencies
    smooth = (original / waves - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    mixed = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    return mixed.astype(np.float32)


def _yarn(rope: RopeConfig, dim: int, frequencies: np.ndarray) -> np.ndarray:
    """Fast-turning dimensions kept, slow ones stretched; Peng et al. 2023 (arXiv:2309.00071)."""
    original = _original(rope)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    mixed = frequencies / rope.factor * ramp + frequencies * (1 - ramp)
    return mixed.astype(np.float32)


def _dynamic(rope: RopeConfig, dim: int, lens: Array) -> Array:
    """[..., T, R]: the base grows with the part of the context beyond the trained one (NTK)."""
    original = _original(rope)
    stretched = jnp.maximum(lens, original).astype(jnp.float32)
    growth = rope.factor * stretched / original - (rope.factor - 1.0)
    theta = rope.theta * growth ** (dim / (dim - 2))
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return 1.0 / theta ** _align(exponents, theta.ndim)


def _longrope(rope: RopeConfig, dim: int, lens: Array) -> Array:
    """[..., T, R]: one list of divisors up to the trained length, another beyond it."""
    for name in ("short_factor", "long_factor"):
        divisors = getattr(rope, name)
        if len(divisors) != dim // 2:
            raise ValueError(f"{name} must have {dim // 2} entries, got {len(divisors)}")
    powers = _powers(rope.theta, dim)
    short = 1.0 / (np.asarray(rope.short_factor, np.float32) * powers)
    long = 1.0 / (np.asarray(rope.long_factor, np.float32) * powers)
    return jnp.where(lens > _original(rope), _align(long, lens.ndim), _align(short, lens.ndim))


def _align(vector: np.ndarray, rank: int) -> Array:
    return jnp.asarray(vector.reshape((1,) * (rank - 1) + vector.shape))
