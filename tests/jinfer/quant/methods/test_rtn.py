"""Round to nearest and its range search."""

import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.quant_format import QFormat
from jinfer.linear.qtensor import dequantize, quantize
from jinfer.quant.methods.rtn import NORM, quantize_rtn


def weights(seed=0, rows=150, columns=24):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_t(4, size=(rows, columns)) * 0.02, jnp.float32)


def group_errors(w, x, group, power=NORM):
    error = np.abs(np.asarray(dequantize(x) - w, np.float64)) ** power
    return np.stack([error[i : i + group].sum(0) for i in range(0, len(error), group)])


def test_without_search_it_is_quantize():
    w, fmt = weights(), QFormat.parse("int4-g64-asym")
    a, b = quantize_rtn(w, fmt), quantize(w, fmt)
    np.testing.assert_array_equal(a.codes(), b.codes())
    np.testing.assert_array_equal(a.scale, b.scale)


@pytest.mark.parametrize("text", ["int3-g64", "int4-g64-asym", "int4-tensor", "fp8-e4m3-block128"])
def test_the_search_never_loses_in_any_group_and_wins_somewhere(text):
    w, fmt = weights(), QFormat.parse(text)
    plain, searched = quantize_rtn(w, fmt), quantize_rtn(w, fmt, mse=True)
    before, after = (group_errors(w, x, fmt.group_size(150)) for x in (plain, searched))
    if fmt.group == 0 or fmt.block > 1:
        before, after = before.sum(1), after.sum(1)
    assert np.all(after <= before * (1 + 1e-5))
    assert after.sum() < 0.97 * before.sum()


def test_the_search_finds_the_best_of_the_80_ranges():
    w, fmt = weights(rows=64, columns=3), QFormat.parse("int4-g64")
    searched = quantize_rtn(w, fmt, mse=True)
    w64 = np.asarray(w, np.float64)
    best = np.full(3, np.inf)
    for i in range(80):
        scale = 2 * np.abs(w64).max(0) * (1 - i / 100) / 15
        q = np.clip(np.round(w64 / scale), -8, 7) * scale
        best = np.minimum(best, (np.abs(q - w64) ** NORM).sum(0))
    np.testing.assert_allclose(group_errors(w, searched, 64)[0], best, rtol=1e-3)


def test_important_inputs_are_rounded_better():
    w, fmt = weights(rows=64), QFormat.parse("int3-g64")
    importance = jnp.ones(64).at[:8].set(1000.0)
    plain = quantize_rtn(w, fmt, mse=True)
    weighed = quantize_rtn(w, fmt, mse=True, importance=importance)
    first = [np.square(np.asarray(dequantize(x) - w)[:8]).sum() for x in (plain, weighed)]
    assert first[1] < 0.8 * first[0]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="importance"):
        quantize_rtn(weights(), QFormat.parse("int4-g64"), importance=jnp.ones(150))
    with pytest.raises(ValueError, match="double scales"):
        quantize_rtn(weights(), QFormat.parse("nf4-g64-dq"), mse=True)
    with pytest.raises(ValueError, match="NaN"):
        quantize_rtn(weights().at[0, 0].set(jnp.nan), QFormat.parse("int4-g64"), mse=True)
