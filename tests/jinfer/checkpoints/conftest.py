"""Tiny models of every family with random weights, and writers of their checkpoints."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import HF_COMMON, HF_FAMILIES

from jinfer.checkpoints.families import (
    assemble,
    config_from_hf,
    expected_shapes,
    tensor_names,
    unflatten,
)
from jinfer.config.model import ModelConfig
from jinfer.linear import qtensor


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A random model: config.json, its translation, and params as numpy (flat and as a tree)."""

    hf: dict[str, Any]
    config: ModelConfig
    flat: dict[tuple[str | int, ...], np.ndarray]

    @property
    def params(self) -> dict[str, Any]:
        return unflatten(self.flat, self.config)

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors under their Hugging Face names."""
        return {
            name: np.ascontiguousarray(assemble(self.config, name, self.flat.__getitem__))
            for name in tensor_names(self.config)
        }


def make_tiny(family: str, **changes: Any) -> Tiny:
    hf = {"model_type": family, **HF_COMMON, **HF_FAMILIES[family], **changes}
    config = config_from_hf(hf)
    rng = np.random.default_rng(0)
    flat = {
        path: rng.normal(size=shape).astype(np.float32) / math.sqrt(shape[-1])
        for path, shape in expected_shapes(config).items()
    }
    return Tiny(hf, config, flat)


def write_hf_folder(
    folder: pathlib.Path,
    hf: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    num_shards: int = 1,
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_one_line(error: BaseException, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text, text
    for part in parts:
        assert part in text, text


@pytest.fixture
def tiny() -> Callable[..., Tiny]:
    return make_tiny


@pytest.fixture(params=sorted(HF_FAMILIES))
def any_tiny(request: pytest.FixtureRequest) -> Tiny:
    return make_tiny(request.param)


@pytest.fixture
def write_hf() -> Callable[..., pathlib.Path]:
    return write_hf_folder


@pytest.fixture
def one_line() -> Callable[..., None]:
    return assert_one_line


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, qtensor.QTensor)


@pytest.fixture(scope="session")
def linears() -> Callable[..., list[qtensor.QTensor]]:
    """The quantized weights of a params tree."""
    return lambda params: [
        x for x in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(x)
    ]


@pytest.fixture(scope="session")
def dense() -> Callable[..., Any]:
    """A params tree with its quantized weights dequantized."""
    dequantize = jax.jit(qtensor.dequantize)
    return lambda params: jax.tree.map(
        lambda x: dequantize(x) if is_quantized(x) else x, params, is_leaf=is_quantized
    )
