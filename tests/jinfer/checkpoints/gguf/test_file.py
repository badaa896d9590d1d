"""The GGUF container against the gguf package: the same metadata, table and numbers."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jinfer.checkpoints.gguf import file as gguf_file
from jinfer.checkpoints.gguf.file import SUPPORTED_TYPES, GGUFFile


def random_blocks(type_name: str, rows: int, columns: int) -> np.ndarray:
    """Random stored bytes of a quantized type, their float16 scales made finite and small."""
    kind = GGMLQuantizationType[type_name]
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows, columns // block_size, block_bytes), np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    scales |= {"TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (), "MXFP4": (), "NVFP4": ()}
    for start in scales.get(type_name, (0, 2) if type_name.endswith("_1") else (0,)):
        values = rng.normal(size=blocks.shape[:2]).astype(np.float16)
        blocks[..., start : start + 2] = values[..., None].view(np.uint8)
    if type_name == "IQ1_M":  # the nibble of the scale's exponent
        blocks[..., 55] = blocks[..., 55] & 15 | 0x30
    if type_name == "MXFP4":  # 2 ** (e - 127)
        blocks[..., 0] = blocks[..., 0] % 20 + 117
    if type_name == "NVFP4":  # four scales in fp8, 127 is NaN
        blocks[..., :4] %= 127
    return blocks.reshape(rows, -1)


def stored_tensor(type_name: str) -> np.ndarray:
    if type_name in ("F32", "F16", "BF16"):
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[type_name]
        values = np.random.default_rng(0).normal(size=(5, 512)).astype(dtype)
        return values if type_name != "BF16" else values.view(np.uint8)
    return random_blocks(type_name, 5, 512)


@pytest.fixture
def every_type(tmp_path):
    path = tmp_path / "every-type.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 250)
    writer.add_int16("a.i16", -3)
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_float32("a.f32", 0.1)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "grüß ▁ 😀")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    writer.add_array("a.texts", ["x", "", "日本"])
    for name in SUPPORTED_TYPES:
        writer.add_tensor(name, stored_tensor(name), raw_dtype=GGMLQuantizationType[name])
    writer.add_tensor("odd", np.arange(3, dtype=np.float32))  # the next one is padded up to
    writer.add_tensor("cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_reads_as_the_gguf_package_reads_it(every_type):
    ours = GGUFFile(every_type).metadata
    theirs = {
        key: field.contents()
        for key, field in gguf.GGUFReader(every_type).fields.items()
        if not key.startswith("GGUF.")
    }
    assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in ours.items()} == theirs


@pytest.mark.parametrize("chunk", [1, 600, 1 << 22])
def test_tensors_read_as_the_gguf_package_reads_them(chunk, every_type, monkeypatch):
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", chunk)
    file = GGUFFile(every_type)
    reference = gguf.GGUFReader(every_type)
    assert set(file.tensors) == {tensor.name for tensor in reference.tensors}
    for tensor in reference.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        ours = file.read(tensor.name)
        assert ours.dtype == np.float32 and ours.flags.writeable
        np.testing.assert_array_equal(ours, expected, err_msg=tensor.name)
        assert np.isfinite(ours).all(), tensor.name
        bf16 = file.read(tensor.name, ml_dtypes.bfloat16)
        np.testing.assert_array_equal(bf16, expected.astype(ml_dtypes.bfloat16))


def half(value):
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def test_types_without_an_encoder_of_ours_have_the_values_of_their_definition(tmp_path):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, 256).astype(np.uint8)
    levels = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    packed = codes.reshape(8, 2, 16)  # of 32 codes, the first half in the low nibbles
    packed = packed[:, 0] | packed[:, 1] << 4
    ternary = rng.integers(-1, 2, (1, 256)).astype(np.float32) * 0.25
    ternary[0, 0] = 0.25
    scale_bits = np.uint8([*b"\xaa\xaa", *b"\x11\x11\x11\x11"])  # 33 each: 33 - 32 times d
    scale = np.tile(half(0.5), (8, 1))
    made = {
        "IQ4_NL": (np.concatenate([scale, packed], 1), 0.5 * np.array(levels)[codes]),
        "IQ4_XS": (
            np.concatenate([half(0.5), scale_bits, packed.reshape(-1)]),
            0.5 * np.array(levels)[codes],
        ),
        "MXFP4": (
            np.concatenate([np.full((8, 1), 129, np.uint8), packed], 1),
            4.0 * codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32),
        ),
        "TQ1_0": (gguf.quantize(ternary, GGMLQuantizationType.TQ1_0), ternary),
        "TQ2_0": (gguf.quantize(ternary, GGMLQuantizationType.TQ2_0), ternary),
    }
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, (stored, _) in made.items():
        kind = GGMLQuantizationType[name]
        writer.add_tensor(name, stored.reshape(1, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    for name, (_, values) in made.items():
        np.testing.assert_array_equal(file.read(name)[0], values.reshape(-1), err_msg=name)


@pytest.mark.thorough
def test_the_default_models_metadata_reads_as_the_gguf_package_reads_it(smollm2_path):
    file, reference = GGUFFile(smollm2_path), gguf.GGUFReader(smollm2_path)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            ours = file.metadata[key]
            ours = ours.tolist() if isinstance(ours, np.ndarray) else ours
            assert ours == field.contents(), key
    for tensor in reference.tensors:
        ours = file.tensors[tensor.name]
        assert (ours.offset, ours.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))


def test_a_file_cut_anywhere_is_called_truncated(every_type, one_line):
    data = every_type.read_bytes()
    for length in [5, 9, 20, 30, 60, 120, 200, 300, 500, 900, 1500, 2500, len(data) - 300]:
        every_type.write_bytes(data[:length])
        with pytest.raises(ValueError) as error:
            GGUFFile(every_type)
        one_line(error.value, "truncated", str(every_type), "download it again")


def test_the_last_tensor_must_be_whole(every_type, one_line):
    last = GGUFFile(every_type).tensors["cube"]
    data = every_type.read_bytes()
    every_type.write_bytes(data[: last.offset + last.num_bytes])  # without the padding after it
    GGUFFile(every_type)
    every_type.write_bytes(data[: last.offset + last.num_bytes - 1])
    with pytest.raises(ValueError) as error:
        GGUFFile(every_type)
    one_line(error.value, "truncated", "'cube'")


@pytest.mark.parametrize(
    "data, part",
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04 a zip", "not a GGUF file"),
        (b"GGUF\x01\x00\x00\x00" + b"\0" * 16, "GGUF version 1"),
        (b"GGUF\x00\x00\x00\x03" + b"\0" * 16, "big-endian"),
    ],
)
def test_other_files_are_refused_by_what_they_are(data, part, tmp_path, one_line):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        GGUFFile(path)
    one_line(error.value, part)


def test_an_absent_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*nothing\.gguf"):
        GGUFFile(tmp_path / "nothing.gguf")


def test_an_unsupported_type_is_named_with_its_tensor(tmp_path, one_line):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("w", np.zeros((2, 40), np.uint8), raw_dtype=GGMLQuantizationType.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError) as error:
        GGUFFile(tmp_path / "model.gguf")
    one_line(error.value, "'w'", "Q8_1", "Q4_K", "MXFP4")
