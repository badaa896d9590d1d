"""`packed_matmul` in C++ for CPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Impl
from pallas_kernels.native import native, why_not
from pallas_kernels.packed_matmul.base import PackedWeight
from pallas_kernels.target import Target


def _why_not(target: Target, x: jax.Array, w: PackedWeight) -> str | None:
    return why_not(target)


def _run(x: jax.Array, w: PackedWeight) -> jax.Array:
    out = jax.ShapeDtypeStruct((x.shape[0], w.num_outputs), jnp.float32)
    call = jax.ffi.ffi_call(native().target("packed_matmul"), out)
    return call(
        x, w.data, bits=np.int32(w.bits), group=np.int64(w.group), is_wide=np.bool_(w.is_wide)
    )


IMPL = Impl("native", _why_not, _run)
