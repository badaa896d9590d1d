"""Quantizes a model block by block.

Each block reads the outputs of the quantized blocks before it; inside a block q, k and v are
quantized before o is calibrated, and so on ("true sequential"). Only one block's activations are
in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

from jinfer.config.fields import require
from jinfer.config.typing import Params
from jinfer.linear.weight import format_of, weights
from jinfer.models import inputs
from jinfer.models.model import Model
from jinfer.quant import calibrate
from jinfer.quant.layer import GROUPS, Layer, LayerQuantizer
from jinfer.quant.recipe import Recipe
from jinfer.quant.solve import Row

Progress = Callable[[int, Layer, list[Row]], None]


def linear_names(model: Model) -> list[str]:
    """Returns the names of the linears that may be quantized, by layer, without routers."""
    parts = [f"{block}.{part}" for block, parts in GROUPS for part in parts]
    return [f"layers.{i}.{part}" for i in range(model.config.num_layers) for part in parts]


def quantize_model(
    model: Model,
    params: Params,
    recipe: Recipe,
    tokens: Array | None = None,
    *,
    is_sequential: bool = True,
    done: Mapping[int, Layer] | None = None,
    on_layer: Progress | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Returns params with QTensor leaves, and one row for each linear.

    Args:
      model: the model; experts are calibrated with every token, routed to them or not.
      params: its float parameters, layers as a tuple; not changed.
      recipe: what to do with each linear.
      tokens: i32 [n, T] calibration sequences; None for recipes that need none.
      is_sequential: whether a block's inputs come from quantized blocks. False: from float ones,
        as AWQ's authors do; one pass less for folding methods.
      done: layers finished in an earlier run, by index: taken as they are.
      on_layer: called after each layer with its index, parameters and rows.

    Raises:
      ValueError: the recipe fits no linear or needs tokens, or weights or activations are not
        finite, with the place.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}")
    recipe.check(linear_names(model))
    params = inputs.examine(model, params)
    if tokens is not None:
        tokens = inputs.read_tokens(tokens, model.config.vocab_size)
        require(tokens.ndim == 2, f"tokens must be [n, T], got {list(tokens.shape)}")
    layers = params["layers"]
    require(isinstance(layers, tuple), "quantization takes layers as a tuple, not stacked")
    is_quantized = any(format_of(w) is not None for w in weights(layers))
    require(not is_quantized, "these params are quantized already")
    require(
        tokens is not None or not recipe.needs_calibration,
        "this recipe needs calibration tokens: pass [n, T] of them",
    )
    x = None
    if tokens is not None and recipe.needs_calibration:
        x = calibrate.first_inputs(model, params, tokens)
    # The float model's activations at the same place, to which methods with `correct` move back.
    corrects = any(method is not None and method.correct for _, method in recipe.rules)
    require(
        not corrects or is_sequential,
        "correct compensates for quantized inputs, and these are the float model's: it needs "
        "--sequential",
    )
    reference = x if corrects else None
    new_layers, rows = [], []
    for i, layer in enumerate(layers):
        worker = LayerQuantizer(model, i, recipe, is_sequential=is_sequential, reference=reference)
        is_last = i == len(layers) - 1
        if done is not None and i in done:
            new, layer_rows = dict(done[i]), []
            if x is not None and not is_last:
                x = worker.forward(new if is_sequential else layer, x)
                if reference is not None:
                    reference = worker.forward(layer, reference)
        else:
            new, x, layer_rows = worker.run(layer, x, needs_output=not is_last)
            reference = worker.reference
            if on_layer is not None:
                on_layer(i, new, layer_rows)
        new_layers.append(new)
        rows += layer_rows
    return {**params, "layers": tuple(new_layers)}, rows


def fold_model(model: Model, params: Params, recipe: Recipe, tokens: Array) -> dict[str, Any]:
    """Returns float params with the recipe's AWQ and SmoothQuant scales folded in.

    Logits equal those of `params` up to rounding; for checks of folding without quantization.
    """
    x = calibrate.first_inputs(model, params, tokens)
    layers = []
    for i, layer in enumerate(params["layers"]):
        folded, x = LayerQuantizer(model, i, recipe).fold(layer, x)
        layers.append(folded)
    return {**params, "layers": tuple(layers)}
