"""Products with packed weights: the layout, the jnp form, and the native kernel beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import native
from pallas_kernels.packed_matmul import pack, packed_matmul, unpack

needs_native = pytest.mark.skipif(native().why_not is not None, reason=str(native().why_not))
multiply = jax.jit(packed_matmul, static_argnames="impl")


def make_weight(num_inputs, num_outputs, *, bits, group, is_wide=False, seed=0):
    """Returns a packed weight and the floats that it stands for."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (num_inputs, num_outputs)).astype(np.uint8)
    shape = (num_inputs // group, num_outputs)
    scale, low = rng.uniform(0.5, 2, shape) / 2**bits, rng.uniform(-1, 0, shape)
    kind = np.float32 if is_wide else np.float16
    scale, low = (x.astype(kind).astype(np.float32) for x in (scale, low))
    w = pack(*map(jnp.asarray, (codes, scale, low)), bits=bits)
    assert w.is_wide == is_wide
    return w, codes * np.repeat(scale, group, axis=0) + np.repeat(low, group, axis=0)


SHAPES = [(32, 16, 32), (64, 5, 32), (256, 40, 64), (576, 100, 576), (1024, 33, 128)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_loses_nothing(shape, bits, is_wide):
    num_inputs, num_outputs, group = shape
    w, dense = make_weight(num_inputs, num_outputs, bits=bits, group=group, is_wide=is_wide)
    codes, scale, low = map(np.asarray, unpack(w))
    found = codes * np.repeat(scale, group, axis=0) + np.repeat(low, group, axis=0)
    np.testing.assert_array_equal(found.astype(np.float32), dense.astype(np.float32))
    numbers = 2 * (4 if is_wide else 2) / group
    strips = -(-num_outputs // 16) * 16
    assert w.data.nbytes == num_inputs * strips * (bits / 8 + numbers)


@pytest.mark.parametrize("impl", ["xla", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_is_that_of_rounding_rows_to_int8(impl, bits):
    w, dense = make_weight(1024, 64, bits=bits, group=32)
    x = np.random.default_rng(1).standard_normal((7, 1024)).astype(np.float32)
    y = np.asarray(multiply(x, w, impl=impl), np.float64)
    expected = x.astype(np.float64) @ dense
    error = np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2))
    assert 1e-4 < error < 7e-3


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 13, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_native_agrees_with_jnp(shape, bits, num_rows, dtype):
    num_inputs, num_outputs, group = shape
    for is_wide in (False, True):
        w, _ = make_weight(num_inputs, num_outputs, bits=bits, group=group, is_wide=is_wide)
        x = np.random.default_rng(num_rows).standard_normal((num_rows, num_inputs))
        x = jnp.asarray(x * 10, dtype)
        expected = np.asarray(multiply(x, w, impl="xla"))
        y = np.asarray(multiply(x, w, impl="native"))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(y, expected, atol=3e-5 * scale, rtol=3e-5)


@needs_native
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_do_not_saturate(bits):
    """AVX2 sums products of 8 bits in 16 bits."""
    top = 2**bits - 1
    codes = jnp.full((64, 16), top, jnp.uint8)
    one = jnp.ones((1, 16), jnp.float32)
    w = pack(codes, one, -128 * one, bits=bits)
    x = jnp.stack([jnp.ones(64), -jnp.ones(64)])
    y = np.asarray(multiply(x, w, impl="native"))
    np.testing.assert_allclose(y[:, 0], [64 * (top - 128), -64 * (top - 128)], rtol=1e-5)


@needs_native
def test_a_row_does_not_depend_on_other_rows():
    w, _ = make_weight(576, 100, bits=4, group=32)
    x = np.random.default_rng(0).standard_normal((21, 576)).astype(np.float32)
    together = np.asarray(multiply(x, w, impl="native"))
    for i in range(21):
        alone = np.asarray(multiply(x[i : i + 1], w, impl="native"))
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize("impl", ["xla", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_comes_through_in_its_row_alone(impl, bad):
    w, _ = make_weight(64, 20, bits=4, group=32)
    x = np.ones((3, 64), np.float32)
    x[1, 40] = bad
    y = np.asarray(multiply(x, w, impl=impl))
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


def test_zeros_give_zeros():
    w, _ = make_weight(64, 20, bits=8, group=64)
    assert not np.asarray(multiply(jnp.zeros((2, 64)), w)).any()


def test_other_widths_are_refused():
    w, _ = make_weight(64, 20, bits=8, group=64)
    with pytest.raises(ValueError, match=r"x must be \[..., 64\], got \[2, 32\]"):
        packed_matmul(jnp.zeros((2, 32)), w)
