"""Quantized weights as a device multiplies them fastest, their values unchanged; knows no model."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp

from jinfer.config import memory
from jinfer.config.typing import Params
from jinfer.linear.grids import FP8_DTYPES
from jinfer.linear.qtensor import QTensor, dequantize
from jinfer.linear.weight import map_weights, weights
from pallas_kernels import target as target_lib

logger = logging.getLogger(__name__)


def lay_out(params: Params, *, dense_bytes: int | None = None) -> Any:
    """Returns params with every QTensor as the current target wants it; the rest is left alone.

    On CPUs XLA would convert codes to floats anew in each step, which takes ten times as long as
    the product. So there, if together they fit `dense_bytes`, weights whose inputs stay in float
    become dense f32, the very values that they stand for, and fp8 codes with fp8 inputs f32
    numbers. Integers with int8 inputs stay, at a byte each. Elsewhere nothing changes.

    Args:
      params: a tree of arrays and QTensors.
      dense_bytes: default: a quarter of the host's memory.
    """
    if target_lib.current().kind != "cpu":
        return params
    wanted = sum(4 * x.size for x in weights(params) if isinstance(x, QTensor) and _is_converted(x))
    limit = memory.host_memory_bytes() // 4 if dense_bytes is None else dense_bytes
    if wanted > limit:
        logger.warning(
            "quantized weights stay as they are, which is slow on CPUs: as floats they would take "
            "%s, a quarter of the memory is %s",
            memory.format_size(wanted),
            memory.format_size(limit),
        )
        return params
    return map_weights(_on_cpu, params)


def _is_converted(x: QTensor) -> bool:
    return x.fmt.act is None or x.fmt.kind in FP8_DTYPES


def _on_cpu(x: Any) -> Any:
    if not isinstance(x, QTensor):
        return x
    if x.fmt.act is None:
        return dequantize(x)
    if x.fmt.kind in FP8_DTYPES:
        return dataclasses.replace(x, q=x.q.astype(jnp.float32))
    if x.q.dtype == jnp.int4:
        return dataclasses.replace(x, q=x.q.astype(jnp.int8))
    return x
