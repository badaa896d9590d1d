"""The basic maths against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.linear import ops

RNG = np.random.default_rng(0)
# float32 sums of a few dozen terms; bfloat16 keeps 8 bits of a result that was summed in float32.
TOLERANCE = {jnp.float32: dict(rtol=1e-5, atol=1e-5), jnp.bfloat16: dict(rtol=2**-8, atol=1e-2)}
DTYPES = [jnp.float32, jnp.bfloat16]


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def f64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_linear_is_a_product_plus_bias_in_the_inputs_dtype(dtype, lead):
    x, w, b = normal(*lead, 24, dtype=dtype), normal(24, 7, dtype=dtype), normal(7, dtype=dtype)
    got = ops.linear(x, w, b)
    assert got.dtype == dtype
    np.testing.assert_allclose(f64(got), f64(x) @ f64(w) + f64(b), **TOLERANCE[dtype])
    np.testing.assert_allclose(f64(ops.linear(x, w)), f64(x) @ f64(w), **TOLERANCE[dtype])


def test_linear_accumulates_in_float32():
    """2^8 + 1 is no bfloat16: summed in bfloat16, the ones would be lost."""
    x = jnp.ones((1, 257), jnp.bfloat16)
    w = jnp.concatenate([jnp.full((1, 1), 256.0), jnp.ones((255, 1)), jnp.full((1, 1), -256.0)])
    assert ops.linear(x, w.astype(jnp.bfloat16)).item() == 255.0


def test_linear_does_not_round_its_input_to_a_narrower_weight():
    x, w = normal(3, 24), normal(24, 7, dtype=jnp.bfloat16)
    got = ops.linear(x, w)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(f64(got), f64(x) @ f64(w), **TOLERANCE[jnp.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_gives_float32_logits_tied_or_not(dtype):
    x, table = normal(2, 3, 24, dtype=dtype), normal(11, 24, dtype=dtype)
    tied = ops.head(x, table, is_tied=True)
    untied = ops.head(x, table.T, is_tied=False)
    assert tied.dtype == untied.dtype == jnp.float32
    np.testing.assert_allclose(f64(tied), f64(x) @ f64(table).T, **TOLERANCE[jnp.float32])
    np.testing.assert_allclose(tied, untied, rtol=1e-6, atol=1e-6)


def test_embed_takes_rows():
    table = normal(11, 4)
    tokens = jnp.array([[3, 0], [10, 3]])
    np.testing.assert_array_equal(ops.embed(tokens, table), np.asarray(table)[np.asarray(tokens)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(dtype, plus_one):
    x, scale = normal(2, 3, 16, dtype=dtype), normal(16, dtype=dtype)
    got = ops.rms_norm(x, scale, 1e-2, plus_one=plus_one)
    want = f64(x) / np.sqrt((f64(x) ** 2).mean(-1, keepdims=True) + 1e-2)
    want = want * (f64(scale) + plus_one)
    assert got.dtype == dtype
    np.testing.assert_allclose(f64(got), want, **TOLERANCE[dtype])


def test_rms_norm_of_large_bfloat16_does_not_overflow():
    x = jnp.full((1, 4), 1e20, jnp.float32)
    np.testing.assert_allclose(ops.rms_norm(x / 1e2, jnp.ones(4), 1e-6), np.ones((1, 4)), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [8, 6])
def test_rotate_turns_pairs_and_leaves_the_rest(dtype, rotated):
    half = rotated // 2
    x, angles = normal(2, 5, 3, 8, dtype=dtype), normal(2, 5, half)
    got = f64(ops.rotate(x, jnp.cos(angles), jnp.sin(angles)))
    pairs = f64(x)[..., :half] + 1j * f64(x)[..., half:rotated]
    turned = pairs * np.exp(1j * np.asarray(angles, np.float64))[:, :, None, :]
    np.testing.assert_allclose(got[..., :half], turned.real, **TOLERANCE[dtype])
    np.testing.assert_allclose(got[..., half:rotated], turned.imag, **TOLERANCE[dtype])
    np.testing.assert_array_equal(got[..., rotated:], f64(x)[..., rotated:])


def test_gated_activations():
    gate, up = normal(3, 9), normal(3, 9)
    g, u = f64(gate), f64(up)
    erf = np.vectorize(__import__("math").erf)
    want = {
        "silu": g / (1 + np.exp(-g)) * u,
        "gelu": g * 0.5 * (1 + erf(g / np.sqrt(2))) * u,
        "gelu_tanh": g * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u,
    }
    for name, value in want.items():
        np.testing.assert_allclose(ops.gated(name, gate, up), value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="relu"):
        ops.gated("relu", gate, up)


def attention_in_numpy(q, k, v, sm_scale, window, cap, q_positions):
    """One query and one head at a time."""
    q, k, v = f64(q), f64(k), f64(v)
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for t, position in enumerate(q_positions):
        first = 0 if window is None else max(0, position - window + 1)
        seen = slice(first, position + 1)
        for n in range(q.shape[1]):
            scores = k[seen, n // group] @ q[t, n] * sm_scale
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            out[t, n] = weights / weights.sum() @ v[seen, n // group]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (3, None), (1, 0.5), (None, 2.0)])
def test_dense_attention(dtype, num_kv_heads, window, cap):
    q = normal(6, 4, 8, dtype=dtype)
    k, v = (normal(9, num_kv_heads, 8, dtype=dtype) for _ in "kv")
    got = ops.dense_attention(q, k, v, sm_scale=0.7, window=window, cap=cap)
    want = attention_in_numpy(q, k, v, 0.7, window, cap, range(3, 9))
    assert got.dtype == dtype
    np.testing.assert_allclose(f64(got), want, **TOLERANCE[dtype])


def test_dense_attention_places_queries_by_their_positions_in_each_example():
    q, k, v = normal(2, 3, 4, 8), normal(2, 9, 2, 8), normal(2, 9, 2, 8)
    positions = np.array([[0, 4, 2], [8, 1, 5]])
    got = ops.dense_attention(q, k, v, sm_scale=0.7, window=4, q_positions=jnp.asarray(positions))
    for i in range(2):
        want = attention_in_numpy(q[i], k[i], v[i], 0.7, 4, None, positions[i])
        np.testing.assert_allclose(got[i], want, **TOLERANCE[jnp.float32])


def test_dense_attention_takes_leading_axes_and_vmap():
    q, k, v = normal(2, 3, 5, 4, 8), normal(2, 3, 5, 2, 8), normal(2, 3, 5, 2, 8)

    def attend(q, k, v):
        return ops.dense_attention(q, k, v, sm_scale=0.3, window=2)

    whole = attend(q, k, v)
    np.testing.assert_allclose(whole, jax.vmap(attend)(q, k, v), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(whole[1, 2], attend(q[1, 2], k[1, 2], v[1, 2]), rtol=1e-6, atol=1e-6)


def test_a_query_that_sees_nothing_stays_finite():
    q, k, v = normal(2, 4, 8), normal(5, 2, 8), normal(5, 2, 8)
    out = ops.dense_attention(q, k, v, sm_scale=1.0, q_positions=jnp.array([-1, 2]))
    assert bool(jnp.isfinite(out).all())
    want = attention_in_numpy(q, k, v, 1.0, None, None, [0, 2])
    np.testing.assert_allclose(out[1], want[1], **TOLERANCE[jnp.float32])


def test_soft_cap_bounds_and_none_leaves_alone():
    x = jnp.array([-1e4, -0.01, 0.0, 0.01, 1e4])
    np.testing.assert_allclose(ops.soft_cap(x, 5.0), [-5, -0.01, 0, 0.01, 5], rtol=1e-5)
    assert ops.soft_cap(x, None) is x
