"""Takes an `LLM`'s model and weights from the caller or loads them, and places the weights."""

from __future__ import annotations

import os
from typing import Any

from jinfer.config.fields import shown
from jinfer.config.typing import Params
from jinfer.linear.placement import Placement
from jinfer.linear.weight import flatten_weights, is_weight
from jinfer.models.inputs import examine
from jinfer.models.model import Model
from jinfer.setup.options import LLMOptions
from jinfer.steps.tracing import refuse_tracing

SERVED_DTYPES = ("float32", "bfloat16", "float16")


def take_model(
    model: str | os.PathLike[str] | Model, params: Params | None, options: LLMOptions
) -> tuple[Model, Params]:
    """Returns the model and weights that `LLM` was given, or loads them; the weights are placed.

    Args:
      model, params: as given to `LLM`.
      options: of which dtype, revision, quantization and linear_impl are used.

    Raises:
      ValueError: a Model came without weights, or weights with a path.
    """
    dtype, quantization = options.dtype, options.quantization
    if isinstance(model, Model):
        if quantization == "gguf":
            raise ValueError("quantization 'gguf' is for GGUF files: pass the path of one")
        if options.revision is not None:
            raise ValueError(
                f"revision={shown(options.revision)} is for names on the hub, but this model is in "
                "memory: drop it"
            )
        params = examine_params(model, params)
        own_dtype = str(params["embed"]["w"].dtype)
        if dtype not in ("auto", own_dtype):
            raise ValueError(
                f"dtype={dtype!r}: the params of a Model are served as they are, in {own_dtype}; "
                f"cast them, or drop dtype"
            )
        return model, place(params, Placement.of(params, options.linear_impl), quantization)
    if params is not None:
        raise ValueError("params go with a Model; a path or name has its own weights")
    from jinfer.quant.on_load import load

    loaded, own = load(
        model,
        dtype=None if dtype == "auto" else dtype,
        revision=options.revision,
        quantization=quantization,
    )
    return loaded, Placement.of(own, options.linear_impl).place(own, is_owner=True)


def examine_params(model: Model, params: Any) -> dict[str, Any]:
    """Returns a caller's weights as plain dicts and a tuple of layers.

    Args:
      model: the model of these weights.
      params: a tree as `Model.init` makes it, or quantized.

    Raises:
      ValueError, TypeError: as `examine`; a float array has a dtype that is not served, or an array
        was donated or deleted.
    """
    refuse_tracing()
    if params is None:
        raise ValueError("a Model needs its weights: pass params=")
    params = examine(model, params)
    for path, leaf in flatten_weights(params):
        if not is_weight(leaf) and leaf.dtype.name not in SERVED_DTYPES:
            name = "".join(map(str, path))
            raise ValueError(
                f"params{name} must be of {', '.join(SERVED_DTYPES)}, got {leaf.dtype}: cast it"
            )
    return params


def place(params: Params, placement: Placement, quantization: str | None) -> Params:
    """Places examined weights, quantized first if `quantization` says so, and returns them.

    "gguf" quantizes nothing here: it applies only to loading a GGUF file.
    """
    params = placement.bind(params)
    if quantization not in (None, "gguf"):
        from jinfer.quant.on_load import quantize_params

        params = quantize_params(params, quantization)
    return placement.place(params)
