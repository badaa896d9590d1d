"""Formats, grids, packing and the pytree of quantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.quant_format import CODEBOOKS, QFormat
from jinfer.linear import qtensor
from jinfer.linear.grids import decode, encode, find_scales
from jinfer.linear.qtensor import (
    DYNAMIC_MAP,
    DoubleScale,
    QTensor,
    from_codes,
    pack_bits,
    unpack_bits,
)

FORMATS = [
    "int2-g64",
    "int3-g64",
    "int4-g64",
    "int4-g64-asym",
    "int4-tensor",
    "int5-channel",
    "int6-g16-asymf",
    "int7-tensor",
    "int8-channel:dyn",
    "int8-g32-asym",
    "fp8-e4m3-channel:dyn",
    "fp8-e4m3-tensor",
    "fp8-e5m2-channel",
    "fp8-e4m3-block128:dyn",
    "nf4-g64",
    "nf4-g64-dq",
    "fp4-g64",
]
ROUNDING = 1e-6  # relative: one f32 division and one multiplication


quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "grid", "scale_dtype"))
dequantize = jax.jit(qtensor.dequantize, static_argnames="dtype")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


@pytest.mark.parametrize("text", [*FORMATS, "int8-channel:outlier", "fp8-e4m3-tensor:static"])
def test_a_format_prints_what_it_parses(text):
    fmt = QFormat.parse(text)
    assert str(fmt) == text
    assert QFormat.parse(str(fmt)) == fmt
    assert hash(fmt) == hash(QFormat.parse(text))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("int4", "not understood"),
        ("int9-g64", "not understood"),
        ("int4-g0", "not understood"),
        ("int4-g64:fast", "act must be"),
        ("nf4-g64-asym", "no zero point"),
        ("int4-g64-asym:dyn", "symmetric int and fp8"),
        ("nf4-g64:dyn", "symmetric int and fp8"),
        ("int4-g64-dq", "double_quant"),
        ("fp8-e4m3-channel:outlier", "integer formats"),
        ("fp8-e4m3-block128:static", "dynamic inputs"),
        ("fp8-e4m3-g64:static", "dynamic inputs"),
    ],
)
def test_a_format_that_cannot_work_is_refused_by_name(text, word):
    with pytest.raises(ValueError, match=word):
        QFormat.parse(text)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("num_inputs", [1, 21])
def test_unpack_inverts_pack_and_the_stream_is_dense(bits, num_inputs):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, num_inputs, 5)).astype(np.uint8)
    stream = pack_bits(jnp.asarray(codes), bits)
    assert stream.shape == (2, -(-num_inputs * bits // 8), 5)
    np.testing.assert_array_equal(unpack_bits(stream, bits, num_inputs), codes)


def test_the_bit_stream_is_little_endian_along_the_inputs():
    codes = np.random.default_rng(0).integers(0, 8, (32, 3))
    value = [sum(int(c) << (3 * i) for i, c in enumerate(codes[:, o])) for o in range(3)]
    expected = np.stack([np.frombuffer(v.to_bytes(12, "little"), np.uint8) for v in value], 1)
    np.testing.assert_array_equal(pack_bits(jnp.asarray(codes), 3), expected)


def test_the_symmetric_grids_differ_as_7_and_7_and_a_half():
    w = normal(64, 3)
    amax = np.abs(np.asarray(w)).max(0)
    fmt = QFormat.parse("int4-channel")
    np.testing.assert_allclose(find_scales(w, fmt)[0][0], amax / 7.5, rtol=ROUNDING)
    restricted = find_scales(w, fmt, grid="restricted")[0][0]
    np.testing.assert_allclose(restricted, amax / 7, rtol=ROUNDING)
    fmt8 = QFormat.parse("int8-channel")
    np.testing.assert_allclose(find_scales(w, fmt8)[0][0], amax / 127.5, rtol=ROUNDING)


def test_the_asymmetric_grid_holds_zero_and_both_ends():
    w = jnp.asarray([[1.0, -3.0], [4.0, -1.0]])  # all positive, all negative
    scale, zero = find_scales(w, QFormat.parse("int4-channel-asym"))
    np.testing.assert_allclose(scale[0], [4 / 15, 3 / 15], rtol=ROUNDING)
    np.testing.assert_array_equal(zero[0], [-8, 7])  # unsigned 0 and 15
    codes = encode(w, scale, zero, QFormat.parse("int4-channel-asym"))
    back = decode(codes, scale, zero, QFormat.parse("int4-channel-asym"))
    assert float(jnp.max(jnp.abs(back - w))) <= float(scale.max()) / 2


@pytest.mark.parametrize("text", FORMATS)
def test_each_weight_lands_on_its_nearest_code(text):
    w = normal(150, 70)  # groups of 64: the last has 22 rows
    fmt = QFormat.parse(text)
    x = quantize(w, fmt)
    assert x.shape == w.shape
    error = np.abs(np.asarray(dequantize(x) - w))
    other = []
    rows = np.repeat(np.asarray(x.scales()), fmt.group_size(150), 0)[:150]
    rows = np.repeat(rows, 70 if fmt.group == 0 else fmt.block, 1)[:, :70]
    if fmt.kind in CODEBOOKS:
        values = CODEBOOKS[fmt.kind].astype(np.float64)
        other = [np.abs(np.asarray(w) - v * rows) for v in values]
        np.testing.assert_allclose(error, np.min(other, 0), atol=1e-5)
    elif fmt.kind == "int":
        zero = 0 if x.zero is None else np.repeat(np.asarray(x.zero, np.float32), 64, 0)[:150]
        if fmt.group == 32 or fmt.group == 16:
            zero = np.repeat(np.asarray(x.zero, np.float32), fmt.group, 0)[:150]
        least, most = fmt.code_range
        other = [np.abs(np.asarray(w) - (c - zero) * rows) for c in range(least, most + 1)]
        np.testing.assert_allclose(error, np.min(other, 0), atol=1e-5)
    else:
        bound = 2.0**-4 if fmt.kind == "fp8-e4m3" else 2.0**-3  # half a unit of 3 or 2 bits
        smallest = 2.0**-10 if fmt.kind == "fp8-e4m3" else 2.0**-17
        assert np.all(error <= bound * np.abs(np.asarray(w)) + smallest * rows + 1e-7)


@pytest.mark.parametrize("jit", [True, False])
def test_ties_round_to_even_as_in_numpy_whatever_xla_does_to_divisions(jit):
    w = normal(64, 512)
    fmt = QFormat.parse("int4-channel")
    x = (quantize if jit else qtensor.quantize)(w, fmt)
    scale = 2 * np.abs(np.asarray(w)).max(0, keepdims=True) / np.float32(15)
    np.testing.assert_array_equal(x.scale, scale)  # so every column has a tie at -7.5 or 7.5
    codes = np.clip(np.round(np.asarray(w) / scale), -8, 7)
    np.testing.assert_array_equal(x.codes(), codes)


def test_codes_use_the_scale_as_it_is_stored():
    w = normal(64, 8)
    fmt = QFormat.parse("int4-g64")
    x = quantize(w, fmt, scale_dtype=jnp.float16)
    assert x.scale.dtype == jnp.float16
    again = encode(w, x.scale, None, fmt)
    np.testing.assert_array_equal(x.codes(), again)


@pytest.mark.parametrize("text", ["int4-g64", "int4-g64-asym", "int6-g16-asymf", "nf4-g64-dq"])
def test_an_all_zero_weight_stays_zero(text):
    x = quantize(jnp.zeros((150, 70)), QFormat.parse(text))
    np.testing.assert_array_equal(dequantize(x), np.zeros((150, 70)))


def test_a_tiny_group_does_not_underflow_in_half_precision():
    w = jnp.full((64, 2), 1e-12)
    x = quantize(w, QFormat.parse("int4-g64"), scale_dtype=jnp.float16)
    assert np.all(np.isfinite(np.asarray(dequantize(x))))
    assert np.all(np.asarray(x.scale, np.float32) > 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("text", ["int4-g64", "fp8-e4m3-channel", "nf4-g64"])
def test_nan_is_refused_before_an_integer_cast_hides_it(text, bad):
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        qtensor.quantize(jnp.zeros((64, 4)).at[3, 2].set(bad), QFormat.parse(text))


def test_fp8_bytes_and_clipping():
    fmt = QFormat.parse("fp8-e4m3-tensor")
    one = jnp.ones((1, 1))
    w = jnp.asarray([[0.3, -1.0, 447.0, 2.0**-9, 1e6, -1e6]])
    codes = encode(w, one, None, fmt)
    assert np.asarray(codes).view(np.uint8)[0].tolist() == [0x2A, 0xB8, 0x7E, 0x01, 0x7E, 0xFE]
    e5m2 = encode(jnp.asarray([[1e9]]), one, None, QFormat.parse("fp8-e5m2-tensor"))
    assert float(e5m2[0, 0]) == 57344.0


def test_nf4_codes_of_the_worked_example():
    w = jnp.zeros((64, 1)).at[:4, 0].set(jnp.asarray([0.1, -0.2, 0.3, -0.4]))
    x = quantize(w, QFormat.parse("nf4-g64"))
    codes = np.asarray(x.codes())[:, 0].astype(int)
    pairs = codes.reshape(-1, 2)
    assert (pairs[:4, 0] * 16 + pairs[:4, 1]).tolist() == [162, 224, 119, 119]
    np.testing.assert_allclose(dequantize(x)[:4, 0], [0.0984, -0.2100, 0.2892, -0.4], atol=5e-5)


def test_double_scales_cost_an_eighth_of_a_bit_and_stay_close():
    w = normal(512, 64, scale=0.02)
    plain, double = (quantize(w, QFormat.parse(f)) for f in ("nf4-g64", "nf4-g64-dq"))
    assert plain.nbytes * 8 / w.size == 4.5
    assert double.nbytes * 8 / w.size == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.002)
    assert isinstance(double.scale, DoubleScale)
    ratio = np.asarray(double.scales() / plain.scales())
    assert 0 < np.abs(ratio - 1).max() < 0.03


def test_the_dynamic_map_is_sorted_and_has_zero_and_one():
    assert DYNAMIC_MAP.shape == (256,) and np.all(np.diff(DYNAMIC_MAP) > 0)
    assert 0.0 in DYNAMIC_MAP and DYNAMIC_MAP[-1] == 1.0
    assert DYNAMIC_MAP[-2] == pytest.approx(0.9929688)
    assert DYNAMIC_MAP[0] == pytest.approx(-0.9929688)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("int2-g128", 2 + 16 / 128),
        ("int3-g128", 3 + 16 / 128),
        ("int4-g128", 4 + 16 / 128),
        ("int4-g128-asym", 4 + 20 / 128),
        ("int8-channel", 8.1),
        ("fp8-e4m3-channel", 8.1),
        ("nf4-g64", 4.25),
    ],
)
def test_resident_bytes_are_what_the_name_says(text, most):
    x = quantize(normal(256, 256), QFormat.parse(text), scale_dtype=jnp.float16)
    assert x.nbytes * 8 / x.size <= most
    assert x.size == 256 * 256


@pytest.mark.parametrize(
    "text", ["int3-g64", "int4-g64-asym", "int8-channel", "fp8-e4m3-block128", "nf4-g64-dq"]
)
def test_leading_axes_are_independent_weights(text):
    fmt = QFormat.parse(text)
    w = normal(3, 96, 40)
    one_by_one = [quantize(w[i], fmt) for i in range(3)]
    batched = jax.vmap(lambda a: quantize(a, fmt))(w)
    assert batched.shape == (3, 96, 40)
    dense = dequantize(batched)
    for i, x in enumerate(one_by_one):
        np.testing.assert_allclose(dense[i], dequantize(x), atol=2e-6)
    if not fmt.double_quant:
        np.testing.assert_allclose(dequantize(quantize(w, fmt)), dense, atol=2e-6)


def test_a_qtensor_is_a_frozen_pytree_that_jit_takes():
    x = quantize(normal(64, 8), QFormat.parse("int4-g32-asym"))
    leaves, treedef = jax.tree.flatten(x)
    assert len(leaves) == 3
    back = jax.tree.unflatten(treedef, leaves)
    np.testing.assert_array_equal(jax.jit(dequantize)(back), dequantize(x))
    with pytest.raises(AttributeError):
        x.q = None
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), x)
    assert stacked.shape == (2, 64, 8)


def test_a_permuted_weight_dequantizes_in_the_inputs_order():
    w = normal(64, 8)
    perm = np.random.default_rng(1).permutation(64)
    fmt = QFormat.parse("int8-g16")
    stored = quantize(w[perm], fmt)
    x = QTensor(stored.q, stored.scale, None, None, jnp.asarray(perm, jnp.int32), fmt)
    np.testing.assert_allclose(dequantize(x), w, atol=0.02)


def test_wrong_shapes_are_named():
    codes = jnp.zeros((64, 8), jnp.int8)
    with pytest.raises(ValueError, match=r"needs scales \[2, 8\], got \[4, 8\]"):
        from_codes(codes, jnp.ones((4, 8)), None, QFormat.parse("int4-g32"))
    with pytest.raises(ValueError, match="disagree"):
        from_codes(codes, jnp.ones((2, 8)), None, QFormat.parse("int4-g32-asym"))
    with pytest.raises(ValueError, match="shape"):
        qtensor.quantize(jnp.zeros(4), QFormat.parse("int4-g32"))
