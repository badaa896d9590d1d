"""Experts: blocks of sorted rows against every token through every expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jinfer.config.model import ModelConfig
from jinfer.linear import ops
from jinfer.models import moe

CONFIG = ModelConfig(
    family="tiny",
    vocab_size=8,
    hidden_size=12,
    intermediate_size=12,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=8,
    num_experts=5,
    num_experts_per_token=2,
    expert_intermediate_size=16,
)


def make(seed=0, **overrides):
    config = dataclasses.replace(CONFIG, **overrides)
    return moe.Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))


def densely(experts, x):
    """Every token through every expert, weighted by zero where not chosen."""
    config = experts.config
    weights, ids = experts.route(x)
    share = jnp.sum(jax.nn.one_hot(ids, config.num_experts) * weights[..., None], axis=-2)
    gate = jnp.einsum("td,edf->etf", x, experts.gate.w.get_value())
    up = jnp.einsum("td,edf->etf", x, experts.up.w.get_value())
    hidden = ops.gated(config.activation, gate, up)
    return jnp.einsum("etf,efd,te->td", hidden, experts.down.w.get_value(), share)


def jitted(experts, function):
    """Runs function(experts, *args) as one program."""
    graph, state = nnx.split(experts)
    run = jax.jit(lambda state, *args: function(nnx.merge(graph, state), *args))
    return lambda *args: run(state, *args)


@pytest.mark.parametrize("num_tokens", [1, 3, 7, 333])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_blocks_equal_every_token_through_every_expert(num_tokens, norm_topk_prob):
    experts = make(norm_topk_prob=norm_topk_prob)
    x = jax.random.normal(jax.random.key(1), (num_tokens, 12))
    out = jitted(experts, lambda experts, x: experts(x)[0])(x)
    np.testing.assert_allclose(out, jitted(experts, densely)(x), rtol=1e-5, atol=1e-5)


RUN_EXPERTS = jitted(make(), moe.Experts.run_experts)
NUM_ROWS = 30


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=NUM_ROWS, max_size=NUM_ROWS))
@example([3] * NUM_ROWS)
@example([0] * (NUM_ROWS - 1) + [4])
def test_any_routing_reaches_its_experts(ids):
    """Also the extreme ones: all to one expert, experts with no token."""
    ids = np.array(ids).reshape(-1, 2)
    experts = make()
    gate, up, down = (np.asarray(w.w.get_value()) for w in (experts.gate, experts.up, experts.down))
    x = np.random.default_rng(2).normal(size=(NUM_ROWS // 2, 12)).astype(np.float32)
    out, hidden = RUN_EXPERTS(x, ids)
    gates = np.einsum("td,tkdf->tkf", x, gate[ids])
    want = gates / (1 + np.exp(-gates)) * np.einsum("td,tkdf->tkf", x, up[ids])
    np.testing.assert_allclose(hidden, want, rtol=1e-4, atol=1e-5)
    want = np.einsum("tkf,tkfd->tkd", want, down[ids])
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any))
def test_blocks_hold_any_split_of_the_rows(counts):
    size, num_blocks = moe.block_sizes(sum(counts), len(counts))
    assert sum(-(-count // size) for count in counts) <= num_blocks


def test_a_decode_step_has_no_more_blocks_than_choices():
    assert moe.block_sizes(2, 8) == (1, 2)
    assert moe.block_sizes(8, 128) == (1, 8)


def test_vmap_and_jit_equal_one_at_a_time():
    experts = make()
    x = jax.random.normal(jax.random.key(3), (3, 9, 12))
    graph, state = nnx.split(experts)

    def run(state, x):
        return nnx.merge(graph, state)(x)[0]

    single = jax.jit(run)
    want = np.stack([single(state, row) for row in x])
    np.testing.assert_allclose(single(state, x), want, rtol=1e-5, atol=1e-5)
    mapped = jax.jit(jax.vmap(run, in_axes=(None, 0)))(state, x)
    np.testing.assert_allclose(mapped, want, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_the_dense_form():
    experts = make()
    graph, state = nnx.split(experts)
    x = jax.random.normal(jax.random.key(4), (21, 12))
    target = jax.random.normal(jax.random.key(5), (21, 12))

    def grads(run):
        def loss(state, x):
            return jnp.sum(run(nnx.merge(graph, state), x) * target)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x)

    got, want = grads(lambda experts, x: experts(x)[0]), grads(densely)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want)) > 0.1
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
