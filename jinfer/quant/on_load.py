"""Quantization without data, weight by weight: of a checkpoint that is loaded, or of params."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.tree_util import SequenceKey

from jinfer.checkpoints.families import is_linear
from jinfer.config.typing import Params
from jinfer.linear.qtensor import QTensor, check_weight
from jinfer.quant.recipe import parse_quantization
from jinfer.quant.solve import solve_group

KEEP_GGUF = "gguf"
"""LLM(quantization=...) that quantizes nothing: a GGUF file's own types stay."""


def quantizer(quantization: str) -> Callable[[str, Array | QTensor], QTensor]:
    """Returns what makes a QTensor of a linear's weight, given its name and [I, O] or [E, I, O].

    Raises:
      ValueError: see `parse_quantization`; and when called, for a weight that is quantized already
        or not finite.
    """
    method = parse_quantization(quantization)

    def quantize(name: str, w: Array | QTensor) -> QTensor:
        if isinstance(w, QTensor):
            raise ValueError(
                f"quantization {quantization!r} needs float weights, {name} is quantized already "
                f"({w.fmt}): leave quantization out"
            )
        check_weight(w, name)
        return solve_group({name: w}, None, method)[0][name]

    return quantize


def quantize_params(params: Params, quantization: str) -> dict[str, Any]:
    """Returns params with the linears of the blocks quantized.

    Raises:
      ValueError: see `quantizer`, or layers are stacked.
    """
    quantize = quantizer(quantization)

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = tuple(key.idx if isinstance(key, SequenceKey) else key.key for key in path)
        return quantize(".".join(map(str, keys[:-1])), leaf) if is_linear(keys) else leaf

    if not isinstance(params, Mapping) or "layers" not in params:
        raise TypeError(f"params must be a dict with layers, got {type(params).__name__}")
    if not isinstance(params["layers"], tuple):
        raise ValueError("quantization takes layers as a tuple, not stacked")
    return jax.tree.map_with_path(convert, params, is_leaf=lambda x: isinstance(x, QTensor))
