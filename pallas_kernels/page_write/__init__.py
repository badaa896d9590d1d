"""Writes rows of tokens into their places of a paged pool."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.page_write import native, xla

IMPLS = (native.IMPL, xla.IMPL)


def page_write(
    pool: jax.Array,
    rows: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    impl: str = dispatch.AUTO,
) -> jax.Array:
    """Returns the pool with `rows[t]` at page `pages[t]`, place `offsets[t]`, of each head.

    A pool that is donated to the program around is written in place.

    Args:
      pool: [P, K, B, ...] pages of B places, heads before places.
      rows: [T, K, ...] of the pool's dtype; no two of them have one place.
      pages: i32 [T]; rows whose page is outside 0 .. P - 1 are dropped.
      offsets: i32 [T] in 0 .. B - 1.
      impl: "auto", "native" or "xla".

    Raises:
      NotImplementedError: the named backend cannot run these arguments here.
    """
    args = (pool, rows, pages, offsets)
    with jax.named_scope("page_write"):
        return dispatch.pick("page_write", IMPLS, impl, *args).run(*args)
