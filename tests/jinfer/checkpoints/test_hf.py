"""Hugging Face folders: what is written is what is loaded, and what is wrong is named."""

import json
import pathlib
import tracemalloc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jinfer import load
from jinfer.checkpoints import fill
from jinfer.checkpoints.load import load_config
from jinfer.models.model import Model


def assert_same_params(loaded, expected):
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_a_checkpoint_of_every_family_loads_as_it_was_written(any_tiny, write_hf, tmp_path):
    folder = write_hf(tmp_path / "model", any_tiny.hf, any_tiny.tensors())
    model, params = load(folder)
    assert model.config == any_tiny.config
    assert_same_params(params, any_tiny.params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert shapes == Model(model.config).abstract_params(jnp.float32)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_shards_load_as_one_file_does(family, tiny, write_hf, tmp_path):
    model = tiny(family)
    folder = write_hf(tmp_path / "model", model.hf, model.tensors(), num_shards=3)
    assert_same_params(load(folder)[1], model.params)


def test_shards_without_an_index_are_all_read(tiny, write_hf, tmp_path):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors(), num_shards=2)
    (folder / "model.safetensors.index.json").unlink()
    assert_same_params(load(folder)[1], model.params)


def test_stacked_experts_load_as_single_ones(tiny, write_hf, tmp_path):
    model = tiny("qwen3_moe")
    tensors = {n: t for n, t in model.tensors().items() if ".experts." not in n}
    for i, layer in enumerate(model.params["layers"]):
        prefix = f"model.layers.{i}.mlp.experts."
        gate_up = np.concatenate([layer["mlp"]["gate"]["w"], layer["mlp"]["up"]["w"]], axis=-1)
        tensors[prefix + "gate_up_proj"] = np.ascontiguousarray(gate_up.swapaxes(1, 2))
        down = layer["mlp"]["down"]["w"]
        tensors[prefix + "down_proj"] = np.ascontiguousarray(down.swapaxes(1, 2))
    folder = write_hf(tmp_path / "model", model.hf, tensors)
    assert_same_params(load(folder)[1], model.params)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_stored_type_loads_in_every_dtype(stored, dtype, tiny, write_hf, tmp_path):
    model = tiny("llama")
    tensors = {name: tensor.astype(stored) for name, tensor in model.tensors().items()}
    folder = write_hf(tmp_path / "model", model.hf, tensors)
    _, params = load(folder, dtype=dtype)
    expected = jax.tree.map(
        lambda x: x.astype(stored).astype(np.float32).astype(jnp.dtype(dtype)), model.params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert_same_params(params, expected)


def test_auto_dtype_is_the_checkpoints_own_except_on_cpus(monkeypatch):
    assert fill.resolve_dtype(None, "bfloat16") == jnp.float32
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fill.resolve_dtype(None, "bfloat16") == jnp.bfloat16
    assert fill.resolve_dtype("auto", "float16") == jnp.float16
    assert fill.resolve_dtype(jnp.float32, "bfloat16") == jnp.float32


@pytest.mark.parametrize(
    "dtype", ["int8", "float64", "fp16", 3.0, "9" * 5000, "(" * 99, "x,", "\x00"]
)
def test_an_unknown_dtype_is_named(dtype, one_line):
    with pytest.raises(ValueError) as error:
        fill.resolve_dtype(dtype, "float32")
    one_line(error.value, repr(dtype)[:50], "bfloat16")


@pytest.mark.parametrize(
    "spelling",
    [
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {},  # as stored
    ],
)
def test_the_checkpoints_own_dtype_is_found(spelling, tiny, write_hf, tmp_path):
    from jinfer.checkpoints.hf import HFCheckpoint

    model = tiny("llama")
    tensors = {name: t.astype(ml_dtypes.bfloat16) for name, t in model.tensors().items()}
    folder = write_hf(tmp_path / "model", {**model.hf, **spelling}, tensors)
    assert HFCheckpoint(folder).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("flag", "head"),
    [
        *((True, "absent"), (True, "same"), (True, "different")),
        *((False, "same"), (False, "different")),
    ],
)
def test_tied_embeddings_follow_the_tensors_over_the_flag(flag, head, tiny, write_hf, tmp_path):
    model = tiny("llama")
    tensors = model.tensors()
    if head == "absent":
        del tensors["lm_head.weight"]
    elif head == "same":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = write_hf(tmp_path / "model", {**model.hf, "tie_word_embeddings": flag}, tensors)
    loaded, params = load(folder)
    is_tied = flag and head != "different"
    assert loaded.config.tie_word_embeddings == is_tied
    assert ("lm_head" in params) != is_tied


def test_ends_come_from_generation_config_as_in_transformers(tiny, write_hf, tmp_path):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    assert load_config(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_config(folder).eos_token_ids == (7, 9)


def test_a_config_is_read_without_weights(tiny, tmp_path):
    model = tiny("llama")
    (tmp_path / "config.json").write_text(json.dumps(model.hf))
    assert load_config(tmp_path) == model.config


def align(file: pathlib.Path, remainder: int) -> None:
    """Rewrites a safetensors file so that its data start at `remainder` modulo 64."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length])).encode()
    header += b" " * ((remainder - 8 - len(header)) % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_tensors_at_odd_offsets_load(tiny, write_hf, tmp_path):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    align(folder / "model.safetensors", 3)
    assert_same_params(load(folder)[1], model.params)


def test_params_do_not_depend_on_the_file_staying_as_it_is(tiny, write_hf, tmp_path):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    file = folder / "model.safetensors"
    align(file, 0)  # jax on a CPU takes over buffers that lie so
    _, params = load(folder)
    with file.open("r+b") as stream:  # in place: the same inode, as a mapping would see it
        stream.write(b"\0" * file.stat().st_size)
    assert_same_params(params, model.params)


def test_expert_stacks_are_in_host_memory_one_at_a_time(tiny, write_hf, tmp_path):
    model = tiny("mixtral", num_hidden_layers=6, num_local_experts=16, hidden_size=128)
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    stack = model.params["layers"][0]["mlp"]["up"]["w"].nbytes
    load(folder)  # everything imported and compiled
    tracemalloc.start()
    try:
        load(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * stack < 18 * stack  # of 18 stacks; copies to the device may lag a little


def cut(bytes_left: int | float) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        left = bytes_left if isinstance(bytes_left, int) else int(len(data) * bytes_left)
        file.write_bytes(data[:left])

    return apply


def edit_config(**changes) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        hf = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**hf, **changes}))

    return apply


def edit_tensors(change) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        from safetensors.numpy import load_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def rename(old: str, new: str) -> Callable[[pathlib.Path], None]:
    return edit_tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


def only_pickles(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def overwrite(name: str, data: bytes) -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / name).write_bytes(data)


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[pathlib.Path], None], type[Exception], tuple[str, ...]]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        FileNotFoundError,
        ("no config.json",),
    ),
    "config is not JSON": (overwrite("config.json", b"{"), ValueError, ("not valid JSON",)),
    "config is a list": (overwrite("config.json", b"[]"), ValueError, ("JSON object",)),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ValueError,
        ("no weights", "model.safetensors", ".gguf"),
    ),
    "pickles": (only_pickles, ValueError, ("no weights", "pickles", "safetensors")),
    "unknown architecture": (
        edit_config(model_type="rwkv"),
        ValueError,
        ("unknown architecture 'rwkv'", "llama", "qwen3_moe"),
    ),
    "quantized": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ValueError,
        ("quantized", "gptq"),
    ),
    "quantized, stated beside": (
        overwrite("quantize_config.json", b"{}"),
        ValueError,
        ("quantized", "quantize_config.json"),
    ),
    "unexpected tensor": (
        edit_tensors(lambda t: t.update({"model.layers.0.mlp.extra.weight": t[UP]})),
        ValueError,
        ("model.layers.0.mlp.extra.weight", "no place", "model.embed_tokens.weight"),
    ),
    "a layer too many": (rename(UP, UP.replace("1", "2")), ValueError, ("model.layers.2.mlp",)),
    "missing tensor": (edit_tensors(lambda t: t.pop(UP)), ValueError, ("lacks", UP)),
    "missing tensors": (
        edit_tensors(lambda t: [t.pop(UP), t.pop("model.norm.weight")]),
        ValueError,
        ("lacks model.norm.weight and 1 more",),
    ),
    # An encoder's file, or an unfinished one: its embedding is no head.
    "no head": (edit_tensors(lambda t: t.pop("lm_head.weight")), ValueError, ("lm_head.weight",)),
    "the same tensor twice": (
        edit_tensors(lambda t: t.update({UP.removeprefix("model."): t[UP]})),
        ValueError,
        (UP, "twice"),
    ),
    "another width": (
        edit_config(intermediate_size=80),
        ValueError,
        ("mlp.down_proj", "[64, 96]", "[64, 80]"),
    ),
    "another rank": (
        edit_tensors(lambda t: t.update({UP: t[UP][None]})),
        ValueError,
        (UP, "[1, 96, 64]", "[96, 64]"),
    ),
    "integer weights": (
        edit_tensors(lambda t: t.update({UP: t[UP].astype(np.int8)})),
        ValueError,
        (UP, "I8", "BF16"),
    ),
    "empty file": (cut(0), ValueError, ("truncated",)),
    "header cut": (cut(100), ValueError, ("truncated", "header")),
    "data cut": (cut(0.7), ValueError, ("truncated", "model.")),
    "one byte short": (
        lambda folder: cut((folder / "model.safetensors").stat().st_size - 1)(folder),
        ValueError,
        ("truncated",),
    ),
    "header is noise": (
        overwrite("model.safetensors", (40).to_bytes(8, "little") + b"?" * 40),
        ValueError,
        ("damaged safetensors header",),
    ),
    **{
        f"header row {row}": (
            overwrite("model.safetensors", len(h).to_bytes(8, "little") + h + bytes(64)),
            ValueError,
            ("damaged safetensors header",),
        )
        for row in (
            '{"dtype": "F32", "shape": [4], "data_offsets": [-4, 12]}',
            '{"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]}',
            '{"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}',
            '{"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}',
            '{"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}',
        )
        for h in [('{"lm_head.weight": ' + row + "}").encode()]
    },
    "index of numbers": (
        overwrite("model.safetensors.index.json", b'{"weight_map": {"a": 5}}'),
        ValueError,
        ("weight_map",),
    ),
    "shard missing": (
        overwrite("model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}'),
        FileNotFoundError,
        ("model-2.safetensors", "not in the folder"),
    ),
    "index without map": (
        overwrite("model.safetensors.index.json", b"{}"),
        ValueError,
        ("weight_map",),
    ),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_what_is_wrong_is_named_in_one_line(fault, tiny, write_hf, tmp_path, one_line):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    load(folder)
    damage, kind, parts = FAULTS[fault]
    damage(folder)
    with pytest.raises(kind) as error:
        load(folder)
    one_line(error.value, *parts)


def test_a_fused_tensor_of_another_size_is_named(tiny, write_hf, tmp_path, one_line):
    model = tiny("phi3")
    tensors = model.tensors()
    name = "model.layers.0.self_attn.qkv_proj.weight"
    for grown in (tensors[name][:-1], np.concatenate([tensors[name], tensors[name][:1]])):
        folder = write_hf(tmp_path / "model", model.hf, {**tensors, name: grown})
        with pytest.raises(ValueError) as error:
            load(folder)
        one_line(error.value, name, str(list(grown.shape)))


def test_a_missing_expert_is_named(tiny, write_hf, tmp_path, one_line):
    model = tiny("mixtral")
    tensors = model.tensors()
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    folder = write_hf(tmp_path / "model", model.hf, tensors)
    with pytest.raises(ValueError) as error:
        load(folder)
    one_line(error.value, "lacks model.layers.1.block_sparse_moe.experts.2.w3.weight;")
