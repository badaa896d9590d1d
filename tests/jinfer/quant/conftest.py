"""Tiny random models of each kind that folding must know: biases, ties, 1 + gamma, experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.model import ModelConfig
from jinfer.models.model import Model

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
KINDS = {
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2", "attention_bias": True, "tie_word_embeddings": True},
    "biased": {"family": "llama", "attention_bias": True, "mlp_bias": True, "num_kv_heads": 1},
    "gemma": {
        "family": "gemma2",
        "norm_plus_one": True,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": 2.0,
        "attention_soft_cap": 50.0,
        "sliding_window": 8,
        "layer_types": ("sliding", "full"),
        "tie_word_embeddings": True,
    },
    "qwen3": {"family": "qwen3", "qk_norm": True, "num_kv_heads": 4},
    "moe": {
        "family": "mixtral",
        "num_experts": 4,
        "num_experts_per_token": 2,
        "expert_intermediate_size": 32,
        "dense_layers": (1,),
    },
}


@functools.cache
def _make(kind):
    """A model whose norms have an outlier channel and whose biases are not zero."""
    model = Model(ModelConfig(**{**COMMON, **KINDS[kind]}))
    leaves, treedef = jax.tree.flatten_with_path(model.abstract_params())
    rng = np.random.default_rng(0)
    out = []
    for path, leaf in leaves:
        values = rng.normal(size=leaf.shape)
        if path[-1].key == "scale":
            values = np.exp(0.3 * values)
            values[..., 3] = 6.0
            values -= model.config.norm_plus_one
        else:
            values *= 0.3 if path[-1].key == "b" else leaf.shape[-2] ** -0.5
            if path[-2].key == "v":
                values[..., 5] *= 4.0  # so that o's inputs differ in size, and are worth scaling
        out.append(jnp.asarray(values, jnp.float32))
    return model, jax.tree.unflatten(treedef, out)


@pytest.fixture(params=sorted(KINDS))
def any_model(request):
    return _make(request.param)


@pytest.fixture
def make_model():
    return _make
