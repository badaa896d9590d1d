"""Converts quantized Hugging Face folders into another format, without loss or not at all.

One module is in memory at a time. Codes, scales and zero points keep their bits, other tensors
their bytes. The result is read back and compared before it is renamed to the output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jinfer.checkpoints.formats.interop import Dense
from jinfer.checkpoints.formats.kv_scales import Scheme, scheme_for
from jinfer.checkpoints.hf import QUANTIZATION_KEYS, HFCheckpoint
from jinfer.checkpoints.hf_files import INDEX
from jinfer.checkpoints.save import (
    EXPORTS,
    new_folder,
    quantization_config,
    skipped_linears,
    write_module,
    write_tensors,
    write_text,
)
from jinfer.config.fields import require
from jinfer.config.quant_format import CHANNEL
from jinfer.linear.qtensor import QTensor

# What a converted folder says anew, or what described the old one.
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", INDEX)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
      num_modules: quantized modules rewritten.
      num_tensors: other tensors, copied.
      formats: of the modules, as `QFormat` prints them.
      num_bytes: of the new folder.
    """

    num_modules: int
    num_tensors: int
    formats: tuple[str, ...]
    num_bytes: int


def convert_folder(
    checkpoint: HFCheckpoint,
    output: str | os.PathLike[str],
    export: str,
    *,
    on_module: Callable[[str], object] | None = None,
) -> Conversion:
    """Writes a quantized folder in the format `export`, atomically.

    Args:
      checkpoint: an open folder of quantized weights.
      output: must not exist, or be empty.
      export: one of `save.EXPORTS`.
      on_module: called with the name of each quantized module, when it is written.

    Raises:
      FileExistsError: the output is there and not empty.
      ValueError: the source is not quantized, or `export` cannot hold a weight exactly as it is:
        the message names the first such module.
    """
    require(export in EXPORTS, f"export must be one of {', '.join(EXPORTS)}, got {export!r}")
    require(
        checkpoint.is_quantized,
        f"{checkpoint.path} is not quantized; `jinfer quantize` makes quantized folders of it",
    )
    names = checkpoint.quantized_names
    plain = checkpoint.plain_tensors()
    stand_ins: dict[str, QTensor] = {}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            module, weight = name.removesuffix(".weight"), _weight(checkpoint, name)
            stand_ins[module] = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weight
            )
            for leaf, tensor in write_module(EXPORTS[export][0], module, weight).items():
                yield f"{module}.{leaf}", tensor
            if on_module is not None:
                on_module(module)
        for name, tensor in plain.items():
            yield name, tensor.read()

    with new_folder(pathlib.Path(output)) as partial:
        write_tensors(partial, tensors())
        config = {k: v for k, v in checkpoint.hf.items() if k not in QUANTIZATION_KEYS}
        if isinstance(text := config.get("text_config"), Mapping):
            config["text_config"] = {k: v for k, v in text.items() if k not in QUANTIZATION_KEYS}
        config["quantization_config"] = quantization_config(
            export,
            stand_ins,
            skipped=skipped_linears(plain),
            kv_scheme=_kv_scheme(checkpoint, export),
        )
        write_text(partial / "config.json", json.dumps(config, indent=2))
        for file in sorted(checkpoint.path.iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and file.name not in _NOT_COPIED:
                write_text(partial / file.name, file.read_bytes())
        _check_same(checkpoint, HFCheckpoint(partial), export)
        return Conversion(
            len(names),
            len(plain),
            tuple(sorted({str(x.fmt) for x in stand_ins.values()})),
            sum(file.stat().st_size for file in partial.iterdir()),
        )


def _kv_scheme(checkpoint: HFCheckpoint, export: str) -> Scheme | None:
    """Returns the scheme of the new folder's KV scales: that of the old one, or fp8.

    compressed-tensors reads no scales without a scheme; other formats store none.
    """
    if checkpoint.kv_scheme is None and checkpoint.kv_scales and export == "compressed-tensors":
        return scheme_for(checkpoint.kv_scales.values())
    return checkpoint.kv_scheme


def _weight(checkpoint: HFCheckpoint, name: str) -> QTensor:
    weight = checkpoint.read_quantized(name)
    module = name.removesuffix(".weight")
    if isinstance(weight, Dense):
        raise ValueError(f"{module} cannot be converted without loss: {weight.reason}")
    assert weight is not None
    return weight


def _check_same(source: HFCheckpoint, made: HFCheckpoint, export: str) -> None:
    """Raises ValueError unless both hold the same weights, bit for bit."""
    require(
        set(source.quantized_names) == set(made.quantized_names),
        f"{export} files would not show which modules are quantized",
    )
    for name in source.quantized_names:
        before, after = _weight(source, name), made.read_quantized(name)
        difference = "it reads back as floats"
        if isinstance(after, QTensor):
            difference = _difference(before, after)
        require(
            not difference,
            f"{name.removesuffix('.weight')}: {export} cannot hold {before.fmt} as it is: "
            f"{difference}",
        )
    require(
        source.kv_scheme in (None, made.kv_scheme),
        f"{export} files cannot hold the kv_cache_scheme {source.kv_scheme}",
    )
    before, after = source.plain_tensors(), made.plain_tensors()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype_name == after[name].dtype_name and tensor.shape == after[name].shape
        assert tensor.read().tobytes() == after[name].read().tobytes(), name


def _difference(a: QTensor, b: QTensor) -> str:
    """Returns the names of the parts in which two weights of one shape differ."""

    def spelled(x: QTensor) -> Any:
        # one group of all inputs is a channel
        whole = x.fmt.group >= x.shape[-2] and x.fmt.block == 1
        return dataclasses.replace(x.fmt, group=CHANNEL) if whole else x.fmt

    if spelled(a) != spelled(b):
        return f"it reads back as {b.fmt}"
    parts: Mapping[str, tuple[Any, Any]] = {
        "codes": (a.codes(), b.codes()),
        "scales": (a.scale, b.scale),
        "zero points": (a.zero, b.zero),
        "input scales": (a.act_scale, b.act_scale),
        "order of inputs": (a.perm, b.perm),
    }
    return ", ".join(
        f"its {what} change" for what, (old, new) in parts.items() if not _is_same(old, new)
    )


def _is_same(a: Any, b: Any) -> bool:
    old, new = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(old) == len(new) and all(
        x.dtype == y.dtype and x.shape == y.shape and _bytes(x) == _bytes(y)
        for x, y in zip(old, new, strict=True)
    )


def _bytes(x: Any) -> bytes:
    return np.asarray(x.astype("int8") if x.dtype == "int4" else x).tobytes()
