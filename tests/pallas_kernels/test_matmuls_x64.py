"""Products with quantized weights with `jax_enable_x64`: the numbers are those without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.int8_matmul import int8_matmul, quantize_rows
from pallas_kernels.quant_matmul import quant_matmul

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 64)).astype(np.float32)
Q = RANDOM.integers(-8, 8, (64, 32)).astype(np.int8)
SCALE = RANDOM.uniform(0.5, 1.5, (2, 32)).astype(np.float32)
ZERO = RANDOM.integers(-8, 8, (2, 32)).astype(np.int8)


def with_int8_inputs():
    codes, scale = quantize_rows(X)
    return int8_matmul(codes, Q, scale, SCALE[:1])


PRODUCTS = {
    "groups": lambda: quant_matmul(X, Q, SCALE, group=32, impl="xla"),
    "groups with zeros": lambda: quant_matmul(X, Q, SCALE, ZERO, group=32, impl="xla"),
    "16 bits": lambda: quant_matmul(jnp.asarray(X, jnp.bfloat16), Q, SCALE, group=32, impl="xla"),
    "int8 inputs": with_int8_inputs,
    "fp8 inputs": lambda: fp8_matmul(
        jnp.asarray(X, jnp.float8_e4m3fn),
        jnp.asarray(Q, jnp.float8_e4m3fn),
        np.ones((3, 1), np.float32),
        SCALE[:1],
        impl="xla",
    ),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_the_same_with_x64(product):
    expected = product()
    with jax.enable_x64(True):
        out = product()
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))
