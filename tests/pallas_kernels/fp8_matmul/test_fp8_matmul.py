"""The reference and the simulated kernels against float64; the door; activations to fp8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch, target, tiles
from pallas_kernels.fp8_matmul import fp8_matmul, prepare, quantize_activation

F32_SUMS = 2e-6
BF16_OPERANDS = 4e-3  # dequantized operands are rounded to bf16 where there are many rows
H100 = target.TARGETS["h100"]
S = jax.ShapeDtypeStruct
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2

needs_simulator = pytest.mark.skipif(
    compat.why_not_interpret("gpu") is not None, reason=str(compat.why_not_interpret("gpu"))
)


@pytest.mark.parametrize("kind", ["cpu", "h100"])
def test_xla_agrees_with_float64(case, inputs, kind, relative_error):
    def f(x, w, x_scale, w_scale):
        v = prepare(w, w_scale, block=inputs.block)
        return fp8_matmul(x, v.w, x_scale, v.scale, block=v.block, layout=v.layout,
                          out_dtype=jnp.float32, impl="xla")  # fmt: skip

    with target.state(kind):
        y = jax.jit(f)(*inputs.arrays())
    has_copies = kind == "h100" and inputs.block and (case.num_rows > 64 or case.num_inputs % 128)
    bound = BF16_OPERANDS if has_copies else F32_SUMS
    assert relative_error(y, inputs.expected()) < bound


@needs_simulator
def test_simulated_hopper_kernel_agrees_with_float64(case, inputs, relative_error, capsys):
    if E5M2 in (inputs.x.dtype, inputs.w.dtype) or case.num_inputs % 128:
        pytest.skip("dtypes or K that the kernel refuses; test_kernels_refuse covers them")
    sizes = {"block_m": max(8, min(tiles.bucket(case.num_rows), 64)), "stages": 3}
    config = tiles.QuantMatmulGpuTiles(**(sizes | case.gpu))
    x, w, x_scale, w_scale = inputs.arrays()
    v = prepare(w, w_scale, block=inputs.block, target=H100)
    few_cores = dataclasses.replace(H100, num_cores=case.cores)
    with target.state(few_cores), compat.interpret(detect_races=True):
        y = fp8_matmul(x, v.w, x_scale, v.scale, block=v.block, layout=v.layout,
                       out_dtype=jnp.float32, config=config, impl="mosaic_gpu")  # fmt: skip
    assert relative_error(y, inputs.expected()) < F32_SUMS
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_simulated_tpu_kernel_agrees_with_float64(case, inputs, relative_error):
    if inputs.block is None or case.num_inputs % 128 or case.num_outputs % 128:
        pytest.skip("scales or sizes that the kernel refuses; test_kernels_refuse covers them")
    sizes = {"block_m": 32, "block_n": 128, "block_k": 128} | case.tpu
    x, w, x_scale, w_scale = inputs.arrays()
    with target.state("v6e"), compat.interpret(detect_races=True):
        y = fp8_matmul(x, w, x_scale, w_scale, block=inputs.block, out_dtype=jnp.float32,
                       config=tiles.QuantMatmulTpuTiles(**sizes), impl="mosaic_tpu")  # fmt: skip
        assert not compat.races_found()
    assert relative_error(y, inputs.expected()) < F32_SUMS


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": S((4, 256), jnp.bfloat16)}, "quantize_activation"),
        ({"x": S((4, 255), E4M3)}, r"K=256"),
        ({"w": S((256, 128), jnp.int8)}, "w must be float8"),
        ({"x_scale": S((5, 1), jnp.float32)}, r"x_scale must be .*\[4, 1\]"),
        ({"w_scale": S((127,), jnp.float32)}, r"w_scale must be .*\[128\]"),
        ({"w_scale": S((128,), jnp.int32)}, "w_scale must be a float"),
        ({"block": 128}, r"w_scale must be .*\[2, 1\] or \[2, 128\]"),
        ({"block": 128, "w_scale": S((2, 1), jnp.float32)}, r"x_scale must be .*\[4, 2\]"),
        ({"block": 0}, "block must be positive"),
        ({"block": 128.0}, "block must be a whole number.*got 128.0"),
        ({"layout": "oi"}, "layout must be 'kn'"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(change, message):
    args = {
        "x": S((4, 256), E4M3),
        "w": S((256, 128), E4M3),
        "x_scale": S((4, 1), jnp.float32),
        "w_scale": S((128,), jnp.float32),
    } | change
    arrays = {k: args.pop(k) for k in ("x", "w", "x_scale", "w_scale")}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda a: fp8_matmul(**a, **args), arrays)


def call(impl, *, x=E4M3, w=E4M3, k=256, n=256, block=128, rows=4, layout="kn", config=None):
    blocks = None if block is None else -(-k // block)
    args = (
        S((rows, k), x),
        S((k, n) if layout == "kn" else (n, k), w),
        S((rows, blocks or 1), jnp.float32),
        S((blocks or 1, n), jnp.float32),
    )
    kwargs = {"block": block, "layout": layout, "config": config, "impl": impl}
    return lambda *a: fp8_matmul(*a, **kwargs), args


@pytest.mark.parametrize(
    "kind, impl, options, message",
    [
        ("cpu", "mosaic_gpu", {"layout": "nk"}, "needs a Hopper GPU"),
        ("h100", "mosaic_gpu", {}, "prepare"),
        ("h100", "mosaic_gpu", {"layout": "nk", "w": E5M2}, "e4m3 by e4m3"),
        ("h100", "mosaic_gpu", {"layout": "nk", "k": 192}, "multiple of 128"),
        ("h100", "mosaic_gpu", {"layout": "nk", "block": 64}, "blocks must be of 128"),
        ("h100", "mosaic_gpu", {"layout": "nk", "rows": 0}, "no rows"),
        ("h100", "mosaic_gpu", {"layout": "nk", "config": tiles.QuantMatmulTpuTiles(block_m=8)},
         "takes QuantMatmulGpuTiles"),
        ("h100", "mosaic_tpu", {}, "needs a TPU"),
        ("v6e", "mosaic_tpu", {"block": None}, "left to XLA"),
        ("v6e", "mosaic_tpu", {"layout": "nk"}, "prepare"),
        ("v6e", "mosaic_tpu", {"n": 160}, "N one of 128"),
        ("v6e", "xla", {"config": tiles.QuantMatmulTpuTiles(block_m=8)}, "XLA takes no tiles"),
    ],
)  # fmt: skip
def test_kernels_refuse_with_their_reason(kind, impl, options, message):
    f, args = call(impl, **options)
    with target.state(kind), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(f, *args)


@pytest.mark.parametrize(
    "kind, block, expected",
    [("h100", 128, "mosaic_gpu"), ("h100", None, "xla"), ("v6e", 128, "mosaic_tpu"),
     ("v6e", None, "xla"), ("cpu", 128, "xla")],
)  # fmt: skip
def test_block_scales_go_to_the_kernels_and_all_else_to_xla(kind, block, expected):
    f, args = call("auto", block=block, layout="nk" if kind == "h100" else "kn")
    with target.state(kind):
        assert [d.chosen for d in dispatch.explain(f, *args)] == [expected]


@pytest.mark.parametrize("dtype, step", [(E4M3, 2**-4), (E5M2, 2**-3)])
@pytest.mark.parametrize("block", [None, 32])
def test_activations_come_back_within_half_a_step(dtype, step, block):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 70)) * 10.0 ** rng.integers(-4, 5, (3, 5, 1))
    q, scale = quantize_activation(jnp.asarray(x, jnp.float32), block=block, dtype=dtype)
    assert q.dtype == dtype and scale.shape == (3, 5, 1 if block is None else 3)
    rows = np.repeat(np.asarray(scale, np.float64), block or 70, axis=-1)[..., :70]
    back = np.asarray(q).astype(np.float64) * rows
    smallest = 2.0**-9 if dtype == E4M3 else 2.0**-16  # half a step of subnormal numbers
    assert (np.abs(back - x) <= np.abs(x) * step * 1.001 + rows * smallest).all()


def test_activations_beyond_the_largest_number_are_clipped_and_nan_stays():
    x = jnp.asarray([[1.0, 1e6, -1e6, np.nan, np.inf]])
    q, scale = quantize_activation(x, jnp.float32(1))
    assert scale.shape == ()
    np.testing.assert_array_equal(np.asarray(q).astype(np.float32)[0], [1, 448, -448, np.nan, 448])
    q, scale = quantize_activation(jnp.zeros((2, 8)))
    assert (np.asarray(q).astype(np.float32) == 0).all() and (np.asarray(scale) == 1).all()


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("size", [1e-30, 1e-33, 1e-36, 1e-38, 1e-44])
def test_activations_next_to_nothing_do_not_become_nan(size, block):
    """A CPU flushes what is below 1e-38 to zero, a row's scale too: 0 / 0 must not come of it."""
    x = jnp.full((2, 8), size, jnp.float32).at[0, 3].set(0)
    for dtype in (E4M3, E5M2):
        q, scale = quantize_activation(x, block=block, dtype=dtype)
        back = np.asarray(q).astype(np.float64) * np.repeat(np.asarray(scale), block or 8, axis=1)
        np.testing.assert_allclose(back, x, rtol=0.07, atol=1.1e-30)


def test_no_rows_give_no_rows():
    for block in (None, 4, 5):
        q, scale = quantize_activation(jnp.zeros((2, 0, 8)), block=block)
        assert q.shape == (2, 0, 8) and scale.shape == (2, 0, 1 if block is None else 2)


def test_activation_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="one number"):
        quantize_activation(jnp.zeros((2, 8)), jnp.float32(1), block=4)
    with pytest.raises(ValueError, match="float8"):
        quantize_activation(jnp.zeros((2, 8)), dtype=jnp.int8)
    for block in (0, -1):
        with pytest.raises(ValueError, match=f"block must be positive or None, got {block}"):
            quantize_activation(jnp.zeros((2, 8)), block=block)
    with pytest.raises(ValueError, match=r"x must be f32, bf16 or f16 \[..., K\], got int32"):
        quantize_activation(jnp.zeros((2, 8), jnp.int32))


def test_a_scale_may_be_a_plain_number():
    x = jnp.linspace(-1, 1, 16, dtype=jnp.float32).reshape(2, 8)
    q, scale = quantize_activation(x, 0.01)
    same, one = quantize_activation(x, jnp.float32(0.01))
    assert (q == same).all() and scale == one
    w = jnp.ones((8, 4), E4M3)
    assert (fp8_matmul(q, w, 0.01, 2.0) == fp8_matmul(q, w, scale, jnp.float32(2))).all()
    assert prepare(np.asarray(w), 2.0).scale == 2


def test_leading_axes_are_rows():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 256)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((256, 128)), E4M3)
    for block, w_scale in ((None, jnp.ones(())), (128, jnp.ones((2, 1)))):
        q, scale = quantize_activation(x, block=block)
        y = fp8_matmul(q, w, scale, w_scale, block=block)
        assert y.shape == (2, 3, 128) and y.dtype == jnp.bfloat16
        one = fp8_matmul(q[1], w, scale[1], w_scale, block=block)
        np.testing.assert_array_equal(np.asarray(y[1]), np.asarray(one))
