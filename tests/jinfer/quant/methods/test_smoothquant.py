"""SmoothQuant's scales, their axes, and what folding helpers do to float outputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.quant_format import QFormat
from jinfer.linear.matmul import matmul
from jinfer.linear.qtensor import quantize
from jinfer.quant.methods.folding import (
    divide_norm,
    divide_outputs,
    head_ties,
    producer_scales,
    scale_inputs,
)
from jinfer.quant.methods.smoothquant import smooth_scales


def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 32)).astype("f4")
    x[:, 3] *= 60
    return jnp.asarray(x), jnp.asarray(rng.normal(size=(32, 48)) * 0.1, jnp.float32)


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scales_follow_the_formula_with_both_maxima_by_input(alpha):
    x, w = problem()
    act, weight = np.abs(np.asarray(x)).max(0), np.abs(np.asarray(w)).max(1)
    s = smooth_scales(jnp.asarray(act), w, alpha=alpha)
    np.testing.assert_allclose(s, act**alpha / weight ** (1 - alpha), rtol=1e-5)
    assert s.shape == (32,)


def test_all_weights_of_one_input_share_the_scale():
    x, w = problem()
    act = jnp.max(jnp.abs(x), axis=0)
    both = smooth_scales(act, jnp.concatenate([w, 10 * w], axis=1))
    np.testing.assert_allclose(both, smooth_scales(act, 10 * w), rtol=1e-6)


def test_an_input_that_never_fired_is_left_alone():
    x, w = problem()
    act = jnp.max(jnp.abs(x), axis=0).at[7].set(0.0)
    assert float(smooth_scales(act, w)[7]) == 1.0


def test_smoothing_helps_w8a8_and_changes_no_float_output():
    x, w = problem()
    s = smooth_scales(jnp.max(jnp.abs(x), axis=0), w)
    smooth_w = scale_inputs(w, s)
    assert relative((x / s[None]) @ smooth_w, x @ w) < 1e-5
    fmt = QFormat.parse("int8-channel:dyn")
    plain = relative(matmul(x, quantize(w, fmt, grid="restricted")), x @ w)
    smoothed = relative(matmul(x / s[None], quantize(smooth_w, fmt, grid="restricted")), x @ w)
    assert smoothed < 0.5 * plain


@pytest.mark.parametrize("plus_one", [False, True])
def test_a_norm_takes_the_scale_gemmas_too(plus_one):
    rng = np.random.default_rng(0)
    gamma, s = (jnp.asarray(rng.uniform(0.2, 3, 32), jnp.float32) for _ in range(2))
    x = jnp.asarray(rng.normal(size=(5, 32)), jnp.float32)

    def norm(g):
        return x * (1 + g if plus_one else g)[None]

    out = norm(divide_norm(gamma, s, plus_one=plus_one))
    assert relative(out * s[None], norm(gamma)) < 1e-6


def test_a_linear_takes_the_scale_with_its_bias():
    x, w = problem()
    b = jnp.arange(48.0)
    s = jnp.linspace(0.5, 4, 48)
    new_w, new_b = divide_outputs(w, b, s)
    assert relative((x @ new_w + new_b[None]) * s[None], x @ w + b[None]) < 1e-5
    assert divide_outputs(w, None, s)[1] is None


def test_query_heads_are_tied_to_the_kv_head_they_read():
    np.testing.assert_array_equal(head_ties(4, 2, 2), [0, 1, 0, 1, 2, 3, 2, 3])
    ties = head_ties(6, 2, 4)  # N = 6, K = 2, H = 4: v has 8 outputs, o 24 inputs
    s_v = jnp.linspace(0.5, 2, 8)
    np.testing.assert_array_equal(producer_scales(s_v[ties], ties, 8), s_v)
    rng = np.random.default_rng(0)
    v = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    w_o = jnp.asarray(rng.normal(size=(24, 3)), jnp.float32)
    out = v[:, ties] @ w_o  # attention to a single token: o reads v itself
    smooth = (v / s_v[None])[:, ties] @ scale_inputs(w_o, s_v[ties])
    assert relative(smooth, out) < 1e-5


def test_bad_arguments_are_named():
    x, w = problem()
    act = jnp.max(jnp.abs(x), axis=0)
    with pytest.raises(ValueError, match="alpha"):
        smooth_scales(act, w, alpha=1.5)
    with pytest.raises(ValueError, match=r"act_max must be \[32\]"):
        smooth_scales(act[:5], w)
    with pytest.raises(ValueError, match="act_max holds"):
        smooth_scales(act.at[0].set(jnp.nan), w)
