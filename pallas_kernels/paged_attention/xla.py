"""Paged attention in plain jnp: the reference, and the backend that runs anywhere.

The padded context is never gathered as a whole: both forms loop over blocks of pages, with a trip
count that depends on the actual lengths, so that one program serves every context length.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Impl
from pallas_kernels.paged_attention import packing
from pallas_kernels.paged_attention.base import (
    PACKED_DTYPE,
    AttentionSpec,
    PagedKV,
    decode_int4,
)
from pallas_kernels.target import Target

# Initial value of the running maximum: finite, so that a row without keys never has inf - inf.
_LOWEST = -1e30
# Largest max_q_len for a rectangle [S, max_q_len]; above, query tiles of one sequence at a time.
_MAX_RECTANGLE = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaTiles:
    """Sizes of the loops: keys of a sequence per step, and query tokens of a prefill tile.

    On a CPU blocks of one page are several times as fast as blocks of two, whose product has one
    more batch dimension.
    """

    kv_block: int = 64
    q_block: int = 32

    def __post_init__(self) -> None:
        if self.kv_block < 1 or self.q_block < 1:
            raise ValueError(
                "XlaTiles: kv_block and q_block must be at least 1, got "
                f"{self.kv_block} and {self.q_block}"
            )


class _Rows(NamedTuple):
    """Queries of S sequences, R rows each, and the inputs of their masks.

    positions: [S, R] last visible key of a row (in a tree: the first node's plus the depth); -1:
      none.
    lens: [S] keys of the sequence.
    tree_starts: [S] key of the tree's first bit.
    tree: [S, R, W] the bits, or None.
    """

    q: jax.Array  # [S, R, N, H] f32
    positions: jax.Array
    lens: jax.Array
    tree_starts: jax.Array
    tree: jax.Array | None


class _Call(NamedTuple):
    """The arguments of `run`, with the query lengths [S] and the sizes of the loops."""

    q: jax.Array
    kv: PagedKV
    kv_lens: jax.Array
    page_table: jax.Array
    q_starts: jax.Array
    q_lens: jax.Array
    tree_mask: jax.Array | None
    spec: AttentionSpec
    tiles: XlaTiles


def _why_not(target: Target, *args: Any) -> str | None:
    spec = args[-1]
    if spec.config is not None and not isinstance(spec.config, XlaTiles):
        return f"config must be XlaTiles, got {type(spec.config).__name__}"
    return None


def run(
    q: jax.Array,
    kv: PagedKV,
    kv_lens: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    tree_mask: jax.Array | None,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, N, H], lse f32 [T, N]); see `ragged_paged_attention`."""
    tiles = spec.config or XlaTiles()
    num_tokens, num_seqs = q.shape[0], kv_lens.shape[0]
    q_lens = q_starts[1:] - q_starts[:-1]
    call = _Call(q, kv, kv_lens, page_table, q_starts, q_lens, tree_mask, spec, tiles)
    rows = spec.max_q_len
    # A rectangle may pad the tokens to at most twice their number.
    if rows == 1 or (rows <= _MAX_RECTANGLE and num_seqs * rows <= 2 * num_tokens):
        return _rectangle(call, num_rows=rows, is_taken=q_lens > 0)
    # Decoding sequences are computed together, without a query tile for each.
    decoded = _rectangle(call, num_rows=1, is_taken=q_lens == 1)
    return _query_tiles(call, initial=decoded, is_taken=q_lens > 1)


def _rectangle(call: _Call, *, num_rows: int, is_taken: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the sequences in `is_taken` at once, up to `num_rows` tokens each; else zeros."""
    q, kv_lens, q_starts, q_lens, tree_mask = (
        call.q,
        call.kv_lens,
        call.q_starts,
        call.q_lens,
        call.tree_mask,
    )
    num_tokens = q.shape[0]
    offsets = jnp.arange(num_rows, dtype=jnp.int32)[None, :]  # [1, R]
    tokens = jnp.minimum(q_starts[:-1, None] + offsets, num_tokens - 1)  # [S, R]
    is_live = is_taken[:, None] & (offsets < q_lens[:, None])
    rows = _make_rows(q[tokens], tree_mask, tokens, kv_lens, q_lens, offsets, is_live)
    attend = _attend_pages if num_rows == 1 and tree_mask is None else _attend
    out, lse = attend(rows, call.kv, call.page_table, call.spec, call.tiles, _precision(q))
    # Back from [S, R] to tokens: token t is row t - q_starts[s] of its sequence s.
    t = jnp.arange(num_tokens, dtype=jnp.int32)
    seqs = jnp.searchsorted(q_starts[1:], t, side="right", method="compare_all").astype(
        jnp.int32
    )  # S: padding
    seqs_in = jnp.minimum(seqs, kv_lens.shape[0] - 1)
    row = t - q_starts[seqs_in]
    ok = (seqs < kv_lens.shape[0]) & (row < num_rows) & is_taken[seqs_in]
    row = jnp.clip(row, 0, num_rows - 1)
    out = jnp.where(ok[:, None, None], out[seqs_in, row], 0.0)
    return out.astype(q.dtype), jnp.where(ok[:, None], lse[seqs_in, row], -jnp.inf)


def _query_tiles(
    call: _Call, *, initial: tuple[jax.Array, jax.Array], is_taken: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds the taken sequences to `initial`, one tile of query tokens after the other.

    The loop has one step per live tile. Example, tiles of 4: q_lens [6, 0, 3] make
    tiles (0, 0) (0, 4) (2, 0) of (sequence, first token), ends [2, 2, 3].
    """
    kv_lens, q_lens, q_starts, tree_mask = call.kv_lens, call.q_lens, call.q_starts, call.tree_mask
    num_rows = min(call.tiles.q_block, call.spec.max_q_len)
    num_tiles = jnp.where(is_taken, -(-q_lens // num_rows), 0)
    ends = jnp.cumsum(num_tiles, dtype=jnp.int32)
    # Pads for a last tile that reaches past the end.
    q = jnp.pad(call.q, ((0, num_rows), (0, 0), (0, 0)))
    if tree_mask is not None:
        tree_mask = jnp.pad(tree_mask, ((0, num_rows), (0, 0)))
    out, lse = (jnp.pad(x, ((0, num_rows),) + ((0, 0),) * (x.ndim - 1)) for x in initial)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, lse = carry
        seq = jnp.searchsorted(ends, i, side="right", method="compare_all").astype(jnp.int32)
        first = (i - (ends[seq] - num_tiles[seq])) * num_rows
        start = q_starts[seq] + first
        offsets = first + jnp.arange(num_rows, dtype=jnp.int32)[None, :]  # [1, R]
        is_live = offsets < q_lens[seq]
        tile = lax.dynamic_slice_in_dim(q, start, num_rows)[None]
        tokens = start + jnp.arange(num_rows, dtype=jnp.int32)[None, :]
        rows = _make_rows(
            tile, tree_mask, tokens, kv_lens[seq][None], q_lens[seq][None], offsets, is_live
        )
        table = lax.dynamic_slice_in_dim(call.page_table, seq, 1)
        new_out, new_lse = _attend(rows, call.kv, table, call.spec, call.tiles, _precision(q))
        # The rows past the sequence's end belong to the next one and are not changed.
        old_out = lax.dynamic_slice_in_dim(out, start, num_rows)
        old_lse = lax.dynamic_slice_in_dim(lse, start, num_rows)
        new_out = jnp.where(is_live[0, :, None, None], new_out[0].astype(out.dtype), old_out)
        new_lse = jnp.where(is_live[0, :, None], new_lse[0], old_lse)
        return (
            lax.dynamic_update_slice_in_dim(out, new_out, start, 0),
            lax.dynamic_update_slice_in_dim(lse, new_lse, start, 0),
        )

    out, lse = _loop(jnp.int32(0), ends[-1], step, (out, lse))
    return out[:-num_rows], lse[:-num_rows]


def _precision(q: jax.Array) -> lax.Precision:
    """Returns the precision of products: reduced only if the f32 operands hold 16-bit numbers.

    16-bit queries do, since the scale is applied after the product.
    """
    return lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT


def _make_rows(
    q: jax.Array,
    tree_mask: jax.Array | None,
    tokens: jax.Array,
    kv_lens: jax.Array,
    q_lens: jax.Array,
    offsets: jax.Array,
    is_live: jax.Array,
) -> _Rows:
    """Returns the rows [S, R] at `offsets` within their sequences."""
    tree_starts = kv_lens - q_lens  # [S]
    if tree_mask is None:
        tree, depth = None, offsets
    else:
        tree = packing.clear_bits_from(tree_mask[tokens], q_lens)  # [S, R, W]
        depth = lax.population_count(tree).sum(axis=-1, dtype=jnp.int32) - 1
    positions = jnp.where(is_live, tree_starts[:, None] + depth, -1)
    lens = jnp.where(is_live.any(axis=1), kv_lens, 0)
    return _Rows(q.astype(jnp.float32), positions, lens, tree_starts, tree)


def _attend(
    rows: _Rows,
    kv: PagedKV,
    page_table: jax.Array,
    spec: AttentionSpec,
    tiles: XlaTiles,
    precision: lax.Precision,
) -> tuple[jax.Array, jax.Array]:
    """Runs the online softmax over blocks of pages; returns f32 ([S, R, N, H], [S, R, N])."""
    num_seqs, num_rows, num_heads, head_dim = rows.q.shape
    num_kv_heads, page = kv.num_kv_heads, kv.page_size
    group = num_heads // num_kv_heads
    pages = max(1, min(tiles.kv_block // page, page_table.shape[1]))  # in a block
    block = pages * page
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
    # Pages are a batch dimension ([S, p, K]), which avoids transposing the gathered pages:
    # [S, p, K, R * G, H] . [S, p, K, B, H].
    q = rows.q.reshape(num_seqs, num_rows, num_kv_heads, group, head_dim)
    q = jnp.moveaxis(q, 1, 2).reshape(num_seqs, 1, num_kv_heads, num_rows * group, head_dim)
    q = jnp.broadcast_to(q, (num_seqs, pages, num_kv_heads, num_rows * group, head_dim))
    dot = functools.partial(
        lax.dot_general, preferred_element_type=jnp.float32, precision=precision
    )
    batch = ((0, 1, 2), (0, 1, 2))

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, top, total = carry
        ids = lax.dynamic_slice_in_dim(page_table, i * pages, pages, axis=1)
        keys = i * block + jnp.arange(block, dtype=jnp.int32).reshape(pages, page)  # [p, B]
        k = _take(kv.k_pages, ids)  # [S, p, K, B, H]
        v = _take(kv.v_pages, ids)
        # Slots past the end may hold anything, including NaN of an earlier request.
        is_key = keys[None] < rows.lens[:, None, None]  # [S, p, B]
        v = jnp.where(is_key[:, :, None, :, None], v, 0.0)
        s = dot(q, k, (((4,), (4,)), batch)) * spec.sm_scale  # [S, p, K, R * G, B]
        k_scale = None if kv.k_scale is None else kv.k_scale[ids][:, :, :, None, :]
        s = _scale_and_cap(s, k_scale, spec.soft_cap)
        visible = jnp.repeat(_visible(rows, keys, spec.sliding_window), group, axis=2)
        s = jnp.where(visible[:, :, None], s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(axis=(1, 4)))  # [S, K, R * G]
        p = jnp.exp(s - new_top[:, None, :, :, None])
        alpha = jnp.exp(top - new_top)
        total = total * alpha + p.sum(axis=(1, 4))
        if kv.v_scale is not None:
            # NaN in the scale of a masked slot must not reach the sum.
            v_scale = jnp.where(is_key[:, :, None], kv.v_scale[ids], 0.0)
            p = p * v_scale[:, :, :, None, :]
        pv = dot(p, v, (((4,), (3,)), batch)).sum(axis=1)  # [S, K, R * G, H]
        return acc * alpha[..., None] + pv, new_top, total

    carry = _start((num_seqs, num_kv_heads, num_rows * group), head_dim)
    first, last = _key_range(rows, spec.sliding_window)
    out, lse = _finish(*_loop(first // block, -(-last // block), step, carry))
    split = (num_seqs, num_kv_heads, num_rows, group)
    out = jnp.moveaxis(out.reshape(*split, head_dim), 1, 2)
    lse = jnp.moveaxis(lse.reshape(split), 1, 2)
    return (
        out.reshape(num_seqs, num_rows, num_heads, head_dim),
        lse.reshape(num_seqs, num_rows, num_heads),
    )


def _attend_pages(
    rows: _Rows,
    kv: PagedKV,
    page_table: jax.Array,
    spec: AttentionSpec,
    tiles: XlaTiles,
    precision: lax.Precision,
) -> tuple[jax.Array, jax.Array]:
    """Like `_attend`, for one row per sequence: a step reads about one live page per sequence."""
    num_seqs, _, num_heads, head_dim = rows.q.shape
    num_kv_heads, page = kv.num_kv_heads, kv.page_size
    group = num_heads // num_kv_heads
    pages = _list_pages(rows, page, spec.sliding_window)
    size = num_seqs * max(1, tiles.kv_block // page)  # items per step
    q = rows.q.reshape(num_seqs, num_kv_heads, group, head_dim)
    dot = functools.partial(
        lax.dot_general, preferred_element_type=jnp.float32, precision=precision
    )

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, top, total = carry
        item = i * size + jnp.arange(size, dtype=jnp.int32)  # [C]
        seq, number, of_seq = pages.locate(item)
        ids = page_table[seq, jnp.clip(number, 0, page_table.shape[1] - 1)]
        keys = number[:, None] * page + jnp.arange(page, dtype=jnp.int32)[None]  # [C, B]
        visible = pages.visible(item, seq, keys)
        k = _take(kv.k_pages, ids)  # [C, K, B, H]
        # Slots past the end may hold anything, including NaN of an earlier request.
        v = _take(kv.v_pages, ids)
        v = jnp.where(visible[:, None, :, None], v, 0.0)
        s = dot(q[seq], k, (((3,), (3,)), ((0, 1), (0, 1)))) * spec.sm_scale  # [C, K, G, B]
        k_scale = None if kv.k_scale is None else kv.k_scale[ids][:, :, None, :]
        s = _scale_and_cap(s, k_scale, spec.soft_cap)
        s = jnp.where(visible[:, None, None], s, -jnp.inf)
        tops = jnp.where(of_seq[:, :, None, None], s.max(axis=-1)[:, None], _LOWEST)
        new_top = jnp.maximum(top, tops.max(axis=0))  # [S, K, G]
        p = jnp.exp(s - new_top[seq][..., None])
        alpha = jnp.exp(top - new_top)
        one_hot = of_seq.astype(jnp.float32)
        weight = p.sum(axis=-1)  # [C, K, G]
        if kv.v_scale is not None:
            # NaN in the scale of a masked slot must not reach the sum.
            p = p * jnp.where(visible[:, None], kv.v_scale[ids], 0.0)[:, :, None, :]
        pv = dot(p, v, (((3,), (2,)), ((0, 1), (0, 1))))  # [C, K, G, H]
        # The sums over items must not carry a sequence's NaN or infinity to other sequences.
        is_bad = weight * 0.0 + jnp.sum(pv * 0.0, axis=-1) != 0.0  # [C, K, G]
        has_bad = jnp.any(of_seq[:, :, None, None] & is_bad[:, None], axis=0)  # [S, K, G]
        weight = jnp.where(is_bad, 0.0, weight)
        pv = jnp.where(is_bad[..., None], 0.0, pv)
        total = total * alpha + dot(one_hot, weight, (((0,), (0,)), ((), ())))
        acc = acc * alpha[..., None] + dot(one_hot, pv, (((0,), (0,)), ((), ())))
        acc = jnp.where(has_bad[..., None], jnp.nan, acc)
        return acc, new_top, total

    carry = _start((num_seqs, num_kv_heads, group), head_dim)
    out, lse = _finish(*_loop(jnp.int32(0), -(-pages.ends[-1] // size), step, carry))
    return out.reshape(num_seqs, 1, num_heads, head_dim), lse.reshape(num_seqs, 1, num_heads)


class _PageList(NamedTuple):
    """The live pages of all sequences as one list, so that short sequences cost little.

    Example, pages of 64: lens [100, 0, 300] have [2, 0, 5] pages, ends [2, 2, 7]; item 3 is page 1
    of sequence 2.

    positions: [S] last visible key. ends_at: [S] end of the visible keys.
    first_page, num_pages, ends: [S] first live page, number of them, and running sum.
    window: most keys that a row sees, or None.
    """

    positions: jax.Array
    ends_at: jax.Array
    first_page: jax.Array
    num_pages: jax.Array
    ends: jax.Array
    window: int | None

    def locate(self, item: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the sequences [C] of items [C], their page numbers [C], and one-hot [C, S]."""
        num_seqs = self.ends.shape[0]
        seq = jnp.sum(item[:, None] >= self.ends[None], axis=1, dtype=jnp.int32)
        seq = jnp.minimum(seq, num_seqs - 1)
        is_item = (item < self.ends[-1])[:, None]
        of_seq = (seq[:, None] == jnp.arange(num_seqs, dtype=jnp.int32)[None]) & is_item
        number = item - (self.ends[seq] - self.num_pages[seq]) + self.first_page[seq]
        return seq, number, of_seq

    def visible(self, item: jax.Array, seq: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns [C, B]: whether items [C] of sequences [C] see the keys [C, B]."""
        visible = (keys < self.ends_at[seq][:, None]) & (item < self.ends[-1])[:, None]
        if self.window is not None:
            visible &= keys > (self.positions - self.window)[seq][:, None]
        return visible


def _list_pages(rows: _Rows, page: int, window: int | None) -> _PageList:
    positions = rows.positions[:, 0]
    ends_at = jnp.minimum(rows.lens, positions + 1)
    first_page = jnp.zeros_like(ends_at)
    if window is not None:
        first_page = jnp.maximum(positions - window + 1, 0) // page
    num_pages = jnp.maximum(-(-ends_at // page) - first_page, 0)
    ends = jnp.cumsum(num_pages, dtype=jnp.int32)
    return _PageList(positions, ends_at, first_page, num_pages, ends, window)


def _scale_and_cap(s: jax.Array, k_scale: jax.Array | None, soft_cap: float | None) -> jax.Array:
    if k_scale is not None:
        s = s * k_scale
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def _start(shape: tuple[int, ...], head_dim: int) -> tuple[jax.Array, ...]:
    """Returns the carry of an online softmax: weighted sum, maximum and sum of weights."""
    return (
        jnp.zeros((*shape, head_dim), jnp.float32),
        jnp.full(shape, _LOWEST, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


def _finish(acc: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the log of the sum of weights; 0 and -inf for rows without keys."""
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return out, lse


def _loop(start: jax.Array, end: jax.Array, step: Any, carry: Any) -> Any:
    """Runs `lax.fori_loop` in int32, even where jax_enable_x64 makes some arithmetic int64."""
    return lax.fori_loop(start.astype(jnp.int32), end.astype(jnp.int32), step, carry)


def _take(pages: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns pages[ids] in f32, int4 decoded.

    Small floats are gathered as integers: XLA on CPUs would widen the whole pool before gathering.
    """
    if pages.dtype == PACKED_DTYPE:
        return decode_int4(pages[ids])
    if pages.dtype.itemsize < 4 and not jnp.issubdtype(pages.dtype, jnp.integer):
        bits = lax.bitcast_convert_type(pages, jnp.dtype(f"uint{8 * pages.dtype.itemsize}"))
        return lax.bitcast_convert_type(bits[ids], pages.dtype).astype(jnp.float32)
    return pages[ids].astype(jnp.float32)


def _key_range(rows: _Rows, window: int | None) -> tuple[jax.Array, jax.Array]:
    """Returns the first key any row sees and one past the last."""
    last = rows.lens if rows.tree is not None else rows.positions.max(axis=1) + 1
    last = jnp.minimum(last, rows.lens).max()
    if window is None:
        return jnp.int32(0), last
    is_live = rows.positions >= 0
    first = jnp.where(is_live, rows.positions - window + 1, last)
    if rows.tree is not None:  # the window masks keys before the tree only
        first = jnp.minimum(first, rows.tree_starts[:, None])
    return jnp.clip(first.min(), 0, last), last


def _visible(rows: _Rows, keys: jax.Array, window: int | None) -> jax.Array:
    """Returns [S, p, R, B]: which keys [p, B] each row sees."""
    keys = keys[None, :, None, :]
    positions = rows.positions[:, None, :, None]
    in_window = True if window is None else keys > positions - window
    if rows.tree is None:
        return (keys <= positions) & in_window
    nodes = keys - rows.tree_starts[:, None, None, None]  # [S, p, 1, B], index into the bits
    bit = jnp.zeros((), bool)
    for w in range(rows.tree.shape[-1]):
        word = rows.tree[:, None, :, w, None]  # [S, 1, R, 1]
        shift = jnp.clip(nodes - 32 * w, 0, 31).astype(jnp.uint32)
        bit = bit | ((nodes // 32 == w) & ((word >> shift) & jnp.uint32(1) == 1))
    is_key = (keys < rows.lens[:, None, None, None]) & (positions >= 0)
    return is_key & (((nodes < 0) & in_window) | ((nodes >= 0) & bit))


IMPL = Impl("xla", _why_not, run)
