"""`jinfer convert`: round trips byte for byte, refusals by name, nothing half written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.checkpoints import save
from jinfer.checkpoints.formats.compressed_tensors import ct_config, write_ct
from jinfer.checkpoints.formats.gptq import gptq_config, write_gptq
from jinfer.checkpoints.hf_files import read_safetensors_header, safetensors_files
from jinfer.checkpoints.load import open_checkpoint
from jinfer.cli.main import main
from jinfer.config.quant_format import QFormat
from jinfer.linear import qtensor

quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "scale_dtype"))


def all_tensors(folder):
    found = {}
    for file in safetensors_files(folder):
        found |= {name: t.read() for name, t in read_safetensors_header(file).items()}
    return found


def assert_same_tensors(a, b, but=()):
    one, other = all_tensors(a), all_tensors(b)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        if not name.endswith(but or ("\0",)):
            assert tensor.tobytes() == other[name].tobytes(), name


def convert(source, export, output):
    argv = ["convert", "--model", source, "--export", export, "--output", output]
    return main([*map(str, argv), "--debug"])


@pytest.fixture
def make(tiny, write_hf, tmp_path):
    """Folders of a tiny model: bf16 floats, f16 scales, a KV scale, a layer left in float."""

    def build(text, write=write_gptq, config_of=gptq_config, perm=None):
        model, tensors, weights = tiny("llama_with_biases"), {}, {}
        for name, tensor in model.tensors().items():
            module = name.removesuffix(".weight")
            if tensor.ndim < 2 or ".layers." not in name or "layers.1.self_attn.o" in name:
                tensors[name] = tensor.astype(jnp.bfloat16)
                continue
            scale_dtype = jnp.float32 if ":" in text else jnp.float16
            x = quantize(jnp.asarray(tensor.T), QFormat.parse(text), scale_dtype=scale_dtype)
            if perm is not None:
                order = np.random.default_rng(0).permutation(x.shape[0])
                x = qtensor.QTensor(x.q, x.scale, x.zero, perm=jnp.asarray(order), fmt=x.fmt)
            weights[module] = x
            tensors |= {f"{module}.{leaf}": t for leaf, t in write(x).items()}
        tensors["model.layers.0.self_attn.k_scale"] = np.array([0.5], np.float32)
        hf = model.hf | {"quantization_config": config_of(weights), "dtype": "bfloat16"}
        folder = write_hf(tmp_path / "source", hf, tensors, num_shards=2)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return build


@pytest.mark.parametrize("text", ["int4-g32-asym", "int4-channel"])
def test_gptq_awq_and_compressed_tensors_go_round_byte_for_byte(text, make, tmp_path):
    source = make(text)
    for before, after in (("source", "awq"), ("awq", "compressed-tensors"), ("ct", "gptq")):
        name = {"compressed-tensors": "ct"}.get(after, after)
        assert convert(tmp_path / before, after, tmp_path / name) == 0
    assert_same_tensors(source, tmp_path / "gptq")
    assert open_checkpoint(tmp_path / "ct").kv_scales == {0: {"k": 0.5}}
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    quantization = config["quantization_config"]
    assert "model.layers.1.self_attn.o_proj" in quantization["ignore"]
    assert quantization["kv_cache_scheme"] is not None
    assert (tmp_path / "gptq" / "tokenizer.json").read_text() == "{}"


def test_quantized_inputs_survive_by_way_of_our_own_files(make, tmp_path):
    source = make("int8-channel:dyn", write_ct, ct_config)
    convert(source, "native", tmp_path / "native")
    convert(tmp_path / "native", "compressed-tensors", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")


@pytest.mark.parametrize(
    ("text", "perm", "export", "words"),
    [
        ("int4-g32", True, "awq", "layers.0.mlp.down_proj: AWQ has no g_idx"),
        ("int4-g32", True, "compressed-tensors", "has no g_idx any more"),
        ("int3-g32", None, "awq", "AWQ holds integers of 4 bits, got int3-g32"),
        ("int4-g32", None, "bitsandbytes", "bitsandbytes holds int8-channel, nf4 and fp4"),
        ("int4-g32", None, "fp8", "an fp8 file holds"),
    ],
)
def test_what_the_target_cannot_hold_is_refused_by_name(text, perm, export, words, make, tmp_path):
    source = make(text, perm=perm)
    with pytest.raises(ValueError, match=words):
        convert(source, export, tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.name != "source"]


def test_a_writer_that_loses_something_is_caught_before_the_folder_is_there(
    make, tmp_path, monkeypatch
):
    source = make("int4-g32-asym")

    def careless(x):
        out = write_ct(x)
        out["weight_scale"] = out["weight_scale"] * np.float16(1.01)
        return out

    monkeypatch.setitem(save.EXPORTS, "compressed-tensors", (careless, ct_config))
    with pytest.raises(
        ValueError, match=r"down_proj: .* cannot hold int4-g32-asym .* scales change"
    ):
        convert(source, "compressed-tensors", tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.name != "source"]


def test_float_folders_are_sent_to_quantize(tiny, write_hf, tmp_path, capsys):
    model = tiny("llama")
    source = write_hf(tmp_path / "m", model.hf, model.tensors())
    argv = ["convert", "--model", str(source), "--export", "gptq", "--output", str(tmp_path / "o")]
    assert main(argv) == 2
    assert "is not quantized; `jinfer quantize` makes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("gptq-v2-w4-asym-g64", ("compressed-tensors", "awq", "gptq")),
        ("gptq-v1-w3-sym-g64", ("compressed-tensors", "gptq")),
        ("gptq-v1-w4-sym-g128", ("awq", "compressed-tensors", "gptq")),
        ("gptq-v1-w8-sym-g128", ("compressed-tensors", "native", "gptq")),
        ("awq-gptqmodel-gemm-g64-qwen2", ("gptq", "compressed-tensors", "awq")),
        ("ct-w4a16-sym-g128", ("gptq", "awq", "compressed-tensors")),
        ("ct-w3a16-sym-g64", ("gptq", "compressed-tensors")),
        ("ct-w8a8-int8-smoothquant", ("native", "compressed-tensors")),
        ("ct-fp8-dynamic", ("native", "compressed-tensors")),
        ("bnb-nf4", ("native", "bitsandbytes")),
    ],
)
@pytest.mark.thorough
def test_files_of_other_libraries_come_back_byte_for_byte(name, chain, shared_data, tmp_path):
    source = folder = shared_data / "quantized" / name
    for i, export in enumerate(chain):
        convert(folder, export, tmp_path / str(i))
        folder = tmp_path / str(i)
    # We write zero points as version 2 has them; bitsandbytes is to compute in f32.
    but = {"gptq-v1": ("qzeros",), "bnb-nf4": ("__nf4",)}.get(name[:7], ())
    assert_same_tensors(source, folder, but)
