"""`LLM(quantization=...)`: quantized while loading, served as what it was quantized to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import hf_llama, make_config

from jinfer import LLM, SamplingParams, load
from jinfer.checkpoints.save import save_folder
from jinfer.config import memory
from jinfer.linear.placement import widen_on_cpu
from jinfer.linear.qtensor import QTensor, dequantize
from jinfer.models.model import Model
from jinfer.quant.on_load import quantize_params

HF = hf_llama(max_position_embeddings=64)
CONFIG = make_config(
    96, hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=64
)
MODEL = Model(CONFIG)
LIMITS = {"max_model_len": 32, "max_num_seqs": 2, "max_num_batched_tokens": 16, "block_size": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = [[5, 17, 40, 3], [60, 2]]
NAMES = ["int4-g32:rtn", "int4-g16-asym", "hqq", "fp8", "int8", "nf4", "int3-g32"]


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def linears(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))
    return [x for x in leaves if isinstance(x, QTensor)]


def as_floats(params):
    return jax.tree.map(
        lambda x: dequantize(x) if isinstance(x, QTensor) else x,
        params,
        is_leaf=lambda x: isinstance(x, QTensor),
    )


def tokens_of(llm):
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.thorough
def test_what_is_served_is_what_the_method_makes(params):
    options = {"skip_tokenizer_init": True, **LIMITS}
    llm = LLM(MODEL, params=params, quantization="int3-g32:rtn", **options)
    quantized = quantize_params(params, "int3-g32:rtn")
    tokens = tokens_of(llm)
    llm.update_weights(jax.tree.map(lambda a: -a, params))
    assert tokens_of(llm) != tokens
    plain = LLM(MODEL, params=params, **options)
    assert tokens_of(plain) != tokens
    plain.update_weights(as_floats(quantized))
    assert tokens_of(plain) == tokens
    llm.update_weights(params)  # floats again: quantized as the first ones were
    assert tokens_of(llm) == tokens


@pytest.mark.parametrize("name", ["int4-g16-asym", "fp8"])
def test_a_folder_is_quantized_while_it_loads(params, tmp_path, name):
    save_folder(tmp_path / "m", MODEL, params, HF, dtype="float32")
    _, loaded = load(tmp_path / "m", quantization=name)
    expected = quantize_params(params, name)
    assert len(linears(loaded)) == 14
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    options = {"skip_tokenizer_init": True, **LIMITS}
    for served in (  # by either door
        LLM(tmp_path / "m", quantization=name, **options),
        LLM(MODEL, params=params, quantization=name, **options),
    ):
        served = jax.tree.leaves(served.loop.engine.runner.params)
        for a, b in zip(served, jax.tree.leaves(widen_on_cpu(expected)), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"layers.0.attn.[kq] is quantized already"):
        quantize_params(loaded, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_planner_counts_the_bytes(params, name):
    if name == "hqq":
        name = "int4-g64-asymf:hqq"
    quantized = quantize_params(params, name)
    parts = memory.part_bytes(CONFIG, "float32", name)
    assert parts["attention"] + parts["mlp"] == sum(x.nbytes for x in linears(quantized))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int9-g64", r"must be fp8, int8, nf4, hqq, or a format .* got 'int9-g64'"),
        ("q4", "must be fp8, int8, nf4, hqq"),
        ("int4-g64:magic", "must be fp8, int8, nf4, hqq"),
        ("int4-g64:fp8", "does not take format int4-g64"),
        ("awq", "needs calibration: run `jinfer quantize`"),
        ("int4-g64:gptq", "needs calibration"),
    ],
)
def test_what_cannot_be_done_while_loading_is_refused_in_one_line(params, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        LLM(MODEL, params=params, quantization=name, skip_tokenizer_init=True, **LIMITS)
    assert "\n" not in str(caught.value)


def test_a_weight_that_is_not_finite_is_named(params):
    layers = jax.tree.map(lambda a: a, params["layers"])
    layers[1]["mlp"]["up"]["w"] = layers[1]["mlp"]["up"]["w"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up: weight holds 1 NaN"):
        quantize_params({**params, "layers": layers}, "int4-g32")


def test_experts_are_quantized_too():
    config = dataclasses.replace(
        CONFIG,
        family="mixtral",
        num_experts=4,
        num_experts_per_token=2,
        expert_intermediate_size=32,
    )
    model = Model(config)
    quantized = quantize_params(model.init(jax.random.key(0)), "int4-g32")
    layer = quantized["layers"][0]["mlp"]
    assert layer["down"]["w"].shape == (4, 32, 64) and not isinstance(layer["router"]["w"], QTensor)
    tokens = jnp.asarray(PROMPTS[:1])
    np.testing.assert_allclose(
        model.logits(widen_on_cpu(quantized), tokens), model.logits(quantized, tokens), atol=1e-5
    )
