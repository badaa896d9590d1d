"""The Hopper kernel for products of few rows with a quantized weight; several ops use it.

It computes the transpose, out^T[N, M] = w[N, K] x^T[K, M]: the many outputs fill `wgmma`'s 64 rows,
the few rows of x its columns. One warpgroup copies, the others compute; blocks are persistent and
take equal shares of the k-tiles (`Schedule`). `wgmma` reads weights of x's dtype from shared
memory; codes of another dtype are converted and passed in registers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels import target as target_lib
from pallas_kernels.quant_matmul.schedule import Schedule, num_bits, sum_parts
from pallas_kernels.tiles import QuantMatmulGpuTiles

F32 = jnp.float32
I32 = jnp.int32

# {compute warpgroups: registers per thread of (a compute, the copy) warpgroup}; 65536 per block.
_REGISTERS = {1: (224, 56), 2: (224, 56), 3: (152, 56)}


def _tiled(shape: tuple[int, ...], dtype: Any, columns: int) -> Any:
    """Returns a shared-memory buffer in the tiling that `wgmma` and the copy engine share.

    Its swizzle is the widest whose rows divide `columns` elements.
    """
    row_bytes = columns * num_bits(dtype) // 8
    swizzle = next(s for s in (128, 64, 32) if row_bytes % s == 0)
    transforms = (
        plgpu.TilingTransform((8, swizzle * 8 // num_bits(dtype))),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def persistent_matmul(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    zero: jax.Array | None = None,
    x_scale: jax.Array | None = None,
    group: int,
    sizes: QuantMatmulGpuTiles,
    target: target_lib.Target,
    out_dtype: Any,
) -> jax.Array:
    """Returns y[m, n] = sum_k x[m, k] x_scale[g, m] (w[n, k] - zero[g, n]) w_scale[g, n].

    g = k // group.

    Args:
      x: [M, K] bf16, f16 or e4m3, M up to 8 or a multiple of 8; with x_scale a multiple of 8.
      w: [N, K] codes, or values of x's dtype.
      w_scale: [G, N] bf16 or f32.
      zero: [G, N] bf16 or f32, or None.
      x_scale: [G, M] f32, or None.
      group: K if G is 1.
      sizes: tiles.
      target: the chip, whose cores give the number of blocks.
      out_dtype: dtype of the result.

    Raises:
      ValueError: the group and the tiles do not fit together.
    """
    (num_rows, num_inputs), num_outputs = x.shape, w.shape[0]
    block_m, block_n, block_k, rows = sizes.block_m, sizes.block_n, sizes.block_k, sizes.rows
    step = min(block_k, group)  # inputs whose products share a scale
    if block_k % step or group % step:
        raise ValueError(f"block_k and the group {group} must divide one another, got {sizes}")
    if sizes.scale_weights and x_scale is not None:
        raise ValueError(f"scales of x can only scale products, got {sizes}")
    num_steps = block_k // step
    m_tiles, n_tiles = pl.cdiv(num_rows, block_m), pl.cdiv(num_outputs, block_n)
    k_tiles = pl.cdiv(num_inputs, block_k)
    schedule = Schedule.make(m_tiles * n_tiles, k_tiles, target.num_cores, sizes.splits)
    max_parts = schedule.max_parts
    part_dtype = out_dtype if max_parts == 1 else F32
    is_converting = w.dtype != x.dtype
    is_interpreting = compat.is_interpreting()

    # The arrays of a pipeline stage: name -> (array, its buffer in shared memory).
    stages = sizes.stages
    stage: dict[str, tuple[jax.Array, Any]] = {
        "w": (w, _tiled((stages, block_n, block_k), w.dtype, math.gcd(block_k, num_inputs))),
        "x": (x, _tiled((stages, block_m, block_k), x.dtype, math.gcd(step, num_inputs))),
        "w_scale": (w_scale, plgpu.SMEM((stages, num_steps, block_n), w_scale.dtype)),
    }
    if zero is not None:
        stage["zero"] = (zero, plgpu.SMEM((stages, num_steps, block_n), zero.dtype))
    scale_columns = -(-block_m // 32) * 32  # the copy engine writes multiples of 128 bytes
    if x_scale is not None:
        stage["x_scale"] = (x_scale, plgpu.SMEM((stages, num_steps, scale_columns), x_scale.dtype))
    scratch: dict[str, Any] = {
        "out": _tiled((sizes.warpgroups, block_m, rows), part_dtype, math.gcd(rows, num_outputs)),
        "full": plgpu.Barrier(num_barriers=stages, num_arrivals=len(stage)),
        "empty": plgpu.Barrier(num_barriers=stages, num_arrivals=sizes.warpgroups),
        "smem": {name: buffer for name, (_, buffer) in stage.items()},
    }
    if is_interpreting and is_converting:
        scratch["operand"] = _tiled((sizes.warpgroups, rows, step), x.dtype, step)

    def kernel(*refs: Any, out: Any, full: Any, empty: Any, smem: Any, operand: Any = None) -> None:
        *sources, out_gmem = refs
        gmem = dict(zip(stage, sources, strict=True))
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        start = block * schedule.per_block
        end = jnp.minimum(start + schedule.per_block, schedule.num_tiles * k_tiles)

        def slot_of(i: jax.Array) -> jax.Array:
            return lax.rem(i - start, I32(stages))

        def origin(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Returns the first row of x and first output of a tile; rows vary fastest."""
            return lax.rem(tile, I32(m_tiles)) * block_m, lax.div(tile, I32(m_tiles)) * block_n

        def copy() -> None:
            def fetch(i: jax.Array, slot: Any) -> None:
                m, n = origin(lax.div(i, I32(k_tiles)))
                k = lax.rem(i, I32(k_tiles)) * block_k
                outputs, inputs, x_rows = pl.ds(n, block_n), pl.ds(k, block_k), pl.ds(m, block_m)
                groups = pl.ds(lax.div(k, I32(group)), num_steps)
                boxes = {
                    "w": (outputs, inputs),
                    "x": (x_rows, inputs),
                    "x_scale": (groups, pl.ds(m, scale_columns)),
                }
                for name, source in gmem.items():
                    box = boxes.get(name, (groups, outputs))
                    plgpu.copy_gmem_to_smem(source.at[box], smem[name].at[slot], full.at[slot])

            def fill(i: jax.Array, _: Any) -> Any:
                fetch(i, i - start)
                return ()

            lax.fori_loop(start, jnp.minimum(start + stages, end), fill, ())

            def refill(i: jax.Array, _: Any) -> Any:
                slot = slot_of(i)
                plgpu.barrier_wait(empty.at[slot])
                pl.when(i + stages < end)(functools.partial(fetch, i + stages, slot))
                return ()

            lax.fori_loop(start, end, refill, ())

        def compute() -> None:
            mine = pl.ds(warpgroup * rows, rows)

            def by_output(
                name: str, slot: jax.Array, j: int, columns: int, dtype: Any
            ) -> jax.Array:
                """Loads one number per output and repeats it along `columns`."""
                layout = plgpu.Layout.WGMMA.reduce(1)
                v = compat.gpu_load(smem[name].at[slot, j, mine], layout=layout)
                return lax.broadcast_in_dim(v.astype(dtype), (rows, columns), [0])

            def operands(slot: jax.Array) -> Iterator[tuple[int, Any, Any]]:
                """Yields (j, A [rows, step], B [step, block_m]) for each group of a stage."""
                pieces = [pl.ds(j * step, step) for j in range(num_steps)]
                codes = None
                if is_converting:
                    upcasts = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}
                    ref = smem["w"].at[slot, mine]
                    codes = compat.gpu_load(ref, layout=upcasts[num_bits(w.dtype)])
                    codes = plgpu.layout_cast(codes, plgpu.Layout.WGMMA).astype(x.dtype)
                for j, piece in enumerate(pieces):
                    b = smem["x"].at[slot] if num_steps == 1 else smem["x"].at[slot, :, piece]
                    if codes is None:
                        a = smem["w"].at[slot, mine]
                        a = a if num_steps == 1 else a.at[:, piece]
                    else:
                        a = codes if num_steps == 1 else codes[:, j * step : (j + 1) * step]
                        if zero is not None:
                            a = a - by_output("zero", slot, j, step, x.dtype)
                        if sizes.scale_weights:
                            a = a * by_output("w_scale", slot, j, step, x.dtype)
                    yield j, a, b.T

            def release(slot: Any) -> None:
                """Returns a stage to the copy warpgroup.

                The barrier alone orders this warpgroup's reads before the next copy into the stage
                (CUTLASS's mixed-input kernels rely on that too); the simulator needs a fence.
                """
                if is_interpreting:
                    plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[slot])

            def mma(acc: Any, a: Any, b: Any) -> None:
                """Computes acc += a @ b; the simulator reads A from shared memory only."""
                if operand is not None:
                    operand[warpgroup] = a
                    plgpu.commit_smem()
                    a = operand.at[warpgroup]
                plgpu.wgmma(acc, a, b)
                plgpu.wgmma_wait(0)

            def add_scaled_products(i: jax.Array, acc: jax.Array) -> jax.Array:
                slot = slot_of(i)
                plgpu.barrier_wait(full.at[slot])
                for j, a, b in operands(slot):

                    def product(ref: Any, a: Any = a, b: Any = b) -> jax.Array:
                        mma(ref, a, b)
                        return ref[...]

                    p = pl.run_scoped(product, plgpu.ACC((rows, block_m), F32))
                    p = p * by_output("w_scale", slot, j, block_m, F32)
                    if x_scale is not None:
                        layout = plgpu.Layout.WGMMA.reduce(0)
                        v = smem["x_scale"].at[slot, j, pl.ds(0, block_m)]
                        v = compat.gpu_load(v, layout=layout)
                        p = p * lax.broadcast_in_dim(v, (rows, block_m), [1])
                    acc = acc + p
                release(slot)
                return acc

            def sum_scaled_weights(first: jax.Array, last: jax.Array, ref: Any) -> jax.Array:
                def body(i: jax.Array, _: Any) -> Any:
                    slot = slot_of(i)
                    plgpu.barrier_wait(full.at[slot])
                    for _, a, b in operands(slot):
                        mma(ref, a, b)
                    release(slot)
                    return ()

                lax.fori_loop(first, last, body, ())
                return ref[...]

            def compute_part(tile: jax.Array, _: Any) -> Any:
                """Sums this block's share of one output tile and writes it."""
                first = jnp.maximum(start, tile * k_tiles)
                last = jnp.minimum(end, (tile + 1) * k_tiles)
                if sizes.scale_weights:
                    acc = pl.run_scoped(
                        functools.partial(sum_scaled_weights, first, last),
                        plgpu.ACC((rows, block_m), F32),
                    )
                else:
                    zeros = jnp.full((rows, block_m), 0, F32)
                    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                    acc = lax.fori_loop(first, last, add_scaled_products, zeros)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                buffer = out.at[warpgroup]
                acc = plgpu.layout_cast(acc.astype(part_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                buffer.T[...] = acc
                plgpu.commit_smem()
                part = block - lax.div(tile * k_tiles, I32(schedule.per_block))
                m, n = origin(tile)
                box = (part, pl.ds(m, block_m), pl.ds(n + warpgroup * rows, rows))
                plgpu.copy_smem_to_gmem(buffer, out_gmem.at[box])
                return ()

            first_tile, last_tile = lax.div(start, I32(k_tiles)), lax.div(end - 1, I32(k_tiles))
            lax.fori_loop(first_tile, last_tile + 1, compute_part, ())
            plgpu.wait_smem_to_gmem(0)

        def with_registers(count: int, action: Any, run: Any) -> Any:
            def body() -> None:
                if not is_interpreting:
                    plgpu.set_max_registers(count, action=action)
                run()

            return body

        compute_registers, copy_registers = _REGISTERS[sizes.warpgroups]
        is_compute = warpgroup < sizes.warpgroups
        pl.when(is_compute)(with_registers(compute_registers, "increase", compute))
        pl.when(jnp.logical_not(is_compute))(with_registers(copy_registers, "decrease", copy))

    parts = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((max_parts, num_rows, num_outputs), part_dtype),
        grid=(schedule.num_blocks,),
        grid_names=("block",),
        num_threads=sizes.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=compat.gpu_compiler_params(approx_math=True),
        interpret=compat.gpu_interpret_params(),
    )(*(array for array, _ in stage.values()))
    if max_parts == 1:
        return parts[0]
    return sum_parts(parts, schedule, m_tiles, (block_m, block_n)).astype(out_dtype)
