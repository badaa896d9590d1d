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

from jinfer.checkpoints.families import (
    assemble,
    config_from_hf,
    expected_shapes,
    tensor_names,
    unflatten,
)
from jinfer.config.model import ModelConfig
from jinfer.linear import qtensor

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama_with_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 32, "num_hidden_layers": 3},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 7,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "phi3": {"original_max_position_embeddings": 128, "tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}


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
    hf = {"model_type": family, **COMMON, **FAMILIES[family], **changes}
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


@pytest.fixture(params=sorted(FAMILIES))
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
