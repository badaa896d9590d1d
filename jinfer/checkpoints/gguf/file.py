"""Reads the GGUF container: metadata, tensor table and dequantized tensors.

The file is memory-mapped and read lazily. The `gguf` package does the arithmetic of the quantized
types; its own reader builds one numpy object for each vocabulary entry, which takes seconds, so the
header is parsed here.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import numpy as np

from jinfer.checkpoints.gguf.metadata import check_metadata, check_sizes
from jinfer.config.fields import one_line

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
SUPPORTED_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
CHUNK_ELEMENTS = 1 << 22
"""Elements dequantized at once; keeps the float32 temporaries small."""

# GGUF value types: number -> numpy dtype, and two types that are not numbers.
_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DEPTH = 8  # arrays of arrays; no key that anybody writes has more than 2
_MAX_DIMS = 4  # ggml's
_MAX_SIZE = 1 << 40  # of one axis
_MAX_NAME = 255  # characters of a tensor's name, four times ggml's, and of a key in an error
_MIN_ROW_BYTES, _MIN_KEY_BYTES = 24, 13  # an entry of the tensor table, of the metadata


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table.

    Attributes:
      name: as in the file, e.g. "blk.0.attn_q.weight".
      shape: numpy order: the quantized axis last, `[out, in]` for a linear.
      type_name: the storage type, e.g. "Q4_K"; one of `SUPPORTED_TYPES`.
      offset: first byte, counted from the start of the file.
      num_bytes: stored size.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


class _Cursor:
    """Reads little-endian values from a buffer; raises if it ends too soon."""

    def __init__(self, path: pathlib.Path, buffer: mmap.mmap) -> None:
        self.path, self.buffer, self.position = path, buffer, 0

    def take(self, num_bytes: int) -> int:
        """Advances by `num_bytes` and returns their start."""
        start = self.position
        if num_bytes < 0 or start + num_bytes > len(self.buffer):
            raise ValueError(
                f"{self.path} is truncated: its header runs past the end of the file "
                f"({len(self.buffer)} bytes); download it again"
            )
        self.position = start + num_bytes
        return start

    def unpack(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.buffer, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.unpack("Q")
        start = self.take(length)
        return self.buffer[start : start + length].decode("utf-8", errors="replace")

    def value(self, key: str, kind: int, depth: int = 0) -> Any:
        """Returns the value of `key`, of a type by number, which follows."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.unpack("I"), self.unpack("Q")
            if kind in _SCALARS:
                return self.numbers(key, kind, count)
            if depth == _MAX_DEPTH:
                raise self.damaged(f"{key!r} has arrays nested deeper than {_MAX_DEPTH}")
            return [self.value(key, kind, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.damaged(f"{key!r} is of the unknown type {kind}")
        return self.numbers(key, kind, 1)[0].item()

    def numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(dtype.itemsize * count)
        if kind == _BOOL and np.frombuffer(self.buffer, "<u1", count, start).max(initial=0) > 1:
            raise self.damaged(f"{key!r} must be true or false, and a byte is neither 1 nor 0")
        return np.frombuffer(self.buffer, dtype, count, start).copy()

    def damaged(self, reason: str) -> ValueError:
        return ValueError(one_line(f"{self.path} is damaged: {reason}; download it again"))


class GGUFFile:
    """An open GGUF file.

    Attributes:
      path: of the file.
      metadata: key -> str, bool, int, float, list of str, or a numpy array of numbers; the keys of
        `gguf.metadata.FIELDS` are checked.
      tensors: name -> `GGUFTensor`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not GGUF, of an unsupported version or type, truncated or damaged, or with invalid
        metadata.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no GGUF file at {self.path}")
        with self.path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{self.path} is not a GGUF file: it does not start with 'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                self._read_header(_Cursor(self.path, buffer))

    def _read_header(self, cursor: _Cursor) -> None:
        cursor.take(len(MAGIC))
        version = cursor.unpack("I")
        if version not in SUPPORTED_VERSIONS:
            swapped = version & 0xFFFF == 0
            raise ValueError(
                f"{self.path} is {'big-endian' if swapped else f'GGUF version {version}'}; "
                f"supported: little-endian GGUF versions {', '.join(map(str, SUPPORTED_VERSIONS))}"
            )
        num_tensors, num_keys = cursor.unpack("Q"), cursor.unpack("Q")
        if num_tensors * _MIN_ROW_BYTES + num_keys * _MIN_KEY_BYTES > len(cursor.buffer):
            raise ValueError(
                f"{self.path} is truncated or damaged: {num_keys} metadata and {num_tensors} "
                f"tensors do not fit into {len(cursor.buffer)} bytes; download it again"
            )
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string()
            if key in self.metadata:
                raise cursor.damaged(f"it has the metadata {key[:_MAX_NAME]!r} twice")
            self.metadata[key] = cursor.value(key[:_MAX_NAME], cursor.unpack("I"))
        check_metadata(self.path, self.metadata)
        rows = self._read_rows(cursor, num_tensors)
        self.tensors: dict[str, GGUFTensor] = self._place(cursor, rows)
        check_sizes(self.path, self.metadata, {n: t.shape for n, t in self.tensors.items()})

    def _read_rows(self, cursor: _Cursor, num_tensors: int) -> dict[str, tuple[Any, ...]]:
        """Returns {name: (shape, number of the type, offset)} of the tensor table."""
        rows: dict[str, tuple[Any, ...]] = {}
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.unpack("I")
            if len(name) > _MAX_NAME:
                raise cursor.damaged(f"a tensor's name has {len(name)} characters")
            if not 0 < num_dims <= _MAX_DIMS:
                raise cursor.damaged(
                    f"tensor {name!r} has {num_dims} dimensions, expected 1 to {_MAX_DIMS}"
                )
            shape = tuple(cursor.unpack("Q") for _ in range(num_dims))[::-1]
            if not all(0 < size <= _MAX_SIZE for size in shape):
                raise cursor.damaged(f"tensor {name!r} has the shape {list(shape)}")
            if name in rows:
                raise cursor.damaged(f"it has a tensor {name!r} twice")
            rows[name] = shape, cursor.unpack("I"), cursor.unpack("Q")
        return rows

    def _place(self, cursor: _Cursor, rows: dict[str, tuple[Any, ...]]) -> dict[str, GGUFTensor]:
        """Finds the bytes of each tensor: one after the other, each padded to the alignment."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        alignment = self.metadata.get("general.alignment", 32)
        data_start = -(-cursor.position // alignment) * alignment
        expected_offset = 0
        known_types = {int(kind): kind.name for kind in GGMLQuantizationType}
        tensors: dict[str, GGUFTensor] = {}
        for name, (shape, kind, offset) in rows.items():
            type_name = known_types.get(kind, f"number {kind}")
            if type_name not in SUPPORTED_TYPES:
                raise ValueError(
                    f"tensor {name!r} of {self.path} has type {type_name}; "
                    f"supported: {', '.join(SUPPORTED_TYPES)}"
                )
            block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
            num_bytes = math.prod(shape) // block_size * block_bytes
            if shape[-1] % block_size:
                raise ValueError(
                    f"tensor {name!r} of {self.path} is damaged: rows of {shape[-1]} are not "
                    f"whole {type_name} blocks of {block_size}"
                )
            if data_start + offset + num_bytes > len(cursor.buffer):
                raise ValueError(
                    f"{self.path} is truncated: tensor {name!r} needs bytes up to "
                    f"{data_start + offset + num_bytes}, the file has {len(cursor.buffer)}; "
                    f"download it again"
                )
            if offset != expected_offset:
                raise cursor.damaged(
                    f"tensor {name!r} starts at offset {offset}, expected {expected_offset}, "
                    f"where the one before it ends"
                )
            expected_offset = -(-(offset + num_bytes) // alignment) * alignment
            tensors[name] = GGUFTensor(name, shape, type_name, data_start + offset, num_bytes)
        return tensors

    def stored(self, name: str) -> np.ndarray:
        """Returns the bytes of tensor `name`, uint8 [..., bytes of a row], a read-only view."""
        tensor = self.tensors[name]
        rows = (*tensor.shape[:-1], -1)
        flat = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.num_bytes,))
        return np.asarray(flat).reshape(rows)

    def read(self, name: str, dtype: np.dtype[Any] | type = np.float32) -> np.ndarray:
        """Returns tensor `name` as a fresh array of its shape in `dtype`, dequantized by chunks."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        out = np.empty(tensor.shape, dtype)
        if out.size == 0:
            return out
        # Mapped only while it is read, so that the file does not accumulate in resident memory.
        stored = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.num_bytes,))
        if tensor.type_name in ("F32", "F16"):
            out.reshape(-1)[:] = stored.view("<f4" if tensor.type_name == "F32" else "<f2")
            return out
        rows = out.reshape(-1, tensor.shape[-1])
        stored = np.asarray(stored).reshape(len(rows), -1)
        kind = GGMLQuantizationType[tensor.type_name]
        step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
        for start in range(0, len(rows), step):
            with np.errstate(all="ignore"):  # values that are not finite are reported later by name
                rows[start : start + step] = dequantize(stored[start : start + step], kind)
        return out
