"""Paged attention on TPU: one tile of query rows after the other, pages copied ahead of their use.

A grid step processes a tile of one sequence for all KV heads. A page holds all heads contiguously,
so one copy brings a page of K for every head. While one block of pages is computed the next is
copied, even across tiles.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels import target as target_lib
from pallas_kernels import tiles as tiles_lib
from pallas_kernels.dispatch import Impl
from pallas_kernels.paged_attention import packing
from pallas_kernels.paged_attention.base import AttentionSpec, PagedKV
from pallas_kernels.target import Target

OP = "paged_attention.mosaic_tpu"  # name in the tables of measured tiles
# Rows of the work list, i32 [4, tiles]; a transposed list wastes no scalar memory on padding.
_SEQ, _FIRST, _NUM, _LEN = range(4)
_LANES = 128
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicTpuTiles:
    """Tiles of the TPU kernel.

    Attributes:
      kv_block: keys per step, rounded to whole pages.
      q_rows: query rows per tile and KV head.
      vmem_limit_bytes: most VMEM of the kernel; None: three quarters of the core's.
    """

    kv_block: int = 512
    q_rows: int = 256
    vmem_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.kv_block < 1 or self.q_rows < 1:
            raise ValueError(
                "MosaicTpuTiles: kv_block and q_rows must be at least 1, got "
                f"{self.kv_block} and {self.q_rows}"
            )


def _why_not(target: Target, *args: Any) -> str | None:
    q, kv, *_, spec = args
    if compat.is_interpreting():
        if reason := compat.why_not_interpret("tpu"):
            return reason
    elif target.kind != "tpu":
        return f"needs a TPU, the target is {target.name}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q must be bf16 or f32, got {q.dtype}"
    if kv.is_packed:
        return "only the xla backend reads int4 kv pages"
    if not kv.is_quantized and kv.k_pages.dtype != q.dtype:
        return (
            f"kv pages must be {q.dtype} as q is, or float8_e4m3fn or int8, got {kv.k_pages.dtype}"
        )
    if q.shape[2] % _LANES and not compat.is_interpreting():
        return (
            f"pages must be a multiple of 128 wide, else XLA copies the pool, got {q.shape[2]}; "
            f"make them {_round_up(q.shape[2], _LANES)} wide, with zeros in the rest"
        )
    multiple = _LANES if kv.k_scale is not None else _sublanes(kv.k_pages.dtype)
    if kv.page_size % multiple:
        return f"page size must be a multiple of {multiple} for these pages, got {kv.page_size}"
    if spec.config is not None and not isinstance(spec.config, MosaicTpuTiles):
        return f"config must be MosaicTpuTiles, got {type(spec.config).__name__}"
    return None


def _sublanes(dtype: Any) -> int:
    """Rows of a vector register: 8 of 32 bits, 16 of 16, 32 of 8."""
    return 32 // jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Launch:
    """The static settings of a launch; `pages` is the number of pages per block."""

    pages: int
    page_size: int
    tree_words: int
    is_quantized: bool
    has_scales: bool
    spec: AttentionSpec


def run(
    q: jax.Array,
    kv: PagedKV,
    kv_lens: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    tree_mask: jax.Array | None,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [T, N, H], lse f32 [T, N], zeros unless asked for); see the op."""
    call = (q, kv, kv_lens, page_table, q_starts, tree_mask, spec)
    q_lens = q_starts[1:] - q_starts[:-1]
    if spec.max_q_len * (q.shape[1] // kv.num_kv_heads) <= _LANES:
        return _run_tiles(*call, q_lens=q_lens, max_q_len=spec.max_q_len)
    # Decoding sequences are computed separately: their tiles hold the rows of one token.
    out, lse = _run_tiles(*call, q_lens=jnp.where(q_lens > 1, q_lens, 0), max_q_len=spec.max_q_len)
    is_one = q_lens == 1
    # Decodes run last, so that their result [T, N, H] takes no memory while chunks need most.
    q, out, lse = lax.optimization_barrier((q, out, lse))
    decoded, decoded_lse = _run_tiles(q, *call[1:], q_lens=is_one.astype(jnp.int32), max_q_len=1)
    # Each token is in at most one of the two, and zero in the other.
    token = jnp.arange(q.shape[0], dtype=jnp.int32)
    seq = jnp.searchsorted(q_starts[1:], token, side="right", method="compare_all")
    is_decoded = is_one[jnp.minimum(seq, is_one.shape[0] - 1)] & (seq < is_one.shape[0])
    return (
        jnp.where(is_decoded[:, None, None], decoded, out),
        jnp.where(is_decoded[:, None], decoded_lse, lse),
    )


def _run_tiles(
    q: jax.Array,
    kv: PagedKV,
    kv_lens: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    tree_mask: jax.Array | None,
    spec: AttentionSpec,
    *,
    q_lens: jax.Array,
    max_q_len: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes the sequences with tokens in q_lens, max_q_len at most; zeros for the others."""
    chosen = choose_tiles(q, kv, max_q_len, spec.config)
    group = q.shape[1] // kv.num_kv_heads
    tiles = packing.list_tiles(q_lens, max_q_len, q.shape[0], max(1, chosen.q_rows // group))
    rows = _round_up(tiles.tile_tokens * group, _sublanes(q.dtype))
    packed = packing.pack(
        *(q, kv.num_kv_heads, kv_lens, q_starts, tree_mask, tiles), num_rows=rows, tile_rows=rows
    )
    launch = _Launch(
        pages=max(1, min(chosen.kv_block // kv.page_size, page_table.shape[1])),
        page_size=kv.page_size,
        tree_words=0 if tree_mask is None else tree_mask.shape[1],
        is_quantized=kv.is_quantized,
        has_scales=kv.k_scale is not None,
        spec=spec,
    )
    work = _list_work(tiles, kv_lens, launch)
    limit = chosen.vmem_limit_bytes or _vmem_limit()
    starts = packing.first_nodes(tiles, kv_lens)
    out, lse = _attend_tiles(work, page_table, starts, packed, kv, launch, limit)
    return packing.unpack(out, lse, q_starts, tiles, q.shape[0], group)


def case_name(q: jax.Array, kv: PagedKV, max_q_len: int) -> str:
    """Returns the key of the measured tiles: "Q1 N32 K8 H128 B64 bfloat16"."""
    _, num_heads, head_dim = q.shape
    longest = min(256, 1 << (max_q_len - 1).bit_length())
    heads = f"N{num_heads} K{kv.num_kv_heads} H{head_dim}"
    return f"Q{longest} {heads} B{kv.page_size} {kv.k_pages.dtype}"


def choose_tiles(
    q: jax.Array, kv: PagedKV, max_q_len: int, explicit: MosaicTpuTiles | None
) -> MosaicTpuTiles:
    """Returns explicit tiles, else measured ones, else the heuristic's."""
    case = case_name(q, kv, max_q_len)
    guess = functools.partial(_heuristic, q, kv)
    return tiles_lib.choose(OP, target_lib.current(), case, MosaicTpuTiles, explicit, guess)


def candidates(q: jax.Array, kv: PagedKV) -> Iterator[MosaicTpuTiles]:
    """Enumerates tiles to measure, the heuristic's first."""
    first = _heuristic(q, kv)
    yield first
    for kv_block, q_rows in itertools.product((256, 512, 1024, 2048), (64, 128, 256)):
        tiles = MosaicTpuTiles(kv_block=kv_block, q_rows=q_rows)
        if tiles != first and kv_block % kv.page_size == 0:
            yield tiles


def _heuristic(q: jax.Array, kv: PagedKV) -> MosaicTpuTiles:
    """Returns tiles if none were measured: blocks of about a megabyte of K."""
    row_bytes = kv.num_kv_heads * _round_up(q.shape[2], _LANES) * kv.k_pages.dtype.itemsize
    kv_block = max(_LANES, min(1024, (1 << 20) // row_bytes // _LANES * _LANES))
    # The accumulators of all heads must fit beside the pages: rows * K * H * 4 bytes * about 4.
    q_rows = (4 << 20) // (kv.num_kv_heads * _round_up(q.shape[2], _LANES) * 4)
    return MosaicTpuTiles(kv_block=kv_block, q_rows=max(16, min(256, q_rows // 16 * 16)))


def _vmem_limit() -> int:
    target = target_lib.current()
    return (target if target.kind == "tpu" else target_lib.TARGETS["tpu7x"]).smem_bytes // 4 * 3


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _list_work(tiles: packing.Tiles, kv_lens: jax.Array, launch: _Launch) -> jax.Array:
    """Returns i32 [4, tiles]: sequence, first block, number of blocks, keys."""
    block, window = launch.pages * launch.page_size, launch.spec.sliding_window
    kv_len, q_len = kv_lens[tiles.seq], tiles.q_lens[tiles.seq]
    start = kv_len - q_len
    if launch.tree_words:
        last, lowest = kv_len - 1, start - 1
    else:
        last = start + jnp.minimum(tiles.first_token + tiles.tile_tokens, q_len) - 1
        lowest = start + tiles.first_token
    first = jnp.zeros_like(start)
    if window is not None:
        first = jnp.maximum(lowest - window + 1, 0) // block
    # A live tile has a block even if it sees no key: a tile's last block starts the next copies.
    num = jnp.where(tiles.is_live, jnp.maximum(last // block + 1 - first, 1), 0)
    return jnp.stack([tiles.seq, first, num, kv_len]).astype(jnp.int32)


def _attend_tiles(
    work: jax.Array,
    page_table: jax.Array,
    tree_starts: jax.Array,
    packed: packing.Packed,
    kv: PagedKV,
    launch: _Launch,
    vmem_limit_bytes: int,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel: ([tiles, K, rows, H], f32 [tiles, K, rows])."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    num_tiles, num_kv_heads, rows, head_dim = packed.q.shape
    page = (launch.pages, num_kv_heads, launch.page_size)
    dtype = kv.k_pages.dtype

    def per_tile(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda i, *_: (i,) + (0,) * len(shape))

    in_specs = [per_tile(num_kv_heads, rows, head_dim), per_tile(rows, _LANES)]
    # The lanes of a row hold the inputs of its mask: its position, the start of its tree, and the
    # words of its tree.
    info = [packed.positions]
    if packed.words is not None:
        words = lax.bitcast_convert_type(packed.words, jnp.int32)
        info += [jnp.broadcast_to(tree_starts[:, None], packed.positions.shape)]
        info += [words[:, w] for w in range(launch.tree_words)]
    lanes = jnp.stack(info, axis=-1)
    lanes = jnp.pad(lanes, ((0, 0), (0, 0), (0, _LANES - lanes.shape[-1])))
    inputs = [packed.q, lanes, kv.k_pages, kv.v_pages]
    scratch: dict[str, Any] = {
        "k_buf": pltpu.VMEM((2, *page, head_dim), dtype),
        "v_buf": pltpu.VMEM((2, *page, head_dim), dtype),
        "top": pltpu.VMEM((num_kv_heads, rows, _LANES), jnp.float32),
        "total": pltpu.VMEM((num_kv_heads, rows, _LANES), jnp.float32),
        "acc": pltpu.VMEM((num_kv_heads, rows, head_dim), jnp.float32),
        "sems": pltpu.SemaphoreType.DMA((2,)),
        "next_slot": pltpu.SMEM((1,), jnp.int32),
    }
    if kv.k_scale is not None and kv.v_scale is not None:
        inputs += [kv.k_scale, kv.v_scale]
        scratch["k_scale_buf"] = pltpu.VMEM((2, *page), jnp.float32)
        scratch["v_scale_buf"] = pltpu.VMEM((2, *page), jnp.float32)
    in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * (len(inputs) - 2)
    out_shape = [jax.ShapeDtypeStruct(packed.q.shape, packed.q.dtype)]
    out_specs = [per_tile(num_kv_heads, rows, head_dim)]
    if launch.spec.return_lse:
        out_shape += [jax.ShapeDtypeStruct((num_tiles, num_kv_heads, rows, _LANES), jnp.float32)]
        out_specs += [per_tile(num_kv_heads, rows, _LANES)]
    out, *lse = pl.pallas_call(
        functools.partial(_kernel, launch=launch, names=tuple(scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_tiles,),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes
        ),
        interpret=compat.tpu_interpret_params(),
        name="paged_attention",
    )(work, page_table, *inputs)
    return out, lse[0][..., 0] if lse else jnp.zeros(out.shape[:3], jnp.float32)


def _kernel(
    work: Any, table: Any, q_ref: Any, lanes_ref: Any, *refs: Any, launch: _Launch, names: Any
):
    from jax.experimental import pallas as pl

    rest = list(refs)
    num_hbm = 4 if launch.has_scales else 2
    hbm, rest = rest[:num_hbm], rest[num_hbm:]
    out_ref, rest = rest[0], rest[1:]
    lse_ref = rest.pop(0) if launch.spec.return_lse else None
    buffers: dict[str, Any] = dict(zip(names, rest, strict=True))
    page_size = launch.page_size
    block = launch.pages * page_size
    i, num_tiles = pl.program_id(0), pl.num_programs(0)
    num_blocks, first, kv_len = work[_NUM, i], work[_FIRST, i], work[_LEN, i]
    copies = _Copies(work, table, hbm, buffers, launch)
    next_slot = buffers["next_slot"]

    @pl.when(i == 0)
    def _first_tile():
        next_slot[0] = 0

        @pl.when(num_blocks > 0)
        def _start():
            copies.start(0, 0, 0)

    top, total, acc = buffers["top"], buffers["total"], buffers["acc"]
    top[...] = jnp.full_like(top, _LOWEST)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)
    base, zero = next_slot[0], jnp.int32(0)  # loops count in int32, under jax_enable_x64 too

    def step(b: jax.Array, carry: Any) -> Any:
        slot = lax.rem(base + b, jnp.int32(2))
        is_last = b + 1 == num_blocks
        # The block after this one is the next of this tile, or the first of the next tile.
        ahead = jnp.where(is_last, jnp.minimum(i + 1, num_tiles - 1), i)
        has_ahead = jnp.where(is_last, (i + 1 < num_tiles) & (work[_NUM, ahead] > 0), True)

        @pl.when(has_ahead)
        def _prefetch():
            copies.start(ahead, jnp.where(is_last, 0, b + 1), 1 - slot)

        copies.wait(i, b, slot)
        start = (first + b) * block
        # Slots past the end may hold anything, and 0 * NaN is NaN.
        pl.when(start + block > kv_len)(lambda: _clear_tail(buffers["v_buf"], slot, kv_len - start))
        keys = lax.broadcasted_iota(jnp.int32, (q_ref.shape[2], block), 1) + start
        visible = _mask(keys, lanes_ref, kv_len, launch)

        def one_head(h: Any, c: Any) -> Any:
            _attend(h, slot, visible, q_ref, buffers, launch)
            return c

        if q_ref.shape[1] <= 8:
            for h in range(q_ref.shape[1]):
                one_head(h, 0)
        else:
            lax.fori_loop(zero, jnp.int32(q_ref.shape[1]), one_head, zero)
        return carry

    lax.fori_loop(zero, num_blocks, step, zero)
    next_slot[0] = lax.rem(base + num_blocks, jnp.int32(2))
    sums = total[...]
    is_seen = sums > 0
    safe = jnp.where(is_seen, sums, 1.0)
    out_ref[0] = (acc[...] / safe[..., :1]).astype(out_ref.dtype)
    if lse_ref is not None:
        lse_ref[0] = jnp.where(is_seen, top[...] + jnp.log(safe), -jnp.inf)


class _Copies:
    """The copies of one block of pages into a buffer, started and awaited together."""

    def __init__(
        self, work: Any, table: Any, hbm: list[Any], buffers: dict[str, Any], launch: _Launch
    ):
        self.work, self.table, self.launch = work, table, launch
        self.sems = buffers["sems"]
        names = ("k_buf", "v_buf", "k_scale_buf", "v_scale_buf")[: len(hbm)]
        self.pairs = [(source, buffers[name]) for source, name in zip(hbm, names)]

    def _each(self, tile: Any, b: Any, slot: Any, act: Any) -> None:
        from jax.experimental.pallas import tpu as pltpu

        pages, page_size = self.launch.pages, self.launch.page_size
        first_page = (self.work[_FIRST, tile] + b) * pages
        end = (self.work[_LEN, tile] + (page_size - 1)) // page_size
        seq = self.work[_SEQ, tile]

        def one(p: jax.Array, carry: Any) -> Any:
            page = self.table[seq, first_page + p]
            for source, buffer in self.pairs:
                act(pltpu.make_async_copy(source.at[page], buffer.at[slot, p], self.sems.at[slot]))
            return carry

        lax.fori_loop(jnp.int32(0), jnp.clip(end - first_page, 0, pages), one, jnp.int32(0))

    def start(self, tile: Any, b: Any, slot: Any) -> None:
        self._each(tile, b, slot, lambda copy: copy.start())

    def wait(self, tile: Any, b: Any, slot: Any) -> None:
        self._each(tile, b, slot, lambda copy: copy.wait())


def _clear_tail(v_buf: Any, slot: Any, num_keys: jax.Array) -> None:
    """Zeroes the slots of a block from `num_keys` on."""
    _, pages, _, page_size, _ = v_buf.shape
    for p in range(pages):
        values = v_buf[slot, p]  # [K, B, H]
        places = lax.broadcasted_iota(jnp.int32, values.shape, 1) + p * page_size
        kept = jnp.where(places < num_keys, values.astype(jnp.float32), 0.0)
        v_buf[slot, p] = kept.astype(v_buf.dtype)


def _attend(
    h: Any, slot: Any, visible: jax.Array, q_ref: Any, buffers: dict[str, Any], launch: _Launch
) -> None:
    """Adds one block of one head to the online softmax."""
    spec, block = launch.spec, launch.pages * launch.page_size
    dtype = q_ref.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = functools.partial(
        lax.dot_general, preferred_element_type=jnp.float32, precision=precision
    )

    def load(name: str) -> jax.Array:
        x = buffers[name][slot, :, h].reshape(block, q_ref.shape[3])
        return x.astype(jnp.float32).astype(dtype) if launch.is_quantized else x

    def scale(name: str) -> jax.Array:
        """[1, block]: one number for each key."""
        return jnp.concatenate(
            [buffers[name][slot, p, pl_ds(h), :] for p in range(launch.pages)], axis=1
        )

    def pl_ds(h: Any) -> Any:
        from jax.experimental import pallas as pl

        return pl.ds(h, 1)

    s = dot(q_ref[0, h], load("k_buf"), (((1,), (1,)), ((), ()))) * spec.sm_scale  # [rows, keys]
    if launch.has_scales:
        s = s * scale("k_scale_buf")
    if spec.soft_cap is not None:
        s = spec.soft_cap * jnp.tanh(s / spec.soft_cap)
    s = jnp.where(visible, s, -jnp.inf)
    top, total, acc = buffers["top"], buffers["total"], buffers["acc"]
    old_top = top[h]  # [rows, lanes], all lanes alike
    new_top = jnp.maximum(old_top, s.max(axis=1, keepdims=True))
    alpha = jnp.exp(old_top - new_top)
    p = jnp.exp(s - new_top[:, :1])
    total[h] = total[h] * alpha + p.sum(axis=1, keepdims=True)
    top[h] = new_top
    if launch.has_scales:
        p = jnp.where(visible, p * scale("v_scale_buf"), 0.0)
    pv = dot(p.astype(dtype), load("v_buf"), (((1,), (0,)), ((), ())))
    acc[h] = acc[h] * alpha[:, :1] + pv


def _mask(keys: jax.Array, lanes_ref: Any, kv_len: jax.Array, launch: _Launch) -> jax.Array:
    """Tells which keys [rows, block] each row sees."""
    window = launch.spec.sliding_window
    position = lanes_ref[0, :, 0:1]  # [rows, 1]
    in_window = True if window is None else keys > position - window
    if not launch.tree_words:
        return (keys <= position) & in_window
    nodes = keys - lanes_ref[0, :, 1:2]
    visible = (nodes < 0) & in_window & (position >= 0)
    for w in range(launch.tree_words):
        word = lanes_ref[0, :, w + 2 : w + 3]
        bit = lax.shift_right_logical(
            jnp.broadcast_to(word, keys.shape), jnp.clip(nodes - 32 * w, 0, 31)
        )
        visible |= (bit & 1 == 1) & (nodes >= 32 * w) & (nodes < 32 * (w + 1))
    return visible & (keys < kv_len)


IMPL = Impl("mosaic_tpu", _why_not, run)
