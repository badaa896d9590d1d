"""Opens a folder, a GGUF file, a hub name or the default model, and fills the params tree."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from jinfer.checkpoints.fill import Checkpoint, Quantizer, fill, resolve_dtype
from jinfer.checkpoints.gguf.checkpoint import GGUFCheckpoint
from jinfer.checkpoints.hf import HFCheckpoint, read_hf_config, with_generation_ends
from jinfer.checkpoints.hf_files import safetensors_files
from jinfer.checkpoints.locate import fetch_from_hub, locate
from jinfer.config.model import ModelConfig
from jinfer.models.model import Model

_CONFIG_FILES = ("config.json", "generation_config.json")
_QUANTIZATION_FILES = ("quantize_config.json", "hf_quant_config.json")  # beside config.json
_WEIGHT_FILES = (
    *_CONFIG_FILES,
    *_QUANTIZATION_FILES,
    *("*.safetensors", "*.safetensors.index.json"),
)


def load(
    path_or_name: str | os.PathLike[str],
    *,
    dtype: Any = None,
    revision: str | None = None,
    quantize: Quantizer | None = None,
    keeps_gguf: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """Loads a model, one tensor in host memory at a time; see `quant.on_load.load`.

    Args:
      path_or_name, dtype, revision: as there.
      quantize: called with the name and the weight of each linear of the blocks, while it is
        loaded; returns the weight to keep.
      keeps_gguf: keep the linears that a GGUF file holds as Q4_0, Q5_0, Q8_0 or Q6_K as they are.
    """
    if keeps_gguf:
        checkpoint = _open_as_it_is(path_or_name, revision)
    else:
        checkpoint = open_checkpoint(path_or_name, revision=revision)
    params = fill(checkpoint, resolve_dtype(dtype, checkpoint.dtype), quantize=quantize)
    return Model(checkpoint.config), params


def _open_as_it_is(path_or_name: str | os.PathLike[str], revision: str | None) -> Checkpoint:
    path = locate(path_or_name, revision)
    if path is None or not path.is_file():
        raise ValueError(
            f"quantization 'gguf' keeps the types of a GGUF file, {path_or_name} is none; "
            f"quantized folders are always loaded as they are"
        )
    return _open_gguf(path_or_name, path, keeps_quantized=True)


def _open_gguf(
    given: str | os.PathLike[str], path: pathlib.Path, *, keeps_quantized: bool = False
) -> GGUFCheckpoint:
    """Opens a GGUF file; if its folder was given, with the end tokens of other files there."""
    checkpoint = GGUFCheckpoint(path, keeps_quantized=keeps_quantized)
    folder = pathlib.Path(given).expanduser()
    if folder.is_dir():
        checkpoint.config = with_generation_ends(checkpoint.config, folder)
        checkpoint.hf["eos_token_id"] = list(checkpoint.config.eos_token_ids)
    return checkpoint


def open_checkpoint(
    path_or_name: str | os.PathLike[str], *, revision: str | None = None
) -> Checkpoint:
    """Opens a checkpoint and reads its config and tensor table; raises as `load`."""
    path = locate(path_or_name, revision)
    if path is None:
        path = fetch_from_hub(os.fspath(path_or_name), revision, _WEIGHT_FILES)
    return _open_gguf(path_or_name, path) if path.is_file() else HFCheckpoint(path)


def load_config(
    path_or_name: str | os.PathLike[str], *, revision: str | None = None
) -> ModelConfig:
    """Returns a model's config; for a hub name only config.json is fetched."""
    path = locate(path_or_name, revision)
    if path is None:
        path = fetch_from_hub(os.fspath(path_or_name), revision, _CONFIG_FILES)
    if path.is_dir() and not safetensors_files(path):
        return read_hf_config(path)[0]
    return open_checkpoint(path).config
