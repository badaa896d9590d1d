"""Names of types: those that XLA prints."""

import jax
import jax.numpy as jnp

from pallas_kernels import hlo


def test_names_are_those_that_xla_prints():
    dtypes = [jnp.dtype(name) for name in hlo._NAMES]
    args = [jax.ShapeDtypeStruct((2 + i, 8), dtype) for i, dtype in enumerate(dtypes)]
    text = jax.jit(lambda *args: args).lower(*args).compile().as_text()
    for x in args:
        assert hlo.type_name(x.dtype, x.shape) in text


def test_float_copies_of_matrices_may_lie_either_way():
    found = hlo.dense_types((4, 8), (2, 3, 5))
    assert len(found) == len(set(found)) == 9
    assert {"bf16[4,8]", "f32[8,4]", "f16[2,3,5]"} < set(found)
    assert "bf16[5,3,2]" not in found
