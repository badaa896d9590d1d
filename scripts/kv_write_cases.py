"""Writing K and V of a step into the paged pool, which must stay where it is: `--op kv_write`.

Two layers of a Llama-3-8B, so that what a write does to the pool's layout meets the next write.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jinfer.config import memory
from jinfer.config.cache import CacheConfig
from jinfer.kv import cache as kv_cache
from jinfer.linear import weight
from pallas_kernels import hlo
from pallas_kernels.compile_only import CompileCase
from pallas_kernels.target import Target

MODEL, NUM_LAYERS = "llama-3-8b", 2
# A pool that fits into a TPU's VMEM (128 MiB) is copied there and back by XLA; real ones do not.
POOL_TOKENS = 131072
NUM_TOKENS = (64, 2048)
POOLS = (("bfloat16", 64), ("float8_e4m3fn", 128), ("int8", 128))  # and tokens a page


def compile_cases(target: Target, *, quick: bool = False) -> tuple[CompileCase, ...]:
    """Returns a write per pool and number of tokens; temporaries: the tokens, never the pool."""
    layers = memory.PRESETS[MODEL].layer_types[:NUM_LAYERS]
    config = dataclasses.replace(memory.PRESETS[MODEL], num_layers=NUM_LAYERS, layer_types=layers)
    cases = []
    for dtype, page_size in POOLS:
        cache = CacheConfig(num_pages=POOL_TOKENS // page_size, page_size=page_size, dtype=dtype)
        kv = jax.eval_shape(functools.partial(kv_cache.init, config, cache))
        for num_tokens in NUM_TOKENS[:1] if quick else NUM_TOKENS:
            new = jax.ShapeDtypeStruct(
                (num_tokens, config.num_kv_heads, config.head_dim), jnp.bfloat16
            )
            slots = jax.ShapeDtypeStruct((num_tokens,), np.int32)
            cases.append(
                CompileCase(
                    name=f"kv_write {MODEL} T={num_tokens} page={page_size} {dtype}",
                    fn=jax.jit(_write, donate_argnums=0),
                    abstract_args=(kv, new, new, slots),
                    max_temp_bytes=(1 << 20) + 16 * weight.array_bytes(new),
                    min_alias_bytes=weight.num_bytes(kv),
                    never_copied=hlo_types(kv),
                    never_written=dense_copies(kv),
                )
            )
    return tuple(cases)


def _write(kv: Any, k: Any, v: Any, slots: Any) -> Any:
    for layer in range(NUM_LAYERS):
        kv = kv_cache.write(kv, layer, k, v, slots)
    return kv


def hlo_types(kv: Any) -> tuple[str, ...]:
    """Returns the types of the pool as XLA prints them: "bf16[1024,8,64,128]", and as rows."""
    return tuple(sorted({hlo.type_name(x.dtype, s) for x in (kv.k, kv.v) for s in _forms(x)}))


def dense_copies(kv: Any) -> tuple[str, ...]:
    """Returns the types of float copies of a quantized pool; none if it holds floats."""
    pools = [x for x in (kv.k, kv.v) if x.dtype.itemsize == 1]
    return hlo.dense_types(*(s for x in pools for s in _forms(x)))


def _forms(pool: Any) -> tuple[tuple[int, ...], ...]:
    *places, width = pool.shape
    return pool.shape, (math.prod(places), width)
