"""Quantized weights as the kernels of a target read them; knows no model, and no maths of its own.

`prepare` lays a weight out once, when an engine takes it; its products call the ops of
`pallas_kernels`, which choose a backend. What no kernel reads stays a QTensor, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jinfer.config.engine import BACKENDS
from jinfer.config.fields import require
from jinfer.config.quant_format import TENSOR, QFormat
from jinfer.linear.packed import PackedLinear, pack_weight, why_not_packed
from jinfer.linear.qtensor import DoubleScale, QTensor
from jinfer.linear.quantized import QuantizedWeight
from pallas_kernels import dispatch
from pallas_kernels import target as target_lib
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.int8_matmul import int8_matmul
from pallas_kernels.quant_matmul import preferred_layout, quant_matmul
from pallas_kernels.quant_matmul.base import Layout

F32 = jnp.float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedWeight(QuantizedWeight):
    """A QTensor [I, O] in the layout of a target's kernels; a pytree of plain arrays.

    Attributes:
      q: int4, int8 or fp8 codes, [I, O] (layout "kn") or [O, I] ("nk").
      scale: [G, O] f32 or bf16, a row of O for each group of inputs, whatever the format shares.
      zero: None, or floats of scale's shape in the codes' signed units.
      act_scale, perm: as in QTensor.
      fmt: the format (static).
      layout: of q (static).
      impl: "auto", or the backend that multiplies (static).
    """

    q: Array
    scale: Array
    zero: Array | None
    act_scale: Array | None
    perm: Array | None
    fmt: QFormat = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    impl: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [I, O]."""
        return self.q.shape if self.layout == "kn" else self.q.shape[::-1]

    @property
    def dtype(self) -> Any:
        """Dtype of the scales: what the weight is worth in float."""
        return self.scale.dtype

    def _code_axes(self, inputs: str, outputs: str) -> tuple[str, str]:
        return (inputs, outputs) if self.layout == "kn" else (outputs, inputs)

    def multiply_floats(self, x: Array) -> Array:
        """See `QuantizedWeight`."""
        return quant_matmul(
            x,
            self.q,
            self.scale,
            self.zero,
            group=self.fmt.group_size(self.shape[0]),
            layout=self.layout,
            out_dtype=F32,
            impl=self.impl,
        )

    def multiply_int8(self, q: Array, token_scale: Array) -> Array:
        """See `QuantizedWeight`."""
        scale = self.scale.astype(F32)
        return int8_matmul(q, self.q, token_scale, scale, layout=self.layout, impl=self.impl)

    def multiply_fp8(self, q: Array, token_scale: Array, shape: Sequence[int]) -> Array:
        """See `QuantizedWeight`; one scale a token, or one a group too."""
        if self.is_blockwise:
            q = q.reshape(q.shape[0], -1)[:, : shape[-1]].reshape(shape)
            token_scale = token_scale.reshape(*shape[:-1], -1)
        return fp8_matmul(
            q,
            self.q,
            token_scale,
            self.scale.astype(F32),
            block=self.fmt.group if self.is_blockwise else None,
            layout=self.layout,
            out_dtype=F32,
            impl=self.impl,
        )


def prepare(
    w: QTensor, *, impl: str = dispatch.AUTO, target: target_lib.Target | None = None
) -> PreparedWeight | PackedLinear | QTensor:
    """Lays a weight out as `target` (default: the current one) reads it. Values do not change.

    On a CPU weights stay as they are, unless a backend is named: "native", or a Mosaic backend to
    be simulated.

    Args:
      w: the weight.
      impl: "auto", or the backend that is to multiply it.
      target: what it is laid out for.

    Raises:
      ValueError: there is no backend of that name.
      NotImplementedError: a backend other than "xla" is named, and it does not read the weight's
        format.
    """
    require(impl in BACKENDS, f"linear_impl must be one of {', '.join(BACKENDS)}, got {impl!r}")
    target = target or target_lib.current()
    is_named = impl not in (dispatch.AUTO, "xla")
    if impl == "native":
        if reason := why_not_packed(w, target):
            raise NotImplementedError(f"linear_impl='native': {reason}; 'auto' leaves it to XLA")
        return pack_weight(w)
    if target.kind == "cpu" and not is_named:
        return w
    if reason := w.why_no_kernel():
        if is_named:
            raise NotImplementedError(f"linear_impl={impl!r}: {reason}; 'auto' leaves it to XLA")
        return w
    num_outputs = w.shape[1]
    assert not isinstance(w.scale, DoubleScale)  # they go with codebooks
    scale = w.scales() if w.scale.dtype == jnp.float16 else w.scale  # no kernel reads f16
    layout = {"mosaic_gpu": "nk", "mosaic_tpu": "kn"}.get(impl) or preferred_layout(target)
    return PreparedWeight(
        q=w.q.T if layout == "nk" else w.q,
        scale=_expand(scale, w.fmt, num_outputs),
        zero=None if w.zero is None else _expand(_as_float(w.zero), w.fmt, num_outputs),
        act_scale=w.act_scale,
        perm=w.perm,
        fmt=w.fmt,
        layout="nk" if layout == "nk" else "kn",
        impl=impl,
    )


def _expand(a: Array, fmt: QFormat, num_outputs: int) -> Array:
    """[G, O / block], or [1, 1], to [G, O]."""
    if fmt.group == TENSOR:
        return jnp.broadcast_to(a, (1, num_outputs))
    if fmt.block > 1:
        return jnp.repeat(a, fmt.block, axis=-1)[:, :num_outputs]
    return a


def _as_float(zero: Array) -> Array:
    return zero if jnp.issubdtype(zero.dtype, jnp.floating) else zero.astype(jnp.bfloat16)  # exact
