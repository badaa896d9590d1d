"""The maths that models are written in, on arrays; knows nothing of models, caches or requests.

Everything accumulates in float32 and is cast to the input's dtype once, at the end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jinfer.linear.matmul import matmul
from jinfer.linear.weight import Weight


def linear(
    x: Float[Array, "*B I"],
    w: Float[Array, "I O"] | Weight,
    b: Float[Array, "O"] | None = None,
) -> Float[Array, "*B O"]:
    """Returns x @ w + b in x.dtype, accumulated in float32."""
    with jax.named_scope("linear"):
        y = matmul(x, w)
        y = y if b is None else y + _align(b, y.ndim).astype(jnp.float32)
        return y.astype(x.dtype)


def head(
    x: Float[Array, "*B D"],
    w: Float[Array, "..."] | Weight,
    *,
    is_tied: bool,
) -> Float[Array, "*B V"]:
    """Returns float32 logits x @ w, or x @ w^T for the [V, D] table of a tied embedding."""
    with jax.named_scope("head"):
        return matmul(x, w, is_table=is_tied)


def embed(tokens: Int[Array, "*B"], w: Float[Array, "V D"]) -> Float[Array, "*B D"]:
    """Returns the rows of `w` for `tokens`; ids must lie in 0..V-1 (others are clamped)."""
    with jax.named_scope("embed"):
        if w.dtype.itemsize != 2:
            return _take_rows(w, tokens)
        return jax.lax.platform_dependent(w, tokens, cpu=_read_rows, default=_take_rows)


def _take_rows(w: Array, tokens: Array) -> Array:
    return jnp.take(w, tokens, axis=0, mode="clip")


def _read_rows(w: Array, tokens: Array) -> Array:
    """`_take_rows` for 16 bits on CPUs, as integers: in a loop XLA widens the table before it, to
    f32 if it sees floats."""
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16)
    return jax.lax.bitcast_convert_type(_take_rows(bits, tokens), w.dtype)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float, *, plus_one: bool = False
) -> Float[Array, "*B D"]:
    """Returns x / rms(x) * scale, or * (1 + scale) where `plus_one` (Gemma)."""
    x32, scale32 = x.astype(jnp.float32), scale.astype(jnp.float32)
    if plus_one:
        scale32 = scale32 + 1.0
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * _align(scale32, x.ndim)).astype(x.dtype)


def rotate(
    x: Float[Array, "*B T N H"], cos: Float[Array, "*B T R"], sin: Float[Array, "*B T R"]
) -> Float[Array, "*B T N H"]:
    """Rotates the first 2 R of each head's H numbers by the angles in the tables.

    Number i is paired with number i + R (Hugging Face's layout, not the interleaved one):

        [ a b | c d | pass ]  ->  [ a cos - c sin,  b cos - d sin | c cos + a sin,  ... | pass ]
    """
    half = cos.shape[-1]
    a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    cos, sin = cos[..., :, None, :], sin[..., :, None, :]  # [..., T, 1, R]
    parts = [(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)]
    return jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)


def gated(
    activation: str, gate: Float[Array, "*B F"], up: Float[Array, "*B F"]
) -> Float[Array, "*B F"]:
    """Returns activation(gate) * up; "silu", "gelu" (exact) or "gelu_tanh"."""
    gate32 = gate.astype(jnp.float32)
    if activation == "silu":
        act = jax.nn.silu(gate32)
    elif activation in ("gelu", "gelu_tanh"):
        act = jax.nn.gelu(gate32, approximate=activation == "gelu_tanh")
    else:
        raise ValueError(f"activation must be silu, gelu or gelu_tanh, got {activation!r}")
    return (act * up.astype(jnp.float32)).astype(gate.dtype)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Returns cap * tanh(x / cap), or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def dense_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    *,
    sm_scale: float,
    window: int | None = None,
    cap: float | None = None,
    q_positions: Int[Array, "*B T"] | None = None,
) -> Float[Array, "*B T N H"]:
    """Causal attention over whole arrays: the reference, and the path without a cache.

    Args:
      q: queries; N is a multiple of K, query head n reads KV head n // (N / K).
      k: keys; key s sits at position s.
      v: values.
      sm_scale: factor on q . k.
      window: a query at position p sees keys p - window + 1 .. p; None: 0 .. p.
      cap: soft cap on the scaled scores.
      q_positions: place of each query; default: the last T of the S places. Keys beyond a query's
        position are never seen, so k and v may be buffers that are only partly filled.

    Returns:
      [..., T, N, H] in q.dtype; finite, but meaningless, for queries at negative positions.
    """
    num_queries, num_keys = q.shape[-3], k.shape[-3]
    num_kv_heads = k.shape[-2]
    with jax.named_scope("attention"):
        groups = q.reshape(*q.shape[:-2], num_kv_heads, -1, q.shape[-1])  # [..., T, K, G, H]
        scores = jnp.einsum(
            "...tkgh,...skh->...kgts", groups, k, preferred_element_type=jnp.float32
        )
        scores = soft_cap(scores * sm_scale, cap)

        if q_positions is None:
            q_positions = jnp.arange(num_keys - num_queries, num_keys, dtype=jnp.int32)
        q_places = q_positions[..., :, None]  # [..., T, 1]
        k_places = _align(jnp.arange(num_keys, dtype=q_places.dtype), q_places.ndim)
        is_seen = k_places <= q_places
        if window is not None:
            is_seen &= k_places > q_places - window
        is_seen = is_seen[..., None, None, :, :]  # [..., 1, 1, T, S]
        is_seen = is_seen.reshape((1,) * (scores.ndim - is_seen.ndim) + is_seen.shape)
        # The least float, not -inf: a query that sees nothing (padding) must not become NaN.
        scores = jnp.where(is_seen, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum(
            "...kgts,...skh->...tkgh",
            weights.astype(v.dtype),
            v,
            preferred_element_type=jnp.float32,
        )
        return out.reshape(q.shape).astype(q.dtype)


def _align(vector: Array, rank: int) -> Array:
    """Reshapes [D] to [1, ..., 1, D], since ranks are never promoted silently here."""
    return vector.reshape((1,) * (rank - 1) + vector.shape)
