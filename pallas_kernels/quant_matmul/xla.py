"""The quantized matmul in plain XLA: the reference, and the backend that always works.

Per-channel scales multiply the product (XLA fuses the weight's cast into the GEMM). XLA does not
fuse group scales: few rows use one small product per group, many rows a dequantized weight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import target as target_lib
from pallas_kernels.dispatch import Impl
from pallas_kernels.int8_matmul.xla import int8_dot
from pallas_kernels.quant_matmul.base import FP8_DTYPES, QuantSpec, shape_kn

F32 = jnp.float32

# Limits up to which int8 digits of x beat a dequantized weight on a CPU: rows with scales per
# channel, rows with scales per group, and unrolled groups. Measured, see docs/lab/log.md.
_MAX_CHANNEL_ROWS = 128
_MAX_GROUP_ROWS = 48
_MAX_UNROLLED_GROUPS = 64
_NUM_DIGITS = 3
# Rows below this count as zeros, so that units are normal numbers, which no CPU flushes to 0.
_TINY = 1e-30


def _why_not(target: Any, x: Any, q: Any, scale: Any, zero: Any, spec: QuantSpec) -> str | None:
    if spec.config is not None:
        return f"XLA takes no tiles, got {type(spec.config).__name__}"
    return None


def run(
    x: jax.Array, q: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
    """Computes x [M, K] @ dequant(q) in the form that suits the target and the shapes."""
    num_inputs, _ = shape_kn(q, spec.layout)
    num_groups = scale.shape[0]
    is_cpu = target_lib.current().kind == "cpu"
    is_int = jnp.dtype(q.dtype) not in FP8_DTYPES
    if is_cpu and is_int and _fits_digits(x.shape[0], num_groups):
        y = _by_digits(x, q, scale, zero, spec)
    elif num_groups == 1:
        y = _per_channel(x, q, scale, zero, spec)
    elif not is_cpu and num_inputs % spec.group == 0 and x.shape[0] * 2 <= spec.group:
        y = _per_group(x, q, scale, zero, spec)  # its partial sums are smaller than a bf16 weight
    else:
        w = dequantize(q, scale, zero, spec).astype(x.dtype)
        y = _dot(x, w, spec)
    return y.astype(spec.out_dtype)


def dequantize(
    q: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
    """Returns the weight in f32, in q's layout: (q - zero) * scale."""
    num_inputs, _ = shape_kn(q, spec.layout)

    def expand(a: jax.Array) -> jax.Array:
        rows = jnp.repeat(a.astype(F32), spec.group, axis=0)[:num_inputs]
        return rows if spec.layout == "kn" else rows.T

    w = q.astype(F32)
    w = w if zero is None else w - expand(zero)
    return w * expand(scale)


def _dot(x: jax.Array, w: jax.Array, spec: QuantSpec) -> jax.Array:
    contract = ((1,), (0 if spec.layout == "kn" else 1,))
    return lax.dot_general(x, w, (contract, ((), ())), preferred_element_type=F32)


def _per_channel(
    x: jax.Array, q: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
    y = _dot(x, q.astype(x.dtype), spec)
    if zero is not None:
        y = y - x.astype(F32).sum(axis=1, keepdims=True) * zero.astype(F32)
    return y * scale.astype(F32)


def _per_group(
    x: jax.Array, q: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
    num_rows, group = x.shape[0], spec.group
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    num_groups = num_inputs // group
    xs = x.reshape(num_rows, num_groups, group)
    if spec.layout == "kn":
        w, axes = (
            q.reshape(num_groups, group, num_outputs),
            ((2,), (1,)),
        )
        batch = ((1,), (0,))
    else:
        w, axes = q.reshape(num_outputs, num_groups, group), ((2,), (2,))
        batch = ((1,), (1,))
    y = lax.dot_general(xs, w.astype(x.dtype), (axes, batch), preferred_element_type=F32)
    if zero is not None:
        sums = xs.astype(F32).sum(axis=2).T[:, :, None]  # [G, M, 1]
        y = y - sums * zero.astype(F32)[:, None, :]
    return (y * scale.astype(F32)[:, None, :]).sum(axis=0)  # [G, M, N] -> [M, N]


# For CPUs, where XLA's int8 products are far faster than converting the weight first.


def _fits_digits(num_rows: int, num_groups: int) -> bool:
    max_rows = _MAX_CHANNEL_ROWS if num_groups == 1 else _MAX_GROUP_ROWS
    return num_rows <= max_rows and num_groups <= _MAX_UNROLLED_GROUPS


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _by_digits(
    x: jax.Array, q: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
    """Multiplies by splitting x into three base-128 digits: int8 products that keep 22 bits of x.

    With a row's largest |x| = a, x = a / (127 * 128^2) * (d2 * 128^2 + d1 * 128 + d0) up to half a
    unit of d0: exact products and sums in int32, errors of x below 2^-22 of the row's largest.
    """
    num_rows = x.shape[0]
    x = x.astype(F32)
    top = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    unit = jnp.where(top < _TINY, 1.0, top) / (127 * 128**2)
    whole = jnp.rint(x / unit)
    rest, digits = whole.astype(jnp.int32), []
    for power in (128**2, 128, 1):
        digit = lax.div(rest + jnp.sign(rest) * (power // 2), jnp.int32(power))
        digits.append(digit.astype(jnp.int8))
        rest = rest - digit * power
    stacked = jnp.concatenate(digits)  # [3 M, K]
    num_inputs, num_outputs = shape_kn(q, spec.layout)
    axis = 0 if spec.layout == "kn" else 1
    codes = q.astype(jnp.int8)
    y = jnp.zeros((), F32)
    for g in range(scale.shape[0]):
        start, end = g * spec.group, min((g + 1) * spec.group, num_inputs)
        part = stacked[:, start:end]
        sums = int8_dot(part, lax.slice_in_dim(codes, start, end, axis=axis), spec.layout)
        d = sums.astype(F32).reshape(_NUM_DIGITS, num_rows, num_outputs)
        product = (d[0] * 128 + d[1]) * 128 + d[2]
        if zero is not None:
            total = whole[:, start:end].sum(axis=1, keepdims=True)
            product = product - total * zero[g].astype(F32)[None]
        y = y + product * scale[g].astype(F32)[None]
    return y * unit


@_by_digits.defjvp
def _by_digits_jvp(
    spec: QuantSpec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """The derivative of the exact product: rounded digits have no useful derivative."""

    def product(x: jax.Array, q: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        return _dot(x.astype(F32), dequantize(q, scale, zero, spec), spec)

    return _by_digits(*primals, spec), jax.jvp(product, primals, tangents)[1]


IMPL = Impl("xla", _why_not, run)
