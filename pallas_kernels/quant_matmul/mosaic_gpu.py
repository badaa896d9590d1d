"""The quantized matmul on Hopper: codes become bf16 in registers and feed `wgmma` as its A operand.

Transposed product, out^T[N, M] = w^T[N, K] x^T[K, M]: the many outputs fill `wgmma`'s 64 rows, the
few rows of x its N. One warpgroup copies, the others compute; blocks are persistent and share the
tiles' inputs equally.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import target as target_lib
from pallas_kernels import tiles as tiles_lib
from pallas_kernels.dispatch import Impl
from pallas_kernels.quant_matmul.base import FP8_DTYPES, QuantSpec, describe, shape_kn
from pallas_kernels.quant_matmul.schedule import Schedule, Shape, sum_parts
from pallas_kernels.tiles import QuantMatmulGpuTiles

OP = "quant_matmul.mosaic_gpu"
F32 = jnp.float32
CODES = (jnp.dtype(jnp.int4), jnp.dtype(jnp.int8), *FP8_DTYPES)

# Registers of a compute and of the copy warpgroup, by compute warpgroups: 65536 a block in all.
_REGISTERS = {1: (232, 40), 2: (232, 40), 3: (160, 32)}


def num_bits(dtype: Any) -> int:
    """Returns the bits that an element takes in memory."""
    return 4 if jnp.dtype(dtype) in (jnp.dtype(jnp.int4), jnp.dtype(jnp.uint4)) else (
        jnp.dtype(dtype).itemsize * 8)  # fmt: skip


def swizzle_for(num_columns: int, dtype: Any) -> int | None:
    """Returns the widest swizzle (bytes) whose rows divide `num_columns`; None: 32 does not."""
    row_bytes = num_columns * num_bits(dtype) // 8
    return next((s for s in (128, 64, 32) if row_bytes % s == 0), None)


def tiled(shape: tuple[int, ...], dtype: Any, swizzle: int) -> Any:
    """Returns a shared-memory buffer in the tiling that `wgmma` and the copy engine share."""
    transforms = (
        plgpu.TilingTransform((8, swizzle * 8 // num_bits(dtype))),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _why_not(
    target: target_lib.Target, x: Any, q: Any, scale: Any, zero: Any, spec: QuantSpec
) -> str | None:
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    if not target.is_hopper and not target_lib.is_interpreting():
        return f"needs a Hopper GPU (sm_90a), the target is {target.name} ({target.arch})"
    if target_lib.is_interpreting() and (reason := target_lib.why_not_interpret("gpu")):
        return reason
    if spec.config is not None and not isinstance(spec.config, QuantMatmulGpuTiles):
        return f"takes QuantMatmulGpuTiles, got {type(spec.config).__name__}"
    if jnp.dtype(q.dtype) not in CODES:
        return f"reads int4, int8, e4m3 and e5m2 codes, got {q.dtype}; prepare() the weight"
    if spec.layout != "nk":
        return f"reads codes laid out [N, K], got layout {spec.layout!r}; prepare() the weight"
    if x.dtype != jnp.bfloat16 and not (x.dtype == jnp.float16 and q.dtype in FP8_DTYPES):
        return f"multiplies bf16 rows (f16 too by fp8 codes), got {describe(x)}; cast x"
    if x.shape[0] == 0:
        return "x has no rows"
    if scale.dtype == jnp.float16:
        return "reads f32 and bf16 scales, got f16"
    if num_inputs % 64 or num_outputs % 32:
        return f"K must be a multiple of 64 and N of 32, got K={num_inputs}, N={num_outputs}"
    if scale.shape[0] > 1 and spec.group != 32 and spec.group % 64:
        return f"groups must be 32 or a multiple of 64 inputs, got {spec.group}"
    return None


def case_name(num_rows: int, q: Any, spec: QuantSpec, num_groups: int) -> str:
    """Returns the key of the measured table: what the kernel is specialised on."""
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    group = f"g{spec.group}" if num_groups > 1 else "channel"
    rows = tiles_lib.bucket(num_rows)
    return f"M{rows} K{num_inputs} N{num_outputs} {jnp.dtype(q.dtype).name} {group}"


def heuristic_tiles(
    num_rows: int, q: Any, spec: QuantSpec, num_groups: int, target: target_lib.Target
) -> QuantMatmulGpuTiles:
    """Returns the tiles whose modelled time is least."""
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    shape = Shape(
        num_rows=num_rows,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        w_bits=num_bits(q.dtype),
        group=spec.group if num_groups > 1 else num_inputs,
        instructions=2.7 if num_bits(q.dtype) == 4 else 2.2,
    )
    return shape.best(candidate_tiles(shape, jnp.dtype(q.dtype) in FP8_DTYPES), target)


def candidate_tiles(shape: Shape, is_fp8: bool) -> Iterator[QuantMatmulGpuTiles]:
    """Enumerates the tiles that fit the registers, for the model and for `scripts/autotune.py`.

    Of 232 registers a thread, the accumulator takes rows * block_m / 128, twice that if products
    are scaled. Scaled weights would leave f16's range, so fp8 codes always scale products.
    """
    largest = min(tiles_lib.bucket(shape.num_rows), 256)
    for block_m, rows, block_k, splits in itertools.product(
        {largest, min(largest, 128), min(largest, 64)}, (64, 128), (256, 128, 64), (1, 2, 4, 8, 16)
    ):
        scale_weights = block_m >= 128 and not is_fp8
        accumulators = rows * block_m // 128 * (1 if scale_weights else 2)
        operand = rows * min(block_k, 128) // 256
        row_bytes = block_k * shape.w_bits // 8
        fits = accumulators + operand <= 192 and row_bytes <= 128
        group = shape.group
        if fits and shape.num_inputs % block_k == 0 and not (block_k % group and group % block_k):
            yield QuantMatmulGpuTiles(
                block_m=block_m,
                rows=rows,
                block_k=block_k,
                scale_weights=scale_weights,
                splits=splits,
            )


def run(
    x: jax.Array, q: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
    """Computes x [M, K] @ dequant(q [N, K])^T."""
    target = target_lib.current()
    target = target if target.is_hopper else target_lib.TARGETS["h100"]  # simulated on a CPU
    num_rows, num_groups = x.shape[0], scale.shape[0]
    sizes = tiles_lib.choose(
        OP,
        target,
        case_name(num_rows, q, spec, num_groups),
        QuantMatmulGpuTiles,
        spec.config,
        lambda: heuristic_tiles(num_rows, q, spec, num_groups, target),
    )
    exponent = None
    if jnp.dtype(q.dtype) in FP8_DTYPES:
        x, exponent = _to_f16(x)
    if num_rows > 8 and num_rows % 8:  # the copy engine's tiles are 8 rows high
        x = jnp.pad(x, ((0, -num_rows % 8), (0, 0)))
    if zero is not None and not jnp.issubdtype(zero.dtype, jnp.floating):
        zero = zero.astype(jnp.bfloat16)
    out_dtype = F32 if exponent is not None else spec.out_dtype
    y = _matmul(x, q, scale, zero, spec, sizes, target, out_dtype)[:num_rows]
    if exponent is not None:
        y = jnp.ldexp(y, exponent)
    return y.astype(spec.out_dtype)


def _to_f16(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scales each row by a power of two so that its largest entry is in [1, 2): f16 holds it."""
    if x.dtype == jnp.float16:
        return x, None
    x = x.astype(F32)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    return jnp.ldexp(x, 1 - exponent).astype(jnp.float16), exponent - 1


def _matmul(
    x: jax.Array,
    q: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    spec: QuantSpec,
    sizes: QuantMatmulGpuTiles,
    target: target_lib.Target,
    out_dtype: Any,
) -> jax.Array:
    is_interpreting = target_lib.is_interpreting()
    (num_rows, num_inputs), num_outputs = x.shape, q.shape[0]
    compute_dtype = x.dtype
    block_m, block_n, block_k, rows = sizes.block_m, sizes.block_n, sizes.block_k, sizes.rows
    group = spec.group if scale.shape[0] > 1 else num_inputs
    step = min(block_k, group)  # inputs whose products share a scale
    num_steps = block_k // step
    m_tiles, n_tiles = pl.cdiv(num_rows, block_m), pl.cdiv(num_outputs, block_n)
    k_tiles = pl.cdiv(num_inputs, block_k)
    schedule = Schedule.make(m_tiles * n_tiles, k_tiles, target.num_cores, sizes.splits)
    max_parts = schedule.max_parts
    if max_parts > 1:
        out_dtype = F32
    if block_k % step or group % step:
        raise ValueError(f"block_k and the group {group} must divide one another, got {sizes}")
    stages = sizes.stages
    upcast = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}[num_bits(q.dtype)]
    has_zero = zero is not None

    def kernel(*refs: Any) -> None:
        x_gmem, q_gmem, scale_gmem, *rest = refs
        zero_gmem = rest.pop(0) if has_zero else None
        out_gmem, x_smem, q_smem, scale_smem, *rest = rest
        zero_smem = rest.pop(0) if has_zero else None
        out_smem, full, empty, *staging = rest
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        start = block * schedule.per_block
        end = jnp.minimum(start + schedule.per_block, schedule.num_tiles * k_tiles)

        def mma(acc: Any, a: jax.Array, b: Any) -> None:
            """acc += a @ b; the simulator knows A operands in shared memory only."""
            if is_interpreting:
                a_smem = staging[0].at[warpgroup]
                a_smem[...] = a
                plgpu.commit_smem()
                plgpu.wgmma(acc, a_smem, b)
            else:
                plgpu.wgmma(acc, a, b)
            plgpu.wgmma_wait(0)

        def compute() -> None:
            mine = pl.ds(warpgroup * rows, rows)

            def across(row_vector: jax.Array, num_columns: int) -> jax.Array:
                return lax.broadcast_in_dim(row_vector, (rows, num_columns), [0])

            def operands(slot: jax.Array) -> Any:
                """Yields (A [rows, step], scales [rows], B [step, block_m]) of a stage."""
                codes = target_lib.gpu_load(q_smem.at[slot, mine], layout=upcast)
                w = plgpu.layout_cast(codes, plgpu.Layout.WGMMA).astype(compute_dtype)
                row_layout = plgpu.Layout.WGMMA.reduce(1)
                for j in range(num_steps):
                    a = w if num_steps == 1 else w[:, j * step : (j + 1) * step]
                    s = target_lib.gpu_load(scale_smem.at[slot, j, mine], layout=row_layout)
                    if zero_smem is not None:
                        z = target_lib.gpu_load(zero_smem.at[slot, j, mine], layout=row_layout)
                        a = a - across(z.astype(compute_dtype), step)
                    b = x_smem.at[slot] if num_steps == 1 else (
                        x_smem.at[slot, :, pl.ds(j * step, step)])  # fmt: skip
                    yield a, s, b.T

            def scaled_products(i: jax.Array, acc: jax.Array) -> jax.Array:
                slot = lax.rem(i - start, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                for a, s, b in operands(slot):

                    def product(ref: Any, a: jax.Array = a, b: Any = b) -> jax.Array:
                        mma(ref, a, b)
                        return ref[...]

                    p = pl.run_scoped(product, plgpu.ACC((rows, block_m), F32))
                    acc = acc + p * across(s.astype(F32), block_m)
                plgpu.barrier_arrive(empty.at[slot])
                return acc

            def scaled_weights(ref: Any, first: jax.Array, last: jax.Array) -> jax.Array:
                def body(i: jax.Array, _: Any) -> Any:
                    slot = lax.rem(i - start, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    for a, s, b in operands(slot):
                        mma(ref, a * across(s.astype(compute_dtype), step), b)
                    plgpu.barrier_arrive(empty.at[slot])
                    return ()

                lax.fori_loop(first, last, body, ())
                return ref[...]

            def segment(tile: jax.Array, _: Any) -> Any:
                """Computes this block's part of one output tile."""
                first = jnp.maximum(start, tile * k_tiles)
                last = jnp.minimum(end, (tile + 1) * k_tiles)
                if sizes.scale_weights:
                    acc = pl.run_scoped(
                        lambda ref: scaled_weights(ref, first, last),
                        plgpu.ACC((rows, block_m), F32),
                    )
                else:
                    zeros = jnp.full((rows, block_m), 0, F32)
                    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                    acc = lax.fori_loop(first, last, scaled_products, zeros)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                buffer = out_smem.at[warpgroup]
                acc = plgpu.layout_cast(acc.astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                buffer.T[...] = acc
                plgpu.commit_smem()
                part = block - lax.div(tile * k_tiles, jnp.int32(schedule.per_block))
                m = lax.rem(tile, jnp.int32(m_tiles)) * block_m
                n = lax.div(tile, jnp.int32(m_tiles)) * block_n + warpgroup * rows
                destination = out_gmem.at[part, pl.ds(m, block_m), pl.ds(n, rows)]
                plgpu.copy_smem_to_gmem(buffer, destination)
                return ()

            first_tile = lax.div(start, jnp.int32(k_tiles))
            last_tile = lax.div(end - 1, jnp.int32(k_tiles))
            lax.fori_loop(first_tile, last_tile + 1, segment, ())
            plgpu.wait_smem_to_gmem(0)

        def copy() -> None:
            def fetch(i: jax.Array, slot: Any) -> None:
                tile, k = lax.div(i, jnp.int32(k_tiles)), lax.rem(i, jnp.int32(k_tiles)) * block_k
                m = lax.rem(tile, jnp.int32(m_tiles)) * block_m
                n = lax.div(tile, jnp.int32(m_tiles)) * block_n
                outputs, inputs = pl.ds(n, block_n), pl.ds(k, block_k)
                groups = pl.ds(lax.div(k, jnp.int32(group)), num_steps)
                barrier = full.at[slot]
                plgpu.copy_gmem_to_smem(q_gmem.at[outputs, inputs], q_smem.at[slot], barrier)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(m, block_m), inputs], x_smem.at[slot], barrier
                )
                plgpu.copy_gmem_to_smem(
                    scale_gmem.at[groups, outputs], scale_smem.at[slot], barrier
                )
                if zero_gmem is not None and zero_smem is not None:
                    plgpu.copy_gmem_to_smem(
                        zero_gmem.at[groups, outputs], zero_smem.at[slot], barrier
                    )

            for s in range(stages):

                @pl.when(start + s < end)
                def _(s: int = s) -> None:
                    fetch(start + s, s)

            def refill(i: jax.Array, _: Any) -> Any:
                slot = lax.rem(i - start, jnp.int32(stages))
                plgpu.barrier_wait(empty.at[slot])

                @pl.when(i + stages < end)
                def _() -> None:
                    fetch(i + stages, slot)

                return ()

            lax.fori_loop(start, end, refill, ())

        compute_registers, copy_registers = _REGISTERS[sizes.warpgroups]

        @pl.when(warpgroup < sizes.warpgroups)
        def _() -> None:
            if not is_interpreting:
                plgpu.set_max_registers(compute_registers, action="increase")
            compute()

        @pl.when(warpgroup == sizes.warpgroups)
        def _() -> None:
            if not is_interpreting:
                plgpu.set_max_registers(copy_registers, action="decrease")
            copy()

    def swizzle(columns: int, dtype: Any) -> int:
        found = swizzle_for(columns, dtype)
        assert found is not None
        return found

    operands = [x, q, scale]
    num_copies = 3
    x_swizzle = swizzle(math.gcd(step, num_inputs), compute_dtype)
    q_swizzle = swizzle(math.gcd(block_k, num_inputs), q.dtype)
    out_swizzle = swizzle(math.gcd(rows, num_outputs), out_dtype)
    scratch = [
        tiled((stages, block_m, block_k), compute_dtype, x_swizzle),
        tiled((stages, block_n, block_k), q.dtype, q_swizzle),
        plgpu.SMEM((stages, num_steps, block_n), scale.dtype),
    ]
    if zero is not None:
        operands.append(zero)
        num_copies += 1
        scratch.append(plgpu.SMEM((stages, num_steps, block_n), zero.dtype))
    scratch += [
        tiled((sizes.warpgroups, block_m, rows), out_dtype, out_swizzle),
        plgpu.Barrier(num_barriers=stages, num_arrivals=num_copies),
        plgpu.Barrier(num_barriers=stages, num_arrivals=sizes.warpgroups),
    ]
    if is_interpreting:
        a_swizzle = swizzle(step, compute_dtype)
        scratch.append(tiled((sizes.warpgroups, rows, step), compute_dtype, a_swizzle))
    parts = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((max_parts, num_rows, num_outputs), out_dtype),
        grid=(schedule.num_blocks,),
        grid_names=("block",),
        num_threads=sizes.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=target_lib.gpu_compiler_params(approx_math=True),
        interpret=target_lib.gpu_interpret_params(),
    )(*operands)
    if max_parts == 1:
        return parts[0]
    return sum_parts(parts, schedule, m_tiles, (block_m, block_n))


IMPL = Impl("mosaic_gpu", _why_not, run)
