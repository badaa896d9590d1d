"""Saves params, quantized or not, as a Hugging Face folder or GGUF file that `load` reads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jinfer.checkpoints.families import Path, assemble, config_from_hf, placements, tensor_names
from jinfer.checkpoints.files import writing
from jinfer.checkpoints.formats.awq import awq_config, write_awq
from jinfer.checkpoints.formats.bnb import bnb_config, write_bnb
from jinfer.checkpoints.formats.compressed_tensors import ct_config, write_ct
from jinfer.checkpoints.formats.fp8 import fp8_config, write_fp8
from jinfer.checkpoints.formats.gptq import gptq_config, write_gptq
from jinfer.checkpoints.formats.kv_scales import Scheme, scheme_for
from jinfer.checkpoints.formats.native import native_config, write_native
from jinfer.checkpoints.gguf.write import check_gguf, write_gguf
from jinfer.checkpoints.hf import QUANTIZATION_KEYS
from jinfer.checkpoints.hf_files import INDEX
from jinfer.config.fields import require
from jinfer.config.typing import Params
from jinfer.linear.qtensor import QTensor, concat_outputs
from jinfer.linear.weight import format_of, is_weight, map_weights
from jinfer.models.model import Model

EXPORTS: Mapping[
    str, tuple[Callable[..., dict[str, np.ndarray]], Callable[..., dict[str, Any]]]
] = {
    "native": (write_native, native_config),
    "gptq": (write_gptq, gptq_config),
    "awq": (write_awq, awq_config),
    "compressed-tensors": (write_ct, ct_config),
    "fp8": (write_fp8, fp8_config),
    "bitsandbytes": (write_bnb, bnb_config),
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
GGUF = "gguf"
SHARD_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extras:
    """What a folder holds besides the weights.

    Attributes:
      files: name -> content of other files, such as a report or the tokenizer's.
      vocabulary: the tokenizer as metadata of a GGUF file.
      kv_scales: {layer: {"k" or "v": scale}} of a KV cache (`HFCheckpoint.kv_scales`).
      kv_scheme: their scheme (`HFCheckpoint.kv_scheme`); None: fp8.
    """

    files: Mapping[str, str | bytes] = dataclasses.field(default_factory=dict)
    vocabulary: Mapping[str, Any] | None = None
    kv_scales: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    kv_scheme: Scheme | None = None


def save_folder(
    folder: str | os.PathLike[str],
    model: Model,
    params: Params,
    hf: Mapping[str, Any],
    *,
    export: str = "native",
    dtype: str = "float16",
    extras: Extras = Extras(),
) -> int:
    """Writes config.json and safetensors, or one GGUF file; atomically.

    Args:
      folder: must not exist, or be empty.
      model: the model.
      params: its parameters; QTensor leaves go to `export`'s format, layers as a tuple.
      hf: config.json of the float model (`checkpoint.hf`).
      export: one of `EXPORTS`, or "gguf".
      dtype: of float matrices, and of norms and biases that it represents exactly; others, such as
        a norm into which scales were folded, are stored as f32.
      extras: other content of the folder.

    Returns:
      Bytes written.

    Raises:
      FileExistsError: the folder is there and not empty.
      ValueError: the format cannot hold one of the weights, named with it.
    """
    _check_name(export)
    if export == GGUF:
        require(not extras.kv_scales, "a GGUF file has no place for scales of a KV cache")
        with new_folder(pathlib.Path(folder)) as partial:
            held = _in_dtype(params, dtype)
            write_gguf(partial / "model.gguf", model, held, tokenizer=extras.vocabulary)
            return _finish(partial, extras.files)
    config = {k: v for k, v in hf.items() if k not in QUANTIZATION_KEYS}
    tied = model.config.tie_word_embeddings
    config |= {"tie_word_embeddings": tied, "dtype": dtype}
    config.pop("torch_dtype", None)
    config.setdefault("architectures", [ARCHITECTURES[str(hf["model_type"])]])
    written = config_from_hf(config)
    different = [
        name
        for name in ("hidden_size", "num_layers", "num_heads", "attention_bias", "rope")
        if getattr(written, name) != getattr(model.config, name)
    ]
    require(not different, f"this config.json does not describe the model: {different} differ")
    quantized = _quantized_modules(model, params)
    require(
        bool(quantized) or not extras.kv_scales, "scales of a KV cache go with quantized weights"
    )
    if quantized:
        scheme = extras.kv_scheme
        if scheme is None and extras.kv_scales:
            scheme = scheme_for(extras.kv_scales.values())
        plain = (
            n for n in tensor_names(model.config) if n.removesuffix(".weight") not in quantized
        )
        config["quantization_config"] = quantization_config(
            export,
            _outlines(quantized),
            skipped=skipped_linears(plain),
            kv_scheme=scheme,
        )
    with new_folder(pathlib.Path(folder)) as partial:
        tensors = _tensors(model, params, quantized, export, dtype)
        write_tensors(partial, itertools.chain(tensors, _kv_tensors(extras.kv_scales)))
        write_text(partial / "config.json", json.dumps(config, indent=2))
        return _finish(partial, extras.files)


def _finish(folder: pathlib.Path, files: Mapping[str, str | bytes]) -> int:
    for name, content in files.items():
        write_text(folder / name, content)
    return sum(file.stat().st_size for file in folder.iterdir())


def _in_dtype(params: Params, dtype: str) -> Params:
    """Rounds the float matrices outside QTensors to `dtype`."""

    def keep(x: Any) -> Any:
        if is_weight(x) or x.ndim < 2:
            return x
        return x.astype(dtype).astype("float32")

    return map_weights(keep, params)


def _check_name(export: str) -> None:
    names = (*EXPORTS, GGUF)
    require(export in names, f"export must be one of {', '.join(names)}, got {export!r}")


def quantization_config(
    export: str,
    weights: Mapping[str, QTensor],
    *,
    skipped: tuple[str, ...] = (),
    kv_scheme: Scheme | None = None,
) -> dict[str, Any]:
    """Returns the entry of config.json that describes quantized modules.

    A head that is not quantized is listed as skipped even where it is tied and not a tensor of the
    file, since other libraries build a linear for it. Every format keeps the KV scheme.
    """
    if "lm_head" not in (*weights, *skipped):
        skipped = (*skipped, "lm_head")
    config = EXPORTS[export][1](weights, skipped=skipped)
    return config if kv_scheme is None else config | {"kv_cache_scheme": kv_scheme}


def skipped_linears(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the plain modules that other libraries build as linears and must not quantize."""
    modules = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    return tuple(m for m in modules if not m.endswith(("norm", "embed_tokens")))


def check_export(model: Model, params: Params, export: str) -> None:
    """Checks whether `export` can hold the QTensors of `params`, without writing them.

    Args:
      model: the model.
      params: its parameters. Only QTensors among the linears are checked: one object once, and one
        expert of many.
      export: one of `EXPORTS`, or "gguf".

    Raises:
      ValueError: it cannot; the message names the first module.
    """
    _check_name(export)
    quantized = _quantized_modules(model, params)
    if export != GGUF:
        EXPORTS[export][1](_outlines(quantized))
    seen: set[tuple[Any, ...]] = set()
    for name, module in quantized.items():
        if module.kind in seen:
            continue
        seen.add(module.kind)
        if export == GGUF:
            check_gguf(name, module.weight())
        else:
            write_module(EXPORTS[export][0], name, module.weight())


def check_free(folder: pathlib.Path) -> None:
    """Raises FileExistsError unless a folder of this name can be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose another output folder")


@dataclasses.dataclass(frozen=True)
class _Module:
    """A quantized tensor of a checkpoint: parts that the family fuses, or one expert's part."""

    parts: tuple[QTensor, ...]
    expert: int | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Key that is equal for modules made of the same objects, for any expert."""
        return (*map(id, self.parts), self.expert is None)

    def weight(self) -> QTensor:
        """Returns [I, O], computed at each call so that no second copy of all experts is held."""
        return _join(self.parts, self.expert)


def _join(parts: tuple[QTensor, ...], expert: int | None) -> QTensor:
    if expert is not None:
        parts = (jax.tree.map(lambda a: a[expert], parts[0]),)
    return parts[0] if len(parts) == 1 else concat_outputs(parts)


def _quantized_modules(model: Model, params: Params) -> dict[str, _Module]:
    get = _getter(params)
    modules = {}
    for name in tensor_names(model.config):
        places = placements(model.config, name)
        leaves = [get(place.path) for place in places]
        weights = tuple(leaf for leaf in leaves if format_of(leaf) is not None)
        if not weights:
            continue
        module = name.removesuffix(".weight")
        require(
            len(weights) == len(leaves),
            f"{module} is one tensor in checkpoints, but only some of its parts are quantized",
        )
        modules[module] = _Module(weights, places[0].expert)
        if len(weights) > 1 and len({w.fmt for w in weights}) > 1:
            raise ValueError(
                f"{module} is one tensor in checkpoints, but its parts differ: "
                f"{', '.join(str(w.fmt) for w in weights)}; give them one format"
            )
    return modules


def _outlines(modules: Mapping[str, _Module]) -> dict[str, QTensor]:
    """Returns the modules as shapes and formats, without values."""
    made: dict[tuple[Any, ...], QTensor] = {}
    for module in modules.values():
        if module.kind not in made:
            join = functools.partial(_join, expert=module.expert)
            made[module.kind] = jax.eval_shape(join, module.parts)
    return {name: made[module.kind] for name, module in modules.items()}


def _tensors(
    model: Model,
    params: Params,
    quantized: Mapping[str, _Module],
    export: str,
    dtype: str,
) -> Iterator[tuple[str, np.ndarray]]:
    get, write = _getter(params), EXPORTS[export][0]
    for name in tensor_names(model.config):
        module = name.removesuffix(".weight")
        if module in quantized:
            leaves = write_module(write, module, quantized[module].weight())
            yield from ((f"{module}.{leaf}", tensor) for leaf, tensor in leaves.items())
        else:
            tensor = assemble(model.config, name, lambda path: np.asarray(get(path)))
            stored = tensor.astype(jax.numpy.dtype(dtype))
            if tensor.ndim == 1 and not np.array_equal(stored.astype(np.float32), tensor):
                stored = tensor.astype(np.float32)
            yield name, np.ascontiguousarray(stored)


def _kv_tensors(
    scales: Mapping[int, Mapping[str, Any]],
) -> Iterator[tuple[str, np.ndarray]]:
    for layer, kinds in scales.items():
        for kind, scale in kinds.items():
            leaf = f"{kind}_scale" if kind in ("k", "v", "kv") else kind
            name = f"model.layers.{layer}.self_attn.{leaf}"
            yield name, np.atleast_1d(np.asarray(scale, getattr(scale, "dtype", np.float32)))


def write_module(
    write: Callable[..., dict[str, np.ndarray]], module: str, weight: QTensor
) -> dict[str, np.ndarray]:
    try:
        return write(weight)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error


def _getter(params: Params) -> Callable[[Path], Any]:
    def get(path: Path) -> Any:
        node: Any = params
        for key in path:
            node = node[key]
        return node

    return get


def write_tensors(folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Writes shards of at most 4 GiB, with one in memory at a time."""
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    num_bytes = 0

    def flush() -> None:
        if held:
            save_file(dict(held), folder / f"shard-{len(shards)}", {"format": "pt"})
            shards.append(list(held))
            held.clear()

    for name, tensor in tensors:
        size = tensor.nbytes
        if num_bytes + size > SHARD_BYTES:
            flush()
            num_bytes = 0
        held[name] = tensor
        num_bytes += size
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))


def write_text(path: pathlib.Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder: renamed to `folder` when complete, removed after an error."""
    check_free(folder)
    partial = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with writing(folder, left="nothing of it is left"):
            yield partial
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
