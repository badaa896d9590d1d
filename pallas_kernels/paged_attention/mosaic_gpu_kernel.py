"""The Hopper kernel of paged attention: packed query tiles against pages of one KV head.

`mosaic_gpu.py` packs query rows into tiles and makes the work list. One thread block processes one
item, a range of KV blocks for one tile and one KV head, with these warpgroups:

    copy      pages -> shared memory (TMA, a ring of stages)
    convert   8-bit pages -> f16, scaled (only when pages are quantized; a second ring)
    attend    1 or 2: q k^T and p v on the tensor cores (wgmma), online softmax between them

Two attending warpgroups either read the same keys (each has 64 rows of the tile) or have the same
rows (they alternate in the KV blocks and write a partial result each).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.paged_attention import mosaic_gpu_block as block_maths
from pallas_kernels.paged_attention.base import PagedKV

# Columns of the work list, i32 each.
TILE, SEQ, PART, FIRST_BLOCK, NUM_BLOCKS, FULL_FIRST, FULL_END, TREE_START, KV_LEN = range(9)
ITEM_FIELDS = 9

ROWS = 64  # rows of a tile per warpgroup: the M of wgmma
_LOWEST = -1e30
_LOG2E = math.log2(math.e)
_LN2 = math.log(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """The static settings of a launch.

    Attributes:
      num_attending: warpgroups that compute, 1 or 2.
      share_keys: each has its own 64 rows; else each takes every other KV block.
      kv_block: keys per step, 64 or 128; divides the page size or is a multiple of it.
      num_stages: stages of the ring that TMA fills.
      num_converted: slots of the ring of converted blocks.
      num_parts: partial results a tile may have (before `share_keys=False` doubles them).
    """

    num_attending: int
    share_keys: bool
    kv_block: int
    num_stages: int
    num_converted: int
    num_parts: int
    sm_scale: float
    soft_cap: float | None
    window: int | None
    tree_words: int

    @property
    def tile_rows(self) -> int:
        return ROWS * (self.num_attending if self.share_keys else 1)

    @property
    def partials(self) -> int:
        return self.num_parts * (1 if self.share_keys else self.num_attending)

    def registers(self, is_quantized: bool) -> dict[str, int]:
        """Returns the registers per thread of each role, in multiples of 8.

        Every thread starts with 65536 / threads. A role that asks for more waits until others have
        released enough, so the sum over warpgroups must stay within 512.
        """
        copy, convert = 40, 104 if self.num_attending == 2 else 160
        rest = 504 - copy - (convert if is_quantized else 0)
        attend = min(240, rest // self.num_attending // 8 * 8)
        return {"copy": copy, "convert": convert, "attend": attend}

    @property
    def stride(self) -> int:
        """Distance in blocks between two steps of an attending warpgroup."""
        return 1 if self.share_keys else self.num_attending


def attend_tiles(
    items: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    tree: jax.Array | None,
    q: jax.Array,
    kv: PagedKV,
    launch: Launch,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      items: i32 [I, ITEM_FIELDS], the work list; an item without blocks does nothing.
      page_table: i32 [S, M].
      positions, tree: per row, see `packing.Packed`.
      q: [tiles, K, R, H] with R a multiple of 8, at most tile_rows; f16 for quantized pages.
      kv: the pages.
      launch: static settings.

    Returns:
      out [tiles, partials, K, R, H] in q's dtype and lse f32 [tiles, partials, K, R]; parts that no
      item writes are uninitialized.
    """
    num_tiles, num_kv_heads, num_rows, head_dim = q.shape
    parts = (num_tiles, launch.partials, num_kv_heads, num_rows)
    inputs = [items, page_table, positions, q, kv.k_pages, kv.v_pages]
    if kv.k_scale is not None and kv.v_scale is not None:
        inputs += [kv.k_scale, kv.v_scale]
    if tree is not None:
        inputs += [tree]
    roles = launch.num_attending + 1 + int(kv.is_quantized)
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            launch=launch,
            is_quantized=kv.is_quantized,
            has_scales=kv.k_scale is not None,
            has_tree=tree is not None,
        ),
        out_type=(
            jax.ShapeDtypeStruct((*parts, head_dim), q.dtype),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ),
        scratch_types=_scratch(q, kv, launch),
        grid=(items.shape[0], num_kv_heads),
        grid_names=("item", "head"),
        num_threads=roles,
        thread_name="role",
        compiler_params=compat.gpu_compiler_params(approx_math=True, reduction_scratch_bytes=0),
        interpret=compat.gpu_interpret_params() or None,
        kernel_name="paged_attention",
    )
    return kernel(*inputs)


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory in the tiling that wgmma and TMA read without bank conflicts."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if shape[-1] * itemsize % s == 0)
    tiling = (8, swizzle // itemsize)
    transforms = (plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _scratch(q: jax.Array, kv: PagedKV, launch: Launch) -> dict[str, Any]:
    block, stages, head_dim = launch.kv_block, launch.num_stages, q.shape[-1]
    attending = launch.num_attending
    copies = max(1, block // kv.page_size)
    sharing = attending if launch.share_keys else 1
    scratch: dict[str, Any] = dict(
        q_s=_tiled((launch.tile_rows // ROWS, ROWS, head_dim), q.dtype),
        lse_s=plgpu.SMEM((attending, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=launch.tile_rows // ROWS),
        turn=plgpu.Barrier(num_arrivals=attending),
    )
    if launch.share_keys and attending == 2 and not kv.is_quantized:
        scratch["cleared"] = plgpu.Barrier()
    if not launch.share_keys:  # else each warpgroup's result overwrites its queries
        scratch["o_s"] = _tiled((attending, ROWS, head_dim), q.dtype)
    if compat.is_interpreting():  # the simulator has no wgmma operands in registers
        scratch["p_s"] = _tiled((attending, ROWS, block), q.dtype)
    for x in "kv":
        scratch[f"{x}_s"] = _tiled((stages, block, head_dim), kv.k_pages.dtype)
        scratch[f"{x}_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        scratch[f"{x}_free"] = plgpu.Barrier(num_arrivals=sharing, num_barriers=stages)
    if not kv.is_quantized:
        return scratch
    for x in "kv":
        scales = 1 if kv.k_scale is None else 2  # copies a page
        scratch[f"raw_{x}_full"] = plgpu.Barrier(num_arrivals=scales * copies, num_barriers=stages)
        scratch[f"raw_{x}_free"] = plgpu.Barrier(num_barriers=stages)
        scratch[f"raw_{x}_s"] = scratch[f"{x}_s"]
        if kv.k_scale is not None:
            scratch[f"{x}_scale_s"] = plgpu.SMEM((stages, block), jnp.float32)
        slots = launch.num_converted
        scratch[f"{x}_s"] = _tiled((slots, block, head_dim), q.dtype)
        scratch[f"{x}_full"] = plgpu.Barrier(num_barriers=slots)
        scratch[f"{x}_free"] = plgpu.Barrier(num_arrivals=sharing, num_barriers=slots)
    return scratch


def _kernel(
    items_g: Any,
    table_g: Any,
    positions_g: Any,
    q_g: Any,
    k_g: Any,
    v_g: Any,
    *refs: Any,
    launch: Launch,
    is_quantized: bool,
    has_scales: bool,
    has_tree: bool,
    **scratch: Any,
) -> None:
    rest = list(refs)
    k_scale_g, v_scale_g = (rest.pop(0), rest.pop(0)) if has_scales else (None, None)
    tree_g = rest.pop(0) if has_tree else None
    o_g, lse_g = rest
    item, role = lax.axis_index("item"), lax.axis_index("role")
    num_blocks = items_g[item, NUM_BLOCKS]
    attending = launch.num_attending
    registers = launch.registers(is_quantized)

    def attend() -> None:
        plgpu.set_max_registers(registers["attend"], action="increase")
        _attend_role(items_g, positions_g, tree_g, o_g, lse_g, launch, scratch)

    def copy() -> None:
        plgpu.set_max_registers(registers["copy"], action="decrease")
        pages = {"k": (k_g, k_scale_g), "v": (v_g, v_scale_g)}
        _copy_role(items_g, table_g, q_g, pages, launch, scratch, is_quantized)

    def convert() -> None:
        plgpu.set_max_registers(registers["convert"], action="decrease")
        num_keys = items_g[item, KV_LEN] - items_g[item, FIRST_BLOCK] * launch.kv_block
        _convert_role(num_blocks, num_keys, launch, scratch, has_scales)

    def serve() -> None:
        lax.cond(role == attending, copy, convert) if is_quantized else copy()

    # One chain of branches: only then does ptxas allocate registers per role.
    pl.when(num_blocks > 0)(lambda: lax.cond(role < attending, attend, serve))


def _copy_role(
    items_g: Any,
    table_g: Any,
    q_g: Any,
    pages: dict[str, Any],
    launch: Launch,
    scratch: dict[str, Any],
    is_quantized: bool,
) -> None:
    """Fills the ring with the item's KV blocks."""
    item, head = lax.axis_index("item"), lax.axis_index("head")
    tile, seq = items_g[item, TILE], items_g[item, SEQ]
    first, num_blocks = items_g[item, FIRST_BLOCK], items_g[item, NUM_BLOCKS]
    page_size, block, stages = pages["k"][0].shape[2], launch.kv_block, launch.num_stages
    max_pages = table_g.shape[1]
    prefix = "raw_" if is_quantized else ""

    num_rows = q_g.shape[2]
    q_s, q_full = scratch["q_s"], scratch["q_full"]
    for i in range(-(-num_rows // ROWS)):
        rows = min(ROWS, num_rows - i * ROWS)
        plgpu.copy_gmem_to_smem(
            q_g.at[tile, head, pl.ds(i * ROWS, rows)], q_s.at[i, pl.ds(0, rows)], q_full
        )

    def places(b: jax.Array) -> list[tuple[Any, Any, Any]]:
        """(page, rows in the page, rows in the block) of the copies that make up block b."""
        b = first + b
        if page_size >= block:
            blocks = page_size // block
            page = table_g[seq, lax.div(b, jnp.int32(blocks))]
            start = pl.multiple_of(lax.rem(b, jnp.int32(blocks)) * block, block)
            return [(page, pl.ds(start, block), pl.ds(0, block))]
        count = block // page_size
        # The last block may reach past the table: any page will do there, its keys are masked.
        ids = [jnp.minimum(b * count + i, max_pages - 1) for i in range(count)]
        return [
            (table_g[seq, j], pl.ds(0, page_size), pl.ds(i * page_size, page_size))
            for i, j in enumerate(ids)
        ]

    # A copy that pads with zeros needs multiples of 128 bytes, which scales of small pages are not.
    mode = plgpu.OOBFillMode["PROMISE_IN_BOUNDS" if page_size % 32 else "ZEROS"]

    def fetch(x: str, where: list[tuple[Any, Any, Any]], slot: Any) -> None:
        pages_g, scale_g = pages[x]
        full = scratch[f"{prefix}{x}_full"].at[slot]
        for page, rows, to in where:
            plgpu.copy_gmem_to_smem(
                pages_g.at[page, head, rows], scratch[f"{prefix}{x}_s"].at[slot, to], full
            )
            if scale_g is not None:
                scales, to = scale_g.at[page, head, rows], scratch[f"{x}_scale_s"].at[slot, to]
                plgpu.copy_gmem_to_smem(scales, to, full, oob_mode=mode)

    for i in range(stages):

        @pl.when(i < num_blocks)
        def _fill(i=i):
            where = places(jnp.int32(i))
            fetch("k", where, i)
            fetch("v", where, i)

    def refill(b: jax.Array, carry: tuple[()]) -> tuple[()]:
        slot = lax.rem(b, jnp.int32(stages))
        where = places(b)  # the page ids load while we wait
        for x in "kv":
            plgpu.barrier_wait(scratch[f"{prefix}{x}_free"].at[slot])
            fetch(x, where, slot)
        return carry

    lax.fori_loop(jnp.int32(stages), num_blocks, refill, ())
    _drain([scratch[f"{prefix}{x}_free"] for x in "kv"], stages, num_blocks)


def _drain(barriers: list[Any], count: int, num_blocks: jax.Array) -> None:
    """Waits for the last phase of each slot: a barrier must not end with a phase not waited for."""
    for i in range(count):

        @pl.when(i < num_blocks)
        def _last(i=i):
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[i])


def _convert_role(
    num_blocks: jax.Array,
    num_keys: jax.Array,
    launch: Launch,
    scratch: dict[str, Any],
    has_scales: bool,
) -> None:
    """Converts 8-bit blocks to 16 bits, times their scales, for the tensor cores.

    V is zeroed from key `num_keys` (counted from the first block) on, in the last block.
    """
    dtype = scratch["k_s"].dtype

    def step(b: jax.Array, carry: tuple[()], *, is_last: bool) -> tuple[()]:
        raw = lax.rem(b, jnp.int32(launch.num_stages))
        slot = lax.rem(b, jnp.int32(launch.num_converted))
        for x in "kv":
            plgpu.barrier_wait(scratch[f"raw_{x}_full"].at[raw])
            block = compat.gpu_load(
                scratch[f"raw_{x}_s"].at[raw], layout=plgpu.Layout.WGMMA_UPCAST_2X
            )
            block = plgpu.layout_cast(block, plgpu.Layout.WGMMA).astype(dtype)
            if has_scales:
                scale = compat.gpu_load(
                    scratch[f"{x}_scale_s"].at[raw], layout=plgpu.Layout.WGMMA.reduce(1)
                )
                block = block * lax.broadcast_in_dim(scale.astype(dtype), block.shape, [0])
            if is_last and x == "v":
                block = block_maths.without_tail(block, num_keys - b * launch.kv_block)
            plgpu.barrier_arrive(scratch[f"raw_{x}_free"].at[raw])

            @pl.when(b >= launch.num_converted)
            def _wait(x=x, slot=slot):
                plgpu.barrier_wait(scratch[f"{x}_free"].at[slot])

            scratch[f"{x}_s"].at[slot][...] = block
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch[f"{x}_full"].at[slot])
        return carry

    last = num_blocks - 1
    lax.fori_loop(0, last, functools.partial(step, is_last=False), ())
    step(last, (), is_last=True)
    _drain([scratch["k_free"], scratch["v_free"]], launch.num_converted, num_blocks)


def _attend_role(
    items_g: Any,
    positions_g: Any,
    tree_g: Any,
    o_g: Any,
    lse_g: Any,
    launch: Launch,
    scratch: dict[str, Any],
) -> None:
    """Computes one warpgroup's share of the item and writes its partial result."""
    item, head, role = lax.axis_index("item"), lax.axis_index("head"), lax.axis_index("role")
    tile, part = items_g[item, TILE], items_g[item, PART]
    first, num_blocks = items_g[item, FIRST_BLOCK], items_g[item, NUM_BLOCKS]
    tree_start, kv_len = items_g[item, TREE_START], items_g[item, KV_LEN]
    q_s, head_dim = scratch["q_s"], scratch["q_s"].shape[-1]
    block, stride = launch.kv_block, launch.stride
    row_set = role if launch.share_keys else 0
    stages = scratch["k_s"].shape[0]
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    rows = pl.ds(row_set * ROWS, ROWS)
    load = functools.partial(compat.gpu_load, layout=row_layout, optimized=False)
    position = load(positions_g.at[tile, rows])
    words = [load(tree_g.at[tile, w, rows]) for w in range(launch.tree_words)]

    def take_turn() -> None:
        """Alternates: one warpgroup computes its softmax while the other uses the tensor cores."""
        if launch.share_keys and launch.num_attending == 2:
            plgpu.barrier_arrive(scratch["turn"])
            plgpu.barrier_wait(scratch["turn"])

    def clear(b: jax.Array, slot: jax.Array) -> None:
        """Zeroes V past the end of the sequence: it may be NaN there, and 0 * NaN is NaN."""
        num_keys = kv_len - (first + b) * block
        values = scratch["v_s"].at[slot]

        def clear_and_tell() -> None:
            block_maths.clear_tail(values, num_keys)
            plgpu.barrier_arrive(scratch["cleared"])

        @pl.when(num_keys < block)
        def _tail():
            if launch.share_keys and launch.num_attending == 2:
                lax.cond(role == 0, clear_and_tell, lambda: plgpu.barrier_wait(scratch["cleared"]))
            else:
                block_maths.clear_tail(values, num_keys)

    def step(b: jax.Array, carry: Any, *, is_masked: bool, may_end: bool) -> Any:
        acc, top, total = carry
        slot = lax.rem(b, jnp.int32(stages))
        wait_for_v = functools.partial(plgpu.barrier_wait, scratch["v_full"].at[slot])
        clears = may_end and "raw_v_s" not in scratch  # else the converting warpgroup clears
        plgpu.barrier_wait(scratch["k_full"].at[slot])
        if clears:  # before the logits occupy registers
            wait_for_v()
            clear(b, slot)

        def qk(s_ref: Any) -> jax.Array:
            plgpu.wgmma(s_ref, q_s.at[row_set], scratch["k_s"].at[slot].T)
            take_turn()
            return s_ref[...]

        s = pl.run_scoped(qk, plgpu.ACC((ROWS, block), jnp.float32))
        plgpu.barrier_arrive(scratch["k_free"].at[slot])
        factor = launch.sm_scale * _LOG2E
        if launch.soft_cap is not None:
            cap = launch.soft_cap  # tanh by exp2: the hardware's tanh has only 11 bits
            s = cap - (2 * cap) / (jnp.exp2(s * (2 * factor / cap)) + 1.0)
            factor = _LOG2E
        if is_masked:
            visible = block_maths.mask(
                (first + b) * block, s.shape, position, words, tree_start, launch.window
            )
            s = jnp.where(visible, s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(axis=1) * factor)
        alpha = jnp.exp2(top - new_top)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(new_top, s.shape, [0]))
        acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
        total = total * alpha + p.sum(axis=1)
        p = p.astype(q_s.dtype)
        if launch.share_keys and launch.num_attending == 2:
            if not compat.is_interpreting():
                acc, total, new_top, p = lax.optimization_barrier((acc, total, new_top, p))
            plgpu.barrier_arrive(scratch["turn"])
            if not clears:
                wait_for_v()
            plgpu.barrier_wait(scratch["turn"])
        elif not clears:
            wait_for_v()
        acc = block_maths.multiply_add(acc, p, scratch["v_s"].at[slot], scratch.get("p_s"))
        plgpu.barrier_arrive(scratch["v_free"].at[slot])
        return acc, new_top, total

    plgpu.barrier_wait(scratch["q_full"])
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA)
    top = plgpu.layout_cast(jnp.full((ROWS,), _LOWEST, jnp.float32), row_layout)
    carry = (zeros, top, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout))
    masked = functools.partial(step, is_masked=True, may_end=True)
    if launch.share_keys:
        full_first, full_end = items_g[item, FULL_FIRST], items_g[item, FULL_END]
        inner = functools.partial(step, is_masked=False, may_end=False)
        pl.when(role == 1)(take_turn)
        if launch.window is not None:
            carry = lax.fori_loop(0, full_first, masked, carry)
        else:
            full_first = jnp.int32(0)
        carry = lax.fori_loop(full_first, full_end, inner, carry)
        carry = lax.fori_loop(full_end, num_blocks, masked, carry)
        pl.when(role == 0)(take_turn)
        mine = num_blocks
    else:
        mine = lax.div(num_blocks + (stride - 1) - role, jnp.int32(stride))
        last = jnp.maximum(mine - 1, 0)
        inner = functools.partial(step, is_masked=True, may_end=False)
        carry = lax.fori_loop(0, last, lambda i, c: inner(i * stride + role, c), carry)
        carry = lax.fori_loop(last, mine, lambda i, c: masked(i * stride + role, c), carry)

    acc, top, total = carry

    @pl.when(mine > 0)
    def _write():
        is_seen = total > 0
        inverse = jnp.where(is_seen, 1.0 / total, 0.0)
        o_s = (q_s if launch.share_keys else scratch["o_s"]).at[role]
        lse_s = scratch["lse_s"].at[role]
        o_s[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(o_g.dtype)
        lse_s[...] = jnp.where(is_seen, top * _LN2 + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        num_rows = min(ROWS, o_g.shape[3])
        if launch.share_keys:
            where = (tile, part, head, pl.ds(role * ROWS, num_rows))
        else:
            where = (tile, part * launch.num_attending + role, head, pl.ds(0, num_rows))
        plgpu.copy_smem_to_gmem(o_s.at[pl.ds(0, num_rows)], o_g.at[where])
        plgpu.copy_smem_to_gmem(lse_s.at[pl.ds(0, num_rows)], lse_g.at[where])
        plgpu.wait_smem_to_gmem(0)
