"""Weights in layouts of their own: same values, same tokens, nothing more to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Layout
from tiny_models import make_model

from jinfer import LLM, SamplingParams
from jinfer.config.quant_format import QFormat
from jinfer.linear import layouts as formats
from jinfer.linear.qtensor import quantize
from pallas_kernels import compile_only, target

MODEL = make_model(256, num_layers=1)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = [11, 12, 13, 14, 15]


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), jnp.bfloat16)


def by_columns(params):
    """Layouts that no CPU has by default."""
    return jax.tree.map(
        lambda x: x.format.layout.update(major_to_minor=tuple(range(x.ndim))[::-1]), params
    )


def order(x):
    return x.format.layout.major_to_minor


def test_matrices_for_a_tpu7x_lie_in_tiles_of_sixteen_rows_and_the_table_as_it_was(params):
    wanted = formats.layouts(params, target.TARGETS["tpu7x"])
    tiles = Layout((0, 1), tiling=((16, 128), (2, 1)))
    assert wanted["lm_head"]["w"] == wanted["layers"][0]["mlp"]["up"]["w"] == tiles
    assert wanted["embed"]["w"] is None and wanted["final_norm"]["scale"] is None
    quantized = quantize(
        params["lm_head"]["w"], QFormat.parse("int4-g16"), scale_dtype=jnp.bfloat16
    )
    assert quantized.scale.ndim == 2
    only = formats.layouts({"lm_head": {"w": quantized}}, target.TARGETS["tpu7x"])
    assert only == {"lm_head": {"w": None}}
    assert formats.place({"lm_head": {"w": quantized}}, only)["lm_head"]["w"] is quantized
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    assert not jax.tree.leaves(formats.layouts(floats, target.TARGETS["tpu7x"]))


@pytest.mark.parametrize("name", ["v5e", "v6e", "h100", "cpu"])
def test_elsewhere_nothing_is_copied(params, name):
    placed = formats.place(params, formats.layouts(params, target.TARGETS[name]), is_owner=True)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        assert after is before and not before.is_deleted()


def test_placed_weights_keep_their_values_and_shared_ones_stay_one():
    x = jnp.arange(12.0).reshape(3, 4)
    tree = {"a": x, "b": x, "c": jnp.ones(3)}
    expected = np.array(x)
    placed = formats.place(tree, by_columns(tree))
    assert order(placed["a"]) == (1, 0) and placed["a"] is placed["b"]
    assert placed["c"] is tree["c"] and not x.is_deleted()
    np.testing.assert_array_equal(placed["a"], expected)
    owned = formats.place(tree, by_columns(tree), is_owner=True)
    assert x.is_deleted() and owned["a"] is owned["b"]
    np.testing.assert_array_equal(owned["b"], expected)


def test_an_engine_serves_them_and_takes_new_ones_into_the_same_layouts():
    params, other = (MODEL.init(jax.random.key(seed)) for seed in (0, 1))
    limits = {"max_model_len": 32, "max_num_seqs": 1, "max_num_batched_tokens": 16}
    llm = LLM(
        MODEL,
        params=formats.place(params, by_columns(params)),
        skip_tokenizer_init=True,
        block_size=8,
        num_decode_steps=2,
        enable_prefix_caching=False,
        **limits,
    )

    def serve():
        return llm.generate({"prompt_token_ids": PROMPT}, GREEDY, use_tqdm=False)[0].outputs[0]

    def best(params, tokens):
        text = jnp.asarray(PROMPT + tokens, jnp.int32)
        return np.asarray(MODEL.logits(params, text)).argmax(-1)[len(PROMPT) - 1 : -1].tolist()

    tokens = serve().token_ids
    assert tokens == best(params, tokens)
    before = llm.num_compilations
    assert serve().token_ids == tokens
    assert llm.num_compilations == before  # what steps bring back is bound like what they took
    llm.update_weights(other)
    served = llm._runner.params["lm_head"]["w"]
    assert order(served) == (1, 0)
    np.testing.assert_array_equal(served, other["lm_head"]["w"])
    before = llm.num_compilations
    new = serve().token_ids
    assert llm.num_compilations == before
    assert new == best(other, new) != tokens


def test_a_compiler_for_tpu7x_takes_and_makes_those_tiles():
    if reason := compile_only.why_not_compile("tpu7x"):
        pytest.skip(reason)
    tree = {"lm_head": {"w": jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)}}
    with compile_only.compile_target("tpu7x") as compiler:
        wanted = formats.layouts(tree, compiler.target)
        goal = compiler.laid_out(tree, wanted)["lm_head"]["w"].format
        there = compiler.compile(jax.jit(jnp.copy, out_shardings=goal), tree["lm_head"]["w"])
        back = compiler.compile(lambda tree: tree["lm_head"]["w"] * 2, tree, layouts=wanted)
    assert there.executable.output_formats.layout.tiling == goal.layout.tiling
    assert back.executable.input_formats[0][0]["lm_head"]["w"].layout.tiling == goal.layout.tiling
