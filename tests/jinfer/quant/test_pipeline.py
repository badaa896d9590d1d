"""The walk over a model: folds leave floats alone, recipes are followed, killed runs go on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.linear.qtensor import QTensor
from jinfer.quant import calibrate, sensitivity
from jinfer.quant.importance import measure_importance
from jinfer.quant.layer import LayerQuantizer
from jinfer.quant.pipeline import fold_model, linear_names, quantize_model
from jinfer.quant.recipe import Recipe, make_method

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 96, (8, 64)), jnp.int32)
HELD_OUT = jnp.asarray(np.random.default_rng(1).integers(0, 96, (4, 64)), jnp.int32)
FLOATS = 1e-5  # relative: the same sums in another order


logits = jax.jit(lambda model, params: model.logits(params, HELD_OUT), static_argnums=0)


def logits_of(model, params):
    return logits(model, params)


def divergence(reference, logits):
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def weights_of(params, kind=QTensor):
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))
    return [x for x in leaves if isinstance(x, kind)]


def uniform(name, fmt=None, **options):
    return Recipe.uniform(make_method(name, fmt, **options))


def test_the_stages_are_the_block(any_model):
    model, params = any_model
    x = calibrate.embed(model, params, calibrate.chunks_of(HELD_OUT))
    for i, layer in enumerate(params["layers"]):
        x = LayerQuantizer(model, i, uniform("rtn")).forward(layer, x)
    hidden = model.final_norm(params, x.reshape(4, 64, -1))
    assert distance(model.unembed(params, hidden), logits_of(model, params)) < FLOATS


@pytest.mark.parametrize(
    ("num", "length", "chunks"),
    [(128, 512, (32, 4)), (7, 512, (7, 1)), (6, 512, (2, 3)), (3, 16, (1, 3)), (2, 4096, (2, 1))],
)
def test_no_calibration_sequence_is_left_out(num, length, chunks):
    tokens = jnp.arange(num * length).reshape(num, length)
    got = calibrate.chunks_of(tokens)
    assert got.shape == (*chunks, length)
    np.testing.assert_array_equal(got.reshape(tokens.shape), tokens)


def test_a_thinned_gram_matrix_takes_whole_chunks_and_all_else_every_token():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 16, 8)), jnp.float32)
    whole, thin = calibrate.measure(x), calibrate.measure(x, 2)
    np.testing.assert_array_equal(thin.gram, calibrate.measure(x[::2]).gram)
    assert distance(thin.gram, whole.gram) > 0.1
    for name in ("abs_sum", "abs_max", "count"):
        np.testing.assert_array_equal(getattr(thin, name), getattr(whole, name))
    np.testing.assert_allclose(whole.mean_abs, jnp.mean(jnp.abs(x), (0, 1, 2)), rtol=1e-5)
    assert int(whole.count) == 160


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_folding_leaves_float_outputs_equal(any_model, method):
    model, params = any_model
    fmt = "int4-g32-asym" if method == "awq" else None
    folded = fold_model(model, params, uniform(method, fmt), TOKENS)
    assert distance(logits_of(model, folded), logits_of(model, params)) < FLOATS
    for part, name in (("attn", "q"), ("mlp", "up"), ("attn", "v")):
        old, new = (p["layers"][0][part][name]["w"] for p in (params, folded))
        assert not np.allclose(old, new), f"{part}.{name} was not scaled"
    if method == "awq":  # o and down too, whatever the number of KV heads
        for part, name in (("attn", "o"), ("mlp", "down")):
            old, new = (p["layers"][0][part][name]["w"] for p in (params, folded))
            assert not np.allclose(old, new), f"{part}.{name} was not scaled"


@pytest.mark.parametrize("method", [pytest.param("gptq", marks=pytest.mark.slow), "awq"])
def test_calibrated_methods_beat_rounding(make_model, method):
    model, params = make_model("llama")
    reference = logits_of(model, params)
    fmt = "int3-g32-asym"
    rounded, _ = quantize_model(model, params, uniform("rtn", fmt))
    better, rows = quantize_model(model, params, uniform(method, fmt), TOKENS)
    errors = [divergence(reference, logits_of(model, p)) for p in (rounded, better)]
    assert errors[1] < 0.8 * errors[0]
    ratios = [row.error / row.rtn_error for row in rows]
    assert len(ratios) == 14 and max(ratios) < 1.1 and np.mean(ratios) < 0.9


def test_smoothquant_beats_plain_w8a8(make_model):
    model, params = make_model("llama")
    reference = logits_of(model, params)
    plain = uniform("rtn", "int8-channel:dyn", grid="restricted", scale_dtype="float32")
    errors = []
    for recipe in (plain, uniform("smoothquant")):
        quantized, _ = quantize_model(model, params, recipe, TOKENS)
        errors.append(divergence(reference, logits_of(model, quantized)))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("kind", "method", "fmt", "sequential"),
    [
        pytest.param("moe", "gptq", "int4-g32", True, marks=pytest.mark.slow),
        pytest.param("moe", "awq", "int4-g32-asym", True, marks=pytest.mark.slow),
        ("moe", "smoothquant", None, False),
        ("gemma", "gptq", "int4-g32", False),
        ("gemma", "smoothquant", None, True),
        ("qwen2", "awq", "int4-g32-asym", False),
    ],
)
def test_every_kind_of_model_quantizes(kind, method, fmt, sequential, make_model):
    model, params = make_model(kind)
    before = jax.tree.map(np.asarray, params)
    quantized, rows = quantize_model(
        model, params, uniform(method, fmt), TOKENS, is_sequential=sequential
    )
    assert [row.module for row in rows] == linear_names(model)
    assert len(weights_of(quantized)) == 14
    for layer in quantized["layers"]:
        router = layer["mlp"].get("router")
        assert router is None or not isinstance(router["w"], QTensor)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(params)):
        np.testing.assert_array_equal(old, new)  # the caller's params are left alone
    got, reference = logits_of(model, quantized), logits_of(model, params)
    plain, _ = quantize_model(model, params, uniform("rtn", fmt or "int8-channel:dyn"))
    assert divergence(reference, got) < divergence(reference, logits_of(model, plain))
    if model.config.is_moe_layer(0):
        assert quantized["layers"][0]["mlp"]["down"]["w"].shape == (4, 32, 64)


def test_static_inputs_get_their_scale_from_calibration(make_model):
    model, params = make_model("llama")
    quantized, _ = quantize_model(model, params, uniform("fp8", "fp8-e4m3-tensor:static"), TOKENS)
    q = quantized["layers"][0]["attn"]["q"]["w"]
    x = calibrate.embed(model, params, calibrate.chunks_of(TOKENS))
    inputs = calibrate.attention_inputs(model, 0, params["layers"][0], x)
    np.testing.assert_allclose(q.act_scale, jnp.max(jnp.abs(inputs)) / 448, rtol=1e-6)
    assert divergence(logits_of(model, params), logits_of(model, quantized)) < 0.1


def test_a_recipe_gives_each_linear_its_method(make_model):
    model, params = make_model("llama")
    recipe = Recipe(
        (
            ("layers.1.*", None),
            ("layers.*.mlp.down", make_method("rtn", "int8-g32")),
            ("layers.*.attn.[qk]", make_method("gptq", "int4-g32")),
            ("layers.*", make_method("nf4", "nf4-g32")),
        )
    )
    quantized, rows = quantize_model(model, params, recipe, TOKENS)
    formats = {row.module: row.format for row in rows}
    assert formats == {
        "layers.0.attn.q": "int4-g32",
        "layers.0.attn.k": "int4-g32",
        "layers.0.attn.v": "nf4-g32",
        "layers.0.attn.o": "nf4-g32",
        "layers.0.mlp.gate": "nf4-g32",
        "layers.0.mlp.up": "nf4-g32",
        "layers.0.mlp.down": "int8-g32",
    }
    assert weights_of(quantized["layers"][1]) == []


def test_a_killed_run_goes_on_to_the_same_result(make_model):
    model, params = make_model("moe")
    recipe = uniform("gptq", "int4-g32")
    finished = {}
    whole, _ = quantize_model(
        model, params, recipe, TOKENS, on_layer=lambda i, layer, rows: finished.update({i: layer})
    )
    seen = []
    resumed, rows = quantize_model(
        model,
        params,
        recipe,
        TOKENS,
        done={0: finished[0]},
        on_layer=lambda i, layer, rows: seen.append(i),
    )
    assert seen == [1] and {row.module.split(".")[1] for row in rows} == {"1"}
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_bfloat16_params_keep_their_dtype(make_model):
    model, params = make_model("qwen2")
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    quantized, _ = quantize_model(model, half, uniform("awq", "int4-g32-asym"), TOKENS)
    layer = quantized["layers"][0]
    assert layer["attn_norm"]["scale"].dtype == layer["attn"]["q"]["b"].dtype == jnp.bfloat16
    assert layer["attn"]["q"]["w"].scale.dtype == jnp.float16


def test_what_cannot_be_quantized_is_named(make_model):
    model, params = make_model("llama")
    gptq = uniform("gptq", "int4-g32")
    run = functools.partial(quantize_model, model)
    with pytest.raises(ValueError, match="needs calibration tokens"):
        run(params, gptq)
    with pytest.raises(ValueError, match=r"'layers.9.\*' fits no linear"):
        run(params, Recipe((("layers.9.*", make_method("rtn")),)))
    with pytest.raises(ValueError, match="quantizes nothing"):
        run(params, Recipe((("layers.*", None),)))
    quantized, _ = run(params, uniform("rtn", "int4-g32"))
    with pytest.raises(ValueError, match="quantized already"):
        run(quantized, gptq, TOKENS)
    spoilt = {**params, "embed": {"w": params["embed"]["w"].at[5].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"^embed: weight holds 64 NaN"):
        run(spoilt, gptq, TOKENS)
    layers = jax.tree.map(lambda a: a, params["layers"])
    layers[1]["mlp"]["up"]["w"] = layers[1]["mlp"]["up"]["w"].at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up: weight holds 1 NaN"):
        run({**params, "layers": layers}, uniform("rtn", "int4-g32"))


CALIBRATED = {
    "gptq": uniform("gptq", "int4-g32"),
    "awq": uniform("awq", "int4-g32-asym"),
    "smoothquant": uniform("smoothquant"),
    "static": uniform("fp8", "fp8-e4m3-tensor:static"),
    "correct": uniform("gptq", "int4-g32", correct=0.5),
}


@pytest.mark.parametrize(
    "path", [("attn", "q", "w"), ("attn_norm", "scale"), ("mlp", "down", "w"), ("attn", "k", "b")]
)
def test_what_calibrates_names_the_parameter_that_is_not_finite(path, make_model):
    model, params = make_model("qwen2")
    layers = jax.tree.map(lambda a: a, params["layers"])
    node = functools.reduce(lambda tree, key: tree[key], path[:-1], layers[0])
    node[path[-1]] = node[path[-1]].at[..., 0].set(jnp.nan)
    spoilt = {**params, "layers": layers}
    what = {"w": "weight", "b": "bias"}.get(path[-1], path[-1])
    match = f"^layers.0.{'.'.join(path[:-1])}: {what} holds [0-9]+ NaN"
    for name, recipe in CALIBRATED.items():
        with pytest.raises(ValueError, match=match):
            quantize_model(model, spoilt, recipe, TOKENS, is_sequential=name == "correct")
    with pytest.raises(ValueError, match=match):
        fold_model(model, spoilt, CALIBRATED["awq"], TOKENS)
    with pytest.raises(ValueError, match=match):
        measure_importance(model, spoilt, TOKENS)
    with pytest.raises(ValueError, match=match):
        sensitivity.measure(model, spoilt, make_method("rtn", "int4-g32"), np.asarray(TOKENS))
