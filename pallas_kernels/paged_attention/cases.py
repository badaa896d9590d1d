"""Paged attention at the shapes of real models, to be compiled for chips that are not there."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hlo
from pallas_kernels.compile_only import CompileCase
from pallas_kernels.paged_attention.base import PagedKV
from pallas_kernels.target import Target

# (N, K, H) of a device that holds the whole model.
_MODELS = {
    "llama-3-8b": (32, 8, 128),
    "qwen3-0.6b": (16, 8, 128),
    "gemma-2-9b": (16, 8, 256),
    "gemma-3-1b": (4, 1, 256),
    "phi-3-mini": (32, 32, 96),
    "smollm2-135m": (9, 3, 64),
}


def compile_cases(target: Target, *, quick: bool = False) -> tuple[CompileCase, ...]:
    """Returns the calls that `target` must be able to build: decode, chunks, mixed steps, trees.

    Temporaries: packed queries and results, and parts to be merged; never a copy of the context.
    """
    fp8, int8 = jnp.float8_e4m3fn, jnp.int8
    llama = functools.partial(_case, target, "llama-3-8b")
    cases = [
        llama("decode", seqs=64, context=4096),
        llama("decode", seqs=64, context=4096, page=128, kv=fp8),
        llama("tree of 16", seqs=8, context=4096, q_len=16, tree_words=1),
        llama("mixed", seqs=64, context=4096, tokens=2048),
    ]
    if quick:
        return tuple(cases)
    cases += [
        llama("decode", seqs=1, context=16384, lse=True),
        llama("decode", seqs=64, context=4096, page=128, kv=int8),
        llama("tree of 64", seqs=8, context=4096, q_len=64, tree_words=2),
        llama("chunk", seqs=1, context=8192, tokens=8192),
        llama("mixed", seqs=8, context=4096, tokens=2048, page=128, kv=fp8),
        _case(target, "qwen3-0.6b", "decode", seqs=16, context=4096, page=16),
        _case(target, "gemma-2-9b", "decode", seqs=16, context=8192, soft_cap=50.0, window=4096),
        _case(target, "gemma-2-9b", "mixed", seqs=8, context=8192, tokens=2048, soft_cap=50.0),
        _case(target, "gemma-2-9b", "mixed", seqs=8, context=8192, tokens=512, page=128, kv=fp8),
        _case(target, "gemma-3-1b", "chunk", seqs=4, context=32768, tokens=1024, window=512),
        _case(target, "phi-3-mini", "decode", seqs=8, context=4096),
        _case(target, "phi-3-mini", "mixed", seqs=8, context=4096, tokens=512),
        _case(target, "smollm2-135m", "mixed", seqs=16, context=2048, tokens=256, page=16),
    ]
    return tuple(cases)


def _case(
    target: Target,
    model: str,
    what: str,
    *,
    seqs: int,
    context: int,
    tokens: int | None = None,
    q_len: int = 1,
    page: int = 64,
    kv: Any = jnp.bfloat16,
    soft_cap: float | None = None,
    window: int | None = None,
    tree_words: int = 0,
    lse: bool = False,
) -> CompileCase:
    from pallas_kernels.paged_attention import ragged_paged_attention

    num_heads, num_kv_heads, head_dim = _MODELS[model]
    max_q_len = q_len if tokens is None else tokens
    num_tokens = seqs * q_len if tokens is None else tokens
    s, i32 = jax.ShapeDtypeStruct, jnp.int32
    # A TPU's registers are 128 wide: there the pages are too, whatever the head.
    width = -(-head_dim // 128) * 128 if target.kind == "tpu" else head_dim
    pages = s((seqs * context // page, num_kv_heads, page, width), kv)
    scale = s(pages.shape[:3], jnp.float32) if jnp.dtype(kv).itemsize == 1 else None
    args: list[Any] = [
        s((num_tokens, num_heads, head_dim), jnp.bfloat16),
        PagedKV(pages, pages, scale, scale),  # pyright: ignore[reportArgumentType]
        s((seqs,), i32),
        s((seqs, context // page), i32),
        s((seqs + 1,), i32),
    ]
    if tree_words:
        args.append(s((num_tokens, tree_words), jnp.uint32))
    impl = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(target.kind, "xla")

    def call(q: Any, kv: Any, lens: Any, table: Any, starts: Any, tree: Any = None) -> Any:
        return ragged_paged_attention(
            *(q, kv, lens, table, starts),
            sm_scale=head_dim**-0.5,
            soft_cap=soft_cap,
            sliding_window=window,
            max_q_len=max_q_len,
            tree_mask=tree,
            return_lse=lse,
            impl=impl,
        )

    packed_bytes = num_tokens * num_heads * max(head_dim, 128) * 2
    name = f"paged_attention {model} {what} S={seqs} T={num_tokens} ctx={context} page={page}"
    return CompileCase(
        name=f"{name} {jnp.dtype(kv).name}",
        fn=call,
        abstract_args=tuple(args),
        max_temp_bytes=(32 << 20) + 6 * packed_bytes,
        expects_wgmma=impl == "mosaic_gpu",
        expects_tma=impl == "mosaic_gpu",
        never_copied=(hlo.type_name(kv, pages.shape),),
        never_written=() if scale is None else hlo.dense_types(pages.shape),
    )
