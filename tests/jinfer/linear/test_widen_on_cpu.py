"""Laying weights out for the CPU changes neither their values nor, beyond rounding, a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.quant_format import QFormat
from jinfer.linear import ops
from jinfer.linear.placement import widen_on_cpu
from jinfer.linear.qtensor import QTensor, dequantize, quantize
from jinfer.quant.methods.rtn import with_static_inputs

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(96, 48)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(3, 96)), jnp.float32)
linear = jax.jit(ops.linear)


def make(text, w=W):
    static = text.endswith(":static")
    x = quantize(w, QFormat.parse(text.removesuffix(":static")))
    return with_static_inputs(x, 4.0) if static else x


@pytest.mark.parametrize(
    "text", ["int4-g32", "int3-g32-asym", "int8-channel", "nf4-g32-dq", "fp8-e4m3-channel"]
)
def test_weight_only_formats_become_the_floats_they_stand_for(text):
    x = make(text)
    out = widen_on_cpu({"w": x, "b": W})
    np.testing.assert_array_equal(out["w"], dequantize(x))
    assert out["w"].dtype == jnp.float32 and out["b"] is W


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("fp8-e4m3-channel:dyn", jnp.float32),
        ("fp8-e4m3-tensor:static", jnp.float32),
        ("fp8-e4m3-block32:dyn", jnp.float32),
        ("int8-channel:dyn", jnp.int8),
        ("int8-channel:outlier", jnp.int8),
        ("int4-g32:dyn", jnp.int8),
    ],
)
def test_formats_with_quantized_inputs_multiply_to_the_same_bits(text, dtype):
    x = make(text)
    out = widen_on_cpu(x)
    assert isinstance(out, QTensor) and out.q.dtype == dtype and out.shape == x.shape
    np.testing.assert_array_equal(linear(X, out), linear(X, x))


def test_a_permuted_weight_is_put_back_in_order():
    perm = jnp.asarray(RNG.permutation(96), jnp.int32)
    plain = make("int4-g32", W[perm])
    x = QTensor(plain.q, plain.scale, None, None, perm, plain.fmt)
    np.testing.assert_array_equal(widen_on_cpu(x)[perm], dequantize(plain))


def test_weights_that_would_not_fit_as_floats_stay_as_they_are(caplog):
    params = {"w": make("int4-g32")}
    assert widen_on_cpu(params, dense_bytes=4 * W.size - 1) is params
    assert "slow on CPUs" in caplog.text
    assert isinstance(widen_on_cpu(params, dense_bytes=4 * W.size)["w"], jax.Array)
