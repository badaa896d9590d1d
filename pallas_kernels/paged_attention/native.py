"""Paged attention in C++ for CPUs; the form of the computation is described in native.cc."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Impl
from pallas_kernels.native import native, why_not
from pallas_kernels.paged_attention.base import AttentionSpec, PagedKV
from pallas_kernels.target import Target

MAX_GROUP = 96  # query heads of a KV head: rows of a tile in native.cc
_FORMATS = {  # of pages, by dtype, as native.cc numbers them
    "float32": 0,
    "bfloat16": 1,
    "float16": 2,
    "int8": 3,
    "float8_e4m3fn": 4,
    "uint8": 5,
}


def _why_not(target: Target, q: jax.Array, kv: PagedKV, *args: Any) -> str | None:
    if reason := why_not(target):
        return reason
    spec = args[-1]
    if spec.config is not None:
        return f"takes no config, got {type(spec.config).__name__}"
    multiple = 32 if kv.is_packed else 16
    if kv.head_dim % multiple:
        return f"heads must be multiples of {multiple} wide, got {kv.head_dim}"
    if (group := q.shape[1] // kv.num_kv_heads) > MAX_GROUP:
        return f"at most {MAX_GROUP} query heads share a KV head, got {group}"
    return None


def _run(
    q: jax.Array,
    kv: PagedKV,
    kv_lens: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    tree_mask: jax.Array | None,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, N, H], lse f32 [T, N]); see `ragged_paged_attention`."""
    scales = [jnp.zeros(0, jnp.float32) if x is None else x for x in (kv.k_scale, kv.v_scale)]
    tree = jnp.zeros((0, 0), jnp.uint32) if tree_mask is None else tree_mask
    call = jax.ffi.ffi_call(
        native().target("paged_attention"),
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
        ),
    )
    out, lse = call(
        *(q, _storage(kv.k_pages), _storage(kv.v_pages), *scales),
        *(kv_lens, page_table, q_starts, tree),
        sm_scale=np.float32(spec.sm_scale),
        soft_cap=np.float32(spec.soft_cap or 0.0),
        window=np.int64(spec.sliding_window or 0),
        format=np.int32(_FORMATS[jnp.dtype(kv.k_pages.dtype).name]),
    )
    return out, lse


def _storage(pages: jax.Array) -> jax.Array:
    """Returns 16-bit pages as integers: an engine's pool holds these, and two casts are none."""
    if pages.dtype.itemsize != 2:
        return pages
    return jax.lax.bitcast_convert_type(pages, jnp.uint16)


IMPL = Impl("native", _why_not, _run)
