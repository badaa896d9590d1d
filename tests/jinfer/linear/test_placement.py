"""Where arrays lie changes no value and no token, and compiles nothing more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Layout
from jax.sharding import AbstractMesh
from tiny_models import make_model

from jinfer import LLM, SamplingParams
from jinfer.config.quant_format import QFormat
from jinfer.linear import placement
from jinfer.linear.placement import Placement, place
from jinfer.linear.prepared import PreparedWeight
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
    wanted = placement.layouts(params, target.TARGETS["tpu7x"])
    tiles = Layout((0, 1), tiling=((16, 128), (2, 1)))
    assert wanted["lm_head"]["w"] == wanted["layers"][0]["mlp"]["up"]["w"] == tiles
    assert wanted["embed"]["w"] is None and wanted["final_norm"]["scale"] is None
    quantized = quantize(
        params["lm_head"]["w"], QFormat.parse("int4-g16"), scale_dtype=jnp.bfloat16
    )
    assert quantized.scale.ndim == 2
    only = placement.layouts({"lm_head": {"w": quantized}}, target.TARGETS["tpu7x"])
    assert only == {"lm_head": {"w": None}}
    same = placement.in_formats({"lm_head": {"w": quantized}}, only)
    assert same["lm_head"]["w"] is quantized
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    assert not jax.tree.leaves(placement.layouts(floats, target.TARGETS["tpu7x"]))


@pytest.mark.parametrize("name", ["v5e", "v6e", "h100", "cpu"])
def test_elsewhere_nothing_is_copied(params, name):
    wanted = placement.layouts(params, target.TARGETS[name])
    placed = placement.in_formats(params, wanted, is_owner=True)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        assert after is before and not before.is_deleted()


def test_placed_weights_keep_their_values_and_shared_ones_stay_one():
    x = jnp.arange(12.0).reshape(3, 4)
    tree = {"a": x, "b": x, "c": jnp.ones(3)}
    expected = np.array(x)
    placed = placement.in_formats(tree, by_columns(tree))
    assert order(placed["a"]) == (1, 0) and placed["a"] is placed["b"]
    assert placed["c"] is tree["c"] and not x.is_deleted()
    np.testing.assert_array_equal(placed["a"], expected)
    owned = placement.in_formats(tree, by_columns(tree), is_owner=True)
    assert x.is_deleted() and owned["a"] is owned["b"]
    np.testing.assert_array_equal(owned["b"], expected)


def test_an_engine_serves_them_and_takes_new_ones_into_the_same_layouts():
    params, other = (MODEL.init(jax.random.key(seed)) for seed in (0, 1))
    limits = {"max_model_len": 32, "max_num_seqs": 1, "max_num_batched_tokens": 16}
    llm = LLM(
        MODEL,
        params=placement.in_formats(params, by_columns(params)),
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
    served = llm.loop.engine.runner.params["lm_head"]["w"]
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
        wanted = placement.layouts(tree, compiler.target)
        goal = compiler.laid_out(tree, wanted)["lm_head"]["w"].format
        there = compiler.compile(jax.jit(jnp.copy, out_shardings=goal), tree["lm_head"]["w"])
        back = compiler.compile(lambda tree: tree["lm_head"]["w"] * 2, tree, layouts=wanted)
    assert there.executable.output_formats.layout.tiling == goal.layout.tiling
    assert back.executable.input_formats[0][0]["lm_head"]["w"].layout.tiling == goal.layout.tiling


H100 = target.TARGETS["h100"]


def weight(*shape, text="int4-g64", seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return quantize(jnp.asarray(x, jnp.float32), QFormat.parse(text))


def test_one_door_lays_weights_out_for_the_target_and_binds_all_arrays():
    tree = {"a": weight(128, 64), "b": jnp.ones((3, 3)), "c": np.ones(3, np.float32)}
    gpu = place(tree, H100)
    assert isinstance(gpu["a"], PreparedWeight) and gpu["a"].q.shape == (64, 128)
    cpu = place(tree, target.TARGETS["cpu"])
    np.testing.assert_array_equal(cpu["a"], tree["a"].dequantize())
    named = place(tree, target.TARGETS["cpu"], "xla")
    assert named["a"].q.dtype == jnp.int4
    for placed in (gpu, cpu, named):
        for leaf in jax.tree.leaves(placed):
            assert isinstance(leaf, jax.Array) and leaf.committed
        again = place(placed, H100 if placed is gpu else target.TARGETS["cpu"], "xla")
        assert [a is b for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(again))]
    assert not tree["a"].q.is_deleted()


def test_a_placement_stays_what_it_was_whatever_target_is_stated_later():
    with target.state("h100"):
        there = Placement.of({})
    assert isinstance(there.place({"a": weight(128, 64)})["a"], PreparedWeight)
    assert there.target is H100 and Placement.of({}).target is target.TARGETS["cpu"]


def test_weights_are_laid_out_once_freed_if_owned_and_placed_again_to_the_same():
    w = weight(128, 64)
    tree = {"a": w, "b": w, "c": jnp.ones(3)}
    once = place(tree, H100, is_owner=True)
    assert once["a"].q is once["b"].q
    assert w.q.is_deleted() and not w.scale.is_deleted()
    twice = place(once, H100)
    assert twice["a"].q is once["a"].q and twice["c"] is once["c"]
    assert once["a"].nbytes == 128 * 64 // 2 + 2 * 64 * 4


def test_weights_of_experts_stay_and_a_tree_names_the_one_that_is_refused():
    w = weight(3, 64, 64)
    tree = {"layers": ({"mlp": {"up": {"w": w}}},), "norm": {"scale": jnp.ones(3)}}
    assert placement.lay_out(tree, H100)["layers"][0]["mlp"]["up"]["w"] is w
    with pytest.raises(NotImplementedError, match=r"\['up'\]\['w'\]: .*weights of experts"):
        place(tree, impl="mosaic_tpu")
    with pytest.raises(ValueError, match="linear_impl must be one of auto, xla"):
        place(tree, impl="triton")


def test_a_mesh_of_one_device_is_taken_and_a_larger_one_is_refused_by_name():
    device = jax.devices()[0]
    mesh = jax.make_mesh((1,), ("model",))
    assert Placement.of({}, mesh=mesh) == Placement(device, target.TARGETS["cpu"])
    assert place({"a": jnp.ones(3)}, mesh=mesh)["a"].devices() == {device}
    with pytest.raises(ValueError, match=r"one device, got 4 \(data=2, model=2\)"):
        place({"a": jnp.ones(3)}, mesh=AbstractMesh((2, 2), ("data", "model")))


def test_pages_come_back_from_the_host_as_they_were():
    there = Placement.of({})
    pages = [jnp.arange(6, dtype=jnp.int32), jnp.ones((2, 2))]
    kept = there.to_host(pages)
    kinds = {getattr(getattr(x, "sharding", None), "memory_kind", "numpy") for x in kept}
    assert kinds == {there.host_memory_kind}
    for before, after in zip(pages, there.from_host(kept), strict=True):
        assert after.devices() == {there.device}
        np.testing.assert_array_equal(before, after)
