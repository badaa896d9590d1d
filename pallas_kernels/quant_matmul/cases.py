"""Calls of `quant_matmul` at shapes of real models, for compiling, tuning and measuring."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hlo
from pallas_kernels.compile_only import CompileCase
from pallas_kernels.quant_matmul.base import FP8_DTYPES
from pallas_kernels.target import Target

# Model, linear, K, N, with fused qkv and gate_up.
LINEARS = (
    ("llama-3-8b", "qkv", 4096, 6144),
    ("llama-3-8b", "o", 4096, 4096),
    ("llama-3-8b", "gate_up", 4096, 28672),
    ("llama-3-8b", "down", 14336, 4096),
    ("qwen3-8b", "gate_up", 4096, 24576),
    ("qwen3-8b", "down", 12288, 4096),
    ("qwen3-0.6b", "qkv", 1024, 4096),
    ("qwen3-0.6b", "o", 2048, 1024),
    ("qwen3-0.6b", "gate_up", 1024, 6144),
    ("qwen3-0.6b", "down", 3072, 1024),
    ("gemma-3-1b", "qkv", 1152, 1536),
    ("gemma-3-1b", "o", 1024, 1152),
    ("gemma-3-1b", "gate_up", 1152, 13824),
    ("gemma-3-1b", "down", 6912, 1152),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: rows, linear, codes, group (None: per channel), zero points."""

    model: str
    linear: str
    num_rows: int
    num_inputs: int
    num_outputs: int
    codes: Any = jnp.int4
    group: int | None = 128
    has_zero: bool = False
    is_quick: bool = False

    @property
    def num_groups(self) -> int:
        return 1 if self.group is None else -(-self.num_inputs // self.group)

    def __str__(self) -> str:
        group = "channel" if self.group is None else f"g{self.group}"
        zero = " zero" if self.has_zero else ""
        shape = f"M{self.num_rows} K{self.num_inputs} N{self.num_outputs}"
        return f"{self.model} {self.linear} {shape} {jnp.dtype(self.codes).name} {group}{zero}"

    def abstract_args(self, layout: str) -> tuple[Any, ...]:
        """Returns (x, q, scale, zero) as shapes."""
        shape = (self.num_inputs, self.num_outputs)
        scale = jax.ShapeDtypeStruct((self.num_groups, self.num_outputs), jnp.bfloat16)
        return (
            jax.ShapeDtypeStruct((self.num_rows, self.num_inputs), jnp.bfloat16),
            jax.ShapeDtypeStruct(shape if layout == "kn" else shape[::-1], self.codes),
            scale,
            scale if self.has_zero else None,
        )

    def random_args(self, layout: str, seed: int) -> tuple[Any, ...]:
        """Returns (x, q, scale, zero) of random numbers, as `abstract_args` describes them."""
        keys = jax.random.split(jax.random.key(seed), 4)
        x, q, scale, zero = self.abstract_args(layout)
        if jnp.dtype(q.dtype) in FP8_DTYPES:
            codes = jax.random.normal(keys[1], q.shape, jnp.bfloat16).astype(q.dtype)
        else:
            info = jnp.iinfo(q.dtype)
            codes = jax.random.randint(keys[1], q.shape, int(info.min), int(info.max) + 1, jnp.int8)
            codes = codes.astype(q.dtype)
        return (
            jax.random.normal(keys[0], x.shape, x.dtype),
            codes,
            jax.random.uniform(keys[2], scale.shape, scale.dtype, 0.5, 1.5),
            None
            if zero is None
            else jax.random.randint(keys[3], zero.shape, -8, 8).astype(zero.dtype),
        )


def cases() -> Iterator[Case]:
    """Enumerates the calls; those marked quick are the ones CI compiles."""
    for model, linear, k, n in LINEARS:
        rows = (1, 16, 64, 256) if model == "llama-3-8b" else (1, 64)
        for m in rows:
            quick = (model, linear) == ("llama-3-8b", "qkv")
            yield Case(model=model, linear=linear, num_rows=m, num_inputs=k, num_outputs=n,
                       is_quick=quick)  # fmt: skip
    llama = {"model": "llama-3-8b", "linear": "qkv", "num_inputs": 4096, "num_outputs": 6144}
    for m in (8, 32, 100, 128, 1024):  # 100: not a multiple of the copy engine's 8 rows
        yield Case(**llama, num_rows=m, is_quick=m == 100)
    for m in (1, 16, 256):
        yield Case(**llama, num_rows=m, group=32, has_zero=True, is_quick=m == 256)
        yield Case(**llama, num_rows=m, group=64)
        yield Case(**llama, num_rows=m, has_zero=True, is_quick=m == 1)
        yield Case(**llama, num_rows=m, codes=jnp.int8, is_quick=m == 16)
        yield Case(**llama, num_rows=m, codes=jnp.float8_e4m3fn, is_quick=m == 16)
    yield Case(**llama, num_rows=16, codes=jnp.float8_e5m2)
    for codes in (jnp.int4, jnp.int8, jnp.float8_e4m3fn):
        yield Case(**llama, num_rows=16, codes=codes, group=None, is_quick=codes == jnp.int4)


def compile_cases(target: Target, *, quick: bool = False) -> tuple[CompileCase, ...]:
    """Returns the cases that `scripts/compile_kernels.py` compiles for `target`.

    Temporaries must not include a bf16 copy of the weight: they are bounded by a quarter of one,
    plus the rows of x and the partial sums.
    """
    from pallas_kernels.quant_matmul import preferred_layout, quant_matmul

    layout = preferred_layout(target)
    compiled = []
    for case in cases():
        if quick and not case.is_quick:
            continue
        kernel = "mosaic_gpu" if target.kind == "gpu" else "mosaic_tpu"
        impl = "xla" if case.group is None else kernel
        is_kernel = impl == "mosaic_gpu"
        group = case.group or case.num_inputs
        sums = 16 if case.num_rows <= 64 else 8  # bytes per output
        compiled.append(
            CompileCase(
                name=f"quant_matmul {case}",
                fn=functools.partial(quant_matmul, group=group, layout=layout, impl=impl),
                abstract_args=case.abstract_args(layout),
                max_temp_bytes=case.num_inputs * case.num_outputs * 2 // 4
                + case.num_rows * (case.num_inputs * 4 + case.num_outputs * sums),
                expects_wgmma=is_kernel,
                expects_tma=is_kernel,
                never_written=hlo.dense_types((case.num_inputs, case.num_outputs)),
            )
        )
    return tuple(compiled)
