"""The kernels, shapes and candidate tiles of attention that `scripts/autotune.py` measures."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import mosaic_gpu, mosaic_tpu, ragged_paged_attention
from pallas_kernels.paged_attention.base import PagedKV
from pallas_kernels.target import Target
from pallas_kernels.tiles import Tunable

# (N, K, H): Llama-3-8B and Qwen3-8B, Qwen3-0.6B, Gemma-2-9B.
_HEADS = ((32, 8, 128), (16, 8, 128), (16, 8, 256))
# (sequences, query tokens of each, keys of each)
_CALLS = ((1, 1, 16384), (8, 1, 4096), (64, 1, 4096), (8, 16, 4096), (1, 2048, 8192))


def tunables(target: Target) -> Iterator[Tunable]:
    """Enumerates decode, tree and chunk calls of the models, for the kernel of `target`."""
    kernel = {"gpu": mosaic_gpu, "tpu": mosaic_tpu}.get(target.kind)
    if kernel is None:
        return
    for heads in _HEADS:
        for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
            for seqs, q_len, context in _CALLS:
                yield _tunable(target, heads, dtype, seqs, q_len, context)


def _tunable(
    target: Target, heads: tuple[int, int, int], dtype: Any, seqs: int, q_len: int, context: int
) -> Tunable:
    num_heads, num_kv_heads, head_dim = heads
    page = 64 if dtype == jnp.bfloat16 else 128
    pages = context // page
    shape = (seqs * pages, num_kv_heads, page, head_dim)

    def inputs(seed: int) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(seed), 6)
        q = jax.random.normal(keys[0], (seqs * q_len, num_heads, head_dim), jnp.bfloat16)
        k, v = (jax.random.normal(key, shape, jnp.bfloat16).astype(dtype) for key in keys[1:3])
        scales = [None, None]
        if dtype != jnp.bfloat16:
            scales = [jax.random.uniform(key, shape[:3], minval=0.5) for key in keys[3:5]]
        table = jax.random.permutation(keys[5], seqs * pages).reshape(seqs, pages)
        lens = jnp.full((seqs,), context, jnp.int32)
        starts = jnp.arange(seqs + 1, dtype=jnp.int32) * q_len
        return q, PagedKV(k, v, *scales), lens, table.astype(jnp.int32), starts

    call: Any = functools.partial(ragged_paged_attention, sm_scale=head_dim**-0.5, max_q_len=q_len)
    q, kv, *_ = jax.eval_shape(inputs, 0)
    if target.kind == "gpu":
        op, impl = mosaic_gpu.OP, mosaic_gpu.IMPL.name
        case = mosaic_gpu.case_name(q, kv, seqs, q_len)
        candidates = mosaic_gpu.candidates(q, kv, q_len)
    else:
        op, impl = mosaic_tpu.OP, mosaic_tpu.IMPL.name
        case = mosaic_tpu.case_name(q, kv, q_len)
        candidates = mosaic_tpu.candidates(q, kv)

    def run(tiles: Any, *args: Any) -> Any:
        return call(*args, config=tiles, impl=impl)

    return Tunable(
        op=op,
        case=case,
        candidates=tuple(candidates),
        inputs=inputs,
        run=run,
        reference=functools.partial(call, impl="xla"),
    )
