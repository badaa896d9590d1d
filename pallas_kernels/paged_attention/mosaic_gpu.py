"""Paged attention on Hopper: packs query rows into tiles, lists the work, runs the kernel, merges.

A tile's KV blocks are split into parts so that all multiprocessors get work even if the lengths
are very unequal; the parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels import target as target_lib
from pallas_kernels import tiles as tiles_lib
from pallas_kernels.dispatch import Impl
from pallas_kernels.paged_attention import packing
from pallas_kernels.paged_attention.base import AttentionSpec, PagedKV
from pallas_kernels.target import Target

OP = "paged_attention.mosaic_gpu"  # name in the tables of measured tiles
ROWS = 64  # rows per warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicGpuTiles:
    """Tiles of the Hopper kernel.

    Attributes:
      kv_block: keys per step, 64 or 128.
      num_stages: depth of the ring of KV blocks; even, so that each stage belongs to one warpgroup.
      num_converted: depth of the ring of converted blocks, 1 or 2; for 8-bit pages.
      num_attending: warpgroups that compute, 1 or 2: a chunk's tiles have 64 rows for each.
      min_part, max_part: bounds on the KV blocks of a part: smaller parts cost more to merge than
        they gain, larger ones make the last wave uneven.
    """

    kv_block: int = 64
    num_stages: int = 4
    num_converted: int = 2
    num_attending: int = 2
    min_part: int = 4
    max_part: int = 24

    def __post_init__(self) -> None:
        if self.kv_block not in (64, 128) or self.num_attending not in (1, 2):
            raise ValueError(
                "MosaicGpuTiles: kv_block must be 64 or 128 and num_attending 1 or 2, got "
                f"{self.kv_block} and {self.num_attending}"
            )
        if self.num_stages < 2 or self.num_stages % 2:
            raise ValueError(f"MosaicGpuTiles: num_stages must be even, got {self.num_stages}")
        if self.num_converted not in (1, 2):
            raise ValueError(
                f"MosaicGpuTiles: num_converted must be 1 or 2, got {self.num_converted}"
            )
        if not 1 <= self.min_part <= self.max_part:
            raise ValueError(
                "MosaicGpuTiles: expected 1 <= min_part <= max_part, got "
                f"{self.min_part} and {self.max_part}"
            )


def _why_not(target: Target, *args: Any) -> str | None:
    q, kv, *_, spec = args
    if compat.is_interpreting():
        if reason := compat.why_not_interpret("gpu"):
            return reason
    elif not target.is_hopper:
        return f"needs a Hopper GPU (sm_90), the target is {target.name} ({target.arch})"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q must be bf16 or f16 for the tensor cores, got {q.dtype}"
    if kv.is_packed:
        return "only the xla backend reads int4 kv pages"
    if not kv.is_quantized and kv.k_pages.dtype != q.dtype:
        return (
            f"kv pages must be {q.dtype} as q is, or float8_e4m3fn or int8, got {kv.k_pages.dtype}"
        )
    if q.shape[2] % 32 or q.shape[2] > 256:
        return f"head_dim must be a multiple of 32 up to 256, got {q.shape[2]}"
    if kv.page_size < 8 or (64 % kv.page_size and kv.page_size % 64):
        return f"page size must divide 64 or be a multiple of it, at least 8, got {kv.page_size}"
    if q.shape[1] // kv.num_kv_heads > ROWS:
        return f"at most {ROWS} query heads a KV head, got {q.shape[1] // kv.num_kv_heads}"
    if spec.sm_scale <= 0:
        return f"sm_scale must be positive, got {spec.sm_scale}"
    if spec.config is None:
        if not all(any(candidates(q, kv, n)) for n in (1, spec.max_q_len)):
            return f"no tiles fit into shared memory at head_dim {q.shape[2]}"
        return None
    if not isinstance(spec.config, MosaicGpuTiles):
        return f"config must be MosaicGpuTiles, got {type(spec.config).__name__}"
    if not _fits(spec.config.kv_block, kv.page_size):
        return f"config.kv_block {spec.config.kv_block} and page size {kv.page_size} do not divide"
    if kv.is_quantized and (spec.config.num_attending, spec.config.num_converted) == (2, 1):
        return "config: two attending warpgroups need num_converted = 2"
    if kv.is_quantized and spec.config.num_attending == 2 and q.shape[2] > 128:
        return f"config: num_attending must be 1 for 8-bit pages of head_dim {q.shape[2]}"
    return None


def _fits(kv_block: int, page_size: int) -> bool:
    return kv_block % page_size == 0 or page_size % kv_block == 0


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
    call = (q, kv, kv_lens, page_table, q_starts, tree_mask, spec)
    q_lens = q_starts[1:] - q_starts[:-1]
    group = q.shape[1] // kv.num_kv_heads
    if spec.max_q_len * group <= 2 * ROWS:
        return _run_tiles(*call, is_taken=q_lens > 0, max_q_len=spec.max_q_len)
    # Decoding sequences split their long contexts; prefill tiles rarely need to.
    out, lse = _run_tiles(*call, is_taken=q_lens > 1, max_q_len=spec.max_q_len)
    decoded, decoded_lse = _run_tiles(*call, is_taken=q_lens == 1, max_q_len=1)
    is_decoded = jnp.isneginf(lse)
    return jnp.where(is_decoded[:, :, None], decoded, out), jnp.where(is_decoded, decoded_lse, lse)


def _run_tiles(
    q: jax.Array,
    kv: PagedKV,
    kv_lens: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    tree_mask: jax.Array | None,
    spec: AttentionSpec,
    *,
    is_taken: jax.Array,
    max_q_len: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes the taken sequences, of at most max_q_len tokens; zeros and -inf for the others."""
    from pallas_kernels.paged_attention import mosaic_gpu_kernel as kernel

    num_kv_heads = kv.num_kv_heads
    group = q.shape[1] // num_kv_heads
    chosen = choose_tiles(q, kv, page_table.shape[0], max_q_len, spec.config)
    launch = _launch(q, kv, page_table, tree_mask, spec, max_q_len, chosen)
    q_lens = jnp.where(is_taken, q_starts[1:] - q_starts[:-1], 0)
    tiles = packing.list_tiles(q_lens, max_q_len, q.shape[0], launch.tile_rows // group)
    blocks = _list_blocks(tiles, kv_lens, launch)
    items, num_written = _list_items(tiles, blocks, num_kv_heads, launch, chosen)
    fits_one = launch.tile_rows == ROWS
    packed = packing.pack(
        q.astype(jnp.float16) if kv.is_quantized else q,
        num_kv_heads,
        kv_lens,
        q_starts,
        tree_mask,
        tiles,
        num_rows=-(-tiles.tile_tokens * group // 8) * 8 if fits_one else launch.tile_rows,
        tile_rows=launch.tile_rows,
    )
    out, lse = kernel.attend_tiles(
        items, page_table, packed.positions, packed.words, packed.q, kv, launch
    )
    out, lse = _merge(out, lse, num_written)
    out, lse = packing.unpack(out, lse, q_starts, tiles, q.shape[0], group)
    return out.astype(q.dtype), lse


def _launch(
    q: jax.Array,
    kv: PagedKV,
    page_table: jax.Array,
    tree_mask: jax.Array | None,
    spec: AttentionSpec,
    max_q_len: int,
    chosen: MosaicGpuTiles,
) -> Any:
    """Returns the static settings of the launch."""
    from pallas_kernels.paged_attention import mosaic_gpu_kernel as kernel

    num_kv_heads = kv.num_kv_heads
    group = q.shape[1] // num_kv_heads
    fits_one = max_q_len * group <= ROWS
    num_attending = chosen.num_attending
    table_blocks = -(-page_table.shape[1] * kv.page_size // chosen.kv_block)
    cores = _num_cores()
    if max_q_len * group <= 2 * ROWS:
        wanted = -(-4 * cores // (num_kv_heads * page_table.shape[0]))
        wanted = max(8, min(wanted, 64))
    else:
        tiles = max(1, q.shape[0] * group // (2 * ROWS))
        wanted = min(4, cores // (num_kv_heads * tiles))
    return kernel.Launch(
        num_attending=num_attending,
        share_keys=not fits_one or num_attending == 1,
        kv_block=chosen.kv_block,
        num_stages=chosen.num_stages,
        num_converted=chosen.num_converted,
        num_parts=max(1, min(wanted, -(-table_blocks // chosen.min_part))),
        sm_scale=spec.sm_scale,
        soft_cap=spec.soft_cap,
        window=spec.sliding_window,
        tree_words=0 if tree_mask is None else tree_mask.shape[1],
    )


def case_name(q: jax.Array, kv: PagedKV, num_seqs: int, max_q_len: int) -> str:
    """Returns the key of the measured tiles: "Q1 S64 N32 K8 H128 B64 bfloat16"."""
    _, num_heads, head_dim = q.shape
    longest = min(256, 1 << (max_q_len - 1).bit_length())
    most = 1 << (num_seqs - 1).bit_length()
    heads = f"N{num_heads} K{kv.num_kv_heads} H{head_dim}"
    return f"Q{longest} S{most} {heads} B{kv.page_size} {kv.k_pages.dtype}"


def choose_tiles(
    q: jax.Array, kv: PagedKV, num_seqs: int, max_q_len: int, explicit: MosaicGpuTiles | None
) -> MosaicGpuTiles:
    """Returns explicit tiles, else measured ones, else the heuristic's."""
    case = case_name(q, kv, num_seqs, max_q_len)
    guess = functools.partial(next, candidates(q, kv, max_q_len))
    return tiles_lib.choose(OP, target_lib.current(), case, MosaicGpuTiles, explicit, guess)


def candidates(q: jax.Array, kv: PagedKV, max_q_len: int) -> Iterator[MosaicGpuTiles]:
    """Enumerates tiles that fit into shared memory, the most promising first."""
    rows = max_q_len * q.shape[1] // kv.num_kv_heads
    is_prefill = rows > ROWS
    has_registers = is_prefill and q.shape[2] <= 128 and not kv.is_quantized
    blocks = (128, 64) if has_registers else (64, 128)
    bounds = ((4, 24),) if is_prefill else ((4, 24), (4, 12), (8, 48))
    rings = [(2, 2), (1, 2), (1, 1)]  # attending warpgroups, converted blocks
    if kv.is_quantized and q.shape[2] > 128:
        rings = rings[1:]  # four warpgroups leave too few registers for such wide accumulators
    elif is_prefill:
        rings = rings[:1]
    if not kv.is_quantized:
        rings = [ring for ring in rings if ring[1] == 2]
    shapes = itertools.product(blocks, bounds, rings, (6, 4, 2))
    for kv_block, (min_part, max_part), (num_attending, num_converted), num_stages in shapes:
        tiles = MosaicGpuTiles(
            kv_block=kv_block,
            num_stages=num_stages,
            num_converted=num_converted,
            num_attending=num_attending,
            min_part=min_part,
            max_part=max_part,
        )
        room = target_lib.TARGETS["h100"].smem_bytes
        if _fits(kv_block, kv.page_size) and _smem_bytes(tiles, q, kv, is_prefill) <= room:
            yield tiles


def _smem_bytes(tiles: MosaicGpuTiles, q: jax.Array, kv: PagedKV, is_prefill: bool) -> int:
    """Returns an upper estimate of the shared memory of a launch, in bytes."""
    head_dim, block = q.shape[2], tiles.kv_block
    block_bytes = block * head_dim * kv.k_pages.dtype.itemsize
    # 64 rows each: queries, and results if two warpgroups share the rows.
    sets = 3 if tiles.num_attending == 2 and not is_prefill else tiles.num_attending
    total = sets * ROWS * head_dim * 2 + 2 * tiles.num_stages * block_bytes
    if kv.is_quantized:
        total += 2 * tiles.num_converted * block * head_dim * 2 + 2 * tiles.num_stages * block * 4
    return total + (4096 if kv.is_quantized else 2048)  # lse, barriers, alignment


def _num_cores() -> int:
    target = target_lib.current()
    return target.num_cores if target.kind == "gpu" else target_lib.TARGETS["h100"].num_cores


class _Blocks(NamedTuple):
    """KV blocks of each tile, all [tiles]: the first one and their number; the range
    [full_first, full_end) that needs no mask; the tree's first key; keys of the sequence."""

    first: jax.Array
    num: jax.Array
    full_first: jax.Array
    full_end: jax.Array
    tree_start: jax.Array
    kv_len: jax.Array


def _list_blocks(tiles: packing.Tiles, kv_lens: jax.Array, launch: Any) -> _Blocks:
    block, window, is_tree = launch.kv_block, launch.window, launch.tree_words > 0
    kv_len, q_len = kv_lens[tiles.seq], tiles.q_lens[tiles.seq]
    start = kv_len - q_len
    last_token = jnp.minimum(tiles.first_token + tiles.tile_tokens, q_len) - 1
    last = kv_len - 1 if is_tree else start + last_token  # last visible key
    lowest = start - 1 if is_tree else start + tiles.first_token  # position of the first row
    first = jnp.zeros_like(start)
    full_first = jnp.zeros_like(start)
    if window is not None:
        first = jnp.maximum(lowest - window + 1, 0) // block
        full_first = -(-jnp.maximum(last - window + 1, 0) // block)
    end = last // block + 1
    full_end = jnp.maximum(start if is_tree else lowest + 1, 0) // block
    num = jnp.where(tiles.is_live & (kv_len > 0), jnp.maximum(end - first, 0), 0)
    return _Blocks(first, num, full_first, full_end, start, kv_len)


def _list_items(
    tiles: packing.Tiles, blocks: _Blocks, num_kv_heads: int, launch: Any, chosen: MosaicGpuTiles
) -> tuple[jax.Array, jax.Array]:
    """Splits the tiles' blocks into items, the largest first.

    A part has total / wanted blocks, within bounds; parts of a tile are about equal. Example, parts
    of at most 24: a tile of 64 blocks makes parts of 22, 22, 20.

    Returns:
      items i32 [I, ITEM_FIELDS], and num_written i32 [tiles]: partial results that are written.
    """
    from pallas_kernels.paged_attention import mosaic_gpu_kernel as kernel

    num_tiles = tiles.seq.shape[0]
    if launch.num_parts == 1:
        count = (blocks.num > 0).astype(jnp.int32)
        num_items = num_tiles
        size = blocks.num
    else:
        per_wave = -(-_num_cores() // num_kv_heads)
        extra = 4 * per_wave
        total = blocks.num.sum(dtype=jnp.int32)
        size = jnp.clip(-(-total // per_wave), chosen.min_part, chosen.max_part)
        size = jnp.maximum(size, -(-total // extra))
        size = jnp.maximum(size, launch.stride)  # only the last part may leave a warpgroup idle
        count = jnp.minimum(-(-blocks.num // size), launch.num_parts)
        size = -(-blocks.num // jnp.maximum(count, 1))
        count = -(-blocks.num // jnp.maximum(size, 1))
        num_items = min(num_tiles + extra, num_tiles * launch.num_parts)
    ends = jnp.cumsum(count, dtype=jnp.int32)
    index = jnp.arange(num_items, dtype=jnp.int32)
    tile = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    is_live = tile < num_tiles
    tile = jnp.minimum(tile, num_tiles - 1)
    part = index - (ends - count)[tile]
    offset = part * size[tile]
    num = jnp.where(is_live, jnp.minimum(size[tile], blocks.num[tile] - offset), 0)
    first = blocks.first[tile] + offset
    full_first = jnp.clip(blocks.full_first[tile] - first, 0, num)
    full_end = jnp.clip(blocks.full_end[tile] - first, full_first, num)
    fields: list[jax.Array] = [jnp.zeros((), jnp.int32)] * kernel.ITEM_FIELDS
    fields[kernel.TILE], fields[kernel.SEQ], fields[kernel.PART] = tile, tiles.seq[tile], part
    fields[kernel.FIRST_BLOCK], fields[kernel.NUM_BLOCKS] = first, num
    fields[kernel.FULL_FIRST], fields[kernel.FULL_END] = full_first, full_end
    fields[kernel.TREE_START], fields[kernel.KV_LEN] = blocks.tree_start[tile], blocks.kv_len[tile]
    items = jnp.stack([x.astype(jnp.int32) for x in fields], axis=1)
    if not launch.share_keys:
        # Each attending warpgroup writes a part, but only the first one if there is a single block.
        last = blocks.num - (count - 1) * size
        short = jnp.where(last < launch.num_attending, launch.num_attending - last, 0)
        count = jnp.where(count > 0, count * launch.num_attending - short, 0)
    return items[jnp.argsort(-num)], count


def _merge(out: jax.Array, lse: jax.Array, num_written: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges the parts of each tile by their lse: ([tiles, K, R, H], f32 [tiles, K, R])."""
    parts = out.shape[1]
    is_written = jnp.arange(parts, dtype=jnp.int32)[None, :] < num_written[:, None]
    lse = jnp.where(is_written[:, :, None, None], lse, -jnp.inf)
    if parts == 1:
        return jnp.where(is_written[:, :, None, None, None], out, 0)[:, 0], lse[:, 0]
    top = jnp.maximum(lse.max(axis=1), -1e30)
    weight = jnp.exp(lse - top[:, None])
    total = weight.sum(axis=1)
    safe = jnp.where(total > 0, total, 1.0)
    # Unwritten parts may hold anything: they are left out, not multiplied by 0.
    rows = jnp.where(weight[..., None] > 0, out.astype(jnp.float32), 0.0) * weight[..., None]
    merged = (rows.sum(axis=1) / safe[..., None]).astype(out.dtype)
    return merged, jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)


IMPL = Impl("mosaic_gpu", _why_not, run)
