"""Products of int8 arrays in plain XLA, in the form that is fast on each target."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import target as target_lib
from pallas_kernels.dispatch import Impl

# XLA's int8 product on a CPU is a naive loop below 8 rows: measured (two AVX-512 cores,
# [M, 2048] x [2048, 4096], jax 0.10.2) 45 ms for one row and 0.7 ms for eight.
_MIN_CPU_ROWS = 16


def int8_dot(x: jax.Array, w: jax.Array, layout: str) -> jax.Array:
    """Returns x @ w exactly, int32 [M, N].

    Args:
      x: int8 [M, K].
      w: int8 [K, N], or [N, K] in layout "nk".
      layout: "kn" or "nk".
    """
    num_rows = x.shape[0]
    padding = 0
    if target_lib.current().kind == "cpu":
        padding = max(0, _MIN_CPU_ROWS - num_rows)
        x = jnp.pad(x, ((0, padding), (0, 0)))
    contract = ((1,), (0 if layout == "kn" else 1,))
    y = lax.dot_general(x, w, (contract, ((), ())), preferred_element_type=jnp.int32)
    return y[:num_rows] if padding else y


def run(
    x: jax.Array,
    w: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    zero: jax.Array | None,
    layout: str,
    out_dtype: Any,
) -> jax.Array:
    """Computes (x * x_scale) @ ((w - zero) * w_scale); scales [1 or M, 1] and [1, 1 or N]."""
    y = int8_dot(x, w, layout).astype(jnp.float32)
    if zero is not None:
        sums = x.sum(axis=1, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
        y = y - sums * zero.astype(jnp.float32).reshape(1, -1)
    y = y * w_scale.astype(jnp.float32)
    return (y * x_scale.astype(jnp.float32)).astype(out_dtype)


IMPL = Impl("xla", lambda target, *args: None, run)
