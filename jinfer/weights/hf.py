"""Hugging Face folders: config.json and safetensors, one file or several; no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jinfer.config import ModelConfig
from jinfer.models.families import Path, config_from_hf, names_of, placements
from jinfer.weights.fill import DTYPES
from jinfer.weights.interop import Weight
from jinfer.weights.quantized import QuantizedModules, first_marked, kv_scale_of

INDEX = "model.safetensors.index.json"
# Where config.json says how weights are quantized; the second is compressed-tensors' of old.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# The types of plain weights; any other comes with a quantization that says what it means.
_STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Those of codes and scales, which a reader of `quantized` understands.
_CODE_DTYPES: dict[str, np.dtype[Any]] = {
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPES = _STORED_DTYPES | _CODE_DTYPES
_EMBEDDING_NAMES = (
    *("model.embed_tokens.weight", "embed_tokens.weight"),
    *("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `path` from byte `offset`, C order."""

    path: pathlib.Path
    dtype_name: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Returns the tensor as a read-only view of the file, unmapped when it is dropped.

        Raises:
          ValueError: of a type that is not supported.
        """
        dtype = _DTYPES.get(self.dtype_name)
        if dtype is None:
            raise ValueError(
                f"{self.path} holds a tensor as {self.dtype_name}; supported: {', '.join(_DTYPES)}"
            )
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        return np.memmap(self.path, dtype, "r", self.offset, self.shape)


def read_safetensors_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one .safetensors file.

    Raises:
      ValueError: the file is cut short, or its header is not one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise ValueError(
                f"{path} is truncated or no safetensors file: {size} bytes, its header should end "
                f"at byte {start}; download it again"
            )
        try:
            header = json.loads(file.read(start - 8))
            rows = {name: _row(r) for name, r in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} has a damaged safetensors header ({error})") from error
    tensors = {}
    for name, (dtype_name, shape, begin, end) in rows.items():
        if start + end > size:
            raise ValueError(
                f"{path} is truncated: tensor {name} needs bytes up to {start + end}, the file has "
                f"{size}; download it again"
            )
        dtype = _DTYPES.get(dtype_name)
        if dtype is not None and end - begin != dtype.itemsize * int(np.prod(shape, dtype=int)):
            raise ValueError(
                f"{path} is damaged: {name} is {dtype_name}{list(shape)} in {end - begin} bytes"
            )
        tensors[name] = StoredTensor(path, dtype_name, shape, start + begin)
    return tensors


def _row(row: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, begin and end of a tensor; raises what it may if a header has no such row."""
    shape, (begin, end) = tuple(row["shape"]), row["data_offsets"]
    numbers = (*shape, begin, end)
    if not isinstance(row["dtype"], str) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"no tensor is {row}")
    return row["dtype"], shape, begin, end


def safetensors_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the weight files of a folder: those of its index, else the single one, else all.

    Raises:
      FileNotFoundError: the index names a file that is not there.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise ValueError(f"{index} has no 'weight_map'")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has a 'weight_map' that names other things than files")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{index} names {file.name}, which is not in the folder")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    # "consolidated" is Mistral's own spelling of weights that the folder also holds.
    return sorted(
        file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated")
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      ValueError: it is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def read_hf_config(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns a folder's config, with the ends of generation_config.json, and its config.json.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the architecture is unknown.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: not a Hugging Face model folder")
    hf = read_json(path)
    config = config_from_hf(hf)
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")  # what transformers' generate stops at
        if eos is not None:
            ids = tuple(eos) if isinstance(eos, list) else (eos,)
            config = dataclasses.replace(config, eos_token_ids=ids)
    return config, hf


def quantization_config(folder: pathlib.Path, hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what a folder says of its quantization, in config.json or beside it; None: nothing.

    Raises:
      ValueError: only a file of a tool that is not supported says it.
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


class HFCheckpoint:
    """A Hugging Face folder as a `Checkpoint`: tensors are mapped one by one, never held.

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
        self._quantized = self._find_quantized(hf)
        taken = self._quantized.taken if self._quantized is not None else set()
        self.kv_scales: dict[int, dict[str, float]] = {}
        self._apart: dict[str, StoredTensor] = {}  # what is no weight of the model
        for name, tensor in list(self._tensors.items()):
            if name in taken:
                continue
            if self._quantized is not None and (scale := kv_scale_of(name)) is not None:
                layer, kind = scale
                self.kv_scales.setdefault(layer, {})[kind] = float(tensor.read().reshape(-1)[0])
                self._apart[name] = self._tensors.pop(name)
            elif self._is_empty_bias(config, name):
                self._apart[name] = self._tensors.pop(name)
            elif tensor.dtype_name not in _STORED_DTYPES and placements(config, name):
                raise ValueError(
                    f"{name} in {tensor.path} is stored as {tensor.dtype_name}; "
                    f"supported: {', '.join(_STORED_DTYPES)}"
                )
        shapes = {n: tensor.shape for n, tensor in self._tensors.items() if n not in taken}
        quantized = self._quantized.shapes if self._quantized is not None else {}
        self.shapes: Mapping[str, tuple[int, ...]] = {**shapes, **quantized}
        self.config = self._untangle_head(config)
        self.dtype = self._own_dtype(hf)

    @property
    def is_quantized(self) -> bool:
        """Whether some of its weights are stored quantized."""
        return self._quantized is not None

    @property
    def quantized_names(self) -> tuple[str, ...]:
        """Names of the weights stored quantized: those that `read_quantized` knows."""
        return () if self._quantized is None else tuple(self._quantized.shapes)

    def plain_tensors(self) -> dict[str, StoredTensor]:
        """All other tensors, as they lie in the files; also those that `shapes` leaves out."""
        taken = self._quantized.taken if self._quantized is not None else set()
        return {n: t for n, t in {**self._tensors, **self._apart}.items() if n not in taken}

    def _find_quantized(self, hf: Mapping[str, Any]) -> QuantizedModules | None:
        stated = quantization_config(self.path, hf)
        tensors = self._tensors
        if stated is None:
            if (marked := first_marked(tensors)) is not None:
                raise ValueError(
                    f"{self.path} holds quantized weights ({marked}), but its config.json has no "
                    f"{QUANTIZATION_KEYS[0]} that says how to read them"
                )
            return None
        return QuantizedModules(stated, tensors, lambda name: tensors[name].read(), str(self.path))

    def _is_empty_bias(self, config: ModelConfig, name: str) -> bool:
        """Whether a tensor is one of the zeros that AutoGPTQ wrote as biases of every linear,
        those of models without biases too."""
        weight = name.removesuffix("bias") + "weight"
        if self._quantized is None or weight not in self._quantized.shapes or weight == name:
            return False
        try:
            placements(config, name)
        except ValueError:  # no place for it
            return not np.any(self._tensors[name].read())
        return False

    def _untangle_head(self, config: ModelConfig) -> ModelConfig:
        """Whether a head that is said to be tied is: tools write that matrix once or twice.

        One that is said to be untied must be there: files of encoders lack it.
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
            return _STORED_DTYPES[embedding.dtype_name].name
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
