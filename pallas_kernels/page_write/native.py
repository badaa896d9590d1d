"""`page_write` in C++ for CPUs."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.dispatch import Impl
from pallas_kernels.native import native, why_not
from pallas_kernels.target import Target


def _why_not(target: Target, *args: Any) -> str | None:
    return why_not(target)


def _run(pool: jax.Array, rows: jax.Array, pages: jax.Array, offsets: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct(pool.shape, pool.dtype)
    call = jax.ffi.ffi_call(native().target("page_write"), out, input_output_aliases={0: 0})
    return call(pool, rows, pages, offsets)


IMPL = Impl("native", _why_not, _run)
