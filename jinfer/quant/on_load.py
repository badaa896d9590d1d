"""Quantization without data, weight by weight: of a checkpoint that is loaded, or of params."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.tree_util import SequenceKey

from jinfer.checkpoints import load as checkpoints
from jinfer.checkpoints.families import is_linear
from jinfer.config.fields import check_kinds
from jinfer.config.typing import Params
from jinfer.linear.qtensor import QTensor, check_weight
from jinfer.linear.weight import format_of, is_weight
from jinfer.models.model import Model
from jinfer.quant.recipe import parse_quantization
from jinfer.quant.solve import solve_group

KEEP_GGUF = "gguf"
"""LLM(quantization=...) that quantizes nothing: a GGUF file's own types stay."""


def load(
    path_or_name: str | os.PathLike[str],
    *,
    dtype: Any = None,
    revision: str | None = None,
    quantization: str | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Loads a model, one tensor in host memory at a time.

    Args:
      path_or_name: a Hugging Face folder, a .gguf file, a folder with exactly one, a name on the
        Hugging Face hub, or "smollm2", the default model. What exists on disk goes first.
      dtype: "float32", "bfloat16" or "float16" for every parameter; None or "auto": the
        checkpoint's own on accelerators (bfloat16 for GGUF files, unless all F32), float32 on CPUs.
      revision: branch, tag or commit of a hub name.
      quantization: how to quantize the linears of the blocks while they are loaded, one by one and
        without data: see `quant.recipe.parse_quantization`. Or "gguf": those that a GGUF file holds
        as Q4_0, Q5_0, Q8_0 or Q6_K stay as they are.

    Returns:
      The model, and its params on the default device.

    Raises:
      FileNotFoundError: nothing is there, or nothing by that name can be fetched.
      ValueError: it cannot be loaded; one line says which part, and what is supported.
    """
    given = {"revision": revision, "quantization": quantization}
    check_kinds(given, texts=given, optional=given)
    keeps_gguf = quantization == KEEP_GGUF
    quantize = None if quantization is None or keeps_gguf else quantizer(quantization)
    return checkpoints.load(
        path_or_name, dtype=dtype, revision=revision, quantize=quantize, keeps_gguf=keeps_gguf
    )


def quantizer(quantization: str) -> Callable[[str, Array | QTensor], QTensor]:
    """Returns what makes a QTensor of a linear's weight, given its name and [I, O] or [E, I, O].

    Raises:
      ValueError: see `parse_quantization`; and when called, for a weight that is quantized already
        or not finite.
    """
    method = parse_quantization(quantization)

    def quantize(name: str, w: Any) -> QTensor:
        if format_of(w) is not None:
            raise ValueError(
                f"quantization {quantization!r} needs float weights, {name} is quantized already "
                f"({format_of(w)}): leave quantization out"
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
    return jax.tree.map_with_path(convert, params, is_leaf=is_weight)
