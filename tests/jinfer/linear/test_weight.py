"""A weight of any class multiplies itself, in a model and in an engine, bound to a step or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_model

from jinfer import LLM, SamplingParams
from jinfer.config.quant_format import QFormat
from jinfer.linear.matmul import matmul
from jinfer.linear.prepared import prepare
from jinfer.linear.qtensor import quantize
from jinfer.linear.weight import (
    bind,
    flatten_weights,
    format_of,
    is_weight,
    map_weights,
    num_bytes,
    to_dense,
    weights,
)
from jinfer.models.model import stack_layers
from pallas_kernels import target

MODEL = make_model(96)
TOKENS = jnp.asarray([7, 1, 44, 9, 60], jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerToken:
    """x @ base, and a row of `table` [n, O] for each token, chosen by its position."""

    base: jax.Array
    table: jax.Array
    choice: jax.Array | None = None  # [T], once it is bound; [L, T] in stacked layers

    @property
    def shape(self):
        return self.base.shape

    @property
    def ndim(self):
        return self.base.ndim

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def nbytes(self):
        return self.base.nbytes + self.table.nbytes

    def bind(self, inputs):
        choice = inputs.positions % self.table.shape[-2]
        if self.ndim == 3:
            choice = jnp.broadcast_to(choice, (self.shape[0], *choice.shape))
        return dataclasses.replace(self, choice=choice)

    def matmul(self, x):
        if self.choice is None:
            raise ValueError("this weight must be bound to a step")
        return matmul(x, self.base) + self.table[self.choice]


@dataclasses.dataclass
class Inputs:
    positions: jax.Array


def put_rows(params, table):
    """Returns params in which `up` of the second layer has a term for each token."""
    second = params["layers"][1]
    up = {"w": PerToken(second["mlp"]["up"]["w"], table)}
    second = {**second, "mlp": {**second["mlp"], "up": up}}
    return {**params, "layers": (params["layers"][0], second)}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 2 if x.ndim == 2 else x, MODEL.init(jax.random.key(0)))


def table(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def logits(params, tokens):
    def run(params, tokens):
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        return MODEL.logits(bind(params, Inputs(positions)), tokens)

    return jax.jit(run)(params, tokens)


def test_a_weight_adds_a_term_for_each_token_under_jit(params):
    terms = table(3, 64)
    x = table(5, 32)
    w = PerToken(params["layers"][1]["mlp"]["up"]["w"], terms)
    bound = bind({"w": w}, Inputs(jnp.arange(5, dtype=jnp.int32)))["w"]
    expected = x @ w.base + terms[jnp.asarray([0, 1, 2, 0, 1])]
    np.testing.assert_allclose(jax.jit(matmul)(x, bound), expected, rtol=1e-5, atol=1e-5)

    with_terms = logits(put_rows(params, terms), TOKENS)
    without = logits(put_rows(params, terms * 0), TOKENS)
    np.testing.assert_array_equal(without, jax.jit(MODEL.logits)(params, TOKENS))
    assert not np.allclose(with_terms, without, atol=1e-2)
    # A token's term moves the logits of that token and of those after it alone.
    moved = logits(put_rows(params, terms.at[2].add(1.0)), TOKENS)
    np.testing.assert_array_equal(moved[:2], with_terms[:2])
    assert not np.allclose(moved[2], with_terms[2], atol=1e-2)


def test_a_weight_that_is_not_bound_says_so(params):
    with pytest.raises(ValueError, match="must be bound to a step"):
        MODEL.logits(put_rows(params, table(3, 64)), TOKENS)


def test_stacked_layers_are_bound_alike(params):
    terms = table(3, 64)
    layers = tuple(
        {**layer, "mlp": {**layer["mlp"], "up": {"w": PerToken(layer["mlp"]["up"]["w"], terms)}}}
        for layer in params["layers"]
    )
    split = {**params, "layers": layers}
    stacked = stack_layers(MODEL.config, split)
    assert stacked["layers"]["mlp"]["up"]["w"].shape == (2, 32, 64)
    np.testing.assert_allclose(logits(stacked, TOKENS), logits(split, TOKENS), rtol=1e-5, atol=1e-5)


def test_an_engine_binds_weights_to_each_of_its_steps(params):
    params = put_rows(params, table(3, 64))
    text = TOKENS.tolist()
    for _ in range(4):
        text.append(int(logits(params, jnp.asarray(text, jnp.int32))[-1].argmax()))
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 4, "num_gpu_blocks_override": 8}
    llm = LLM(MODEL, params=params, skip_tokenizer_init=True, num_decode_steps=2, **limits)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    output = llm.generate([{"prompt_token_ids": TOKENS.tolist()}], sampling, use_tqdm=False)
    assert output[0].outputs[0].token_ids == text[len(TOKENS) :]


def test_a_quantized_weight_is_one_leaf_and_answers_for_itself():
    dense = table(64, 32)
    w = quantize(dense, QFormat.parse("int4-g32"))
    laid_out = prepare(w, target=target.TARGETS["h100"])
    tree = {"a": w, "b": [laid_out, dense]}
    assert [x is y for x, y in zip(weights(tree), (w, laid_out, dense), strict=True)] == [True] * 3
    assert [len(path) for path, _ in flatten_weights(tree)] == [1, 2, 2]
    assert map_weights(is_weight, tree) == {"a": True, "b": [True, False]}
    assert [str(format_of(x)) for x in weights(tree)] == ["int4-g32", "int4-g32", "None"]
    np.testing.assert_array_equal(to_dense(w), w.dequantize())
    assert to_dense(dense) is dense
    for x in (w, laid_out):
        assert x.shape == (64, 32) and x.ndim == 2 and x.size == 2048 and x.dtype == jnp.float32
        assert num_bytes(x) == x.nbytes == 64 * 32 // 2 + 2 * 32 * 4


@pytest.mark.parametrize("is_table", [False, True])
def test_arrays_and_objects_are_multiplied_by_one_function(is_table):
    x, w = table(3, 64).astype(jnp.bfloat16), table(64, 32).astype(jnp.bfloat16)
    out = matmul(x, w.T if is_table else w, is_table=is_table)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    q = quantize(w, QFormat.parse("int8-channel"))
    assert matmul(x, q, is_table=is_table).dtype == jnp.float32
    np.testing.assert_allclose(matmul(x, q), expected, atol=0.5)
