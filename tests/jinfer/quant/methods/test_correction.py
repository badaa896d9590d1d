"""Corrected weights against least squares in float64, and in the walk over a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.quant import calibrate
from jinfer.quant.methods.correction import correct_weight
from jinfer.quant.methods.factor import gram
from jinfer.quant.pipeline import quantize_model
from jinfer.quant.recipe import Recipe, make_method

SIZE, TOKENS = 150, 900


def problem(seed=0):
    """A weight, inputs, and the float model's inputs for the same tokens."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(SIZE, SIZE)) / np.sqrt(SIZE)
    floats = rng.normal(size=(TOKENS, SIZE)) @ mix
    x = floats + 0.3 * floats @ mix.T + 0.1 * rng.normal(size=(TOKENS, SIZE)) @ mix
    w = rng.normal(size=(SIZE, 40)) * 0.05
    return w, x, floats


def sums_of(x, floats):
    chunks = [jnp.asarray(a, jnp.float32).reshape(3, 1, -1, SIZE) for a in (x, floats)]
    return gram(chunks[0]), calibrate.measure_drift(*chunks)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_it_is_the_damped_least_squares_step_of_float64(strength):
    w, x, floats = problem()
    got = correct_weight(jnp.asarray(w, jnp.float32), *sums_of(x, floats), strength=strength)
    h = x.T @ x
    h[np.diag_indices(SIZE)] += 0.01 * np.mean(np.diag(h))
    expected = w + strength * np.linalg.solve(h, x.T @ (floats - x) @ w)
    assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected - w)


def test_the_float_outputs_come_nearer():
    w, x, floats = problem()
    got = correct_weight(jnp.asarray(w, jnp.float32), *sums_of(x, floats), strength=1.0)
    wanted = floats @ w
    before, after = (np.linalg.norm(x @ np.asarray(v) - wanted) for v in (w, got))
    assert after < 0.9 * before


def test_no_drift_or_no_strength_changes_nothing():
    w, x, floats = problem()
    w = jnp.asarray(w, jnp.float32)
    h, drift = sums_of(x, floats)
    np.testing.assert_array_equal(correct_weight(w, h, drift, strength=0.0), w)
    np.testing.assert_array_equal(correct_weight(w, h, 0 * drift, strength=1.0), w)


def test_a_gram_matrix_that_no_damping_saves_leaves_the_weight():
    w, x, floats = problem()
    w = jnp.asarray(w, jnp.float32)
    h, drift = sums_of(x, floats)
    h = h.at[0, 1].set(1e3 * jnp.max(h)).at[1, 0].set(1e3 * jnp.max(h))
    np.testing.assert_array_equal(correct_weight(w, h, drift, strength=1.0), w)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strength": 1.5}, "0 .. 1"),
        ({"drift": jnp.zeros((2, 2))}, "drift"),
        ({"w": jnp.nan}, "weight"),
    ],
)
def test_wrong_arguments_are_refused(change, says):
    w, x, floats = problem()
    h, drift = sums_of(x, floats)
    given = {"w": jnp.asarray(w, jnp.float32), "gram": h, "drift": drift, "strength": 1.0}
    if "w" in change:
        change = {"w": given["w"] * change["w"]}
    with pytest.raises(ValueError, match=says):
        correct_weight(**{**given, **change})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_blocks_end_nearer_to_the_float_model(make_model, kind):
    model, params = make_model(kind)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (32, 64)), jnp.int32)
    held_out = jnp.asarray(np.random.default_rng(1).integers(0, 96, (8, 64)), jnp.int32)
    logits = jax.jit(lambda p: model.logits(p, held_out))
    reference = logits(params)
    errors = []
    for correct in (0.0, 1.0):
        method = make_method("gptq", "int3-g32", scales="extremes", correct=correct)
        quantized, _ = quantize_model(model, params, Recipe.uniform(method), tokens)
        errors.append(float(jnp.linalg.norm(logits(quantized) - reference)))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_correction(make_model):
    model, params = make_model("llama")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (8, 64)), jnp.int32)
    recipe = Recipe.uniform(make_method("gptq", "int3-g32", correct=1.0))
    whole, _ = quantize_model(model, params, recipe, tokens)
    rest, _ = quantize_model(model, params, recipe, tokens, done={0: whole["layers"][0]})
    for a, b in zip(*(jax.tree.leaves(p["layers"][1]) for p in (whole, rest)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_correction_needs_gptq_and_quantized_inputs(make_model):
    with pytest.raises(ValueError, match="option of gptq"):
        make_method("rtn", correct=0.5)
    with pytest.raises(ValueError, match="correct must lie"):
        make_method("gptq", correct=2.0)
    model, params = make_model("llama")
    recipe = Recipe.uniform(make_method("gptq", "int4-g32", correct=0.5))
    with pytest.raises(ValueError, match="--sequential"):
        quantize_model(model, params, recipe, jnp.zeros((2, 64), jnp.int32), is_sequential=False)
