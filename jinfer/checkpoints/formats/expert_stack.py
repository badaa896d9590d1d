"""Stacks experts that are stored one by one, in one common quantized format if there is one.

Checkpoints may keep single experts in float, or give them different bits, groups, orders and zero
points. This module finds formats that represent several others without changing any value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jinfer.config.quant_format import CHANNEL, TENSOR, QFormat
from jinfer.linear.qtensor import DoubleScale, QTensor, from_codes


def common_format(formats: Sequence[QFormat | None], num_inputs: int) -> QFormat | None:
    """Returns a format that represents weights of all `formats` exactly; None if there is none.

    Codes may get wider, groups smaller, and zero points of 0 may be added; plain scales replace
    double ones. The kinds of codes and of input quantization must be the same.

    Args:
      formats: of weights [num_inputs, O]; None for a float weight.
      num_inputs: I.
    """
    known = [fmt for fmt in formats if fmt is not None]
    if len(known) < len(formats):
        return None
    first = known[0]
    if len(set(known)) == 1:
        return first
    zeros = {fmt.float_zero for fmt in known if not fmt.symmetric}
    if len({(fmt.kind, fmt.act) for fmt in known}) > 1 or len(zeros) > 1:
        return None
    if any(fmt.block > 1 for fmt in known):
        return None
    sizes = {min(fmt.group_size(num_inputs), num_inputs) for fmt in known}
    group = min(sizes)
    if any(size % group and size != num_inputs for size in sizes):
        return None
    if group == num_inputs:
        group = TENSOR if all(fmt.group == TENSOR for fmt in known) else CHANNEL
    return dataclasses.replace(
        first,
        bits=max(fmt.bits for fmt in known),
        group=group,
        symmetric=not zeros,
        float_zero=True in zeros,
        double_quant=False,
    )


def stack_experts(weights: Sequence[QTensor]) -> QTensor | None:
    """Returns [E, I, O] of E weights [I, O] with equal values; None if no format represents all."""
    fmt = common_format([x.fmt for x in weights], weights[0].shape[0])
    if fmt is None:
        return None
    alike = [_in_format(x, fmt) for x in weights]
    changes: list[dict[str, Any]] = [{} for _ in alike]
    if any(x.perm is not None for x in alike):
        order = jnp.arange(weights[0].shape[0], dtype=jnp.int32)
        for change, x in zip(changes, alike, strict=True):
            change["perm"] = order if x.perm is None else x.perm
    for name in ("scale", "zero"):
        arrays = [getattr(x, name) for x in alike]
        if len({a.dtype for a in arrays if isinstance(a, Array)}) > 1:  # f32 holds f16 and bf16
            for change, array in zip(changes, arrays, strict=True):
                change[name] = array.astype(jnp.float32)
    alike = [dataclasses.replace(x, **change) for x, change in zip(alike, changes, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)


def _in_format(x: QTensor, fmt: QFormat) -> QTensor:
    """Returns the same values in a format from `common_format`."""
    if x.fmt == fmt:
        return x
    num_inputs, num_outputs = x.shape
    size = min(x.fmt.group_size(num_inputs), num_inputs)
    times = -(-size // fmt.group_size(num_inputs))

    def spread(per_group: Array) -> Array:
        if x.fmt.group == TENSOR != fmt.group:
            per_group = jnp.broadcast_to(per_group, (1, num_outputs))
        return jnp.repeat(per_group, times, axis=0)[: fmt.num_groups(num_inputs)]

    scale = x.scale.decode() if isinstance(x.scale, DoubleScale) else x.scale
    scale, zero = spread(scale), None
    if not fmt.symmetric:
        dtype = jnp.float32 if fmt.float_zero else jnp.int8
        zero = jnp.zeros(scale.shape, dtype) if x.zero is None else spread(x.zero.astype(dtype))
    return from_codes(x.codes(), scale, zero, fmt, act_scale=x.act_scale, perm=x.perm)


def describe_forms(forms: Mapping[int, QFormat | None]) -> str:
    """Describes the experts' formats (None is float): "float: expert 1; int4-g32: experts 0, 2"."""
    experts: dict[str, list[str]] = {}
    for expert, fmt in sorted(forms.items()):
        experts.setdefault("float" if fmt is None else str(fmt), []).append(str(expert))
    rare_first = sorted(experts.items(), key=lambda item: len(item[1]))
    return "; ".join(f"{form}: {_listed(names)}" for form, names in rare_first)


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"expert {names[0]}"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"experts {', '.join(names[:8])}{more}"
