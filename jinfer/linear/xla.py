"""The products of quantized weights that XLA runs, on codes as a `QTensor` keeps them.

Scales per channel multiply after the dot: XLA fuses the conversion of the codes into it. Group
scales need the partial sums of each group, or the dense weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jinfer.config.fields import require
from jinfer.config.quant_format import CODEBOOKS
from jinfer.linear.grids import expand_groups, split_groups
from jinfer.linear.quantized import QuantizedWeight, split_features
from pallas_kernels import dispatch
from pallas_kernels import target as target_lib
from pallas_kernels.int8_matmul.xla import int8_dot

MAX_PARTIAL_ROWS = 16  # up to here partial sums of groups beat writing the dense weight


class XlaWeight(QuantizedWeight):
    """A dataclass whose codes, scales and zero points XLA can multiply with."""

    def codes(self) -> Array:
        """Codes [..., I, O]."""
        raise NotImplementedError

    def scales(self) -> Array:
        """f32 scales [..., G, O]."""
        raise NotImplementedError

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The dense weight [..., I, O], inputs in their original order."""
        raise NotImplementedError

    def note_backend(self, x: Array, op: str) -> None:
        """Records that XLA multiplies, and refuses a kernel that `use_impl` names for `op`."""
        dispatch.pick(op, (_XLA,) if op == "int8_matmul" else _IMPLS, dispatch.AUTO, x, self)

    def multiply_floats(self, x: Array) -> Array:
        """See `QuantizedWeight`. Codes are exact in bf16, so only scales and sums need f32."""
        num_rows = x.size // x.shape[-1]
        is_plain = self.fmt.kind not in CODEBOOKS and self.fmt.block == 1
        if is_plain and self.fmt.num_groups(self.shape[-2]) == 1:
            scale = self.scales()
            out = _dot(x, self.codes().astype(x.dtype)) * _scale_rows(scale, x)
            if self.zero is not None:
                zero = _scale_rows(self.zero.astype(jnp.float32) * scale, x)
                out = out - jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True) * zero
            return out
        is_grouped = is_plain and self.ndim == 2
        if is_grouped and num_rows <= MAX_PARTIAL_ROWS and x.dtype != jnp.float32:
            return self._sum_groups(x)
        stored: Any = self
        return _dot(x, dataclasses.replace(stored, perm=None).dequantize(x.dtype))

    def multiply_int8(self, q: Array, token_scale: Array) -> Array:
        """See `QuantizedWeight`; sums in int32 (Xiao et al. 2023, W8A8)."""
        codes = self.codes()
        if self.fmt.num_groups(self.shape[-2]) == 1:
            if self.ndim == 2:
                sums = int8_dot(q.reshape(-1, q.shape[-1]), codes, "kn")
                acc = sums.reshape(*q.shape[:-1], -1).astype(jnp.float32)
            else:
                acc = _dot(q, codes, jnp.int32).astype(jnp.float32)
            return acc * token_scale * _scale_rows(self.scales(), q)
        require(self.ndim == 2, f"{self.fmt} with experts: use a per-channel format")
        partial = lax.dot_general(
            split_features(q.reshape(-1, q.shape[-1]), self.fmt.group),
            split_groups(codes, self.fmt.group),
            (((2,), (1,)), ((1,), (0,))),
            preferred_element_type=jnp.int32,
        )
        out = jnp.sum(partial.astype(jnp.float32) * self.scales()[:, None, :], axis=0)
        return out.reshape(*q.shape[:-1], self.shape[-1]) * token_scale

    def multiply_fp8(self, q: Array, token_scale: Array, shape: Sequence[int]) -> Array:
        """See `QuantizedWeight`; products of fp8 numbers are exact in f32."""
        if not self.is_blockwise:
            acc = _dot(q.astype(jnp.float32), self.q.astype(jnp.float32))
            return acc * token_scale * _scale_rows(self.scales(), q)
        num_inputs, num_outputs = self.shape[-2:]
        values = (q.astype(jnp.float32) * token_scale).reshape(q.shape[0], -1)[:, :num_inputs]
        scale = expand_groups(self.scales(), self.fmt, num_inputs, num_outputs)
        out = _dot(values, self.q.astype(jnp.float32) * scale)
        return out.reshape(*shape[:-1], num_outputs)

    def _sum_groups(self, x: Array) -> Array:
        """Groups as a batched dot, then scale and sum: the dense weight is never written."""
        num_inputs, num_outputs = self.shape
        group = self.fmt.group
        q = split_groups(self.codes().astype(x.dtype), group)  # [G, g, O]
        xs = split_features(x.reshape(-1, num_inputs), group)  # [M, G, g]
        partial = lax.dot_general(
            xs, q, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32
        )  # [G, M, O]
        scale = self.scales()
        out = jnp.sum(partial * scale[:, None, :], axis=0)
        if self.zero is not None:
            sums = jnp.sum(xs.astype(jnp.float32), axis=2)  # [M, G]
            out = out - jnp.dot(
                sums, self.zero.astype(jnp.float32) * scale, preferred_element_type=jnp.float32
            )
        return out.reshape(*x.shape[:-1], num_outputs)


def _dot(x: Array, q: Array, accumulate: type = jnp.float32) -> Array:
    """x [(E,) ..., I] . q [(E,) I, O] -> [(E,) ..., O]."""
    batch = ((0,), (0,)) if q.ndim == 3 else ((), ())
    dims = (((x.ndim - 1,), (q.ndim - 2,)), batch)
    return lax.dot_general(x, q, dims, preferred_element_type=accumulate)


def _scale_rows(scale: Array, x: Array) -> Array:
    """[(E,) 1, O] -> [(E,) 1.., O], of x's rank."""
    *lead, _, num_outputs = scale.shape
    return scale.reshape(*lead, *([1] * (x.ndim - 1 - len(lead))), num_outputs)


# Products here are recorded like those of the kernels' ops, so that `dispatch.explain` reports
# every linear.


def _why_xla(target: target_lib.Target, x: Array, w: QuantizedWeight) -> str | None:
    if reason := w.why_no_kernel():
        return reason
    if target.kind == "cpu":
        return f"needs a GPU or TPU, the target is {target.name}"
    return (
        "the weight is not laid out for kernels: experts never are, "
        "placement.place() does it for others"
    )


def _multiply(x: Array, w: QuantizedWeight) -> Array:
    raise AssertionError("XlaWeight multiplies")


_XLA = dispatch.Impl("xla", lambda target, x, w: None, _multiply)
_IMPLS = (
    dispatch.Impl("mosaic_gpu", _why_xla, _multiply),
    dispatch.Impl("mosaic_tpu", _why_xla, _multiply),
    _XLA,
)
