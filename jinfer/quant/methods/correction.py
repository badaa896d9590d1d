"""Corrects weights for the errors that quantized blocks before them add to their inputs.

GPTQ minimizes the difference of X Q and X W. But the inputs X come from blocks that are already
quantized, and the wanted output is X' W with the float model's inputs X'. The least squares
solution is W + (X^T X)^-1 X^T (X' - X) W. This is QEP of Arai and Ichikawa 2025 (arXiv:2504.09629);
GPTAQ of Li et al. 2025 (arXiv:2504.02692) has the same aim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jinfer.config.fields import require
from jinfer.linear.qtensor import check_finite
from jinfer.quant.methods.factor import dot_transposed, inverse_factor


def correct_weight(
    w: Array, gram: Array, drift: Array, *, strength: float, damp: float = 0.01
) -> Array:
    """Moves `w` towards the least squares solution of ||X V - X' W|| over V.

    Args:
      w: [I, O], the float weight.
      gram: f32 [I, I], X^T X of the inputs that it will have.
      drift: f32 [I, I], X^T (X' - X), with X' the float model's inputs for the same tokens.
      strength: 0 keeps `w`, 1 is the full correction; values between fit less noise.
      damp: fraction of mean(diag gram) added to its diagonal.

    Returns:
      f32 [I, O]; `w` itself where no damping makes `gram` positive definite.

    Raises:
      ValueError: shapes disagree, values are not finite, or a strength outside 0 .. 1.
    """
    square = (w.shape[0], w.shape[0])
    require(
        w.ndim == 2 and gram.shape == square and drift.shape == square,
        f"a weight [I, O] needs gram and drift [I, I], got {list(w.shape)}, {list(gram.shape)} "
        f"and {list(drift.shape)}",
    )
    require(0 <= strength <= 1, f"strength must lie in 0 .. 1, got {strength}")
    for value, what in ((w, "weight"), (gram, "gram"), (drift, "drift")):
        check_finite(value, what)
    return _step(w, drift, *_factor(gram, damp), strength)


@functools.partial(jax.jit, static_argnums=1)
def _factor(gram: Array, damp: float) -> tuple[Array, Array, Array]:
    """U with U^T U = mean (gram + damping)^-1, that mean of its diagonal, and whether none is."""
    is_dead = (jnp.diagonal(gram) == 0).astype(jnp.float32)
    upper, _, _, failed = inverse_factor(gram + jnp.diag(is_dead), damp)
    return upper, jnp.mean(jnp.diagonal(gram) + is_dead), failed


@functools.partial(jax.jit, static_argnums=5)
def _step(
    w: Array, drift: Array, upper: Array, mean: Array, failed: Array, strength: float
) -> Array:
    w = w.astype(jnp.float32)
    dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
    step = dot_transposed(upper, dot(upper, dot(drift, w))) / mean
    return jnp.where(failed, w, w + strength * step)
