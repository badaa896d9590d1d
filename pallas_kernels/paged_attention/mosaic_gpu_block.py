"""What a warpgroup of the Hopper kernel does with one block of keys or values.

Shapes are per warpgroup: 64 query rows, a block of 64 or 128 keys.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat

_CHUNK_ROWS = 64  # rows of a block that a warpgroup holds in registers at a time


def mask(
    start: jax.Array,
    shape: tuple[int, ...],
    position: jax.Array,
    words: list[jax.Array],
    tree_start: jax.Array,
    window: int | None,
) -> jax.Array:
    """Tells which of the keys from `start` on each row sees."""
    keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + start

    def rows(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, shape, [0])

    visible = keys < tree_start if words else keys <= rows(position)
    if window is not None:
        visible &= keys > rows(position - window)
    for w, word in enumerate(words):
        nodes = keys - tree_start
        shift = jnp.clip(nodes - 32 * w, 0, 31).astype(jnp.uint32)
        bit = (lax.shift_right_logical(rows(word), shift) & jnp.uint32(1)) == jnp.uint32(1)
        visible |= bit & (nodes >= 32 * w) & (nodes < 32 * (w + 1))
    return visible


def without_tail(values: jax.Array, num_keys: jax.Array) -> jax.Array:
    """Returns `values`, [keys, H] in registers, with zeros from row `num_keys` on."""
    rows = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
    return jnp.where(rows < num_keys, values, 0.0)


def clear_tail(v_ref: Any, num_keys: jax.Array) -> None:
    """Zeroes rows `num_keys` and on of a block [keys, H] in shared memory, for wgmma to read."""
    num_rows, head_dim = v_ref.shape
    columns = 64 if head_dim % 64 == 0 else 32  # one tile of the swizzle
    for row in range(0, num_rows, _CHUNK_ROWS):
        for column in range(0, head_dim, columns):
            chunk = v_ref.at[pl.ds(row, _CHUNK_ROWS), pl.ds(column, columns)]
            values = compat.gpu_load(chunk, layout=plgpu.Layout.WGMMA)
            chunk[...] = without_tail(values, num_keys - row)
    plgpu.commit_smem()


def multiply_add(acc: jax.Array, p: jax.Array, v_ref: Any, p_ref: Any) -> jax.Array:
    """Returns acc + p @ v on the tensor cores; `p_ref` holds p if they are simulated."""
    if compat.is_interpreting():
        role = lax.axis_index("role")
        p_ref.at[role][...] = p
        plgpu.commit_smem()

        def pv(ref: Any) -> jax.Array:
            plgpu.wgmma(ref, p_ref.at[role], v_ref)
            return ref[...]

        return acc + pl.run_scoped(pv, plgpu.ACC((acc.shape[0], acc.shape[1]), jnp.float32))
    updated: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, p, v_ref))(plgpu.ACC.init(acc))
    return updated
