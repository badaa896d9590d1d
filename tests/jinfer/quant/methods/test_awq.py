"""AWQ's scale and clip searches on matrices with outlier features."""

import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.quant_format import QFormat
from jinfer.linear.qtensor import dequantize
from jinfer.quant.methods.awq import clip_weights, fake_quantize, search_scales
from jinfer.quant.methods.factor import gram
from jinfer.quant.methods.gptq import output_error
from jinfer.quant.methods.rtn import quantize_rtn

FMT = QFormat.parse("int4-g64-asym")


def problem(seed=0, rows=150, columns=40, tokens=600):
    """Inputs of which every tenth is 15 times larger, and heavy-tailed weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, rows)).astype("f4")
    x[:, ::10] *= 15
    w = jnp.asarray(rng.standard_t(5, size=(rows, columns)) * 0.03, jnp.float32)
    return x, w


def stats(x):
    return gram(x), jnp.mean(jnp.abs(x), axis=0)


def scaled_error(x, w, s):
    q = fake_quantize(w * s[:, None], FMT) / s[:, None]
    return float(jnp.linalg.norm(x @ (q - w)) / jnp.linalg.norm(x @ w))


def test_the_search_beats_rounding_on_held_out_inputs():
    x, w = problem()
    s, best, plain = search_scales(w, *stats(x[:400]), FMT)
    assert float(best) < 0.7 * float(plain)
    assert scaled_error(x[400:], w, s) < 0.85 * scaled_error(x[400:], w, jnp.ones(150))


def test_the_gram_matrix_gives_the_loss_of_the_tokens_themselves():
    x, w = problem()
    s, best, plain = search_scales(w, *stats(x), FMT)
    for scales, loss in ((s, best), (jnp.ones(150), plain)):
        q = fake_quantize(w * scales[:, None], FMT) / scales[:, None]
        expected = np.square(x.astype("f8") @ np.asarray(q - w, "f8")).sum()
        assert float(loss) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_comes_to_the_best_exponent_of_all(seed):
    x, w = problem(seed)
    h, size = stats(x)
    s, _, _ = search_scales(w, h, size, FMT, duo=False)
    losses = []
    for i in range(20):
        scales = size ** (i / 20)
        scales = scales / jnp.sqrt(scales.max() * scales.min())
        losses.append(
            float(output_error(w, fake_quantize(w * scales[:, None], FMT) / scales[:, None], h))
        )
    error = float(output_error(w, fake_quantize(w * s[:, None], FMT) / s[:, None], h))
    assert min(losses) <= error * 1.0001 <= 1.01 * min(losses)
    assert error < 0.9 * losses[0] and error < 0.9 * losses[-1]


def test_what_counts_is_the_size_of_activations_not_of_weights():
    x, w = problem()
    loud, _, _ = search_scales(w, *stats(x), FMT, duo=False)
    assert float(jnp.mean(loud[::10])) > 1.5 * float(jnp.mean(loud))
    heavy = w.at[5].multiply(10.0)  # one input's weights are larger, its activations are not
    s, _, _ = search_scales(heavy, *stats(x), FMT, duo=False)
    assert float(s[5]) < float(jnp.mean(s[::10])) / 2


def test_scales_are_normalized_and_one_is_among_the_candidates():
    x, w = problem()
    s, _, _ = search_scales(w, *stats(x), FMT)
    assert float(jnp.sqrt(s.max() * s.min())) == pytest.approx(1.0, rel=1e-5)
    even = np.sign(problem(seed=1)[0])  # nothing to gain where all inputs are +-1
    s, best, plain = search_scales(jnp.sign(w) * 0.1, *stats(even), FMT)
    assert float(best) == float(plain)
    np.testing.assert_array_equal(s, np.ones(150))


def test_tied_inputs_get_one_scale():
    x, w = problem()
    ties = jnp.asarray(np.arange(150) % 50, jnp.int32)
    s, best, plain = search_scales(w, *stats(x), FMT, ties=ties)
    np.testing.assert_array_equal(s.reshape(3, 50), jnp.broadcast_to(s[:50], (3, 50)))
    assert float(best) < float(plain)


def test_clipping_only_clamps_and_lowers_the_error_of_outputs():
    x, w = problem()
    h, _ = stats(x)
    clipped = clip_weights(w, h, FMT)
    assert np.all(np.abs(np.asarray(clipped)) <= np.abs(np.asarray(w)))
    changed = np.asarray(clipped != w)
    assert 0 < changed.mean() < 0.2
    before, after = (
        float(output_error(w, dequantize(quantize_rtn(v, FMT)), h)) for v in (w, clipped)
    )
    assert after < 0.98 * before


def test_clipping_picks_the_best_of_ten_ranges_group_by_group():
    x, w = problem(rows=64, columns=3)
    h, _ = stats(x)
    clipped = np.asarray(clip_weights(w, h, FMT))
    for column in range(3):
        limits = np.abs(np.asarray(w[:, column])).max() * (1 - 0.05 * np.arange(10))
        losses = []
        for limit in limits:
            v = jnp.clip(w[:, column : column + 1], -limit, limit)
            delta = np.asarray(fake_quantize(v, FMT) - w[:, column : column + 1], "f8")[:, 0]
            losses.append(delta @ np.asarray(h, "f8") @ delta)
        picked = np.flatnonzero(np.isclose(limits, np.abs(clipped[:, column]).max(), rtol=1e-5))
        assert picked.size == 1, "clipped to none of the ten ranges"
        # A scale that differs in its last bit rounds a weight the other way: ranges may swap where
        # their losses are close. Most are not: 8.72, 8.95, 9.00, 9.70, 17.2 .. 34.6 in the last.
        assert losses[picked[0]] <= 1.03 * min(losses)


def test_bad_arguments_are_named():
    x, w = problem()
    h, mean_abs = stats(x)
    with pytest.raises(ValueError, match=r"needs gram \[150, 150\]"):
        search_scales(w, h[:10], mean_abs, FMT)
    with pytest.raises(ValueError, match="by group or channel"):
        search_scales(w, h, mean_abs, QFormat.parse("int4-tensor"))
    with pytest.raises(ValueError, match="gram holds"):
        search_scales(w, h.at[0, 0].set(jnp.nan), mean_abs, FMT)
