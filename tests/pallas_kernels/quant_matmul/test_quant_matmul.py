"""The door: what is refused and how, which backend is chosen, what `prepare` does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, target, tiles
from pallas_kernels.quant_matmul import preferred_layout, prepare, quant_matmul

S = jax.ShapeDtypeStruct
X = S((4, 256), jnp.bfloat16)


NK = {"layout": "nk"}


def weight(codes=jnp.int4, groups=2, layout="kn", shape=(256, 128), scales=jnp.bfloat16):
    q = S(shape if layout == "kn" else shape[::-1], codes)
    return q, S((groups, shape[1]), scales)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": S((4, 255), jnp.bfloat16)}, r"x must be .*K=256.*got bfloat16\[4, 255\]"),
        ({"x": S((4, 256), jnp.int8)}, "x must be f32, bf16 or f16"),
        ({"q": S((256, 128), jnp.uint8)}, "q must be int4"),
        ({"q": S((2, 256, 128), jnp.int4)}, "jax.vmap"),
        ({"scale": S((2, 127), jnp.float32)}, r"scale must be \[G, N=128\]"),
        ({"scale": S((128,), jnp.float32)}, r"per channel is \[1, N\]"),
        ({"scale": S((2, 128), jnp.int8)}, "scale must be f32, bf16 or f16"),
        ({"scale": S((3, 128), jnp.float32)}, "3 groups, which do not divide K=256; pass group="),
        ({"zero": S((1, 128), jnp.int8)}, "zero must have the shape of scale"),
        ({"group": 64}, "need 4 rows of scales, got 2"),
        ({"group": 0}, "groups of 0"),
        ({"x": S((4, 0), jnp.bfloat16), "q": S((0, 128), jnp.int4)}, "do not divide K=0"),
        ({"group": 128.0}, "group must be a whole number.*got 128.0"),
        ({"zero": S((2, 128), jnp.bool_)}, "zero must be integers or floats, got bool"),
        ({"layout": "io"}, "layout must be 'kn'"),
        ({"impl": "triton"}, "impl must be one of"),
        (
            {"q": S((256, 128), jnp.float8_e4m3fn), "zero": S((2, 128), jnp.int8)},
            "fp8 weights have no zero points",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(change, message):
    q, scale = weight()
    args = {"x": X, "q": q, "scale": scale, "zero": None} | change
    arrays = {k: args.pop(k) for k in ("x", "q", "scale", "zero")}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda a: quant_matmul(**a, **args), arrays)


@pytest.mark.parametrize(
    "kind, x, w, kwargs, message",
    [
        ("cpu", X, weight(layout="nk"), NK, "needs a Hopper GPU"),
        ("h100", X, weight(), {}, "prepare"),
        ("h100", S((4, 256), jnp.float32), weight(layout="nk"), NK, "cast x"),
        ("h100", X, weight(layout="nk", codes=jnp.uint4), NK, "reads int4"),
        ("h100", X, weight(layout="nk", scales=jnp.float16), NK, "got f16"),
        ("h100", X, weight(layout="nk", shape=(256, 120)), NK, "N of 32"),
        ("h100", X, weight(layout="nk", groups=16), NK, "got 16"),
        ("h100", S((0, 256), jnp.bfloat16), weight(layout="nk"), NK, "no rows"),
        (
            "h100",
            X,
            weight(layout="nk"),
            {"layout": "nk", "config": tiles.QuantMatmulTpuTiles(block_m=16)},
            "takes QuantMatmulGpuTiles",
        ),
    ],
)
def test_the_hopper_kernel_refuses_with_its_reason(kind, x, w, kwargs, message):
    def f(impl):
        return jax.eval_shape(lambda a, b, c: quant_matmul(a, b, c, impl=impl, **kwargs), x, *w)

    with target.state(kind):
        with pytest.raises(NotImplementedError, match=message):
            f("mosaic_gpu")
        if "config" not in kwargs:
            f("auto")


@pytest.mark.parametrize(
    "kind, x, w, message",
    [
        ("h100", X, weight(), "needs a TPU"),
        ("v5e", X, weight(groups=1), "left to XLA"),
        ("v5e", X, weight(codes=jnp.uint4), "reads int4"),
        ("v5e", X, weight(shape=(256, 160)), "multiples of 128"),
        ("v5e", X, weight(groups=16), "got 16"),
        ("v5e", S((4, 256), jnp.float32), weight(), "cast x"),
    ],
)
def test_the_tpu_kernel_refuses_with_its_reason(kind, x, w, message):
    def f(impl):
        return jax.eval_shape(lambda a, b, c: quant_matmul(a, b, c, impl=impl), x, *w)

    with target.state(kind):
        with pytest.raises(NotImplementedError, match=message):
            f("mosaic_tpu")
        f("auto")


def test_numpy_arrays_are_as_good_as_jax_arrays():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    q = rng.integers(-8, 8, (64, 32)).astype(np.int8)
    scale = rng.uniform(0.5, 1.5, (2, 32)).astype(np.float32)
    expected = quant_matmul(*map(jnp.asarray, (x, q, scale)))
    np.testing.assert_array_equal(quant_matmul(x, q, scale.tolist()), expected)
    w = prepare(q, scale, q[:2, :32].tolist())
    assert all(isinstance(a, jax.Array) for a in (w.q, w.scale, w.zero))


@pytest.mark.parametrize(
    "kind, groups, expected",
    [
        ("cpu", 2, "xla"),
        ("h100", 2, "mosaic_gpu"),
        ("h100", 1, "xla"),
        ("v6e", 2, "mosaic_tpu"),
        ("tpu7x", 1, "xla"),
    ],
)
def test_group_scales_go_to_the_kernels_and_channel_scales_to_xla(kind, groups, expected):
    with target.state(kind):
        layout = preferred_layout()
        found = dispatch.explain(
            quant_matmul, X, *weight(groups=groups, layout=layout), layout=layout
        )
    assert [d.chosen for d in found] == [expected]


def test_tiles_for_a_kernel_are_refused_where_xla_would_run():
    q, scale = weight()
    config = tiles.QuantMatmulGpuTiles(block_m=8)
    with pytest.raises(NotImplementedError, match="XLA takes no tiles"):
        jax.eval_shape(lambda a, b, c: quant_matmul(a, b, c, config=config), X, q, scale)


def test_tiles_that_do_not_fit_the_group_are_refused_by_name():
    q, scale = weight(layout="nk", groups=4)  # groups of 64
    config = tiles.QuantMatmulGpuTiles(block_m=8, block_k=96)
    with target.state("h100"), pytest.raises(ValueError, match="group 64 must divide"):
        jax.eval_shape(
            lambda a, b, c: quant_matmul(a, b, c, layout="nk", config=config), X, q, scale
        )


@pytest.mark.parametrize("kind", ["cpu", "h100", "v5e"])
@pytest.mark.parametrize("codes", [jnp.int4, jnp.uint4, jnp.int8, jnp.float8_e4m3fn])
def test_prepare_keeps_values_and_lays_codes_out(kind, codes):
    rng = np.random.default_rng(0)
    high = 127 if codes == jnp.int8 else 7
    q = jnp.asarray(rng.integers(0, high, (64, 32)), codes)
    scale = jnp.asarray(rng.uniform(1, 2, (2, 32)), jnp.float32)
    zero = (
        None if codes == jnp.float8_e4m3fn else jnp.asarray(rng.integers(0, 8, (2, 32)), jnp.uint8)
    )
    w = prepare(q, scale, zero, target=target.TARGETS[kind])
    assert w.layout == ("nk" if kind == "h100" else "kn") and w.group == 32
    assert w.q.dtype != jnp.uint4
    if kind == "cpu" and codes in (jnp.int4, jnp.uint4):
        assert w.q.dtype == jnp.int8

    def values(q, zero, layout):
        q = np.asarray(q).astype(np.float64)
        q = q if layout == "kn" else q.T
        return q if zero is None else q - np.repeat(np.asarray(zero).astype(np.float64), 32, 0)

    np.testing.assert_array_equal(values(w.q, w.zero, w.layout), values(q, zero, "kn"))


def test_a_prepared_weight_is_a_pytree_with_a_static_layout():
    w = prepare(*(jnp.zeros(s.shape, s.dtype) for s in weight()), target=target.TARGETS["h100"])
    assert len(jax.tree.leaves(w)) == 2
    assert jax.tree.map(lambda a: a, w).layout == "nk"
