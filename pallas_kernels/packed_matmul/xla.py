"""`packed_matmul` in plain jnp: the specification of the native kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Impl
from pallas_kernels.packed_matmul.base import IN, PackedWeight, round_rows, unpack
from pallas_kernels.target import Target


def _why_not(target: Target, *args: Any) -> str | None:
    return None


def _run(x: jax.Array, w: PackedWeight) -> jax.Array:
    codes, scale, low = unpack(w)
    blocks = codes.astype(jnp.int32).reshape(-1, IN, w.num_outputs)
    rows, row_scale = round_rows(x)
    sums = jnp.einsum("mgi,gio->mgo", rows.astype(jnp.int32), blocks)
    repeat = w.group // IN
    scale, low = (jnp.repeat(y, repeat, axis=0)[None] for y in (scale, low))
    total = jnp.sum(rows.astype(jnp.int32), axis=-1, keepdims=True).astype(jnp.float32)
    return jnp.sum(row_scale * (scale * sums.astype(jnp.float32) + low * total), axis=1)


IMPL = Impl("xla", _why_not, _run)
