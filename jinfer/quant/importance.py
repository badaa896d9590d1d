"""Measures the importance of each linear's inputs: mean squares over calibration tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinfer.checkpoints.families import Path
from jinfer.config.fields import require
from jinfer.config.typing import Params
from jinfer.models.model import Model
from jinfer.quant import calibrate


@jax.jit
def mean_squares(x: Array) -> Array:
    """f32 [I] of inputs [C, S, T, I]."""
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(0, 1, 2))


def measure_importance(
    model: Model,
    params: Params,
    tokens: Array | np.ndarray,
    *,
    on_layer: Callable[[int], object] | None = None,
) -> dict[Path, np.ndarray]:
    """Returns {path of a linear's weight: f32 [I]}, one block's activations in memory at a time.

    In mixtures of experts, gate and up get every token, routed to them or not; down is left out.

    Args:
      model: the model.
      params: its float parameters, layers as a tuple.
      tokens: i32 [n, T] calibration sequences.
      on_layer: called after each layer with its index.

    Raises:
      ValueError: parameters or activations are not finite, with the place.
    """
    x = calibrate.first_inputs(model, params, jnp.asarray(tokens, jnp.int32))
    out: dict[Path, np.ndarray] = {}

    def keep(layer: int, block: str, parts: tuple[str, ...], inputs: Array) -> None:
        squares = np.asarray(mean_squares(inputs))
        require(
            bool(np.isfinite(squares).all()),
            f"inputs of layers.{layer}.{block}.{parts[0]} are not finite",
        )
        out.update({("layers", layer, block, part, "w"): squares for part in parts})

    for i, layer in enumerate(params["layers"]):
        kind = model.config.kind_of(i)
        layer_params: Any = layer
        keep(i, "attn", ("q", "k", "v"), calibrate.attention_inputs(model, kind, layer_params, x))
        mixed = calibrate.mix_values(model, kind, layer_params, x)
        keep(i, "attn", ("o",), mixed)
        x, h = calibrate.mlp_inputs(model, kind, layer_params, x, mixed)
        keep(i, "mlp", ("gate", "up"), h)
        hidden = None
        if not model.config.is_moe_layer(i):
            hidden = calibrate.hidden_inputs(model, kind, layer_params, h)
            keep(i, "mlp", ("down",), hidden)
        x = calibrate.block_outputs(model, kind, layer_params, x, h, hidden)
        if on_layer is not None:
            on_layer(i)
    return out
