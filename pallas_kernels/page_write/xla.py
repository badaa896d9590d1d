"""`page_write` as a scatter; on TPUs as one of rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import target as target_lib
from pallas_kernels.dispatch import Impl
from pallas_kernels.target import Target


def _why_not(target: Target, *args: Any) -> str | None:
    return None


def _run(pool: jax.Array, rows: jax.Array, pages: jax.Array, offsets: jax.Array) -> jax.Array:
    num_pages, num_heads, page_size, *width = pool.shape
    pages = jnp.where(pages < 0, num_pages, pages)
    if target_lib.current().kind != "tpu":
        return pool.at[pages, :, offsets].set(rows, mode="drop")
    # One head of one token a row: XLA for TPUs writes such rows in place. For all heads at once it
    # would transpose the whole pool and back.
    heads = jnp.arange(num_heads, dtype=jnp.int32)[None]
    places = (pages[:, None] * num_heads + heads) * page_size + offsets[:, None]
    places = jnp.where(pages[:, None] < num_pages, places, num_pages * num_heads * page_size)
    flat = pool.reshape(-1, *width)
    flat = flat.at[places.reshape(-1)].set(rows.reshape(-1, *width), mode="drop")
    return flat.reshape(pool.shape)


IMPL = Impl("xla", _why_not, _run)
