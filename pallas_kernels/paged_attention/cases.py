"""Calls of paged attention at shapes of real models, to compile for absent chips."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
    """Returns the calls that must compile for `target`: decode, chunks, mixed steps, trees.

    Their temporaries are packed queries and results, and parts to merge; never a copy of the
    context.
    """
    fp8, int8 = jnp.float8_e4m3fn, jnp.int8
    llama = functools.partial(_Case, "llama-3-8b")
    cases = [
        llama("decode", seqs=64, context=4096),
        llama("decode", seqs=64, context=4096, page=128, kv=fp8),
        llama("tree of 16", seqs=8, context=4096, q_len=16, tree_words=1),
        llama("mixed", seqs=64, context=4096, tokens=2048),
    ]
    if quick:
        return tuple(case.build(target) for case in cases)
    cases += [
        llama("decode", seqs=1, context=16384, lse=True),
        llama("decode", seqs=64, context=4096, page=128, kv=int8),
        llama("tree of 64", seqs=8, context=4096, q_len=64, tree_words=2),
        llama("chunk", seqs=1, context=8192, tokens=8192),
        llama("mixed", seqs=8, context=4096, tokens=2048, page=128, kv=fp8),
        _Case("qwen3-0.6b", "decode", seqs=16, context=4096, page=16),
        _Case("gemma-2-9b", "decode", seqs=16, context=8192, soft_cap=50.0, window=4096),
        _Case("gemma-2-9b", "mixed", seqs=8, context=8192, tokens=2048, soft_cap=50.0),
        _Case("gemma-2-9b", "mixed", seqs=8, context=8192, tokens=512, page=128, kv=fp8),
        _Case("gemma-3-1b", "chunk", seqs=4, context=32768, tokens=1024, window=512),
        _Case("phi-3-mini", "decode", seqs=8, context=4096),
        _Case("phi-3-mini", "mixed", seqs=8, context=4096, tokens=512),
        _Case("smollm2-135m", "mixed", seqs=16, context=2048, tokens=256, page=16),
    ]
    return tuple(case.build(target) for case in cases)


@dataclasses.dataclass(frozen=True)
class _Case:
    """A call: a model's kind of step and its sizes (`tokens`: of all sequences, if ragged)."""

    model: str
    what: str
    seqs: int
    context: int
    tokens: int | None = None
    q_len: int = 1
    page: int = 64
    kv: Any = jnp.bfloat16
    soft_cap: float | None = None
    window: int | None = None
    tree_words: int = 0
    lse: bool = False

    @property
    def num_tokens(self) -> int:
        """Query tokens of all sequences."""
        return self.seqs * self.q_len if self.tokens is None else self.tokens

    def build(self, target: Target) -> CompileCase:
        """Returns the call for `target`, with bounds on what it may allocate and copy."""
        args = self._arguments(target)
        impl = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(target.kind, "xla")
        num_heads, _, head_dim = _MODELS[self.model]
        packed_bytes = self.num_tokens * num_heads * max(head_dim, 128) * 2
        pages = args[1].k_pages
        name = f"paged_attention {self.model} {self.what} S={self.seqs} T={self.num_tokens}"
        return CompileCase(
            name=f"{name} ctx={self.context} page={self.page} {jnp.dtype(self.kv).name}",
            fn=self._call(impl),
            abstract_args=tuple(args),
            max_temp_bytes=(32 << 20) + 6 * packed_bytes,
            expects_wgmma=impl == "mosaic_gpu",
            expects_tma=impl == "mosaic_gpu",
            never_copied=(hlo.type_name(self.kv, pages.shape),),
            never_written=() if args[1].k_scale is None else hlo.dense_types(pages.shape),
        )

    def _arguments(self, target: Target) -> list[Any]:
        num_heads, num_kv_heads, head_dim = _MODELS[self.model]
        s, i32 = jax.ShapeDtypeStruct, jnp.int32
        # A TPU's registers are 128 wide, and so are its pages for any head_dim.
        width = -(-head_dim // 128) * 128 if target.kind == "tpu" else head_dim
        num_pages = self.seqs * self.context // self.page
        pages = s((num_pages, num_kv_heads, self.page, width), self.kv)
        scale = s(pages.shape[:3], jnp.float32) if jnp.dtype(self.kv).itemsize == 1 else None
        args: list[Any] = [
            s((self.num_tokens, num_heads, head_dim), jnp.bfloat16),
            PagedKV(pages, pages, scale, scale),  # pyright: ignore[reportArgumentType]
            s((self.seqs,), i32),
            s((self.seqs, self.context // self.page), i32),
            s((self.seqs + 1,), i32),
        ]
        if self.tree_words:
            args.append(s((self.num_tokens, self.tree_words), jnp.uint32))
        return args

    def _call(self, impl: str) -> Callable[..., Any]:
        from pallas_kernels.paged_attention import ragged_paged_attention

        def call(q: Any, kv: Any, lens: Any, table: Any, starts: Any, tree: Any = None) -> Any:
            return ragged_paged_attention(
                q,
                kv,
                lens,
                table,
                starts,
                sm_scale=_MODELS[self.model][2] ** -0.5,
                soft_cap=self.soft_cap,
                sliding_window=self.window,
                max_q_len=self.q_len if self.tokens is None else self.tokens,
                tree_mask=tree,
                return_lse=self.lse,
                impl=impl,
            )

        return call
