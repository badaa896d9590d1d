"""Packs query tokens of ragged sequences into tiles of equal size, and unpacks them.

A tile holds tokens of one sequence. For each KV head, query token j of the tile and query head g of
the group are row j * G + g. Example with G = 4 and 16 tokens a tile:

    q_lens  1 40 0    tiles  seq 0: token 0 | seq 1: tokens 0-15 | 16-31 | 32-39 | dead tiles
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Tiles(NamedTuple):
    """The queries of each tile, live tiles first; i32 [tiles] unless noted.

    seq, first_token: the sequence and the first of its tokens. is_live: bool. starts: [S], first
    tile of each sequence. q_lens: [S], packed tokens of each sequence. tile_tokens: static.
    """

    seq: jax.Array
    first_token: jax.Array
    is_live: jax.Array
    starts: jax.Array
    q_lens: jax.Array
    tile_tokens: int


class Packed(NamedTuple):
    """Queries in tiles.

    q: [tiles, K, rows, H]. positions: i32 [tiles, tile_rows], positions in the sequence (in a
    tree: the first node's plus the depth), -1 for rows without a token. words: u32
    [tiles, W, tile_rows], bits of the tree over the sequence's last n_s keys, or None.
    """

    q: jax.Array
    positions: jax.Array
    words: jax.Array | None


def first_nodes(tiles: Tiles, kv_lens: jax.Array) -> jax.Array:
    """Returns for each tile the position of its sequence's first query token."""
    return kv_lens[tiles.seq] - tiles.q_lens[tiles.seq]


def list_tiles(q_lens: jax.Array, max_q_len: int, num_tokens: int, most_tokens: int) -> Tiles:
    """Cuts each sequence into tiles of `most_tokens` (fewer if no sequence has as many).

    At 16 tokens a tile q_lens [1, 40, 0] give 1, 3 and 0 tiles.
    """
    num_seqs = q_lens.shape[0]
    tile_tokens = min(max_q_len, most_tokens)
    # Sequences of one tile each need no further tiles.
    num_tiles = num_seqs if max_q_len <= most_tokens else num_seqs + num_tokens // tile_tokens
    count = -(-q_lens // tile_tokens)
    ends = jnp.cumsum(count, dtype=jnp.int32)
    starts = ends - count
    index = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    is_live = seq < num_seqs
    seq = jnp.minimum(seq, num_seqs - 1)
    first_token = jnp.where(is_live, (index - starts[seq]) * tile_tokens, 0)
    return Tiles(seq, first_token.astype(jnp.int32), is_live, starts, q_lens, tile_tokens)


def pack(
    q: jax.Array,
    num_kv_heads: int,
    kv_lens: jax.Array,
    q_starts: jax.Array,
    tree_mask: jax.Array | None,
    tiles: Tiles,
    *,
    num_rows: int,
    tile_rows: int,
) -> Packed:
    """Gathers the rows of each tile, padded to `num_rows` (queries) and `tile_rows` (the rest)."""
    num_tokens, num_heads, head_dim = q.shape
    group, num_tiles = num_heads // num_kv_heads, tiles.seq.shape[0]
    live_rows = tiles.tile_tokens * group
    tokens_in = tiles.first_token[:, None] + jnp.arange(tiles.tile_tokens, dtype=jnp.int32)[None, :]
    q_len = tiles.q_lens[tiles.seq]
    is_row = tiles.is_live[:, None] & (tokens_in < q_len[:, None])  # [tiles, tokens]
    tokens = jnp.minimum(q_starts[tiles.seq][:, None] + tokens_in, num_tokens - 1)
    rows = q.reshape(num_tokens, num_kv_heads, group, head_dim)[tokens]
    rows = jnp.moveaxis(rows, 2, 1)  # [tiles, K, tokens, G, H]
    rows = rows.reshape(num_tiles, num_kv_heads, live_rows, head_dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, num_rows - live_rows), (0, 0)))

    def per_row(x: jax.Array, fill: int) -> jax.Array:
        """[tiles, tokens] -> [tiles, tile_rows]."""
        x = jnp.repeat(x, group, axis=1)
        return jnp.pad(x, ((0, 0), (0, tile_rows - live_rows)), constant_values=fill)

    words, depth = None, tokens_in
    if tree_mask is not None:
        bits = clear_bits_from(tree_mask[tokens], q_len)  # [tiles, tokens, W]
        bits = jnp.where(is_row[:, :, None], bits, jnp.uint32(0))
        depth = lax.population_count(bits).sum(axis=-1, dtype=jnp.int32) - 1
        words = jnp.stack([per_row(bits[..., w], 0) for w in range(bits.shape[-1])], axis=1)
    start = first_nodes(tiles, kv_lens)[:, None]
    return Packed(rows, per_row(jnp.where(is_row, start + depth, -1), -1), words)


def unpack(
    out: jax.Array, lse: jax.Array, q_starts: jax.Array, tiles: Tiles, num_tokens: int, group: int
) -> tuple[jax.Array, jax.Array]:
    """Unpacks [tiles, K, rows, H] and [tiles, K, rows] to ([T, N, H], [T, N]).

    Tokens that are in no tile get zeros and -inf.
    """
    num_tiles, num_kv_heads, _, head_dim = out.shape
    rows, num_heads = tiles.tile_tokens * group, num_kv_heads * group
    split = (num_tiles, num_kv_heads, tiles.tile_tokens, group)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(q_starts[1:], token, side="right", method="compare_all")
    seq = seq.astype(jnp.int32)
    is_live = seq < tiles.q_lens.shape[0]
    seq = jnp.minimum(seq, tiles.q_lens.shape[0] - 1)
    j = token - q_starts[seq]
    is_live &= j < tiles.q_lens[seq]
    tile = jnp.clip(tiles.starts[seq] + j // tiles.tile_tokens, 0, num_tiles - 1)
    row = j % tiles.tile_tokens
    out = out[:, :, :rows].reshape(*split, head_dim)[tile, :, row]  # [T, K, G, H]
    lse = lse[:, :, :rows].reshape(split)[tile, :, row]
    out = jnp.where(is_live[:, None, None], out.reshape(num_tokens, num_heads, head_dim), 0)
    return out, jnp.where(is_live[:, None], lse.reshape(num_tokens, num_heads), -jnp.inf)


def clear_bits_from(words: jax.Array, count: jax.Array) -> jax.Array:
    """Clears bits `count` [tiles] and above of [tiles, tokens, W]: count 3 leaves 0b111."""
    left = jnp.clip(
        count[:, None] - 32 * jnp.arange(words.shape[-1], dtype=jnp.int32)[None, :], 0, 32
    )  # [tiles, W]
    shift = jnp.minimum(left, 31).astype(jnp.uint32)
    low = jnp.where(left == 32, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << shift) - jnp.uint32(1))
    return words & low[:, None, :]
