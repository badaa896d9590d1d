"""Perplexity, divergence and agreement against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.model import ModelConfig
from jinfer.models.model import Model
from jinfer.quant.evaluate import evaluate, evaluate_both

WINDOWS = np.random.default_rng(0).integers(0, 96, (3, 16)).astype(np.int32)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.sum(np.exp(logits - top), -1, keepdims=True))


@pytest.mark.parametrize("kind", ["llama", "gemma"])  # gemma: two kinds of blocks
def test_scores_are_those_of_float64(make_model, kind):
    model, params = make_model(kind)
    other = jax.tree.map(lambda a: a * 1.02, params)
    got = evaluate(model, other, WINDOWS, against=(model, params))
    p = log_softmax(model.logits(params, jnp.asarray(WINDOWS)))
    q = log_softmax(model.logits(other, jnp.asarray(WINDOWS)))
    scored = np.take_along_axis(q[:, :-1], WINDOWS[:, 1:, None], -1)
    kl = np.sum(np.exp(p) * (p - q), -1)
    assert got.nll == pytest.approx(-scored.mean(), rel=1e-5)
    assert got.perplexity == pytest.approx(np.exp(-scored.mean()), rel=1e-4)
    assert got.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert got.kl_se == pytest.approx(kl.mean(1).std(ddof=1) / 3**0.5, rel=1e-2)
    assert got.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert (got.num_windows, got.length, got.num_scored) == (3, 16, 45)


def test_a_model_is_no_distance_from_itself(make_model):
    model, params = make_model("qwen2")
    seen = []
    got = evaluate(model, params, WINDOWS, against=(model, params), on_window=seen.append)
    assert got.kl == pytest.approx(0, abs=1e-7) and got.top1 == 1.0
    assert seen == [1, 2, 3]
    alone = evaluate(model, params, WINDOWS[:1])
    assert alone.kl is alone.kl_se is alone.top1 is None


def test_a_reference_that_runs_once_is_scored_as_if_alone(make_model):
    model, params = make_model("llama")
    other = jax.tree.map(lambda a: a * 1.02, params)
    got, reference = evaluate_both(model, other, params, WINDOWS)
    expected = evaluate(model, other, WINDOWS, against=(model, params))
    alone = evaluate(model, params, WINDOWS)
    assert (got.nll, got.kl, got.top1) == (expected.nll, expected.kl, expected.top1)
    assert (reference.nll, reference.kl) == (alone.nll, None)
    assert reference.nll != got.nll


def test_logits_computed_before_serve_as_reference(make_model):
    model, params = make_model("llama")
    other = jax.tree.map(lambda a: a * 1.02, params)
    kept = np.asarray(model.logits(params, jnp.asarray(WINDOWS)))
    got = evaluate(model, other, WINDOWS, against=kept)
    expected = evaluate(model, other, WINDOWS, against=(model, params))
    assert got.kl == pytest.approx(expected.kl, rel=1e-4) and got.top1 == expected.top1
    with pytest.raises(ValueError, match=r"must be \[3, 16, 96\], got \[2, 16, 96\]"):
        evaluate(model, other, WINDOWS, against=kept[:2])


def test_other_vocabularies_and_infinite_logits_are_refused(make_model):
    model, params = make_model("llama")
    small = Model(ModelConfig(**{**vars(model.config), "vocab_size": 64}))
    with pytest.raises(ValueError, match="reference has 64 tokens, the model 96"):
        evaluate(model, params, WINDOWS, against=(small, params))
    broken = {**params, "embed": {"w": params["embed"]["w"].at[:, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match="NaN or infinity"):
        evaluate(model, broken, WINDOWS)
