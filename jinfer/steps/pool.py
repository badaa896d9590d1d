"""Jitted changes of the KV pool and of the sampler's state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Int

from jinfer.kv import cache as kv_cache
from jinfer.kv.cache import KVCache
from jinfer.sampling import state as sampling_state
from jinfer.sampling.state import SamplerState


@functools.partial(jax.jit, donate_argnames=("state",))
def reset_row(state: SamplerState, row: Int[Array, ""], setup: Any) -> SamplerState:
    """Prepares one sampler row for a request that is (re-)admitted; `state` is donated."""
    return sampling_state.reset_row(state, row, setup)


@functools.partial(jax.jit, donate_argnames=("kv",))
def copy_pages(
    kv: KVCache,
    src: Int[Array, "N"],
    dst: Int[Array, "N"],
    num_tokens: Int[Array, "N"] | None = None,
) -> KVCache:
    """Copies pages of the pool, which is donated; see `kv_cache.copy_pages`."""
    return kv_cache.copy_pages(kv, src, dst, num_tokens)


@functools.partial(jax.jit, donate_argnames=("kv",))
def clear_pages(kv: KVCache, pages: Int[Array, "N"]) -> KVCache:
    """Zeroes pages of the pool, which is donated; see `kv_cache.clear_pages`."""
    return kv_cache.clear_pages(kv, pages)


@jax.jit
def read_pages(kv: KVCache, pages: Int[Array, "N"]) -> tuple[Any, ...]:
    """Copies pages out of the pool, which stays; see `kv_cache.read_pages`."""
    return kv_cache.read_pages(kv, pages)


@functools.partial(jax.jit, donate_argnames=("kv",))
def write_pages(kv: KVCache, contents: Sequence[Any], pages: Int[Array, "N"]) -> KVCache:
    """Copies pages into the pool, which is donated; see `kv_cache.write_pages`."""
    return kv_cache.write_pages(kv, contents, pages)
