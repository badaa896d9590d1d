"""The quantized matmul on TPUs: blocks of codes become bf16 in VMEM, one product per group.

For group scales, where XLA would write out the whole bf16 weight; per-channel scales it fuses into
its own matmul.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat
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
    if target.kind != "tpu" and not compat.is_interpreting():
        return f"needs a TPU, the target is {target.name}"
    if compat.is_interpreting() and (reason := compat.why_not_interpret("tpu")):
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
    """Returns the key in the table of measured tiles."""
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    rows = tiles_lib.bucket(num_rows)
    return f"M{rows} K{num_inputs} N{num_outputs} {jnp.dtype(q.dtype).name} g{spec.group}"


def largest_block(size: int, unit: int, limit: int) -> int:
    """Returns the largest multiple of `unit` up to `limit` that divides `size`."""
    return max(b for b in range(unit, max(limit, unit) + 1, unit) if size % b == 0)


def heuristic_tiles(num_rows: int, q: Any, spec: QuantSpec) -> QuantMatmulTpuTiles:
    """Returns tiles if none were measured.

    Few rows: about a megabyte of codes per step, so that the copy hides a step's fixed cost. Many
    rows: scaling the weights is cheaper than scaling a product per group.
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
    return block_matmul(
        x, q, scale, zero=zero, group=spec.group, sizes=sizes, out_dtype=spec.out_dtype
    )


def block_matmul(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    zero: jax.Array | None = None,
    x_scale: jax.Array | None = None,
    group: int,
    sizes: QuantMatmulTpuTiles,
    out_dtype: Any,
) -> jax.Array:
    """Returns y[m, n] = sum_k x[m, k] x_scale[g, m] (w[k, n] - zero[g, n]) w_scale[g, n].

    g = k // group.

    Args:
      x: [M, K] bf16 or fp8.
      w: [K, N] codes or fp8 values.
      w_scale: [G, N].
      zero: [G, N] or None.
      x_scale: [G, M] or None.
      group: divides K.
      sizes: tiles.
      out_dtype: dtype of the result.

    Raises:
      ValueError: the tiles do not divide K, or the group does not divide the tiles.
    """
    (num_rows, num_inputs), num_outputs = x.shape, w.shape[1]
    block_m, block_n, block_k = sizes.block_m, sizes.block_n, sizes.block_k
    if num_inputs % block_k or block_k % group:
        raise ValueError(
            f"block_k must be a multiple of the group {group} that divides K={num_inputs}, "
            f"got {sizes}"
        )
    if sizes.scale_weights and x_scale is not None:
        raise ValueError(f"scales of x can only scale products, got {sizes}")
    unit = 32 if x.dtype.itemsize == 1 else 16  # rows of one register tile
    padding = -num_rows % unit if num_rows <= block_m else -num_rows % math.lcm(block_m, unit)
    x = jnp.pad(x, ((0, padding), (0, 0)))
    block_m = min(math.lcm(block_m, unit), x.shape[0])
    groups = block_k // group
    k_tiles = num_inputs // block_k

    def per_step(a: jax.Array) -> jax.Array:
        return a.astype(F32).reshape(k_tiles, groups, -1)

    outputs_spec = pl.BlockSpec((1, groups, block_n), lambda i, j, k: (k, 0, j))
    arrays: dict[str, tuple[jax.Array, pl.BlockSpec]] = {
        "x": (x, pl.BlockSpec((block_m, block_k), lambda i, j, k: (i, k))),
        "w": (w, pl.BlockSpec((block_k, block_n), lambda i, j, k: (k, j))),
        "w_scale": (per_step(w_scale), outputs_spec),
    }
    if zero is not None:
        arrays["zero"] = (per_step(zero), outputs_spec)
    if x_scale is not None:
        by_row = jnp.pad(per_step(x_scale), ((0, 0), (0, 0), (0, padding)))
        by_row = by_row.swapaxes(1, 2)  # [k_tiles, M, groups]: rows along sublanes, as x's
        arrays["x_scale"] = (
            by_row,
            pl.BlockSpec((1, block_m, groups), lambda i, j, k: (k, i, 0)),
        )

    def kernel(*refs: Any) -> None:
        *sources, out_ref, acc_ref = refs
        _add_block(
            dict(zip(arrays, sources, strict=True)),
            out_ref,
            acc_ref,
            group=group,
            k_tiles=k_tiles,
            scale_weights=sizes.scale_weights,
        )

    y = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], num_outputs), out_dtype),
        grid=(x.shape[0] // block_m, pl.cdiv(num_outputs, block_n), k_tiles),
        in_specs=[spec for _, spec in arrays.values()],
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), F32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=compat.tpu_interpret_params(),
    )(*(array for array, _ in arrays.values()))
    return y[:num_rows]


def _add_block(
    refs: dict[str, Any],
    out_ref: Any,
    acc_ref: Any,
    *,
    group: int,
    k_tiles: int,
    scale_weights: bool,
) -> None:
    """Adds one block of inputs to the sums of a tile; after the last, writes the tile."""
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def by_output(name: str, g: int, num_rows: int) -> jax.Array:
        row = refs[name][0, g : g + 1, :]
        return jnp.broadcast_to(row, (num_rows, row.shape[1]))

    acc = acc_ref[...]
    for g in range(refs["w"].shape[0] // group):
        inputs = slice(g * group, (g + 1) * group)
        x = refs["x"][:, inputs]
        x = x if x.dtype.itemsize == 2 else x.astype(jnp.bfloat16)
        w = refs["w"][inputs, :]
        if scale_weights:
            w = w.astype(F32)
            if "zero" in refs:
                w = w - by_output("zero", g, group)
            w = (w * by_output("w_scale", g, group)).astype(x.dtype)
            acc = acc + jnp.dot(x, w, preferred_element_type=F32)
        else:
            p = jnp.dot(x, w.astype(x.dtype), preferred_element_type=F32)
            if "zero" in refs:
                sums = x.astype(F32).sum(axis=1, keepdims=True)
                p = p - jnp.broadcast_to(sums, p.shape) * by_output("zero", g, p.shape[0])
            p = p * by_output("w_scale", g, p.shape[0])
            if "x_scale" in refs:
                p = p * jnp.broadcast_to(refs["x_scale"][0, :, g : g + 1], p.shape)
            acc = acc + p
    acc_ref[...] = acc

    @pl.when(k == k_tiles - 1)
    def _() -> None:
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


IMPL = Impl("mosaic_tpu", _why_not, run)
