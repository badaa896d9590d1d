"""Whatever the header of a GGUF file says, it loads as it should or is refused by name."""

import inspect
import itertools
import math
import pathlib
import random
import re

import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    INTEGERS,
    LAYERS,
    STRING,
    TOKENS,
    U8,
    U32,
    U64,
    Header,
    array,
    nested,
    scalar,
    text,
    tiny_header,
)

from jinfer.checkpoints import tokenizer as tokenizer_module
from jinfer.checkpoints.fill import fill
from jinfer.checkpoints.gguf import checkpoint as gguf
from jinfer.checkpoints.gguf import ends as gguf_ends
from jinfer.checkpoints.gguf.checkpoint import GGUFCheckpoint
from jinfer.checkpoints.gguf.file import GGUFFile
from jinfer.checkpoints.gguf.metadata import FIELDS
from jinfer.checkpoints.tokenizer import tokenizer_from_gguf

ARCHITECTURES = ("llama", "gemma3", "qwen3moe")
HEADERS = {arch: tiny_header(arch) for arch in ARCHITECTURES}


def open_all(path, *, is_filled=False):
    """Reads all that is read of a file when a model is loaded and served."""
    checkpoint = GGUFCheckpoint(path)
    if is_filled:
        fill(checkpoint, np.dtype(np.float32))
    tokenizer = tokenizer_from_gguf(GGUFFile(path))
    tokenizer.encode("ab a")
    return checkpoint.config, tokenizer


def outcome(path, data: bytes):
    """None if the file loads, else its error, which must be one of a GGUF file's."""
    path.write_bytes(data)
    try:
        open_all(path, is_filled=True)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1000, message[:2000]
        assert str(path) in message, message
        assert "config.json" not in message, message
        return message
    return None


def limits(kind: int) -> list[int]:
    bits = 8 * len(scalar(kind, 0))
    is_signed = kind in (1, 3, 5, 11)
    low, high = (-1 << bits - 1, (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    return sorted({low, max(low, -1), 0, 1, 3, 100, high})


def values() -> list[tuple[int, bytes]]:
    """Values of every type and of sizes from nothing to absurd."""
    found = [(kind, scalar(kind, value)) for kind in INTEGERS for value in limits(kind)]
    floats = (0.0, -1.0, 1.0, math.nan, math.inf, -math.inf, 1e-40, 3e38)
    found += [(F32, scalar(F32, value)) for value in floats]
    found += [(F64, scalar(F64, value)) for value in (*floats, 1e-300, 1e300)]
    found += [(BOOL, bytes([byte])) for byte in (0, 1, 2, 255)]
    found += [(STRING, text(value)) for value in ("", "False", "2", b"\xff\xfe", "x" * 10_000)]
    found += [(ARRAY, array(U32, [2] * size)) for size in (0, 1, LAYERS, len(TOKENS), 5000)]
    found += [(ARRAY, array(I32, pair)) for pair in ([1, 2], [-1, -1], [0, 0])]
    found += [(ARRAY, array(kind, [1, 1])) for kind in (U8, U64, F32, BOOL)]
    found += [(ARRAY, array(F32, [math.nan] * len(TOKENS))), (ARRAY, array(BOOL, [1, 7]))]
    found += [(ARRAY, array(STRING, ["a"] * size)) for size in (0, 1, LAYERS, len(TOKENS))]
    found += [(ARRAY, array(U32, [], count=count)) for count in (1 << 40, 1 << 62, (1 << 64) - 1)]
    found += [(ARRAY, array(STRING, [], count=(1 << 64) - 1)), (ARRAY, array(99, []))]
    found += [(ARRAY, nested(depth)) for depth in (1, 3, 20_000)]
    return [*found, (13, b""), (99, b"\0" * 8), (STRING, scalar(U64, 1 << 63))]


VALUES = values()


def may_be(field_kind: int, kind: int) -> bool:
    """Whether a value of one type is allowed where a valid file has another type."""
    groups = (set(INTEGERS), {F32, F64, *INTEGERS}, {BOOL}, {STRING})
    return any(field_kind in group and kind in group for group in groups[:1] + groups[2:]) or (
        field_kind == F32 and kind in groups[1]
    )


def check_value(path, header: Header, key: str, kind: int, value: bytes) -> None:
    message = outcome(path, header.dump(**{key: (kind, value)})[0])
    was = header.metadata[key][0]
    if message is None and kind != ARRAY:
        assert may_be(was, kind), f"{key} of type {kind} was taken for one of type {was}"
    if message is not None and "truncated" not in message:
        module = key.rsplit(".", 1)[-1]
        assert module in message or "tensor" in message or "blk." in message, (key, message)


CASES = [(a, k, v) for a in ARCHITECTURES for k in HEADERS[a].metadata for v in range(len(VALUES))]


def test_a_value_of_any_type_and_size_loads_or_is_refused_by_key_and_file(tmp_path):
    """A draw of all cases; the next test has all."""
    for arch, key, i in random.Random(0).sample(CASES, 150):
        check_value(tmp_path / "model.gguf", HEADERS[arch], key, *VALUES[i])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_value_of_every_key_loads_or_is_refused_by_key_and_file(arch, tmp_path):
    for key, value in itertools.product(HEADERS[arch].metadata, VALUES):
        check_value(tmp_path / "model.gguf", HEADERS[arch], key, *value)


def check_damage(path, data: bytes, num_header: int, at: int, bit: int | None) -> None:
    """Cuts the file at a byte of its header, or flips a bit of it: loads or is refused."""
    damaged = bytearray(data[:at] if bit is None else data)
    if bit is not None:
        damaged[at] ^= 1 << bit
    message = outcome(path, bytes(damaged))
    assert bit is not None or message is not None, f"cut at {at} of {num_header} and loaded"


def places(arch: str) -> list[tuple[int, int | None]]:
    _, num_header = HEADERS[arch].dump()
    return list(itertools.product(range(num_header), (None, *range(8))))


def test_a_header_cut_or_flipped_anywhere_loads_or_is_refused_by_file(tmp_path):
    """A draw of all places; the next test has all."""
    for arch in ARCHITECTURES:
        data, num_header = HEADERS[arch].dump()
        for at, bit in random.Random(1).sample(places(arch), 40):
            check_damage(tmp_path / "model.gguf", data, num_header, at, bit)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_header_cut_or_flipped_everywhere_loads_or_is_refused_by_file(arch, tmp_path):
    data, num_header = HEADERS[arch].dump()
    for at, bit in places(arch):
        check_damage(tmp_path / "model.gguf", data, num_header, at, bit)


def test_equal_values_for_each_layer_load_as_the_one_value(tmp_path):
    path, header = tmp_path / "model.gguf", HEADERS["qwen3moe"]
    path.write_bytes(header.dump()[0])
    expected, _ = open_all(path)
    layered = [key for key, field in FIELDS.items() if field.shape == "layers"]
    keys = [key.replace("{arch}", "qwen3moe") for key in layered]
    keys = [key for key in keys if key in header.metadata]
    assert len(keys) >= 9
    for key in keys:
        value = int.from_bytes(header.metadata[key][1], "little")
        changed = {key: (ARRAY, array(I32, [value] * LAYERS))}
        path.write_bytes(header.dump(**changed)[0])
        assert open_all(path)[0] == expected, key
        for wrong in ([value] * (LAYERS + 1), [value, value + 1]):
            path.write_bytes(header.dump(**{key: (ARRAY, array(I32, wrong))})[0])
            with pytest.raises(ValueError, match=rf"{key} must be .* for each of the 2 layers"):
                open_all(path)


@pytest.mark.parametrize(
    "key, kind, value",
    [
        *((f"tokenizer.ggml.{name}_token_id", I32, -1) for name in ("bos", "eos", "padding")),
        *((f"tokenizer.ggml.{name}_token_id", U32, len(TOKENS)) for name in ("eot", "unknown")),
        ("tokenizer.ggml.add_eos_token", STRING, "False"),
        ("tokenizer.ggml.add_bos_token", U32, 1),
        ("llama.context_length", U32, 0),
        ("llama.block_count", U32, 10_000),
        ("llama.block_count", U64, 1 << 63),
        ("llama.attention.head_count", U32, 0),
        ("llama.attention.head_count_kv", U32, 3),
        ("llama.attention.key_length", U32, 0),
        ("llama.rope.scaling.type", STRING, "dynamic"),
        ("general.alignment", U32, 0),
        ("general.alignment", U32, 24),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key_and_file(key, kind, value, tmp_path):
    path = tmp_path / "model.gguf"
    message = outcome(path, HEADERS["llama"].dump(**{key: (kind, scalar(kind, value))})[0])
    assert message is not None and key in message and str(value).strip("'") in message


def test_a_key_or_tensor_that_is_there_twice_is_refused(tmp_path):
    data, _ = HEADERS["llama"].dump()
    for name, other in (
        (b"llama.rope.scaling.yarn_beta_fast", b"llama.rope.scaling.yarn_beta_slow"),
        (b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"),
    ):
        message = outcome(tmp_path / "model.gguf", data.replace(name, other))
        assert message is not None and "twice" in message and other.decode() in message


@pytest.mark.parametrize("shape", [(), (1 << 62, 1 << 62), (1 << 63, 2), (0, 16), (1,) * 5])
def test_a_tensor_without_a_possible_shape_is_refused(shape, tmp_path):
    path, name = tmp_path / "model.gguf", b"blk.0.attn_q.weight"
    data, _ = HEADERS["llama"].dump()
    at = data.index(name) + len(name)
    sizes = b"".join(scalar(U64, size) for size in shape)
    message = outcome(path, data[:at] + scalar(U32, len(shape)) + sizes + data[at + 20 :])
    assert message is not None and "'blk.0.attn_q.weight'" in message


def test_a_tensor_with_the_bytes_of_another_is_refused(tmp_path):
    data, _ = HEADERS["llama"].dump()
    offsets = {}
    for name in (b"blk.0.ffn_gate.weight", b"blk.0.ffn_up.weight"):
        at = data.index(name) + len(name) + 4 + 16 + 4
        offsets[name] = (at, data[at : at + 8])
    (gate, _), (_, up) = offsets.values()
    message = outcome(tmp_path / "model.gguf", data[:gate] + up + data[gate + 8 :])
    assert message is not None and "'blk.0.ffn_gate.weight' starts at offset" in message


def test_every_key_that_is_read_is_in_the_table():
    """Else a file could hold anything there, and its reader would find out by an exception."""
    weights, ends, tokenizer = (
        pathlib.Path(inspect.getfile(module)).read_text()
        for module in (gguf, gguf_ends, tokenizer_module)
    )
    own = re.findall(r'meta\.(?:get|require)\(\s*"([\w.]+)"', weights)
    own += [*gguf._REFUSED, *gguf._NEUTRAL]
    vocabulary = re.findall(r'meta(?:data)?\.tokenizer\(\s*"(\w+)"', weights)
    vocabulary += re.findall(r'(?<![.\w])get\(\s*"(\w+)"', tokenizer)
    vocabulary += [*gguf_ends._END_KEYS, *tokenizer_module._NAMED_TOKENS.values()]
    whole = re.findall(r'get\(\s*"([\w]+\.[\w.]+)"', weights + tokenizer + ends)
    whole = [key for key in whole if key.startswith(("general", "tokenizer", "split"))]
    read = {f"{{arch}}.{key}" for key in own} | {f"tokenizer.ggml.{key}" for key in vocabulary}
    read |= set(whole)
    assert len(read) > 50
    assert not read - FIELDS.keys()


def test_a_name_of_any_length_is_refused_in_short(tmp_path):
    """A flipped bit in the length of a name makes one of what follows."""
    header = HEADERS["llama"]
    key = "tokenizer.chat_template." + "x" * 3000
    tensors = {"blk.0." + "9" * 5000: np.ones(1), f"blk.{'9' * 5000}.attn_q.weight": np.ones(1)}
    for name, tensor in tensors.items():
        grown = Header(header.metadata, {**header.tensors, name: tensor})
        assert "name has" in str(outcome(tmp_path / "model.gguf", grown.dump()[0]))
    many_digits = Header(
        header.metadata, {**header.tensors, f"blk.{'9' * 200}.attn_q.weight": tensor}
    )
    assert "no place for it" in str(outcome(tmp_path / "model.gguf", many_digits.dump()[0]))
    for kind in (U32, 99):
        message = outcome(tmp_path / "model.gguf", header.dump(**{key: (kind, scalar(U32, 1))})[0])
        assert message is not None and key[:200] in message
