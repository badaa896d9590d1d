"""The files of a Hugging Face folder: JSON objects, the index and headers of safetensors.

Files may come from anywhere, so everything is checked before use, and each error is one line with
the file and the cause.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

INDEX = "model.safetensors.index.json"
# The types of plain weights; any other comes with a quantization that says what it means.
STORED_DTYPES: dict[str, np.dtype[Any]] = {
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
_DTYPES = STORED_DTYPES | _CODE_DTYPES
_MAX_SIZE = 1 << 40  # of one axis: more than any file has, and every product fits 64 bits or fails
_MAX_TENSOR_NAME = 500
_MAX_NAME_BYTES = 255  # of a file, as file systems have it


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A stored tensor: in `path` from byte `offset` on, C order."""

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

    The safetensors library checks the header: types, sizes, and that the tensors cover the file
    without overlap or gap. It accepts duplicate names (of two with one range the last is used) and
    sizes of 2**62 beside a 0; both are refused here.

    Raises:
      FileNotFoundError: it is a folder.
      ValueError: the file is cut short, or its header is not one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: expected safetensors there")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise ValueError(
                f"{path} is truncated or no safetensors file: {size} bytes, its header should end "
                f"at byte {start}; download it again"
            )
        try:
            header = json.loads(file.read(start - 8), object_pairs_hook=_without_duplicates)
            rows = {name: _row(name, r) for name, r in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} has a damaged safetensors header ({error})") from error
    for name, (_, _, _, end) in rows.items():
        if start + end > size:
            raise ValueError(
                f"{path} is truncated: tensor {name} needs bytes up to {start + end}, the file has "
                f"{size}; download it again"
            )
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{path} has a damaged safetensors header ({reason})") from error
    return {
        name: StoredTensor(path, dtype_name, shape, start + begin)
        for name, (dtype_name, shape, begin, _) in rows.items()
    }


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it holds {twice[:_MAX_NAME_BYTES]!r} twice")
    return found


def _row(name: str, row: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Returns type, shape, begin and end of a tensor; raises any error for a malformed entry."""
    if len(name) > _MAX_TENSOR_NAME:
        raise ValueError(f"a tensor's name has {len(name)} characters")
    shape, (begin, end) = tuple(row["shape"]), row["data_offsets"]
    numbers = (*shape, begin, end)
    if not isinstance(row["dtype"], str) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"no tensor is {reprlib.repr(row)}")
    if max(shape, default=0) > _MAX_SIZE:
        raise ValueError(f"a tensor cannot have the shape {list(shape)}")
    return row["dtype"], shape, begin, end


def safetensors_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the weight files of a folder: those of the index, else the single one, else all.

    An index may only name files of its folder, by plain names. Such a file may be a link: the hub's
    cache consists of links. Creating one needs access to the folder, which the author of an index
    does not have.

    Raises:
      FileNotFoundError: the index names a file that is not there.
      ValueError: the index names something else than a file of the folder.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise ValueError(f"{index} has no 'weight_map'")
        for name in weight_map.values():
            _check_file_name(index, name)
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


def _check_file_name(index: pathlib.Path, name: Any) -> None:
    """Raises ValueError unless `name` is the plain name of a file in the folder of `index`."""
    if not isinstance(name, str):
        raise ValueError(
            f"{index} has a 'weight_map' that names other things than files: {reprlib.repr(name)}"
        )
    is_plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0")
    if not is_plain or len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES:
        raise ValueError(
            f"{index} has a 'weight_map' that names {reprlib.repr(name)}: expected the plain name "
            f"of a file in the same folder"
        )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      ValueError: it is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter: nested too deep
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value
