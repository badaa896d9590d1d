"""Attention with `jax_enable_x64`: the numbers are those without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.paged_attention import ragged_paged_attention

SHAPES = {
    "decode": {"seqs": ((1, 9), (1, 17)), "max_q_len": 1},
    "mixed with a window": {"seqs": ((1, 20), (0, 0), (12, 30)), "sliding_window": 11},
    "tree": {"seqs": ((4, 20), (3, 9)), "has_tree": True},
    "quantized pages": {"seqs": ((1, 20), (5, 9)), "kv_dtype": "int8"},
}


@pytest.mark.parametrize("impl", ["xla", "mosaic_tpu"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.thorough
def test_attention_is_the_same_with_x64(make_case, shape, impl):
    if impl == "mosaic_tpu" and shape is SHAPES["quantized pages"]:
        shape = {**shape, "page_size": 128}
    inputs = make_case(name="", **shape).build()

    def attend():
        run = jax.jit(lambda *a, **k: ragged_paged_attention(*a, **k, **inputs.options, impl=impl))
        tree = None if inputs.tree_mask is None else jnp.asarray(inputs.tree_mask)
        if impl == "xla":
            return np.asarray(run(*inputs.args, tree_mask=tree))
        if reason := compat.why_not_interpret("tpu"):
            pytest.skip(reason)
        with compat.interpret():
            return np.asarray(run(*inputs.args, tree_mask=tree))

    expected = attend()
    with jax.enable_x64(True):
        out = attend()
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)
