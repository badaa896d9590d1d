"""The paged KV cache: one donated pool for all layers; hides the page layout from everything else.

The layer is folded into the page index, so that one buffer stays in place through a whole step:

    pool page of (layer l, page p) = l * num_pages + p
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jinfer.config import CacheConfig, ModelConfig

if TYPE_CHECKING:
    from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """K and V of every layer, in pages.

    Attributes:
      k, v: [L * P, K, B, H] pages of B tokens, heads before tokens, so that one page of one head is
        one contiguous box.
      num_layers, page_size: static.
    """

    k: Float[Array, "LP K B H"]
    v: Float[Array, "LP K B H"]
    num_layers: int = dataclasses.field(metadata={"static": True})
    page_size: int = dataclasses.field(metadata={"static": True})

    @property
    def num_pages(self) -> int:
        """Pages a layer has."""
        return self.k.shape[0] // self.num_layers

    @property
    def num_slots(self) -> int:
        """Token places a layer has."""
        return self.num_pages * self.page_size


def init(model: ModelConfig, cache: CacheConfig) -> KVCache:
    """Returns a zeroed pool for `model`."""
    shape = (
        model.num_layers * cache.num_pages,
        model.num_kv_heads,
        cache.page_size,
        model.head_dim,
    )
    dtype = jnp.dtype(cache.dtype)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        num_layers=model.num_layers,
        page_size=cache.page_size,
    )


def layer_pages(kv: KVCache, layer: ArrayLike, page_table: Int[Array, "S M"]) -> Array:
    """Returns pool page ids of `layer` for a table of page ids."""
    return page_table + layer * kv.num_pages


def write(
    kv: KVCache,
    layer: ArrayLike,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int[Array, "T"],
) -> KVCache:
    """Stores this step's K and V; tokens whose slot is out of range (padding) are dropped."""
    pages = slots // kv.page_size
    # Folding the layer in must not push a padding slot into the next layer's pages.
    pages = jnp.where(
        (slots >= 0) & (slots < kv.num_slots), pages + layer * kv.num_pages, kv.k.shape[0]
    )
    offsets = slots % kv.page_size
    return dataclasses.replace(
        kv,
        k=kv.k.at[pages, :, offsets].set(k.astype(kv.k.dtype), mode="drop"),
        v=kv.v.at[pages, :, offsets].set(v.astype(kv.v.dtype), mode="drop"),
    )


def move_slots(kv: KVCache, src: Int[Array, "N"], dst: Int[Array, "N"]) -> KVCache:
    """Copies tokens between slots in every layer; pairs with dst out of range are dropped."""
    layers = jnp.arange(kv.num_layers)[:, None] * kv.num_pages  # [L, 1]
    src_pages, src_offsets = layers + src // kv.page_size, src % kv.page_size
    dst_pages = jnp.where(
        (dst >= 0) & (dst < kv.num_slots), layers + dst // kv.page_size, kv.k.shape[0]
    )
    dst_offsets = dst % kv.page_size

    def move(pool: Array) -> Array:
        return pool.at[dst_pages, :, dst_offsets].set(pool[src_pages, :, src_offsets], mode="drop")

    return dataclasses.replace(kv, k=move(kv.k), v=move(kv.v))
