"""x @ w for every format, against the dense weight or against integer arithmetic in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.quant_format import QFormat
from jinfer.linear import qtensor
from jinfer.linear.matmul import matmul
from jinfer.linear.qtensor import QTensor, from_codes
from jinfer.linear.quantized import quantize_tokens

WEIGHT_ONLY = [
    "int2-g64",
    "int3-g64",
    "int4-g64",
    "int4-g64-asym",
    "int4-channel-asym",
    "int5-channel",
    "int6-g16-asymf",
    "int8-tensor",
    "fp8-e4m3-channel",
    "fp8-e4m3-block128",
    "nf4-g64",
    "nf4-g64-dq",
    "fp4-g64",
]
SUMS = 2e-6  # relative to the largest output: f32 sums in another order
BF16 = 2e-2  # relative: weights or outputs rounded to 8 bits


quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "grid", "scale_dtype"))
multiply = jax.jit(matmul)
dequantize = jax.jit(qtensor.dequantize, static_argnames="dtype")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("text", WEIGHT_ONLY)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(3, jnp.float32), (1, jnp.bfloat16), (40, jnp.bfloat16)]
)
def test_weight_only_equals_the_dense_product(text, rows, dtype):
    w = quantize(normal(150, 70), QFormat.parse(text))
    x = normal(rows, 150, seed=1).astype(dtype)
    out = multiply(x, w)
    assert out.shape == (rows, 70) and out.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64)
    assert relative(out, expected) <= (SUMS if dtype == jnp.float32 else BF16)


@pytest.mark.parametrize("text", ["int8-channel:dyn", "int4-g64:dyn", "int8-channel:dyn-full"])
def test_int8_inputs_follow_integer_arithmetic_exactly(text):
    fmt = QFormat.parse(text)
    w = quantize(normal(150, 70), fmt, grid="restricted")
    x = normal(9, 150, seed=1) * jnp.logspace(-2, 2, 9)[:, None]
    steps = np.float32(127.5 if "full" in text else 127)
    xs = np.asarray(x)
    token_scale = np.abs(xs).max(1, keepdims=True) / steps
    q = np.clip(np.round(xs / token_scale), -128, 127).astype(np.int64)
    codes, scale = np.asarray(w.codes(), np.int64), np.asarray(w.scales(), np.float64)
    group = fmt.group_size(150)
    expected = sum(
        (q[:, i : i + group] @ codes[i : i + group]) * scale[i // group]
        for i in range(0, 150, group)
    )
    assert relative(multiply(x, w), expected * token_scale) <= SUMS


def test_int8_sums_do_not_overflow_nor_round():
    fmt = QFormat.parse("int8-channel:dyn")
    num_inputs = 70_001  # 127 * 127 * 70001 > 2^30, and odd: not exact in f32 step by step
    w = from_codes(jnp.full((num_inputs, 2), 127, jnp.int8), jnp.ones((1, 2)), None, fmt)
    x = jnp.full((1, num_inputs), 127.0)
    assert float(multiply(x, w)[0, 0]) == float(np.float32(127 * 127 * num_inputs))


def test_int8_scales_are_per_token_not_per_tensor():
    w = quantize(normal(64, 16), QFormat.parse("int8-channel:dyn"))
    x = normal(2, 64, seed=1) * jnp.asarray([[1e-3], [1e3]])
    both, alone = multiply(x, w), multiply(x[:1], w)
    np.testing.assert_array_equal(both[0], alone[0])
    assert relative(alone, x[:1] @ dequantize(w)) < 0.02


@pytest.mark.parametrize("text", ["fp8-e4m3-channel:dyn", "fp8-e4m3-block128:dyn"])
def test_fp8_inputs_lose_three_bits_of_fraction_and_no_more(text):
    w = quantize(normal(300, 70), QFormat.parse(text))
    x = normal(5, 300, seed=1) * jnp.logspace(-3, 3, 5)[:, None]
    for row in range(5):
        expected = np.asarray(x[row : row + 1], np.float64) @ np.asarray(dequantize(w), np.float64)
        assert relative(multiply(x[row : row + 1], w), expected) < 0.05
    assert np.all(np.isfinite(np.asarray(multiply(x, w))))


@pytest.mark.parametrize("kind", ["int", "fp8-e4m3", "fp8-e5m2"])
@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-38])
def test_tokens_next_to_nothing_do_not_become_nan(kind, size):
    q, scale = quantize_tokens(jnp.asarray([[size, 0.0], [1.0, 0.0]]), kind)
    back = np.asarray(q).astype(np.float64) * np.asarray(scale)
    np.testing.assert_allclose(back, [[size, 0], [1, 0]], rtol=1e-6, atol=1.1e-30)


def test_the_largest_fp8_input_is_448_and_not_nan():
    q, scale = quantize_tokens(jnp.asarray([[1.0, -3.0, 0.3]]), "fp8-e4m3")
    assert float(q[0, 1]) == -448.0
    np.testing.assert_allclose(scale, [[3 / 448]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8-channel:static", "fp8-e4m3-tensor:static"])
def test_static_inputs_use_the_stored_scale_and_saturate(kind):
    fmt = QFormat.parse(kind)
    plain = quantize(normal(64, 16), QFormat.parse(kind.split(":")[0]))
    w = QTensor(plain.q, plain.scale, None, jnp.float32(0.01), None, fmt)
    x = normal(3, 64, seed=1, scale=0.2)
    assert relative(multiply(x, w), x @ dequantize(w)) < 0.05
    top = 1.27 if "int8" in kind else 4.48
    big = jnp.full((1, 64), 100.0)
    assert relative(multiply(big, w), jnp.full((1, 64), top) @ dequantize(w)) < 1e-5


def test_outlier_features_multiply_in_float():
    fmt = QFormat.parse("int8-channel:outlier")
    w = quantize(normal(4, 3), fmt, grid="restricted")
    x = jnp.asarray([[1.0, -2.0, 7.0, 0.5]])
    q = np.array([64, -127, 0, 32])
    rest = q @ np.asarray(w.codes(), np.int64) * np.asarray(w.scales())[0] * 2 / 127
    expected = rest + 7 * np.asarray(dequantize(w))[2]
    np.testing.assert_allclose(multiply(x, w)[0], expected, rtol=1e-5)


def test_an_outlier_does_not_change_its_batch_mates():
    w = quantize(normal(64, 8), QFormat.parse("int8-channel:outlier"))
    x = normal(2, 64, seed=1)
    spiked = x.at[1, 5].set(90.0)
    np.testing.assert_array_equal(multiply(spiked, w)[0], multiply(x, w)[0])
    assert relative(multiply(spiked, w), spiked @ dequantize(w)) < 0.02


@pytest.mark.parametrize("text", ["int4-g16", "int8-channel:dyn"])
def test_a_permuted_weight_reads_its_inputs_in_its_own_order(text):
    fmt = QFormat.parse(text)
    perm = jnp.asarray(np.random.default_rng(1).permutation(64), jnp.int32)
    stored = quantize(normal(64, 8)[perm], fmt)
    w = QTensor(stored.q, stored.scale, None, None, perm, fmt)
    x = normal(5, 64, seed=1)
    np.testing.assert_allclose(multiply(x, w), multiply(x[:, perm], stored), rtol=1e-5, atol=1e-5)
    assert relative(multiply(x, w), x @ dequantize(w)) < 0.02


@pytest.mark.parametrize("text", ["int4-g16-asym", "int8-channel:dyn", "nf4-g32", "int3-g16"])
def test_experts_are_a_batch_of_products(text):
    w = quantize(normal(3, 48, 8), QFormat.parse(text))
    x = normal(3, 5, 48, seed=1)
    out = multiply(x, w)
    for e in range(3):
        one = jax.tree.map(lambda a, e=e: a[e], w)
        np.testing.assert_allclose(out[e], multiply(x[e], one), rtol=1e-5, atol=1e-5)


def test_jit_and_leading_axes_of_the_inputs():
    w = quantize(normal(64, 8), QFormat.parse("int4-g32"))
    x = normal(2, 3, 64, seed=1)
    out = matmul(x, w)
    np.testing.assert_allclose(out, multiply(x, w), rtol=1e-5, atol=1e-6)
    assert out.shape == (2, 3, 8)
    np.testing.assert_allclose(out[1, 2], multiply(x[1, 2], w), rtol=1e-5, atol=1e-6)


def test_a_wrong_width_is_named():
    w = quantize(normal(64, 8), QFormat.parse("int4-g32"))
    with pytest.raises(ValueError, match=r"x has 63 features, the weight \[64, 8\] takes 64"):
        matmul(jnp.ones((1, 63)), w)
