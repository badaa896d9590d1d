"""Calls of `fp8_matmul` at shapes of real models, for compiling, tuning and measuring."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hlo
from pallas_kernels.compile_only import CompileCase
from pallas_kernels.quant_matmul.cases import LINEARS
from pallas_kernels.target import Target

E4M3 = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; scales "tensor", "channel" (by token) or "block" (128 x 128)."""

    model: str
    linear: str
    num_rows: int
    num_inputs: int
    num_outputs: int
    scales: str = "channel"
    w_dtype: Any = E4M3
    is_quick: bool = False

    def __str__(self) -> str:
        shape = f"M{self.num_rows} K{self.num_inputs} N{self.num_outputs}"
        return f"{self.model} {self.linear} {shape} {jnp.dtype(self.w_dtype).name} {self.scales}"

    @property
    def block(self) -> int | None:
        return 128 if self.scales == "block" else None

    def abstract_args(self, layout: str) -> tuple[Any, ...]:
        """Returns (x, w, x_scale, w_scale) as shapes."""
        blocks = -(-self.num_inputs // 128)
        x_scale, w_scale = {
            "tensor": ((), ()),
            "channel": ((self.num_rows, 1), (1, self.num_outputs)),
            "block": ((self.num_rows, blocks), (blocks, self.num_outputs)),
        }[self.scales]
        shape = (self.num_inputs, self.num_outputs)
        return (
            jax.ShapeDtypeStruct((self.num_rows, self.num_inputs), E4M3),
            jax.ShapeDtypeStruct(shape if layout == "kn" else shape[::-1], self.w_dtype),
            jax.ShapeDtypeStruct(x_scale, jnp.float32),
            jax.ShapeDtypeStruct(w_scale, jnp.float32),
        )

    def random_args(self, layout: str, seed: int) -> tuple[Any, ...]:
        """Returns (x, w, x_scale, w_scale) of random numbers, as `abstract_args` describes them."""
        keys = jax.random.split(jax.random.key(seed), 4)
        x, w, x_scale, w_scale = self.abstract_args(layout)
        return (
            jax.random.normal(keys[0], x.shape, jnp.bfloat16).astype(x.dtype),
            jax.random.normal(keys[1], w.shape, jnp.bfloat16).astype(w.dtype),
            jax.random.uniform(keys[2], x_scale.shape, jnp.float32, 0.5, 1.5),
            jax.random.uniform(keys[3], w_scale.shape, jnp.float32, 0.5, 1.5),
        )


def cases() -> Iterator[Case]:
    """Enumerates the calls; those marked quick are the ones CI compiles."""
    for model, linear, k, n in LINEARS:
        if n % 128 == 0:
            is_qkv = (model, linear) == ("llama-3-8b", "qkv")
            rows = (1, 16, 64, 256, 2048) if is_qkv else (16,)
            for m in rows:
                yield Case(model=model, linear=linear, num_rows=m, num_inputs=k, num_outputs=n,
                           scales="block", is_quick=is_qkv and m in (16, 256))  # fmt: skip
    llama = {"model": "llama-3-8b", "linear": "qkv", "num_inputs": 4096, "num_outputs": 6144}
    for m in (16, 256):
        yield Case(**llama, num_rows=m, scales="tensor")
        yield Case(**llama, num_rows=m, scales="channel", is_quick=m == 16)
    yield Case(**llama, num_rows=16, scales="channel", w_dtype=jnp.float8_e5m2)


def compile_cases(target: Target, *, quick: bool = False) -> tuple[CompileCase, ...]:
    """Returns the cases that `scripts/compile_kernels.py` compiles for `target`."""
    from pallas_kernels.fp8_matmul import fp8_matmul

    layout = "nk" if target.kind == "gpu" else "kn"
    compiled = []
    for case in cases():
        if quick and not case.is_quick:
            continue
        kernel = "mosaic_gpu" if target.kind == "gpu" else "mosaic_tpu"
        impl = kernel if case.block else "xla"
        weight = case.num_inputs * case.num_outputs * 2
        rows = case.num_rows * (case.num_inputs * 2 + case.num_outputs * 8)
        # Mixed fp8 dtypes go through bf16: one copy of the weight.
        is_mixed = case.w_dtype != E4M3
        dense = hlo.dense_types((case.num_inputs, case.num_outputs))
        compiled.append(
            CompileCase(
                name=f"fp8_matmul {case}",
                fn=functools.partial(fp8_matmul, block=case.block, layout=layout, impl=impl),
                abstract_args=case.abstract_args(layout),
                max_temp_bytes=(weight if is_mixed else weight // 4) + rows,
                expects_wgmma=impl == "mosaic_gpu",
                expects_tma=impl == "mosaic_gpu",
                never_written=() if is_mixed else dense,
            )
        )
    return tuple(compiled)
