"""The fp8 matmul in plain XLA, the backend that always works; on an H100, XLA's own fp8 GEMM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import target as target_lib
from pallas_kernels.dispatch import Impl
from pallas_kernels.fp8_matmul.base import Fp8Spec, rows_of_scales
from pallas_kernels.quant_matmul.base import shape_kn

F32 = jnp.float32


def _why_not(target: Any, x: Any, w: Any, x_scale: Any, w_scale: Any, spec: Fp8Spec) -> str | None:
    if spec.config is not None:
        return f"XLA takes no tiles, got {type(spec.config).__name__}"
    return None


def run(
    x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array, spec: Fp8Spec
) -> jax.Array:
    """Computes (x * x_scale) @ (w * w_scale), x [M, K]; scales after the product if possible."""
    contract = ((1,), (0 if spec.layout == "kn" else 1,))
    x_scale, w_scale = x_scale.astype(F32), w_scale.astype(F32)
    if spec.block is None:
        y = _dot(x, w, contract, ((), ()))
        y = y * jnp.broadcast_to(w_scale.reshape(1, -1), y.shape)
        y = y * jnp.broadcast_to(x_scale.reshape(-1, 1), y.shape)
        return y.astype(spec.out_dtype)
    num_rows, num_inputs = x.shape
    _, num_outputs = shape_kn(w, spec.layout)
    w_scale = rows_of_scales(w_scale, num_outputs, spec.block)
    is_cpu = target_lib.current().kind == "cpu"
    if not is_cpu and num_inputs % spec.block == 0 and num_rows * 2 <= spec.block:
        y = _per_block(x, w, x_scale, w_scale, spec)
    else:
        dtype = F32 if is_cpu else jnp.bfloat16
        rows = jnp.repeat(w_scale, spec.block, axis=0)[:num_inputs]
        rows = rows if spec.layout == "kn" else rows.T
        columns = jnp.repeat(x_scale, spec.block, axis=1)[:, :num_inputs]
        left = (x.astype(F32) * columns).astype(dtype)
        right = (w.astype(F32) * rows).astype(dtype)
        y = lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=F32)
    return y.astype(spec.out_dtype)


def _dot(x: jax.Array, w: jax.Array, contract: Any, batch: Any) -> jax.Array:
    if target_lib.current().kind == "cpu":
        x, w = x.astype(F32), w.astype(F32)
    elif x.dtype != w.dtype:  # e4m3 by e5m2; both are exact in bf16
        x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return lax.dot_general(x, w, (contract, batch), preferred_element_type=F32)


def _per_block(
    x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array, spec: Fp8Spec
) -> jax.Array:
    """One product per block of inputs; for few rows its sums take less room than a bf16 weight."""
    assert spec.block is not None
    num_rows, num_inputs = x.shape
    blocks = num_inputs // spec.block
    xs = x.reshape(num_rows, blocks, spec.block)
    if spec.layout == "kn":
        ws, contract, batch = w.reshape(blocks, spec.block, -1), ((2,), (1,)), ((1,), (0,))
    else:
        ws, contract, batch = w.reshape(-1, blocks, spec.block), ((2,), (2,)), ((1,), (1,))
    y = _dot(xs, ws, contract, batch)  # [blocks, M, N]
    return (y * w_scale[:, None, :] * x_scale.T[:, :, None]).sum(axis=0)


IMPL = Impl("xla", _why_not, run)
