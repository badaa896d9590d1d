"""The reference against float64: every form that it takes on CPUs, GPUs and TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import target
from pallas_kernels.quant_matmul import prepare, quant_matmul

F32_SUMS = 2e-6  # f32 rows and sums of a few hundred terms
BF16_OUT = 3e-3  # one rounding to bf16 at the end


def multiply(inputs, x_dtype, kind, is_prepared=False):
    """One program, as a step would have it; in the form for `kind`, run on the CPU."""

    def f(x, q, scale, zero):
        if not is_prepared:
            return quant_matmul(x, q, scale, zero, group=inputs.group, impl="xla")
        w = prepare(q, scale, zero, group=inputs.group)
        return quant_matmul(x, w.q, w.scale, w.zero, group=w.group, layout=w.layout, impl="xla")

    with target.state(kind):
        return jax.jit(f)(*inputs.arrays(x_dtype))


@pytest.mark.parametrize("kind", ["cpu", "h100"])
def test_xla_agrees_with_float64(case, inputs, kind, relative_error):
    y = multiply(inputs, "float32", kind)
    assert y.dtype == jnp.float32
    assert relative_error(y, inputs.expected()) < F32_SUMS


@pytest.mark.parametrize("kind", ["cpu", "h100"])
def test_a_prepared_weight_means_the_same(case, inputs, kind, relative_error):
    """And bf16 rows are rounded once, at the end."""
    y = multiply(inputs, "bfloat16", kind, is_prepared=True)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, inputs.expected()) < BF16_OUT


@pytest.mark.parametrize("num_rows", [1, 3, 100, 300])
@pytest.mark.parametrize("kind", ["cpu", "h100"])
def test_any_number_of_rows_agrees(num_rows, kind, relative_error):
    rng = np.random.default_rng(num_rows)
    x = rng.standard_normal((num_rows, 96)).astype(np.float32)
    q = rng.integers(-8, 8, (96, 40))
    scale = rng.uniform(0.5, 1.5, (3, 40)).astype(np.float32)
    with target.state(kind):
        f = jax.jit(functools.partial(quant_matmul, impl="xla"))
        y = f(jnp.asarray(x), jnp.asarray(q, jnp.int4), jnp.asarray(scale))
    expected = x.astype(np.float64) @ (q * np.repeat(scale.astype(np.float64), 32, 0))
    assert relative_error(y, expected) < F32_SUMS


def test_digits_keep_small_entries_beside_an_outlier():
    """On a CPU rows become 22-bit integers: an entry 1e-4 of the largest keeps 1e-3 of itself."""
    x = np.full((1, 64), 1e-4, np.float32)
    x[0, 0] = 1.0
    q = np.ones((64, 8), np.int8)
    q[0] = 0
    y = quant_matmul(jnp.asarray(x), jnp.asarray(q), jnp.ones((1, 8), jnp.float32), impl="xla")
    np.testing.assert_allclose(np.asarray(y), 63e-4, rtol=1e-3)


def test_rows_of_zeros_give_zeros_and_nan_stays_nan():
    x = np.zeros((3, 64), np.float32)
    x[1, 5] = np.nan
    x[2, 5] = np.inf
    q = jnp.ones((64, 8), jnp.int8)
    scale, zero = jnp.ones((1, 8), jnp.float32), jnp.ones((1, 8), jnp.int8)
    y = np.asarray(quant_matmul(jnp.asarray(x), q, scale, zero, impl="xla"))
    assert (y[0] == 0).all()
    assert not np.isfinite(y[1:]).any()


@pytest.mark.parametrize("size", [1e-30, 1e-33, 1e-36, 1e-38, 1e-44])
def test_rows_next_to_nothing_stay_finite(size):
    """A CPU flushes what is below 1e-38 to zero, a row's unit too: 0 / 0 must not come of it."""
    x = jnp.full((2, 64), size, jnp.float32).at[0, 3].set(0)
    q, scale = jnp.ones((64, 8), jnp.int8), jnp.ones((1, 8), jnp.float32)
    y = quant_matmul(x, q, scale, jnp.full((1, 8), 3, jnp.int8), impl="xla")
    np.testing.assert_allclose(np.asarray(y), -128 * size, rtol=0.02, atol=1e-30)


def test_no_rows_give_no_rows():
    q, scale = jnp.ones((64, 8), jnp.int8), jnp.ones((2, 8), jnp.float32)
    for rows, codes, groups in ((0, q, 2), (0, q, 1), (0, q.astype(jnp.float8_e4m3fn), 2)):
        y = quant_matmul(jnp.ones((3, rows, 64), jnp.float32), codes, scale[:groups])
        assert y.shape == (3, 0, 8)


def test_jit_vmap_and_leading_axes_agree_with_plain_calls():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 64)), jnp.float32)
    q = jnp.asarray(rng.integers(-8, 8, (64, 32)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (2, 32)), jnp.float32)
    whole = quant_matmul(x, q, scale)
    assert whole.shape == (2, 3, 32)
    np.testing.assert_allclose(jax.jit(quant_matmul)(x, q, scale), whole, rtol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(lambda r: quant_matmul(r, q, scale))(x), whole, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["cpu", "h100"])
@pytest.mark.parametrize("groups", [1, 2])
def test_derivatives_are_those_of_the_dequantized_product(kind, groups):
    rng = np.random.default_rng(0)
    x, direction = (jnp.asarray(rng.standard_normal((3, 64)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.integers(-8, 8, (64, 32)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (groups, 32)), jnp.float32)
    zero = jnp.asarray(rng.integers(-8, 8, (groups, 32)), jnp.float32)

    def loss(multiply, x, scale, zero):
        return jnp.sum(jnp.sin(multiply(x, q, scale, zero)))

    def dense(x, q, scale, zero):
        scale, zero = (jnp.repeat(a, 64 // groups, axis=0) for a in (scale, zero))
        return x @ ((q.astype(jnp.float32) - zero) * scale)

    with target.state(kind):
        found, expected = (
            jax.grad(functools.partial(loss, f), argnums=(0, 1, 2))(x, scale, zero)
            for f in (quant_matmul, dense)
        )
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * float(jnp.abs(b).max()))
        _, tangent = jax.jvp(lambda x: quant_matmul(x, q, scale), (x,), (direction,))
        np.testing.assert_allclose(tangent, quant_matmul(direction, q, scale), rtol=1e-4, atol=1e-3)
