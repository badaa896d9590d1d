"""Foreign formats module by module: the bytes of published examples, round trips, transcoding."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jinfer.checkpoints.formats import bitpack
from jinfer.checkpoints.formats.awq import AWQReader, awq_config, write_awq
from jinfer.checkpoints.formats.bnb import BNBReader, bnb_config, write_bnb
from jinfer.checkpoints.formats.compressed_tensors import CTReader, ct_config, write_ct
from jinfer.checkpoints.formats.fp8 import FP8Reader, fp8_config, write_fp8
from jinfer.checkpoints.formats.gptq import GPTQReader, gptq_config, write_gptq
from jinfer.checkpoints.formats.interop import Dense, unsigned_parts
from jinfer.config.quant_format import QFormat
from jinfer.linear import qtensor
from jinfer.linear.qtensor import DoubleScale, QTensor, dequantize

P = "model.layers.0.self_attn.q_proj"
EXAMPLE_CODES = np.add.outer(np.arange(8), np.arange(8)) % 16  # [I, O]: (k + n) % 16
EXAMPLE_WORDS = [0x76543210, 0x87654321, 0x98765432, 0xA9876543]
EXAMPLE_WORDS += [0xBA987654, 0xCBA98765, 0xDCBA9876, 0xEDCBA987]
quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "grid", "scale_dtype"))


def weight(text, rows=128, columns=64, seed=0, scale_dtype=jnp.float16):
    w = np.random.default_rng(seed).normal(size=(rows, columns)) * 0.05
    return quantize(jnp.asarray(w, jnp.float32), QFormat.parse(text), scale_dtype=scale_dtype)


def hexes(words):
    return [f"{int(w) & 0xFFFFFFFF:08x}" for w in np.asarray(words).reshape(-1)]


def assert_same(a: QTensor, b: QTensor):
    assert (a.fmt, a.pad, a.shape) == (b.fmt, b.pad, b.shape)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# ---- bit streams


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 32, 45])
def test_words_come_back(bits, count):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, count)).astype(np.uint8)
    words = bitpack.pack_words(codes, bits)
    assert words.dtype == np.int32 and words.shape == (3, -(-count * bits // 32))
    np.testing.assert_array_equal(bitpack.unpack_words(words, bits, count), codes)
    padded = bitpack.pack_padded_words(codes, bits)
    assert padded.shape == (3, -(-count // (32 // bits)))
    np.testing.assert_array_equal(bitpack.unpack_padded_words(padded, bits, count), codes)


def test_words_are_little_endian_streams():
    assert hexes(bitpack.pack_words(np.arange(8)[None], 4)) == ["76543210"]
    codes = np.arange(32)[None] % 8
    value = sum(int(c) << (3 * i) for i, c in enumerate(codes[0]))
    expected = [value >> (32 * i) & 0xFFFFFFFF for i in range(3)]
    assert [int(h, 16) for h in hexes(bitpack.pack_words(codes, 3))] == expected
    assert hexes(bitpack.pack_padded_words(codes[:, :10], 3)) == hexes([expected[0] & 0x3FFFFFFF])


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.7, got 0\.\.8"):
        bitpack.pack_words(np.array([0, 8]), 3)
    with pytest.raises(ValueError, match="need 3 words, got 2"):
        bitpack.unpack_words(np.zeros(2, np.int32), 3, 32)


# ---- GPTQ


def gptq_reader(version=2, bits=4, group=-1, sym=True, **more):
    label = "gptq_v2" if version == 2 else "gptq"
    return GPTQReader.parse(
        {"bits": bits, "group_size": group, "sym": sym, "checkpoint_format": label, **more}
    )


@pytest.mark.parametrize(("version", "zeros"), [(2, "88888888"), (1, "77777777")])
def test_gptq_bytes_of_the_worked_example(version, zeros):
    scale = jnp.full((1, 8), 0.5, jnp.float16)
    codes = jnp.asarray(EXAMPLE_CODES - 8, jnp.int8)
    x = qtensor.from_codes(codes, scale, None, QFormat.parse("int4-channel"))
    out = write_gptq(x, version=version)
    assert hexes(out["qweight"]) == [f"{w:08x}" for w in EXAMPLE_WORDS]
    assert hexes(out["qzeros"]) == [zeros]
    assert_same(gptq_reader(version).read(P, out), x)
    np.testing.assert_array_equal(dequantize(x), (EXAMPLE_CODES - 8) * 0.5)


@pytest.mark.parametrize("text", ["int2-g32", "int3-g32-asym", "int4-g64-asym", "int8-channel"])
def test_gptq_reads_what_it_writes(text):
    x = weight(text)
    out = write_gptq(x)
    assert out["qweight"].shape == (128 * x.fmt.bits // 32, 64)
    assert out["scales"].dtype == np.float16
    config = gptq_config({P: x})
    assert_same(GPTQReader.parse(config).read(P, out), x)
    again = write_gptq(GPTQReader.parse(config).read(P, out))
    for name, tensor in out.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_gptq_activation_order_is_sorted_on_load_and_restored_on_save():
    x = weight("int4-g32")
    perm = np.random.default_rng(0).permutation(128).astype(np.int32)
    x = dataclasses.replace(x, perm=jnp.asarray(perm))
    out = write_gptq(x)
    assert sorted(out["g_idx"].tolist()) == sorted(np.arange(128) // 32)
    back = gptq_reader(group=32).read(P, out)
    assert isinstance(back, QTensor) and back.perm is not None
    np.testing.assert_array_equal(dequantize(back), dequantize(x))
    again = write_gptq(back)
    for name, tensor in out.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_gptq_groups_that_no_qtensor_holds_become_dense():
    x = weight("int4-g32")
    out = write_gptq(x)
    out["g_idx"] = np.where(np.arange(128) < 40, 0, out["g_idx"]).astype(np.int32)
    back = gptq_reader(group=32).read(P, out)
    assert isinstance(back, Dense) and "g_idx" in back.reason
    scale = np.asarray(x.scales())[out["g_idx"]]
    np.testing.assert_allclose(back.w, np.asarray(x.codes(), np.float32) * scale, rtol=1e-6)


def test_gptq_v1_gives_back_what_a_zero_of_0_borrowed():
    words = np.array([[0x00000050]], np.int32)  # zeros 0, 5, 0, 0, ... in v2
    v1 = (words.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    assert hexes(v1) == ["eeeeef3f"]
    reader = gptq_reader(1, sym=False)
    np.testing.assert_array_equal(reader.zeros(v1, 8)[0], [0, 5, 0, 0, 0, 0, 0, 0])


def test_gptq_v1_is_not_written_with_a_zero_of_0():
    x = weight("int4-g32-asym")
    x = dataclasses.replace(x, zero=x.zero.at[0, 0].set(-8))
    with pytest.raises(ValueError, match="write version 2"):
        write_gptq(x, version=1)


@pytest.mark.parametrize("text", ["int4-g32", "int3-g32", "int8-g32", "int4-g32-asym"])
@pytest.mark.parametrize("truth", [1, 2])
def test_a_lying_gptq_label_is_found_out(text, truth):
    x = weight(text)
    if truth == 1 and not x.fmt.symmetric:
        x = dataclasses.replace(x, zero=jnp.maximum(x.zero.astype(jnp.int8), -7).astype(jnp.int4))
    out = write_gptq(x, version=truth)
    for label in (1, 2):
        reader = gptq_reader(label, x.fmt.bits, 32, x.fmt.symmetric)
        assert_same(reader.believed([(P, out)]).read(P, out), x)


@pytest.mark.parametrize(("bits", "sigmas"), [(3, 0.5), (4, 0.3)])
def test_a_gptq_module_whose_weights_do_not_average_zero_is_no_proof_of_a_lie(bits, sigmas):
    def shifted(sigmas):
        w = np.random.default_rng(0).normal(size=(128, 64)) + sigmas
        fmt = QFormat.parse(f"int{bits}-g32-asym")
        return quantize(jnp.asarray(w, jnp.float32), fmt, scale_dtype=jnp.float16)

    odd = shifted(sigmas)
    out, plain = write_gptq(odd), write_gptq(shifted(0.0))
    reader = gptq_reader(2, bits, 32, False)
    assert reader.believed([(P, out)]).version == 1  # it looks like one
    assert_same(reader.believed([("a", plain), (P, out)]).read(P, out), odd)


def test_gptq_overrides_by_module():
    x3, x4 = weight("int3-g32"), weight("int4-g64-asym")
    config = gptq_config({"a.q_proj": x4, "a.k_proj": x4, "a.v_proj": x3})
    reader = GPTQReader.parse(json.loads(json.dumps(config)))
    assert_same(reader.read("a.v_proj", write_gptq(x3)), x3)
    assert_same(reader.read("a.q_proj", write_gptq(x4)), x4)


# ---- AWQ


def test_awq_bytes_of_the_worked_example():
    codes = jnp.tile(jnp.arange(8, dtype=jnp.int8) - 8, (8, 1))
    x = qtensor.from_codes(codes, jnp.ones((1, 8), jnp.float16), None, QFormat.parse("int4-g8"))
    out = write_awq(x)
    assert set(hexes(out["qweight"])) == {"75316420"} and hexes(out["qzeros"]) == ["88888888"]
    assert_same(AWQReader.parse(awq_config({P: x})).read(P, out), x)


@pytest.mark.parametrize("text", ["int4-g32", "int4-g64-asym", "int4-channel-asym"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_awq_reads_what_it_writes(text, dtype):
    x = weight(text, scale_dtype=dtype)
    out = write_awq(x)
    assert out["qweight"].shape == (128, 8)
    assert_same(AWQReader.parse(awq_config({P: x})).read(P, out), x)


# ---- compressed-tensors


def ct_reader(x, **changes):
    return CTReader.parse(json.loads(json.dumps(ct_config({P: x}) | changes)))


def test_ct_bytes_of_the_worked_examples():
    codes = np.array([[-8, -7, -1, 0, 1, 2, 6, 7]])
    x = qtensor.from_codes(
        jnp.asarray(codes.T, jnp.int8), jnp.ones((1, 1)), None, QFormat.parse("int4-channel")
    )
    assert hexes(write_ct(x)["weight_packed"]) == ["fea98710"]
    zero = jnp.asarray([[-8, 0, 7, 1, 2, 3, 4, 5]], jnp.int8)
    x = qtensor.from_codes(
        jnp.zeros((8, 8), jnp.int8), jnp.ones((1, 8)), zero, QFormat.parse("int4-channel-asym")
    )
    out = write_ct(x)
    assert out["weight_zero_point"].shape == (1, 1)
    assert hexes(out["weight_zero_point"]) == ["dcba9f80"]


@pytest.mark.parametrize(
    "text",
    [
        "int2-g32",
        "int3-g64",
        "int4-g64-asym",
        "int5-channel-asym",
        "int6-tensor",
        "int7-g32",
        "int8-g128",
        "int4-g192",
        "int8-channel:dyn",
        "int8-channel:dyn-full",
        "int4-channel:dyn-full",
        "fp8-e4m3-channel:dyn",
        "fp8-e4m3-tensor",
        "fp8-e4m3-block128:dyn",
    ],
)
def test_ct_reads_what_it_writes(text):
    x = weight(text, rows=192, columns=160)
    out = write_ct(x)
    reader = ct_reader(x)
    assert reader.shape(P, out) == (160, 192)
    assert_same(reader.read(P, out), x)


@pytest.mark.parametrize("kind", ["int8-channel:static", "fp8-e4m3-tensor:static"])
def test_ct_keeps_static_input_scales(kind):
    plain = weight(kind.split(":")[0])
    x = dataclasses.replace(plain, fmt=QFormat.parse(kind), act_scale=jnp.float32(0.25))
    out = write_ct(x)
    assert out["input_scale"].shape == (1,)
    assert_same(ct_reader(x).read(P, out), x)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_ct_reads_padded_words_of_before_0_18(bits):
    x = weight(f"int{bits}-g64-asym", rows=192, columns=160)
    out = write_ct(x)
    codes, _, zero = unsigned_parts(x)
    out["weight_packed"] = bitpack.pack_padded_words(codes.T, bits)
    out["weight_zero_point"] = bitpack.pack_padded_words(zero, bits).T
    assert out["weight_packed"].shape[1] != -(-192 * bits // 32)
    assert_same(ct_reader(x, version="0.17.1").read(P, out), x)
    assert_same(ct_reader(x).read(P, out), x)  # the width says so too


def test_ct_widths_that_could_be_both_go_by_the_version():
    x = weight("int3-channel", rows=20, columns=8)  # 2 words either way
    out = write_ct(x)
    codes, _, _ = unsigned_parts(x)
    assert_same(ct_reader(x, version="0.19.0").read(P, out), x)
    out["weight_packed"] = bitpack.pack_padded_words(codes.T, 3)
    assert_same(ct_reader(x, version="0.15.0").read(P, out), x)


def test_ct_old_activation_order_is_sorted_on_load():
    x = weight("int4-g32")
    perm = np.random.default_rng(0).permutation(128)
    out = write_ct(x)
    back = np.argsort(perm)
    codes = unsigned_parts(x)[0][back]
    out["weight_packed"] = bitpack.pack_words(codes.T, 4)
    out["weight_g_idx"] = (np.arange(128) // 32)[back].astype(np.int32)
    got = ct_reader(x).read(P, out)
    np.testing.assert_array_equal(np.asarray(dequantize(got)), np.asarray(dequantize(x))[back])


def test_ct_targets_go_by_name_before_class():
    a, b = weight("int4-g32"), weight("int8-channel:dyn-full")
    config = ct_config({"m.q_proj": a, "m.down_proj": b})
    assert config["format"] == "mixed-precision"
    reader = CTReader.parse(config)
    assert_same(reader.read("m.down_proj", write_ct(b)), b)
    assert_same(reader.read("m.q_proj", write_ct(a)), a)
    groups = {"group_0": config["config_groups"]["group_0"] | {"targets": ["Linear"]}}
    groups["group_1"] = config["config_groups"]["group_1"] | {"targets": ["re:.*down.*"]}
    reader = CTReader.parse(config | {"config_groups": groups})
    assert reader.scheme("m.down_proj").format == "int-quantized"
    assert reader.scheme("m.o_proj").format == "pack-quantized"


@pytest.mark.parametrize("text", ["int4-g32-asym", "int8-channel-asym"])
def test_ct_zero_points_with_quantized_inputs_become_dense(text):
    x = weight(text)
    config = ct_config({P: x})
    scheme = config["config_groups"]["group_0"]
    scheme["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    back = CTReader.parse(config).read(P, write_ct(x))
    assert isinstance(back, Dense) and "asymmetric" in back.reason
    np.testing.assert_array_equal(back.w, dequantize(x))


def test_ct_scales_of_inputs_that_stay_in_float_are_passed_over():
    x = weight("int4-g32")
    assert_same(ct_reader(x).read(P, write_ct(x) | {"input_scale": np.ones(1, np.float32)}), x)


# ---- fp8


@pytest.mark.parametrize("text", ["fp8-e4m3-tensor:dyn", "fp8-e4m3-block128:dyn"])
def test_fp8_reads_what_it_writes(text):
    x = weight(text, rows=200, columns=300, scale_dtype=jnp.float32)
    reader = FP8Reader.parse(fp8_config({P: x}))
    assert_same(reader.read(P, write_fp8(x)), x)


def test_fp8_bytes_of_the_worked_example():
    q = np.array([[0.3, -1.0, 447.0, 2.0**-9]], np.float32).astype(ml_dtypes.float8_e4m3fn)
    assert q.view(np.uint8).tolist() == [[0x2A, 0xB8, 0x7E, 0x01]]
    reader = FP8Reader.parse({"activation_scheme": "dynamic"})
    x = reader.read(P, {"weight": q, "weight_scale": np.float32(0.01).reshape(())})
    np.testing.assert_allclose(dequantize(x)[:, 0], [0.003125, -0.01, 4.48, 2**-9 / 100], rtol=1e-6)


def test_weight_scale_inv_is_a_multiplier_or_a_divisor_as_the_config_says():
    x = weight("fp8-e4m3-block128:dyn", rows=200, columns=300, scale_dtype=jnp.float32)
    out = write_fp8(x)
    inverted = out | {"weight_scale_inv": 1 / out["weight_scale_inv"]}
    multiplies = FP8Reader.parse(fp8_config({P: x}))
    divides = FP8Reader.parse(
        {"weight_scale_method": "block", "weight_scale_semantics": "inverse"}
        | {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    )
    np.testing.assert_allclose(
        dequantize(divides.read(P, inverted)), dequantize(multiplies.read(P, out)), rtol=1e-6
    )
    with pytest.raises(ValueError, match="inverse of what quantization_config says"):
        multiplies.read(P, inverted)
    with pytest.raises(ValueError, match="inverse of what quantization_config says"):
        divides.read(P, out)


# ---- bitsandbytes


def test_bnb_bytes_of_the_worked_examples():
    w = jnp.zeros((64, 1)).at[:4, 0].set(jnp.asarray([0.1, -0.2, 0.3, -0.4]))
    out = write_bnb(qtensor.quantize(w, QFormat.parse("nf4-g64")))
    assert out["weight"].dtype == np.uint8 and out["weight"].shape == (32, 1)
    assert out["weight"][:4, 0].tolist() == [162, 224, 119, 119]
    np.testing.assert_allclose(out["weight.absmax"], [0.4], rtol=1e-6)
    row = jnp.asarray([[1.0], [-2.0], [0.0], [0.5]])
    fmt = QFormat.parse("int8-channel:outlier")
    out = write_bnb(qtensor.quantize(row, fmt, grid="restricted"))
    assert out["weight"].tolist() == [[64, -127, 0, 32]]
    np.testing.assert_allclose(out["SCB"], [2.0], rtol=1e-6)


@pytest.mark.parametrize(
    "text", ["nf4-g64", "nf4-g64-dq", "fp4-g32", "fp4-g64-dq", "int8-channel:outlier"]
)
def test_bnb_reads_what_it_writes(text):
    x = weight(text, scale_dtype=jnp.float32)
    out = write_bnb(x)
    reader = BNBReader.parse(bnb_config({P: x}))
    assert reader.shape(P, out) == (64, 128)
    if text.startswith("int8"):
        got = reader.read(P, out)
        np.testing.assert_array_equal(got.q, x.q)
        np.testing.assert_allclose(got.scale, x.scale, rtol=1e-6)
    else:
        assert_same(reader.read(P, out), x)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_bnb_codes_may_be_stored_as_another_type(dtype):
    """bnb_4bit_quant_storage: the same bytes, under a type that FSDP can shard."""
    x = weight("nf4-g64-dq", scale_dtype=jnp.float32)
    out = write_bnb(x)
    stored = out["weight"].reshape(-1).view(dtype)[:, None]
    assert_same(BNBReader.parse({}).read(P, out | {"weight": stored}), x)


def test_bnb_blocks_over_row_ends_become_dense():
    x = weight("nf4-g64", rows=128, columns=64, scale_dtype=jnp.float32)
    out = write_bnb(x)
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(out[key].tobytes()) | {"shape": [256, 32]}
    out[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    got = BNBReader.parse({}).read(P, out)
    assert isinstance(got, Dense) and "ends of rows" in got.reason
    flat = np.asarray(dequantize(x)).T.reshape(256, 32)
    np.testing.assert_allclose(got.w.T, flat, rtol=1e-6)


def test_bnb_foreign_nested_map_is_decoded():
    x = weight("nf4-g64-dq", scale_dtype=jnp.float32)
    out = write_bnb(x)
    table = out["weight.nested_quant_map"]
    out["weight.nested_quant_map"] = table[::-1].copy()
    out["weight.absmax"] = (255 - out["weight.absmax"]).astype(np.uint8)
    got = BNBReader.parse({}).read(P, out)
    assert isinstance(got, QTensor) and not isinstance(got.scale, DoubleScale)
    np.testing.assert_allclose(dequantize(got), dequantize(x), rtol=1e-6)


# ---- between formats


@pytest.mark.parametrize("text", ["int4-g32", "int4-g64-asym", "int4-channel"])
def test_gptq_awq_and_compressed_tensors_transcode_without_loss(text):
    x = weight(text)
    first = write_gptq(x)
    as_awq = write_awq(GPTQReader.parse(gptq_config({P: x})).read(P, first))
    as_ct = write_ct(AWQReader.parse(awq_config({P: x})).read(P, as_awq))
    back = write_gptq(ct_reader(x).read(P, as_ct))
    assert list(back) == list(first)
    for name, tensor in first.items():
        assert tensor.dtype == back[name].dtype
        assert tensor.tobytes() == back[name].tobytes()


# ---- refusals


@pytest.mark.parametrize(
    ("write", "text", "change", "word"),
    [
        (write_gptq, "int5-g32", {}, "integers of 2, 3, 4, 8 bits, got int5-g32"),
        (write_gptq, "nf4-g64", {}, "GPTQ holds integers"),
        (write_gptq, "int4-tensor", {}, "by group or channel"),
        (write_gptq, "int4-g32", {"columns": 60}, "multiples of 32"),
        (write_gptq, "int4-g32", {"scale_dtype": jnp.float32}, "scale_dtype=float16"),
        (write_gptq, "int8-channel:dyn", {}, "stores no input quantization"),
        (write_awq, "int3-g32", {}, "AWQ holds integers of 4 bits"),
        (write_awq, "int4-g32", {"columns": 60}, "8 outputs"),
        (write_awq, "int4-g48", {}, "48 does not divide 128 inputs; groups of 16, 32, 64, 128, a"),
        (write_ct, "nf4-g64", {}, "compressed-tensors holds integers"),
        (write_ct, "int8-channel:outlier", {}, "outlier"),
        (write_fp8, "fp8-e4m3-channel", {}, "an fp8 file holds"),
        (write_bnb, "int4-g64", {}, "bitsandbytes holds int8-channel"),
        (write_bnb, "nf4-g64", {"rows": 96}, "whole groups"),
        (write_bnb, "nf4-block64", {}, "bitsandbytes holds"),
        (write_bnb, "int8-channel", {}, "quantizes the inputs"),
        (write_bnb, "int8-channel:dyn-full", {}, "quantizes the inputs"),
        (write_fp8, "fp8-e4m3-tensor", {}, "quantizes the inputs"),
        (write_ct, "int4-block64", {}, "no blocks of integers"),
        (write_ct, "int4-tensor-asym", {}, "no zero point of a whole"),
        (write_ct, "fp8-e4m3-g32:dyn", {}, "channel or 128 x 128 blocks"),
        (write_ct, "fp8-e4m3-block64:dyn", {}, "channel or 128 x 128 blocks"),
    ],
)
def test_what_a_format_cannot_hold_is_named(write, text, change, word):
    with pytest.raises(ValueError, match=word):
        write(weight(text, **change))


@pytest.mark.parametrize(
    ("parse", "config", "word"),
    [
        (GPTQReader.parse, {"bits": 5}, "bits must be one of"),
        (GPTQReader.parse, {"bits": 4, "checkpoint_format": "gptq_p"}, "gptq_p"),
        (GPTQReader.parse, {"bits": 4, "pack_dtype": "int64"}, "int64"),
        (GPTQReader.parse, {"bits": 4, "group_size": 0}, "group_size"),
        (AWQReader.parse, {"bits": 4, "version": "gemv", "group_size": 64}, "gemv"),
        (AWQReader.parse, {"bits": 8, "version": "gemm", "group_size": 64}, "bits must be 4"),
        (CTReader.parse, {"config_groups": {}}, "no config_groups"),
        (CTReader.parse, {"config_groups": {"a": {"format": "nvfp4-pack-quantized"}}}, "nvfp4"),
        (FP8Reader.parse, {"weight_block_size": [64, 64]}, r"\[128, 128\]"),
        (FP8Reader.parse, {"fmt": "e5m2"}, "e5m2"),
        (BNBReader.parse, {"llm_int8_threshold": 4.0}, "threshold"),
    ],
)
def test_configs_that_are_not_supported_are_named(parse, config, word):
    with pytest.raises(ValueError, match=word):
        parse(config)


def test_tensors_that_do_not_fit_are_named_with_their_module():
    x = weight("int4-g32")
    out = write_gptq(x)
    reader = gptq_reader(group=32)
    with pytest.raises(ValueError, match=r"q_proj has qweight but no scales"):
        reader.read(P, {"qweight": out["qweight"]})
    with pytest.raises(ValueError, match=r"q_proj: scales must be \[4, 64\]"):
        reader.read(P, out | {"scales": out["scales"][:2]})
    with pytest.raises(ValueError, match=r"q_proj: qweight must be \[8, 64\] .* got \[16, 64\]"):
        gptq_reader(bits=2, group=32).read(P, out)  # the config lies
    with pytest.raises(ValueError, match=r"q_proj: qzeros must be \[4, 8\] .* got \[1, 8\]"):
        reader.read(P, out | {"qzeros": out["qzeros"][:1]})
    for wrong in (-2, 4):
        g_idx = out["g_idx"].copy()
        g_idx[5] = wrong
        with pytest.raises(ValueError, match=r"q_proj: g_idx must lie in 0\.\.3, got"):
            reader.read(P, out | {"g_idx": g_idx})
    awq = write_awq(weight("int4-g32-asym"))
    with pytest.raises(ValueError, match=r"needs zero points \[4, 64\], got \[1, 64\]"):
        AWQReader(32).read(P, awq | {"qzeros": awq["qzeros"][:1]})
    ct = write_ct(x)
    with pytest.raises(ValueError, match=r"q_proj: 128 codes of 4 bits make 16 words, got 15"):
        ct_reader(x).read(P, ct | {"weight_packed": ct["weight_packed"][:, :15]})
    with pytest.raises(ValueError, match=r"q_proj: 128 inputs in groups of 32 need 4 scales"):
        ct_reader(x).read(P, ct | {"weight_scale": ct["weight_scale"][:, :3]})
    nf4 = write_bnb(weight("nf4-g64", scale_dtype=jnp.float32))
    spoilt = nf4["weight.absmax"].reshape(2, 64).astype(ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match=r"absmax must be \[128\].*save before that"):
        BNBReader.parse({}).read(P, nf4 | {"weight.absmax": spoilt})
