"""Sums and factors of X^T X with the same bits on every run and with any number of threads.

LAPACK's Cholesky depends on the number of threads, so this module has its own. XLA's CPU products
a b and a b^T do not depend on it, but those that read a^T in place do in their last bits
(tests/jinfer/quant/methods/test_factor.py); `dot_transposed` replaces these.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

LEAF = 128  # rows that are factored one by one
CHUNK = 512  # tokens of one partial sum
STRIPE = 384  # rows of X^T X computed at once
# Damping is retried with these multiples; the last try also lifts the diagonal to its mean.
DAMP_RETRIES = (1.0, 5.0, 10.0, 50.0, 100.0)


def gram(x: Array) -> Array:
    """f32 [I, I] X^T X of tokens [..., I], summed in chunks of 512 tokens.

    Only blocks on and above the diagonal are computed: for 1536 inputs 62 % of the products.
    """
    num_inputs = x.shape[-1]
    x = x.reshape(-1, num_inputs).astype(jnp.float32)
    x = jnp.pad(x, ((0, -x.shape[0] % CHUNK), (0, 0))).reshape(-1, CHUNK, num_inputs)
    starts = range(0, num_inputs, STRIPE)

    def add(total: list[Array], chunk: Array) -> tuple[list[Array], None]:
        new = [dot_transposed(chunk[:, i : i + STRIPE], chunk[:, i:]) for i in starts]
        return [a + b for a, b in zip(total, new)], None

    empty = [jnp.zeros((min(STRIPE, num_inputs - i), num_inputs - i), jnp.float32) for i in starts]
    stripes = lax.scan(add, empty, x)[0]
    rows = [jnp.pad(stripe, ((0, 0), (i, 0))) for i, stripe in zip(starts, stripes)]
    upper = jnp.triu(jnp.concatenate(rows))
    return upper + jnp.triu(upper, 1).T


def inverse_factor(hessian: Array, damp: float) -> tuple[Array, Array, Array, Array]:
    """Upper U with U^T U = (H + damping)^-1, retried with more damping until it exists.

    With J the reversal, J H J = L L^T gives H = R R^T for the upper R = J L J, so U = J L^-1 J: one
    factorization where the usual route factors, inverts and factors again.

    Args:
      hessian: [I, I] f32, symmetric.
      damp: fraction of mean(diag H) added to the diagonal; retried 5, 10, 50 and 100 times as
        large, the last time with small diagonal entries lifted to the mean.

    Returns:
      U f32 [I, I], the damping used, failed tries, and whether all failed (then U = identity).
    """
    diagonal = jnp.diagonal(hessian)
    mean = jnp.mean(diagonal)
    retries = jnp.asarray(DAMP_RETRIES, jnp.float32) * damp

    def attempt(i: Array) -> Array:
        is_last = i == len(DAMP_RETRIES) - 1
        lift = jnp.where(is_last, jnp.maximum(mean - diagonal, 0.0), 0.0)
        damped = (hessian + jnp.diag(lift + retries[i] * mean)) / mean
        return inverse_cholesky(damped[::-1, ::-1])[::-1, ::-1]

    def is_good(upper: Array) -> Array:
        return jnp.all(jnp.isfinite(upper)) & jnp.all(jnp.diagonal(upper) > 0)

    def goes_on(state: tuple[Array, Array]) -> Array:
        return ~is_good(state[1]) & (state[0] < len(DAMP_RETRIES) - 1)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return state[0] + 1, attempt(state[0] + 1)

    tries, upper = lax.while_loop(goes_on, step, (jnp.int32(-1), jnp.full_like(hessian, jnp.nan)))
    fell_back = ~is_good(upper)
    eye = jnp.eye(hessian.shape[0], dtype=jnp.float32)
    return jnp.where(fell_back, eye, upper), retries[tries], tries, fell_back


def inverse_cholesky(a: Array) -> Array:
    """L^-1, lower, for a = L L^T; NaN where `a` is not positive definite.

    By halves: with a = [[A, B^T], [B, C]] and M = chol(A)^-1, K = B M^T, N = chol(C - K K^T)^-1 the
    answer is [[M, 0], [-N K M, N]].
    """
    size = a.shape[0]
    if size <= LEAF:
        return _leaf(a)
    half = -(-size // (2 * LEAF)) * LEAF
    m = inverse_cholesky(a[:half, :half])
    k = _dot(a[half:, :half], m.T)
    n = inverse_cholesky(a[half:, half:] - _dot(k, k.T))
    corner = -_dot(n, _dot(k, m))
    return jnp.block([[m, jnp.zeros((half, size - half), a.dtype)], [corner, n]])


def _leaf(a: Array) -> Array:
    """As `inverse_cholesky`: eliminates a's rows one by one from [a | I], scaled by the pivots."""
    size = a.shape[0]
    places = jnp.arange(size, dtype=jnp.int32)

    def eliminate(i: Array, both: Array) -> Array:
        row = lax.dynamic_index_in_dim(both, i, keepdims=False)
        column = lax.dynamic_index_in_dim(both, i, axis=1, keepdims=False)
        pivot = lax.dynamic_index_in_dim(column, i, keepdims=False)
        pivot = lax.rsqrt(jnp.where(pivot > 0, pivot, jnp.nan))
        row = row * pivot
        factors = jnp.where(places > i, column * pivot, 0.0)
        return jnp.where(
            (places == i)[:, None], row[None, :], both - factors[:, None] * row[None, :]
        )

    both = jnp.concatenate([a, jnp.eye(size, dtype=a.dtype)], axis=1)
    return lax.fori_loop(jnp.int32(0), jnp.int32(size), eliminate, both)[:, size:]


def dot_transposed(a: Array, b: Array) -> Array:
    """f32 a^T b of a [K, N] and b [K, M], the same bits with any number of threads.

    The transpose is written out first: XLA would otherwise have the product read `a` by columns.
    """
    return _dot(lax.optimization_barrier(a.T), b)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
