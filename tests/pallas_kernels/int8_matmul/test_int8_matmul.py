"""W8A8 against float64: sums are exact, so only the scaling rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import target
from pallas_kernels.int8_matmul import int8_matmul, quantize_rows


@pytest.mark.parametrize("kind", ["cpu", "h100"])
@pytest.mark.parametrize("layout", ["kn", "nk"])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 33])
@pytest.mark.parametrize("has_zero", [False, True])
def test_products_are_exact_up_to_scaling(kind, layout, num_rows, has_zero):
    rng = np.random.default_rng(num_rows)
    x, w = rng.integers(-127, 128, (num_rows, 96)), rng.integers(-128, 128, (96, 40))
    x_scale = rng.uniform(0.1, 2, (num_rows, 1)).astype(np.float32)
    w_scale = rng.uniform(0.1, 2, (40,)).astype(np.float32)
    zero = rng.integers(-8, 8, (40,)) if has_zero else None
    stored = w if layout == "kn" else w.T

    def f(x, w, zero):
        return int8_matmul(x, w, x_scale, w_scale, zero=zero, layout=layout)

    with target.state(kind):
        y = jax.jit(f)(
            jnp.asarray(x, jnp.int8),
            jnp.asarray(stored, jnp.int8),
            None if zero is None else jnp.asarray(zero, jnp.int8),
        )
    shifted = w if zero is None else w - zero
    expected = (x @ shifted) * x_scale.astype(np.float64) * w_scale.astype(np.float64)
    np.testing.assert_allclose(np.asarray(y), expected, rtol=2e-6, atol=1e-3)


def test_rows_come_back_within_half_a_step_and_saturate_under_a_static_scale():
    x = np.random.default_rng(0).standard_normal((3, 4, 50)).astype(np.float32)
    q, scale = quantize_rows(jnp.asarray(x))
    assert q.dtype == jnp.int8 and scale.shape == (3, 4, 1)
    error = np.abs(np.asarray(q).astype(np.float32) * np.asarray(scale) - x)
    assert (error <= np.asarray(scale) / 2 * 1.001).all()
    assert np.abs(np.asarray(q)).max() == 127
    q, scale = quantize_rows(jnp.asarray([[1.0, -300.0, 300.0]]), jnp.float32(2))
    np.testing.assert_array_equal(q, [[0, -127, 127]])
    q, scale = quantize_rows(jnp.zeros((1, 4)))
    assert (np.asarray(q) == 0).all() and float(scale[0, 0]) == 1


def test_leading_axes_are_rows_and_a_static_scale_is_one_number():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 64)), jnp.bfloat16)
    w = jnp.asarray(rng.integers(-127, 128, (64, 32)), jnp.int8)
    q, scale = quantize_rows(x, jnp.float32(0.05))
    y = int8_matmul(q, w, scale, jnp.float32(0.1), out_dtype=jnp.bfloat16)
    assert y.shape == (2, 3, 32) and y.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.zeros((4, 64))}, "x must be int8, got float32.*quantize_rows"),
        ({"w": jnp.zeros((64, 32))}, "w must be int8"),
        ({"w": jnp.zeros((2, 64, 32), jnp.int8)}, r"w must be int8 with 2 axes, got int8\[2, 64"),
        ({"w": jnp.zeros((64,), jnp.int8)}, r"w must be int8 with 2 axes, got int8\[64\]"),
        ({"x": jnp.zeros((4, 63), jnp.int8)}, "K=64"),
        (
            {"x_scale": jnp.ones((3, 1))},
            r"x_scale must be \[\] \(static\) or \[4, 1\].*got \[3, 1\]",
        ),
        ({"w_scale": jnp.ones((31,))}, r"w_scale must be \[\], \[32\]"),
        ({"w_scale": jnp.ones((2, 32))}, "groups of inputs go to quant_matmul"),
        ({"zero": jnp.ones((31,))}, "zero must be"),
        ({"impl": "mosaic_gpu"}, r"impl must be one of \['auto', 'xla'\], got 'mosaic_gpu'"),
        ({"layout": "oi"}, "layout must be"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(change, message):
    args = {
        "x": jnp.zeros((4, 64), jnp.int8),
        "w": jnp.zeros((64, 32), jnp.int8),
        "x_scale": jnp.ones((4, 1)),
        "w_scale": jnp.ones((32,)),
    } | change
    with pytest.raises(ValueError, match=message):
        int8_matmul(**args)


def test_a_scale_may_be_a_plain_number_and_arrays_numpys():
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    q, _ = quantize_rows(x, 0.01)
    w = np.ones((8, 4), np.int8)
    expected = int8_matmul(q, jnp.asarray(w), jnp.float32(0.01), jnp.float32(2))
    np.testing.assert_array_equal(int8_matmul(np.asarray(q), w, 0.01, 2.0), expected)
    with pytest.raises(ValueError, match=r"x must be f32, bf16 or f16 \[..., K\], got int32"):
        quantize_rows(np.zeros((2, 8), np.int32))
