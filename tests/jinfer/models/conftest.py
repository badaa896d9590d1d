"""Tiny models for the model tests, and a loader of checkpoint tensors in memory."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.checkpoints import families
from jinfer.config.model import ModelConfig
from jinfer.models.model import Model

TINY = ModelConfig(
    family="tiny",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
VARIANTS = {
    "dense": {},
    "gemma": {
        "norm_plus_one": True,
        "post_norms": True,
        "qk_norm": True,
        "activation": "gelu_tanh",
        "tie_word_embeddings": True,
        "embedding_scale": 24**0.5,
        "attention_soft_cap": 2.0,
        "final_soft_cap": 3.0,
        "sliding_window": 4,
    },
    "biased": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "moe": {"num_experts": 5, "num_experts_per_token": 2, "expert_intermediate_size": 16},
}


@pytest.fixture
def tiny():
    """Returns a factory of Models: tiny("moe", num_layers=2)."""

    def make(variant="dense", **overrides):
        fields = {"layer_types": (), **VARIANTS[variant], **overrides}
        return Model(dataclasses.replace(TINY, **fields))

    return make


@pytest.fixture(params=["biased", "gemma", "moe"])
def variant(request):
    """The variants that between them have every part, in turn."""
    return request.param


@pytest.fixture
def load_tensors():
    """Returns a function (config, {checkpoint name: numpy}) -> params, as a loader would do it."""

    def load(config, tensors):
        flat, filled = {}, {}
        for name, tensor in tensors.items():
            for place in families.placements(config, name):
                piece = place.take(np.asarray(tensor))
                shape = families.expected_shapes(config)[place.path]
                if place.expert is None:
                    assert piece.shape == shape, (name, place)
                    assert place.path not in flat, name
                    flat[place.path] = piece
                else:
                    stack = flat.setdefault(place.path, np.full(shape, np.nan, piece.dtype))
                    stack[place.expert] = piece
                    filled.setdefault(place.path, set()).add(place.expert)
        assert set(flat) == set(families.expected_shapes(config))
        assert all(len(experts) == config.num_experts for experts in filled.values())
        return families.unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()}, config)

    return load
