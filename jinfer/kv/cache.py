"""The paged KV cache: one donated pool for all layers, whose page layout only this module knows.

The layer is folded into the page index, so that one buffer stays in place through a whole step:

    pool page of (layer l, page p) = l * num_pages + p
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jinfer.config.cache import CacheConfig
from jinfer.config.model import ModelConfig
from jinfer.kv import codes as kv_quant
from pallas_kernels import target as target_lib
from pallas_kernels.page_write import page_write
from pallas_kernels.paged_attention import PagedKV

if TYPE_CHECKING:
    from jax.typing import ArrayLike


_LANES = 128  # of a TPU's registers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """K and V of every layer, in pages.

    Attributes:
      k, v: [L * P, K, B, H] pages of B tokens, heads before tokens, so that one page of one head is
        one contiguous box. On CPUs small floats are stored as integers of the same bits: XLA would
        widen the whole pool to f32 to write or gather a few places. int4 is stored two to a byte,
        [L * P, K, B, H / 2]. On TPUs heads are padded with zeros, see `as_stored`.
      k_scale, v_scale: [L * P, K, B] f32 of quantized pools, see `kv_quant`; else None.
      num_layers, page_size: static.
      dtype: static, format of K and V, however they are stored.
    """

    k: Shaped[Array, "LP K B H"]
    v: Shaped[Array, "LP K B H"]
    k_scale: Float[Array, "LP K B"] | None
    v_scale: Float[Array, "LP K B"] | None
    num_layers: int = dataclasses.field(metadata={"static": True})
    page_size: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def num_pages(self) -> int:
        """Pages per layer."""
        return self.k.shape[0] // self.num_layers

    @property
    def num_slots(self) -> int:
        """Token places per layer."""
        return self.num_pages * self.page_size


def as_stored(
    model: ModelConfig, dtype: str, target: target_lib.Target | None = None
) -> ModelConfig:
    """Returns `model` with heads as wide as a pool of `dtype` keeps them on `target`.

    A multiple of 128 on TPUs, where arrays are tiled by 128 and the kernels read only such heads.
    int4, which no kernel reads, is not padded.
    """
    if (target or target_lib.current()).kind != "tpu" or dtype == "int4":
        return model
    return dataclasses.replace(model, head_dim=-(-model.head_dim // _LANES) * _LANES)


def init(
    model: ModelConfig, cache: CacheConfig, target: target_lib.Target | None = None
) -> KVCache:
    """Returns a zeroed pool for `model` as `target` (default: the current one) reads it.

    Raises:
      ValueError: int4 is stored two to a byte, and the model's heads have an odd width.
    """
    places = (model.num_layers * cache.num_pages, model.num_kv_heads, cache.page_size)
    target = target or target_lib.current()
    width = as_stored(model, cache.dtype, target).head_dim
    if cache.dtype == "int4":
        storage, width = jnp.dtype(jnp.uint8), width // 2
    else:
        storage = jnp.dtype(cache.dtype)
        is_small_float = jnp.issubdtype(storage, jnp.floating) and storage.itemsize < 4
        if is_small_float and target.kind == "cpu":
            storage = jnp.dtype(f"uint{8 * storage.itemsize}")

    def scales() -> Array | None:
        return jnp.zeros(places, jnp.float32) if cache.is_quantized else None

    return KVCache(
        k=jnp.zeros((*places, width), storage),
        v=jnp.zeros((*places, width), storage),
        k_scale=scales(),
        v_scale=scales(),
        num_layers=model.num_layers,
        page_size=cache.page_size,
        dtype=cache.dtype,
    )


def paged(kv: KVCache) -> PagedKV:
    """Returns the pool as the attention kernels take it."""
    if kv.dtype == "int4":
        return PagedKV(kv.k, kv.v, kv.k_scale, kv.v_scale)
    return PagedKV(_bitcast(kv.k, kv.dtype), _bitcast(kv.v, kv.dtype), kv.k_scale, kv.v_scale)


def layer_pages(kv: KVCache, layer: ArrayLike, page_table: Int[Array, "S M"]) -> Array:
    """Returns pool page ids of `layer` for a table of page ids."""
    return page_table + layer * kv.num_pages


def write(
    kv: KVCache,
    layer: ArrayLike,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int[Array, "T"],
    scales: tuple[Array, Array] | None = None,
) -> KVCache:
    """Writes this step's K and V into the pool, quantized if the pool is.

    With static `scales` of K and V (see `codes.quantize_static`) every token has these scales.

    Tokens whose slot is out of range (padding) are dropped, and their scales with them.
    """
    pages = slots // kv.page_size
    # Folding in the layer must not move a padding slot into the next layer's pages.
    pages = jnp.where(
        (slots >= 0) & (slots < kv.num_slots), pages + layer * kv.num_pages, kv.k.shape[0]
    )
    offsets = slots % kv.page_size

    def store(pool: Array, new: Array) -> Array:
        new = _bitcast(new, pool.dtype)
        if new.ndim == 3 and (missing := pool.shape[-1] - new.shape[-1]):
            new = jnp.pad(new, ((0, 0), (0, 0), (0, missing)))
        return page_write(pool, new, pages, offsets)

    if kv.k_scale is None or kv.v_scale is None:
        return dataclasses.replace(
            kv, k=store(kv.k, k.astype(kv.dtype)), v=store(kv.v, v.astype(kv.dtype))
        )
    if scales is None:
        pairs = [kv_quant.quantize(x, kv.dtype) for x in (k, v)]
    else:
        pairs = [kv_quant.quantize_static(x, kv.dtype, s) for x, s in zip((k, v), scales)]
    (k_codes, k_scale), (v_codes, v_scale) = pairs
    return dataclasses.replace(
        kv,
        k=store(kv.k, k_codes),
        v=store(kv.v, v_codes),
        k_scale=store(kv.k_scale, k_scale),
        v_scale=store(kv.v_scale, v_scale),
    )


def move_slots(kv: KVCache, src: Int[Array, "N"], dst: Int[Array, "N"]) -> KVCache:
    """Copies tokens between slots in every layer; pairs with dst out of range are dropped."""
    src_pages, src_offsets = _in_all_layers(kv, src // kv.page_size), src % kv.page_size
    dst_pages, dst_offsets = _in_all_layers(kv, dst // kv.page_size), dst % kv.page_size

    def move(pool: Array) -> Array:
        moved = _get_places(pool, src_pages, src_offsets[None])  # [L, N, K, ...]
        return _set_places(pool, dst_pages, dst_offsets[None], moved)

    return jax.tree.map(move, kv)


def copy_pages(
    kv: KVCache,
    src: Int[Array, "N"],
    dst: Int[Array, "N"],
    num_tokens: Int[Array, "N"] | None = None,
) -> KVCache:
    """Copies pages in every layer, all reads before any write; for copy-on-write.

    Pairs with dst out of range are dropped. Scales are copied, too.

    Args:
      num_tokens: places of each page that are copied, from the first on; those behind are zeroed.
        None copies whole pages.
    """
    src_pages, dst_pages = _in_all_layers(kv, src), _in_all_layers(kv, dst)

    def copy(pool: Array) -> Array:
        pages = pool[src_pages]  # [L, N, K, B, ...]
        if num_tokens is not None:
            is_copied = (
                jnp.arange(kv.page_size, dtype=jnp.int32)[None] < num_tokens[:, None]
            )  # [N, B]
            shape = (1, src.shape[0], 1, kv.page_size, *[1] * (pool.ndim - 3))
            pages = jnp.where(is_copied.reshape(shape), pages, jnp.zeros((), pool.dtype))
        return pool.at[dst_pages].set(pages, mode="drop")

    return jax.tree.map(copy, kv)


def clear_pages(kv: KVCache, pages: Int[Array, "N"]) -> KVCache:
    """Zeroes whole pages in every layer; those out of range are dropped."""
    pages = _in_all_layers(kv, pages)

    def clear(pool: Array) -> Array:
        return pool.at[pages].set(jnp.zeros((), pool.dtype), mode="drop")

    return jax.tree.map(clear, kv)


def read_pages(kv: KVCache, pages: Int[Array, "N"]) -> tuple[Any, ...]:
    """Returns the content of each of N pages: k, v and scales of all layers, [L, K, B, ...] each.

    One array per page, so that each can be moved by itself. Pages out of range are undefined.
    """
    ids = _in_all_layers(kv, pages)
    stacked = [pool[ids] for pool in jax.tree.leaves(kv)]  # [L, N, ...]
    return tuple(tuple(pool[:, n] for pool in stacked) for n in range(pages.shape[0]))


def write_pages(kv: KVCache, contents: Sequence[Any], pages: Int[Array, "N"]) -> KVCache:
    """Writes what `read_pages` returned into pages of a pool; those out of range are dropped."""
    ids = _in_all_layers(kv, pages)

    pools, treedef = jax.tree.flatten(kv)
    pools = [
        pool.at[ids].set(jnp.stack(new, axis=1), mode="drop")
        for pool, new in zip(pools, zip(*contents, strict=True), strict=True)
    ]
    return jax.tree.unflatten(treedef, pools)


def _in_all_layers(kv: KVCache, pages: Int[Array, "N"]) -> Array:
    """Returns [L, N] pool pages; pages out of range in a layer are out of range in the pool."""
    layers = jnp.arange(kv.num_layers, dtype=jnp.int32)[:, None] * kv.num_pages
    is_page = (pages >= 0) & (pages < kv.num_pages)
    return jnp.where(is_page[None], layers + pages[None], kv.num_layers * kv.num_pages)


def _set_places(pool: Array, pages: Array, offsets: Array, new: Array) -> Array:
    """Writes new [..., K, (H)] to pool[page, :, offset]; pages past the last are dropped."""
    if target_lib.current().kind != "tpu":
        return pool.at[pages, :, offsets].set(new, mode="drop")
    rows, places = _as_rows(pool, pages, offsets)
    new = new.reshape(-1, *rows.shape[1:])
    return rows.at[places.reshape(-1)].set(new, mode="drop").reshape(pool.shape)


def _get_places(pool: Array, pages: Array, offsets: Array) -> Array:
    """Returns pool[page, :, offset], [..., K, (H)]."""
    if target_lib.current().kind != "tpu":
        return pool[pages, :, offsets]
    rows, places = _as_rows(pool, pages, offsets)
    return rows[places.reshape(-1)].reshape(*places.shape, *rows.shape[1:])


def _as_rows(pool: Array, pages: Array, offsets: Array) -> tuple[Array, Array]:
    """Returns the pool as [LP * K * B, (H)], one head of one token per row, and the wanted rows.

    XLA for TPUs writes such rows in place. For all heads of a place at once it would transpose the
    whole pool and back, in every layer.
    """
    num_pages, num_heads, page_size, *width = pool.shape
    heads = jnp.arange(num_heads, dtype=jnp.int32).reshape(*[1] * pages.ndim, num_heads)
    pages, offsets = pages[..., None], offsets[..., None]
    places = (pages * num_heads + heads) * page_size + offsets
    num_rows = num_pages * num_heads * page_size
    places = jnp.where(pages < num_pages, places, num_rows)
    return pool.reshape(num_rows, *width), places


def _bitcast(x: Array, dtype: Any) -> Array:
    return x if x.dtype == jnp.dtype(dtype) else jax.lax.bitcast_convert_type(x, jnp.dtype(dtype))
