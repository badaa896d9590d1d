"""x @ w for a quantized weight, knowing nothing of models: the weight's type picks the maths.

Inputs are quantized here, for every backend alike. A PreparedWeight goes to the kernels' ops, a
QTensor through XLA: per-channel scales multiply after the dot (XLA fuses the conversion into it);
group scales need the partial sums of each group, or the dense weight. Measured lessons: docs of
`QFormat.act`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jinfer.config.fields import require
from jinfer.config.quant_format import CODEBOOKS, FP8_MAX
from jinfer.linear import prepared as qkernels
from jinfer.linear.grids import FP8_DTYPES, divide, expand_groups, split_groups
from jinfer.linear.prepared import PreparedWeight
from jinfer.linear.qtensor import QTensor, dequantize
from pallas_kernels.int8_matmul.xla import int8_dot

OUTLIER_THRESHOLD = 6.0  # LLM.int8(): Dettmers et al. 2022, section 3.2
# Below this a token counts as zeros: its scale stays a normal number, which no CPU flushes to 0.
_TINY = 1e-30
MAX_PARTIAL_ROWS = 16  # up to here partial sums of groups beat writing the dense weight


def qmatmul(x: Array, w: QTensor | PreparedWeight, *, out_dtype: Any = None) -> Array:
    """`x @ w` with the maths of `w.fmt`; sums in f32 (int32 for int8 x int8), cast once at the end.

    Args:
      x: [..., I], any float dtype.
      w: [I, O], or [E, I, O] with x [E, ..., I]: one product an expert.
      out_dtype: default: x's.

    Returns:
      [..., O] in out_dtype.

    Raises:
      ValueError: the input widths differ.
    """
    num_inputs = w.shape[-2]
    require(
        x.shape[-1] == num_inputs,
        f"x has {x.shape[-1]} features, the weight {list(w.shape)} takes {num_inputs}",
    )
    if w.perm is not None:
        if w.ndim == 3:
            perm = w.perm.reshape(w.shape[0], *([1] * (x.ndim - 2)), num_inputs)
            x = jnp.take_along_axis(x, perm, axis=-1)
        else:
            x = jnp.take(x, w.perm, axis=-1)
    act = w.fmt.act
    if act is None:
        out = _weight_only(x, w)
    elif act == "outlier":
        # By token, where bitsandbytes takes a feature out for the whole batch: a result must not
        # depend on batch mates.
        outliers = jnp.where(jnp.abs(x) >= jnp.asarray(OUTLIER_THRESHOLD, x.dtype), x, 0)
        out = _integer(x - outliers, w) + _weight_only(outliers, w)
    elif w.fmt.kind == "int":
        out = _integer(x, w)
    else:
        out = _float8(x, w)
    return out.astype(out_dtype or x.dtype)


def _dot(x: Array, q: Array, accumulate: type = jnp.float32) -> Array:
    """x [(E,) ..., I] . q [(E,) I, O] -> [(E,) ..., O]."""
    batch = ((0,), (0,)) if q.ndim == 3 else ((), ())
    dims = (((x.ndim - 1,), (q.ndim - 2,)), batch)
    return lax.dot_general(x, q, dims, preferred_element_type=accumulate)


def _scale_rows(scale: Array, x: Array) -> Array:
    """[(E,) 1, O] -> [(E,) 1.., O], of x's rank."""
    *lead, _, num_outputs = scale.shape
    return scale.reshape(*lead, *([1] * (x.ndim - 1 - len(lead))), num_outputs)


def _stored_order(w: QTensor) -> QTensor:
    # qmatmul has permuted x already.
    return QTensor(w.q, w.scale, w.zero, w.act_scale, None, w.fmt, w.pad)


def _weight_only(x: Array, w: QTensor | PreparedWeight) -> Array:
    """Float inputs. Codes are exact in bf16 (8 bits), so only scales and sums need f32."""
    if isinstance(w, PreparedWeight):
        return qkernels.weight_only(x, w)
    qkernels.note_own_maths(x, w, op="quant_matmul")
    num_rows = x.size // x.shape[-1]
    num_groups = w.fmt.num_groups(w.shape[-2])
    if num_groups == 1 and w.fmt.kind not in CODEBOOKS and w.fmt.block == 1:
        scale = w.scales()
        out = _dot(x, w.codes().astype(x.dtype)) * _scale_rows(scale, x)
        if w.zero is not None:
            zero = _scale_rows(w.zero.astype(jnp.float32) * scale, x)
            out = out - jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True) * zero
        return out
    grouped = w.ndim == 2 and w.fmt.kind not in CODEBOOKS and w.fmt.block == 1
    if grouped and num_rows <= MAX_PARTIAL_ROWS and x.dtype != jnp.float32:
        return _partial_sums(x, w)
    return _dot(x, dequantize(_stored_order(w), x.dtype))


def _partial_sums(x: Array, w: QTensor) -> Array:
    """Groups as a batched dot, then scale and sum: reads codes, never writes the dense weight."""
    num_inputs, num_outputs = w.shape
    group = w.fmt.group
    q = split_groups(w.codes().astype(x.dtype), group)  # [G, g, O]
    xs = _split_features(x.reshape(-1, num_inputs), group)  # [M, G, g]
    partial = lax.dot_general(
        xs, q, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32
    )  # [G, M, O]
    scale = w.scales()
    out = jnp.sum(partial * scale[:, None, :], axis=0)
    if w.zero is not None:
        sums = jnp.sum(xs.astype(jnp.float32), axis=2)  # [M, G]
        out = out - jnp.dot(
            sums, w.zero.astype(jnp.float32) * scale, preferred_element_type=jnp.float32
        )
    return out.reshape(*x.shape[:-1], num_outputs)


def _split_features(x: Array, group: int) -> Array:
    """[M, I] -> [M, G, g], zeros in a short last group."""
    pad = -x.shape[-1] % group
    return jnp.pad(x, ((0, 0), (0, pad))).reshape(x.shape[0], -1, group)


def quantize_tokens(x: Array, kind: str, *, steps: float | None = None) -> tuple[Array, Array]:
    """One scale a token: codes (int8, or the fp8 dtype of `kind`) and f32 scales [..., 1].

    Args:
      x: [..., I].
      kind: "int", "fp8-e4m3" or "fp8-e5m2".
      steps: amax / steps is the scale; 127 or 127.5 for int, 448 or 57344 for fp8.
    """
    x = x.astype(jnp.float32)
    if steps is None:
        steps = 127.0 if kind == "int" else FP8_MAX[kind]
    amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = divide(jnp.where(amax < _TINY, 1.0, amax), steps)
    return _cast(divide(x, scale), kind), scale


def _cast(ratio: Array, kind: str) -> Array:
    if kind == "int":
        return jnp.clip(jnp.round(ratio), -128, 127).astype(jnp.int8)
    return jnp.clip(ratio, -FP8_MAX[kind], FP8_MAX[kind]).astype(FP8_DTYPES[kind])


def _quantize_inputs(x: Array, w: QTensor | PreparedWeight) -> tuple[Array, Array]:
    if w.fmt.act == "static":
        assert w.act_scale is not None
        scale = w.act_scale.astype(jnp.float32)
        if w.ndim == 3 and scale.ndim:
            scale = scale.reshape(-1, *([1] * (x.ndim - 1)))
        scale = jnp.broadcast_to(scale, (*x.shape[:-1], 1))
        return _cast(divide(x.astype(jnp.float32), scale), w.fmt.kind), scale
    return quantize_tokens(x, w.fmt.kind, steps=127.5 if w.fmt.act == "dyn-full" else None)


def _integer(x: Array, w: QTensor | PreparedWeight) -> Array:
    """int8 inputs, one scale a token, sums in int32 (Xiao et al. 2023, W8A8)."""
    q, token_scale = _quantize_inputs(x, w)
    if isinstance(w, PreparedWeight):
        return qkernels.integer(q, token_scale, w)
    qkernels.note_own_maths(x, w, op="int8_matmul")
    codes = w.codes()
    num_groups = w.fmt.num_groups(w.shape[-2])
    if num_groups == 1:
        if w.ndim == 2:
            sums = int8_dot(q.reshape(-1, q.shape[-1]), codes, "kn")
            acc = sums.reshape(*x.shape[:-1], -1).astype(jnp.float32)
        else:
            acc = _dot(q, codes, jnp.int32).astype(jnp.float32)
        return acc * token_scale * _scale_rows(w.scales(), x)
    require(w.ndim == 2, f"{w.fmt} with experts: use a per-channel format")
    qs = _split_features(q.reshape(-1, q.shape[-1]), w.fmt.group)
    partial = lax.dot_general(
        qs,
        split_groups(codes, w.fmt.group),
        (((2,), (1,)), ((1,), (0,))),
        preferred_element_type=jnp.int32,
    )
    out = jnp.sum(partial.astype(jnp.float32) * w.scales()[:, None, :], axis=0)
    return out.reshape(*x.shape[:-1], w.shape[-1]) * token_scale


def _float8(x: Array, w: QTensor | PreparedWeight) -> Array:
    """fp8 inputs; products of fp8 numbers are exact in f32."""
    num_inputs, num_outputs = w.shape[-2:]
    is_grouped = w.fmt.num_groups(num_inputs) > 1 or w.fmt.block > 1
    if not is_grouped:
        q, token_scale = _quantize_inputs(x, w)
    else:
        require(
            w.ndim == 2 and w.fmt.act == "dyn", f"{w.fmt}: blocks take dynamic inputs, [I, O] only"
        )
        # One scale a token and group of inputs (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
        xs = _split_features(x.reshape(-1, num_inputs), w.fmt.group)
        q, token_scale = quantize_tokens(xs, w.fmt.kind)  # [M, G, g], [M, G, 1]
    if isinstance(w, PreparedWeight):
        if is_grouped:
            q = q.reshape(q.shape[0], -1)[:, :num_inputs].reshape(x.shape)
            token_scale = token_scale.reshape(*x.shape[:-1], -1)
        return qkernels.float8(q, token_scale, w)
    qkernels.note_own_maths(x, w, op="fp8_matmul")
    if not is_grouped:
        acc = _dot(q.astype(jnp.float32), w.q.astype(jnp.float32))
        return acc * token_scale * _scale_rows(w.scales(), x)
    values = (q.astype(jnp.float32) * token_scale).reshape(q.shape[0], -1)[:, :num_inputs]
    scale = expand_groups(w.scales(), w.fmt, num_inputs, num_outputs)
    out = _dot(values, w.q.astype(jnp.float32) * scale)
    return out.reshape(*x.shape[:-1], num_outputs)
