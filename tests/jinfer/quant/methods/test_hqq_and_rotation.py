"""HQQ's fitted zero points; Hadamard rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.quant_format import QFormat
from jinfer.kv.rotation import (
    hadamard,
    kv_rotation,
    random_hadamard,
    rotate,
    rotate_heads,
    rotate_inputs,
    rotate_outputs,
)
from jinfer.linear.qtensor import dequantize
from jinfer.quant.methods.hqq import quantize_hqq
from jinfer.quant.methods.rtn import quantize_rtn


def weights(seed=0, rows=150):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_t(4, size=(rows, 40)) * 0.03 + 0.01, jnp.float32)


@pytest.mark.parametrize("text", ["int4-g64-asym", "int3-g64-asymf"])
def test_hqq_lowers_the_mean_error(text):
    w = weights()
    plain = quantize_rtn(w, QFormat.parse(text))
    fitted = quantize_hqq(w, QFormat.parse(text))
    assert fitted.fmt.float_zero and fitted.zero.dtype == jnp.float32

    def error(x):
        return float(jnp.mean(jnp.abs(dequantize(x) - w)))

    assert error(fitted) < 0.99 * error(plain)


def test_hqq_finds_a_grid_whose_zero_is_no_code():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (64, 8))
    codes[:2] = [[0], [15]]
    w = jnp.asarray((codes - 7.4) * 0.1, jnp.float32)  # w = 0.1 q - 0.74
    fitted = quantize_hqq(w, QFormat.parse("int4-g64-asymf"))
    plain = quantize_rtn(w, QFormat.parse("int4-g64-asym"))
    errors = [float(jnp.abs(dequantize(x) - w).max()) for x in (fitted, plain)]
    assert errors[0] < 1e-3 < errors[1]


def test_hqq_refuses_what_it_cannot_fit():
    with pytest.raises(ValueError, match="asymmetric"):
        quantize_hqq(weights(), QFormat.parse("int4-g64"))
    with pytest.raises(ValueError, match="NaN"):
        quantize_hqq(weights().at[0, 0].set(jnp.nan), QFormat.parse("int4-g64-asym"))


@pytest.mark.parametrize("size", [1, 2, 12, 20, 24, 28, 36, 64, 76, 576, 640, 896, 1152])
def test_hadamard_rows_are_orthogonal_signs(size):
    h = hadamard(size).astype(np.int64)
    assert set(np.unique(h)) <= {-1, 1}
    np.testing.assert_array_equal(h @ h.T, size * np.eye(size, dtype=np.int64))


@pytest.mark.parametrize("size", [6, 7, 52 * 3])
def test_sizes_without_a_construction_are_named(size):
    with pytest.raises(ValueError, match=f"size {size}"):
        hadamard(size)


def test_a_rotation_leaves_products_alone_and_spreads_outliers():
    rotation = random_hadamard(jax.random.key(0), 36)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 36)), jnp.float32).at[:, 4].multiply(50.0)
    w = jnp.asarray(rng.normal(size=(36, 36)), jnp.float32)
    turned = x @ rotation
    np.testing.assert_allclose(turned @ rotate_inputs(w, rotation), x @ w, rtol=1e-4, atol=1e-3)
    w2, b2 = rotate_outputs(w, jnp.arange(36.0), rotation)
    expected = (x @ w + jnp.arange(36.0)[None]) @ rotation
    np.testing.assert_allclose(x @ w2 + b2[None], expected, rtol=1e-4, atol=1e-2)

    def peak(a):
        return float(jnp.max(jnp.abs(a)) / jnp.sqrt(jnp.mean(a * a)))

    assert peak(turned) < peak(x) / 2
    other = random_hadamard(jax.random.key(1), 36)
    assert not np.array_equal(np.asarray(other), np.asarray(rotation))


def test_heads_rotate_one_by_one_also_when_queries_share_them():
    rotation = random_hadamard(jax.random.key(0), 4)
    v, o = rotate_heads(rotation, 2), rotate_heads(rotation, 6)
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    w_o = jnp.asarray(rng.normal(size=(24, 3)), jnp.float32)

    def repeat(a):
        return jnp.repeat(a.reshape(5, 2, 1, 4), 3, axis=2).reshape(5, 24)

    expected = repeat(values) @ w_o
    got = repeat(values @ v) @ rotate_inputs(w_o, o)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_rotated_heads_have_the_same_products_and_no_outliers(head_dim):
    rotation = kv_rotation(head_dim)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((50, head_dim)), jnp.float32) for _ in range(2))
    k = k.at[:, 3].mul(30)
    turned = [rotate(x, rotation) for x in (q, k)]
    np.testing.assert_allclose(
        jnp.sum(turned[0] * turned[1], axis=1), jnp.sum(q * k, axis=1), rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(rotate(turned[1], rotation.T), k, atol=1e-4)
    peaks = [jnp.abs(x).max(axis=1) / jnp.linalg.norm(x, axis=1) for x in (k, turned[1])]
    assert jnp.median(peaks[1]) < 0.7 * jnp.median(peaks[0])
