"""Folds input scales into the producer of the input, so that float outputs do not change.

A consumer's inputs are divided by s: the rows of its weight are multiplied (`scale_inputs`), and
its producer, a norm or the linear before it, is divided.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def scale_inputs(w: Array, s: Array) -> Array:
    """w[..., i, o] * s[i]: for a weight whose inputs come divided by s, [I] or [E, I]."""
    rows = s.reshape(*([1] * (w.ndim - s.ndim - 1)), *s.shape, 1)
    return (w.astype(jnp.float32) * rows).astype(w.dtype)


def divide_norm(gamma: Array, s: Array, *, plus_one: bool) -> Array:
    """A norm's scale that makes its outputs s times smaller; Gemma's is stored as gamma - 1."""
    gamma32 = gamma.astype(jnp.float32)
    out = (1 + gamma32) / s - 1 if plus_one else gamma32 / s
    return out.astype(gamma.dtype)


def divide_outputs(w: Array, b: Array | None, s: Array) -> tuple[Array, Array | None]:
    """A linear (weight [..., I, O], bias [O]) whose outputs are s [..., O] times smaller."""
    w = (w.astype(jnp.float32) / s[..., None, :]).astype(w.dtype)
    return w, None if b is None else (b.astype(jnp.float32) / s).astype(b.dtype)


def head_ties(num_heads: int, num_kv_heads: int, head_dim: int) -> Array:
    """i32 [N * H]: for each input of `o`, the output of `v` that it is an average of.

    Query heads (kv * rep + r) read KV head kv: with N = 4, K = 2, H = 2

        input of o    0 1 | 2 3 | 4 5 | 6 7
        output of v   0 1 | 0 1 | 2 3 | 2 3
    """
    heads = jnp.arange(num_heads, dtype=jnp.int32) // (num_heads // num_kv_heads)
    return (heads[:, None] * head_dim + jnp.arange(head_dim, dtype=jnp.int32)[None, :]).reshape(-1)


def producer_scales(s: Array, ties: Array, num_outputs: int) -> Array:
    """s [I] of a consumer whose tied inputs agree -> s of the producer's outputs [O]."""
    return jnp.zeros(num_outputs, s.dtype).at[ties].set(s)
