"""The quantized matmul on TPUs: blocks of codes become bf16 in VMEM, one product per group.

XLA fuses per-channel scales into its own matmul there; it writes out the whole bf16 weight for
group scales, which is what this kernel is for.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import target as target_lib
from pallas_kernels import tiles as tiles_lib
from pallas_kernels.dispatch import Impl
from pallas_kernels.quant_matmul.base import FP8_DTYPES, QuantSpec, describe, shape_kn
from pallas_kernels.tiles import QuantMatmulTpuTiles

OP = "quant_matmul.mosaic_tpu"
F32 = jnp.float32
CODES = (jnp.dtype(jnp.int4), jnp.dtype(jnp.int8), *FP8_DTYPES)


def _why_not(
    target: target_lib.Target, x: Any, q: Any, scale: Any, zero: Any, spec: QuantSpec
) -> str | None:
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    if target.kind != "tpu" and not target_lib.is_interpreting():
        return f"needs a TPU, the target is {target.name}"
    if target_lib.is_interpreting() and (reason := target_lib.why_not_interpret("tpu")):
        return reason
    if spec.config is not None and not isinstance(spec.config, QuantMatmulTpuTiles):
        return f"takes QuantMatmulTpuTiles, got {type(spec.config).__name__}"
    if scale.shape[0] == 1:
        return "scales per channel are left to XLA, which fuses them"
    if jnp.dtype(q.dtype) not in CODES:
        return f"reads int4, int8, e4m3 and e5m2 codes, got {q.dtype}; prepare() the weight"
    if spec.layout != "kn":
        return f"reads codes laid out [K, N], got layout {spec.layout!r}; prepare() the weight"
    if x.dtype != jnp.bfloat16:
        return f"multiplies bf16 rows, got {describe(x)}; cast x"
    if x.shape[0] == 0:
        return "x has no rows"
    if num_inputs % 128 or num_outputs % 128:
        return f"K and N must be multiples of 128, got K={num_inputs}, N={num_outputs}"
    if spec.group % 32 or (128 % spec.group and spec.group % 128) or num_inputs % spec.group:
        return f"groups must be 32, 64 or a multiple of 128 that divides K, got {spec.group}"
    return None


def case_name(num_rows: int, q: Any, spec: QuantSpec) -> str:
    """Returns the key of the measured table: what the kernel is specialised on."""
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    rows = tiles_lib.bucket(num_rows)
    return f"M{rows} K{num_inputs} N{num_outputs} {jnp.dtype(q.dtype).name} g{spec.group}"


def largest_block(size: int, unit: int, limit: int) -> int:
    """Returns the largest multiple of `unit` up to `limit` that divides `size`."""
    return max(b for b in range(unit, max(limit, unit) + 1, unit) if size % b == 0)


def heuristic_tiles(num_rows: int, q: Any, spec: QuantSpec) -> QuantMatmulTpuTiles:
    """Tiles from first principles, not measured.

    Few rows: about a megabyte of codes per step, so that a step's fixed cost vanishes behind the
    copy. Many: scaling the weights is cheaper than scaling a product per group.
    """
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    unit = max(128, spec.group)
    block_m = min(max(tiles_lib.bucket(num_rows), 16), 256)
    return QuantMatmulTpuTiles(
        block_m=block_m,
        block_n=largest_block(num_outputs, 128, 1024 if block_m <= 64 else 512),
        block_k=largest_block(num_inputs, unit, 2048 if block_m <= 64 else 1024),
        scale_weights=block_m >= spec.group,
    )


def run(
    x: jax.Array, q: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
    """Computes x [M, K] @ dequant(q [K, N])."""
    num_rows = x.shape[0]
    sizes = tiles_lib.choose(
        OP,
        target_lib.current(),
        case_name(num_rows, q, spec),
        QuantMatmulTpuTiles,
        spec.config,
        lambda: heuristic_tiles(num_rows, q, spec),
    )
    (_, num_inputs), num_outputs = x.shape, q.shape[1]
    block_m, block_n, block_k = sizes.block_m, sizes.block_n, sizes.block_k
    if num_inputs % block_k or block_k % spec.group:
        raise ValueError(
            f"block_k must be a multiple of the group {spec.group} that divides K={num_inputs}, "
            f"got {sizes}"
        )
    padding = -num_rows % 16 if num_rows <= block_m else -num_rows % block_m
    x = jnp.pad(x, ((0, padding), (0, 0)))
    block_m = min(block_m, x.shape[0])
    groups = block_k // spec.group
    k_tiles = num_inputs // block_k

    def per_step(a: jax.Array) -> jax.Array:
        return a.astype(F32).reshape(k_tiles, groups, num_outputs)

    row_spec = pl.BlockSpec((1, groups, block_n), lambda i, j, k: (k, 0, j))
    operands = [x, q, per_step(scale)]
    in_specs = [
        pl.BlockSpec((block_m, block_k), lambda i, j, k: (i, k)),
        pl.BlockSpec((block_k, block_n), lambda i, j, k: (k, j)),
        row_spec,
    ]
    if zero is not None:
        operands.append(per_step(zero))
        in_specs.append(row_spec)
    y = pl.pallas_call(
        functools.partial(
            _kernel,
            group=spec.group,
            k_tiles=k_tiles,
            has_zero=zero is not None,
            scale_weights=sizes.scale_weights,
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], num_outputs), spec.out_dtype),
        grid=(x.shape[0] // block_m, pl.cdiv(num_outputs, block_n), k_tiles),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), F32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=target_lib.tpu_interpret_params(),
    )(*operands)
    return y[:num_rows]


def _kernel(*refs: Any, group: int, k_tiles: int, has_zero: bool, scale_weights: bool) -> None:
    x_ref, q_ref, scale_ref, *rest = refs
    zero_ref = rest.pop(0) if has_zero else None
    out_ref, acc_ref = rest
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    acc = acc_ref[...]
    for g in range(q_ref.shape[0] // group):
        inputs = slice(g * group, (g + 1) * group)
        x = x_ref[:, inputs]
        s = scale_ref[0, g : g + 1, :]
        w = q_ref[inputs, :]
        if scale_weights:
            w = w.astype(F32)
            if zero_ref is not None:
                w = w - jnp.broadcast_to(zero_ref[0, g : g + 1, :], w.shape)
            w = (w * jnp.broadcast_to(s, w.shape)).astype(x.dtype)
            acc = acc + jnp.dot(x, w, preferred_element_type=F32)
        else:
            p = jnp.dot(x, w.astype(x.dtype), preferred_element_type=F32)
            if zero_ref is not None:
                sums = x.astype(F32).sum(axis=1, keepdims=True)
                z = jnp.broadcast_to(zero_ref[0, g : g + 1, :], p.shape)
                p = p - jnp.broadcast_to(sums, p.shape) * z
            acc = acc + p * jnp.broadcast_to(s, p.shape)
    acc_ref[...] = acc

    @pl.when(k == k_tiles - 1)
    def _() -> None:
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


IMPL = Impl("mosaic_tpu", _why_not, run)
