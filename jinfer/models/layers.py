"""Parameters that blocks are made of: linears and norms; their maths is in `ops`.

A parameter's value may be an array or a QTensor: it is read with `get_value()` and handed on.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jinfer.config.model import ModelConfig
from jinfer.linear import ops


class Linear(nnx.Module):
    """x @ w + b with w [I, O], or a stack [E, I, O] of them for experts; `name` is for profiles."""

    def __init__(
        self,
        name: str,
        num_inputs: int,
        num_outputs: int,
        *,
        has_bias: bool,
        dtype: Any,
        rngs: nnx.Rngs,
        num_experts: int | None = None,
    ):
        self.name = name
        shape = (num_inputs, num_outputs)
        if num_experts is not None:
            shape = (num_experts, *shape)
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * num_inputs**-0.5)
        self.b = nnx.Param(jnp.zeros((num_outputs,), dtype)) if has_bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        with jax.named_scope(self.name):
            b = None if self.b is None else self.b.get_value()
            return ops.linear(x, self.w.get_value(), b)


class Norm(nnx.Module):
    """RMS norm over the last axis, of the model's width or of a head."""

    def __init__(self, config: ModelConfig, width: int, *, dtype: Any):
        self.config = config
        neutral = 0.0 if config.norm_plus_one else 1.0
        self.scale = nnx.Param(jnp.full((width,), neutral, dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        config = self.config
        return ops.rms_norm(
            x, self.scale.get_value(), config.norm_eps, plus_one=config.norm_plus_one
        )
