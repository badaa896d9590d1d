"""Headers and indexes of safetensors that lie: refused in one line that names file and cause."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from jinfer import load
from jinfer.checkpoints.hf_files import INDEX, read_json, read_safetensors_header
from jinfer.checkpoints.load import load_config

GATE, UP = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))


def row(begin: int, end: int, *shape: int, dtype: str = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape or [4], "data_offsets": [begin, end]})


def write_header(path, rows: list[tuple[str, str]], num_bytes: int):
    header = ("{" + ", ".join(f'"{name}": {text}' for name, text in rows) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))
    return path


@pytest.mark.parametrize(
    "rows, num_bytes",
    [
        ([("a", row(0, 16)), ("b", row(0, 16))], 16),  # overlap whole
        ([("a", row(0, 16)), ("b", row(0, 16))], 32),
        ([("a", row(0, 16)), ("b", row(8, 24))], 24),  # overlap in part
        ([("a", row(0, 16)), ("b", row(20, 36))], 36),  # a hole
        ([("a", row(4, 20))], 20),  # a hole at the start
        ([("a", row(0, 16))], 20),  # bytes after the last
        ([("a", row(0, 16)), ("a", row(0, 16))], 16),  # the same row twice
        ([("a", row(0, 16)), ("a", row(0, 16, 2, 2))], 16),
        ([("a", row(0, 16)), ("a", row(0, 16, dtype="I32"))], 16),
        ([("a", row(0, 16)), ("a", row(16, 32))], 32),
        ([("a", row(0, 8))], 8),  # fewer bytes than the shape needs
        ([("a", row(16, 0))], 16),  # backwards
        ([("a", row(0, 16, 2**62, 4))], 16),  # 2**64 elements
        ([("a", row(0, 16)), ("b", row(16, 16, 2**62, 0))], 16),
        ([("a", row(0, 16)), ("b", row(16, 16, 2**70, 0))], 16),
        ([("a", row(0, 16, dtype="Q9"))], 16),
        ([("a", "[" * 20_000)], 16),
        ([("a", '{"b":' * 20_000)], 16),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(rows, num_bytes, tmp_path, one_line):
    path = write_header(tmp_path / "model.safetensors", rows, num_bytes)
    with pytest.raises(ValueError) as error:
        read_safetensors_header(path)
    one_line(error.value, str(path), "damaged safetensors header")


def test_rows_may_stand_in_any_order_and_tensors_be_empty(tmp_path):
    rows = [("b", row(16, 32, 2, 2)), ("a", row(0, 16)), ("c", row(32, 32, 0, 5))]
    tensors = read_safetensors_header(write_header(tmp_path / "w.safetensors", rows, 32))
    assert {name: t.shape for name, t in tensors.items()} == {"b": (2, 2), "a": (4,), "c": (0, 5)}


def test_a_tensor_with_the_bytes_of_another_is_refused(tiny, write_hf, tmp_path, one_line):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[GATE]["data_offsets"] = header[UP]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(ValueError) as error:
        load(folder)
    one_line(error.value, str(path), "proj.weight")


OUTSIDE = [
    *("/etc/passwd", "../other/model.safetensors", "sub/model.safetensors", "", ".", ".."),
    *("a\\b.safetensors", "C:model.safetensors", "a\0b", "a" * 256, "ü" * 128, "\ud800" * 90),
    *(["model.safetensors"], {"a": 1}, 5, None, True),
]


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_an_index_names_files_of_its_folder_alone(name, tiny, write_hf, tmp_path, one_line):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    for place in (tmp_path / "other", folder / "sub"):  # which are there, and sound
        place.mkdir()
        save_file(model.tensors(), place / "model.safetensors")
    weight_map = dict.fromkeys(model.tensors(), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    load(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, GATE: name}}))
    for read in (load, load_config):
        with pytest.raises(ValueError) as error:
            read(folder)
        one_line(error.value, str(folder / INDEX), "weight_map")
        assert len(str(error.value)) < 500


def test_files_of_an_index_may_be_links_as_in_the_hubs_cache(tiny, write_hf, tmp_path):
    model = tiny("llama")
    blobs = write_hf(tmp_path / "blobs", model.hf, model.tensors(), num_shards=2)
    folder = tmp_path / "snapshots" / "revision"
    folder.mkdir(parents=True)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(os.path.relpath(file, folder))
    _, params = load(folder)
    np.testing.assert_array_equal(params["embed"]["w"], model.params["embed"]["w"])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_parse_is_refused(text, tmp_path, one_line):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_json(path)
    one_line(error.value, str(path), "not valid JSON")
