"""Random Hadamard rotations, which spread outlier features over all and keep products the same.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024, arXiv:2405.16406).
They help quantized activations and KV; for 4-bit weights in small groups no gain was measured.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinfer.config.fields import require


def hadamard(size: int) -> np.ndarray:
    """+-1 matrix [n, n] with H H^T = n I, for n = 2^k m with m from Paley's constructions.

    Covers 576 = 16 * 36, 896 = 32 * 28, 1536 = 128 * 12, 4864 = 64 * 76 and the like.

    Raises:
      ValueError: no construction known here gives this size.
    """
    for power in range(size.bit_length() - 1, -1, -1):
        base, rest = divmod(size, 2**power)
        if rest:
            continue
        core = np.ones((1, 1), np.int8) if base == 1 else _paley(base)
        if core is None:
            continue
        for _ in range(power):
            core = np.block([[core, core], [core, -core]])
        return core
    raise ValueError(f"no Hadamard matrix of size {size} is known here; pad to a multiple of 128")


def _paley(size: int) -> np.ndarray | None:
    """Paley's matrices: q + 1 for a prime q = 3 mod 4, 2 (q + 1) for a prime q = 1 mod 4."""
    if size % 4:
        return None
    if _is_prime(size - 1):  # q = 3 mod 4, since size = 0 mod 4
        core = _jacobsthal(size - 1)
        skew = np.zeros((size, size), np.int8)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
        return skew + np.eye(size, dtype=np.int8)
    q = size // 2 - 1
    if not _is_prime(q) or q % 4 != 1:
        return None
    conference = np.zeros((q + 1, q + 1), np.int8)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(q)
    eye = np.eye(q + 1, dtype=np.int8)
    return np.kron(conference, np.array([[1, 1], [1, -1]], np.int8)) + np.kron(
        eye, np.array([[1, -1], [-1, -1]], np.int8)
    )


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    """Entry [i, j]: 1 if i - j is a square modulo q, -1 if not, 0 on the diagonal."""
    squares = {i * i % q for i in range(1, q)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, q)], np.int8)
    places = np.arange(q)
    return character[(places[:, None] - places[None, :]) % q]


def random_hadamard(key: Array, size: int) -> Array:
    """Orthogonal f32 [n, n]: a Hadamard matrix with random signs on its rows, over sqrt(n)."""
    signs = jax.random.rademacher(key, (size,), jnp.float32)
    return signs[:, None] * jnp.asarray(hadamard(size), jnp.float32) / np.float32(size**0.5)


def kv_rotation(head_dim: int) -> np.ndarray:
    """Returns the fixed orthogonal f32 [H, H] by which heads are rotated before 4-bit quantization.

    Raises:
      ValueError: no Hadamard matrix of this size is known.
    """
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), head_dim)
    return signs[:, None] * hadamard(head_dim).astype(np.float32) / np.float32(head_dim**0.5)


def rotate(x: Array, rotation: np.ndarray) -> Array:
    """x R along the last axis, summed in f32 and returned in x's dtype."""
    out = jnp.dot(
        x.astype(jnp.float32),
        jnp.asarray(rotation),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return out.astype(x.dtype)


def rotate_inputs(w: Array, rotation: Array) -> Array:
    """R^T W: for a weight [I, O] whose inputs come as x R."""
    return _dot(rotation.T, w)


def rotate_outputs(w: Array, b: Array | None, rotation: Array) -> tuple[Array, Array | None]:
    """W R and b R: for a weight [I, O] whose outputs are to be y R."""
    return _dot(w, rotation), None if b is None else _dot(b[None], rotation)[0]


def rotate_heads(rotation: Array, num_heads: int) -> Array:
    """Block-diagonal [N * H, N * H] of one head's rotation [H, H]: for v's outputs and o's inputs.

    With grouped queries v has K heads and o has N: call it once with each.
    """
    require(rotation.ndim == 2, f"a rotation is [H, H], got {list(rotation.shape)}")
    return jnp.kron(jnp.eye(num_heads, dtype=jnp.float32), rotation)


def _dot(a: Array, b: Array) -> Array:
    dtype = b.dtype if a.dtype == jnp.float32 else a.dtype
    out = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return out.astype(dtype)
