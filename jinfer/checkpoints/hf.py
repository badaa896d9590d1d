"""Opens Hugging Face folders: config.json and safetensors, without torch."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jinfer.checkpoints.families import Path, config_from_hf, names_of, placements
from jinfer.checkpoints.fill import DTYPES, places_of
from jinfer.checkpoints.formats.detect import QuantizedModules, first_marked
from jinfer.checkpoints.formats.interop import Weight, check_scales
from jinfer.checkpoints.formats.kv_scales import kv_scale_of, scheme_of, static_kv
from jinfer.checkpoints.hf_fields import END_TOKENS
from jinfer.checkpoints.hf_files import (
    INDEX,
    STORED_DTYPES,
    StoredTensor,
    read_json,
    read_safetensors_header,
    safetensors_files,
)
from jinfer.config.model import ModelConfig

GENERATION = "generation_config.json"
# Where config.json says how weights are quantized; the second is compressed-tensors' of old.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EMBEDDING_NAMES = (
    *("model.embed_tokens.weight", "embed_tokens.weight"),
    *("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
)


def read_hf_config(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns a folder's config, with generation_config.json's end tokens, and its config.json.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the architecture is unknown.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: not a Hugging Face model folder")
    hf = read_json(path)
    config = config_from_hf(hf, str(path))
    return with_generation_ends(config, folder), hf


def generation_files(path: pathlib.Path) -> dict[str, bytes]:
    """Returns the generation_config.json of a model's folder by name, for a copy of the model."""
    file = path / GENERATION
    return {GENERATION: file.read_bytes()} if file.is_file() else {}


def with_generation_ends(config: ModelConfig, folder: pathlib.Path) -> ModelConfig:
    """Returns the config with the end tokens of a folder's generation_config.json, if it has any.

    They take precedence, as in transformers' `generate`.
    """
    generation = folder / GENERATION
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if not END_TOKENS.holds(eos):
        raise ValueError(
            f"{generation}: eos_token_id must be {END_TOKENS.name}, got {reprlib.repr(eos)}"
        )
    if eos is None:
        return config
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    return dataclasses.replace(config, eos_token_ids=ids)


def quantization_config(folder: pathlib.Path, hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns a folder's quantization config, from config.json or another file; None if absent.

    Raises:
      ValueError: it is in a file of an unsupported tool.
    """
    holders = (hf, hf.get("text_config") or {})
    stated = [
        value for holder in holders for key in QUANTIZATION_KEYS if (value := holder.get(key))
    ]
    if stated:
        if not isinstance(stated[0], Mapping):
            raise ValueError(f"{folder}/config.json: {QUANTIZATION_KEYS[0]} must be an object")
        return dict(stated[0])
    if (folder / "hf_quant_config.json").is_file():
        raise ValueError(
            f"{folder} holds quantized weights as hf_quant_config.json describes them, which is "
            f"not supported"
        )
    if (folder / "quant_config.json").is_file():  # AutoAWQ's
        config = read_json(folder / "quant_config.json")
        return {"quant_method": "awq", **config} if "w_bit" in config else None
    beside = folder / "quantize_config.json"  # AutoGPTQ's
    if not beside.is_file():
        return None
    config = read_json(beside)
    if "bits" not in config:
        raise ValueError(f"{folder} seems quantized, but quantize_config.json names no bits")
    return config


_log = logging.getLogger(__name__)


class HFCheckpoint:
    """A Hugging Face folder as a `Checkpoint`; tensors are memory-mapped one by one.

    Raises:
      FileNotFoundError: no config.json, or a shard is missing.
      ValueError: no safetensors, damaged or truncated files, unknown model or quantization.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(folder)
        config, hf = read_hf_config(self.path)
        self.hf = hf
        files = safetensors_files(self.path)
        if not files:
            pickles = any(self.path.glob("*.bin")) or any(self.path.glob("*.pth"))
            hint = "; it has PyTorch pickles only: save it as safetensors" if pickles else ""
            raise ValueError(
                f"no weights in {self.path}: expected model.safetensors, {INDEX} and its files, "
                f"or one .gguf file{hint}"
            )
        self._tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, tensor in read_safetensors_header(file).items():
                if name in self._tensors:
                    raise ValueError(
                        f"{name} is in both {self._tensors[name].path.name} and {file.name} "
                        f"of {self.path}"
                    )
                self._tensors[name] = tensor
        self._check_layers(config)
        stated = quantization_config(self.path, hf)
        self.kv_scheme = scheme_of(stated)
        self._quantized = self._find_quantized(stated)
        taken = self._quantized.taken if self._quantized is not None else set()
        self.kv_scales: dict[int, dict[str, np.ndarray]] = {}
        self._apart: dict[str, StoredTensor] = {}  # tensors that are no weights of the model
        for name, tensor in list(self._tensors.items()):
            if name in taken:
                continue
            if (scale := kv_scale_of(name)) is not None:
                layer, kind = scale
                self.kv_scales.setdefault(layer, {})[kind] = self._kv_scale(name, kind)
                self._apart[name] = self._tensors.pop(name)
            elif self._is_empty_bias(config, name):
                self._apart[name] = self._tensors.pop(name)
            elif tensor.dtype_name not in STORED_DTYPES and places_of(
                config, name, f"checkpoint {self.path}"
            ):
                raise ValueError(
                    f"{name} in {tensor.path} is stored as {tensor.dtype_name}; "
                    f"supported: {', '.join(STORED_DTYPES)}"
                )
        shapes = {n: tensor.shape for n, tensor in self._tensors.items() if n not in taken}
        quantized = self._quantized.shapes if self._quantized is not None else {}
        self.shapes: Mapping[str, tuple[int, ...]] = {**shapes, **quantized}
        self.config = self._with_static_kv(self._untangle_head(config))
        self.dtype = self._own_dtype(hf)

    @property
    def is_quantized(self) -> bool:
        """Whether some of its weights are stored quantized."""
        return self._quantized is not None

    @property
    def quantized_names(self) -> tuple[str, ...]:
        """Names of the weights that are stored quantized."""
        return () if self._quantized is None else tuple(self._quantized.shapes)

    def plain_tensors(self) -> dict[str, StoredTensor]:
        """All other tensors as stored, including those that `shapes` leaves out."""
        taken = self._quantized.taken if self._quantized is not None else set()
        return {n: t for n, t in {**self._tensors, **self._apart}.items() if n not in taken}

    def _kv_scale(self, name: str, kind: str) -> np.ndarray:
        values = np.array(self._tensors[name].read())
        if kind.endswith("scale") or kind in ("k", "v", "kv"):
            parent, _, leaf = name.rpartition(".")
            check_scales(f"{self.path}: {parent}", {leaf: values}, [(leaf, "positive")])
        return values

    def _with_static_kv(self, config: ModelConfig) -> ModelConfig:
        static, reason = static_kv(config, self.kv_scheme, self.kv_scales)
        if reason is not None:
            _log.warning("%s: its scales of a KV cache are not used: %s", self.path, reason)
        return dataclasses.replace(config, static_kv=static)

    def _check_layers(self, config: ModelConfig) -> None:
        """Raises ValueError if the config has more layers than the files."""
        found = {match[1] for name in self._tensors if (match := _LAYER.search(name))}
        if config.num_layers > len(found):
            raise ValueError(
                f"{self.path}/config.json: num_hidden_layers is {config.num_layers}, but the "
                f"safetensors files have {len(found)} layers"
            )

    def _find_quantized(self, stated: Mapping[str, Any] | None) -> QuantizedModules | None:
        tensors = self._tensors
        if self.kv_scheme is not None and first_marked(tensors) is None:
            return None  # the KV cache alone is quantized
        if stated is None:
            if (marked := first_marked(tensors)) is not None:
                raise ValueError(
                    f"{self.path} holds quantized weights ({marked}), but its config.json has no "
                    f"{QUANTIZATION_KEYS[0]} that says how to read them"
                )
            return None
        return QuantizedModules(stated, tensors, lambda name: tensors[name].read(), str(self.path))

    def _is_empty_bias(self, config: ModelConfig, name: str) -> bool:
        """Whether a tensor is a zero bias that AutoGPTQ writes even for models without biases."""
        weight = name.removesuffix("bias") + "weight"
        if self._quantized is None or weight not in self._quantized.shapes or weight == name:
            return False
        try:
            placements(config, name)
        except ValueError:  # no place for it
            return not np.any(self._tensors[name].read())
        return False

    def _untangle_head(self, config: ModelConfig) -> ModelConfig:
        """Whether a head that the config calls tied is tied: some tools store the matrix twice.

        An untied head must be stored; files of encoders lack it.
        """
        if not config.tie_word_embeddings:
            return config
        embedding = self._embedding()
        head = self._tensors.get("lm_head.weight") or self._tensors.get(
            "language_model.lm_head.weight"
        )
        is_tied = head is None and "lm_head.weight" not in self.shapes
        if head is not None and embedding is not None:
            is_tied = head.shape == embedding.shape and np.array_equal(
                head.read(), embedding.read()
            )
        return dataclasses.replace(config, tie_word_embeddings=is_tied)

    def _embedding(self) -> StoredTensor | None:
        return next((self._tensors[n] for n in _EMBEDDING_NAMES if n in self._tensors), None)

    def _own_dtype(self, hf: Mapping[str, Any]) -> str:
        text = hf.get("text_config") or {}
        for holder in (hf, text):
            stated = str(holder.get("dtype") or holder.get("torch_dtype")).removeprefix("torch.")
            if stated in DTYPES:
                return stated
        embedding = self._embedding()
        if embedding is not None and embedding.dtype_name in ("BF16", "F16"):
            return STORED_DTYPES[embedding.dtype_name].name
        return "float32"

    def read_quantized(self, name: str) -> Weight | None:
        if self._quantized is None or name not in self._quantized.shapes:
            return None
        return self._quantized.read(name)

    def read(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        tensor = self._tensors[name].read()
        return tensor.astype(dtype) if tensor.dtype == np.float64 else tensor

    def label(self, name: str) -> str:
        return name

    def spell(self, path: Path, expert: int = 0) -> str:
        return names_of(self.config, path)[expert]
