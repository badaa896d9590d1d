"""Importance is the mean square of what each linear reads."""

import jax.numpy as jnp
import numpy as np

from jinfer.checkpoints.families import expected_shapes, is_linear
from jinfer.quant import calibrate
from jinfer.quant.importance import measure_importance

TOKENS = np.random.default_rng(0).integers(0, 96, (4, 16)).astype(np.int32)


def test_every_linear_gets_the_mean_square_of_its_inputs(make_model):
    model, params = make_model("llama")
    seen = []
    found = measure_importance(model, params, TOKENS, on_layer=seen.append)
    assert seen == [0, 1]
    shapes = expected_shapes(model.config)
    assert found.keys() == {path for path in shapes if is_linear(path)}
    for path, squares in found.items():
        assert squares.shape == (shapes[path][0],) and squares.min() > 0
    x = calibrate.embed(model, params, calibrate.chunks_of(jnp.asarray(TOKENS)))
    for part, inputs in (("q", calibrate.attention_inputs(model, 0, params["layers"][0], x)),):
        want = np.mean(np.square(np.asarray(inputs, np.float64)), axis=(0, 1, 2))
        np.testing.assert_allclose(found["layers", 0, "attn", part, "w"], want, rtol=1e-5)


def test_experts_share_the_importance_of_all_tokens_and_leave_down_out(make_model):
    model, params = make_model("moe")
    found = measure_importance(model, params, TOKENS)
    assert ("layers", 0, "mlp", "gate", "w") in found
    assert ("layers", 0, "mlp", "down", "w") not in found
    assert ("layers", 1, "mlp", "down", "w") in found  # a dense layer
