"""Quantized folders through `load`: every shape of module, heads, configs and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import load
from jinfer.checkpoints import save
from jinfer.checkpoints.formats.awq import awq_config, write_awq
from jinfer.checkpoints.formats.bnb import bnb_config, write_bnb
from jinfer.checkpoints.formats.compressed_tensors import ct_config, write_ct
from jinfer.checkpoints.formats.fp8 import fp8_config, write_fp8
from jinfer.checkpoints.formats.gptq import gptq_config, write_gptq
from jinfer.checkpoints.formats.native import native_config, write_native
from jinfer.checkpoints.hf_files import read_safetensors_header
from jinfer.checkpoints.load import open_checkpoint
from jinfer.checkpoints.save import save_folder, write_tensors
from jinfer.config.quant_format import QFormat
from jinfer.config.static_kv import StaticKV
from jinfer.linear import qtensor
from jinfer.linear.qtensor import QTensor
from jinfer.models.model import Model

quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "scale_dtype"))
dequantize = jax.jit(qtensor.dequantize)


def quantized_tensors(tiny, fmt, write):
    """A tiny model's tensors with all linears of its layers quantized, and the QTensors."""
    tensors, weights = {}, {}
    for name, tensor in tiny.tensors().items():
        module = name.removesuffix(".weight")
        is_linear = tensor.ndim == 2 and ".layers." in name and not name.endswith("gate.weight")
        if not is_linear:
            tensors[name] = tensor
            continue
        x = quantize(jnp.asarray(tensor.T), fmt, scale_dtype=jnp.float16)
        weights[module] = x
        tensors |= {f"{module}.{leaf}": t for leaf, t in write(x).items()}
    return tensors, weights


def names_and_weights(tiny, weights):
    """The same model with its weights dequantized, under plain names."""
    plain = {
        name: t for name, t in tiny.tensors().items() if name.removesuffix(".weight") not in weights
    }
    return plain | {
        f"{m}.weight": np.ascontiguousarray(np.asarray(dequantize(x)).T) for m, x in weights.items()
    }


@pytest.mark.parametrize(
    ("family", "text", "write", "config_of"),
    [
        ("llama_with_biases", "int4-g32-asym", write_gptq, gptq_config),
        ("phi3", "int4-g32", write_gptq, gptq_config),
        ("qwen2", "int4-g32", write_awq, awq_config),
        ("gemma3_text", "int8-channel:dyn-full", write_ct, ct_config),
        ("mixtral", "int3-g32", write_ct, ct_config),
        ("qwen3_moe", "fp8-e4m3-channel:dyn", write_ct, ct_config),
    ],
)
def test_every_shape_of_module_loads(
    family, text, write, config_of, tiny, write_hf, tmp_path, linears, dense
):
    model = tiny(family)
    tensors, weights = quantized_tensors(model, QFormat.parse(text), write)
    hf = model.hf | {"quantization_config": config_of(weights)}
    folder = write_hf(tmp_path / "quantized", hf, tensors)
    plain = write_hf(tmp_path / "plain", model.hf, names_and_weights(model, weights))
    loaded, params = load(folder)
    _, expected = load(plain)
    assert {str(x.fmt) for x in linears(params)} == {text}
    flat, flat_expected = jax.tree.leaves(dense(params)), jax.tree.leaves(expected)
    for got, want in zip(flat, flat_expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    if family not in ("llama_with_biases", "mixtral"):
        return
    tokens = jnp.arange(3, 12)[None]
    got, want = (jax.jit(loaded.logits)(p, tokens) for p in (params, expected))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_zeros_as_biases_of_a_model_without_are_passed_over(
    tiny, write_hf, tmp_path, linears, one_line
):
    """AutoGPTQ wrote a bias for every linear: Qwen2's and many Llamas' GPTQ files have them."""
    model = tiny("qwen2")  # which has biases, but not all of these
    tensors, weights = quantized_tensors(model, QFormat.parse("int4-g32"), write_gptq)
    hf = model.hf | {"quantization_config": gptq_config(weights)}
    _, plain = load(write_hf(tmp_path / "plain", hf, tensors))
    biases = {f"{m}.bias": np.zeros(x.shape[1], np.float16) for m, x in weights.items()}
    folder = write_hf(tmp_path / "biased", hf, biases | tensors)
    _, params = load(folder)
    assert len(linears(params)) == len(weights)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    assert biases.keys() <= open_checkpoint(folder).plain_tensors().keys()
    biases["model.layers.1.mlp.up_proj.bias"][3] = 1
    with pytest.raises(ValueError) as error:
        load(write_hf(tmp_path / "real", hf, biases | tensors))
    one_line(error.value, "layers.1.mlp.up_proj.bias", "no place")


def test_a_quantized_head_is_not_taken_for_a_tied_one(tiny, write_hf, tmp_path):
    model = tiny("llama")
    tensors, weights = quantized_tensors(model, QFormat.parse("int4-g32"), write_gptq)
    head = quantize(
        jnp.asarray(tensors.pop("lm_head.weight").T),
        QFormat.parse("int4-g32"),
        scale_dtype=jnp.float16,
    )
    tensors |= {f"lm_head.{leaf}": t for leaf, t in write_gptq(head).items()}
    config = gptq_config(weights) | {"lm_head": True}
    folder = write_hf(tmp_path / "m", model.hf | {"quantization_config": config}, tensors)
    loaded, params = load(folder)
    assert not loaded.config.tie_word_embeddings
    assert isinstance(params["lm_head"]["w"], QTensor)
    assert np.all(np.isfinite(np.asarray(loaded.logits(params, jnp.arange(3, 9)[None]))))


def test_kv_scales_are_no_weights(tiny, write_hf, tmp_path):
    model = tiny("llama")
    tensors, weights = quantized_tensors(model, QFormat.parse("fp8-e4m3-channel:dyn"), write_ct)
    tensors["model.layers.0.self_attn.k_scale"] = np.array([0.5], np.float32)
    tensors["model.layers.1.self_attn.v_proj.output_scale"] = np.array([0.25], np.float32)
    hf = model.hf | {"quantization_config": ct_config(weights)}
    folder = write_hf(tmp_path / "m", hf, tensors)
    assert open_checkpoint(folder).kv_scales == {0: {"k": 0.5}, 1: {"v": 0.25}}
    load(folder)


@pytest.fixture
def experts(tiny):
    """A mixture of experts in 4 bits: model, params and config.json."""
    model = tiny("qwen3_moe")
    params = jax.tree.map_with_path(
        lambda path, w: quantize(jnp.asarray(w), QFormat.parse("int4-g32")) if w.ndim == 3 else w,
        model.params,
    )
    return Model(model.config), params, model.hf


def test_experts_are_cut_out_one_by_one(experts, tmp_path, monkeypatch):
    """All of them at once would be a second copy of the model."""
    model, params, hf = experts
    before, most = len(jax.live_arrays()), 0

    def write(x):
        nonlocal most
        most = max(most, len(jax.live_arrays()) - before)
        return write_native(x)

    monkeypatch.setattr(save, "SHARD_BYTES", 1)
    monkeypatch.setitem(save.EXPORTS, "native", (write, native_config))
    save.save_folder(tmp_path / "out", model, params, hf)
    assert 0 < most <= 8  # codes and scales of one expert, and the one before


def test_an_export_of_experts_is_checked_on_one_of_them(experts, monkeypatch):
    model, params, _ = experts
    written = []
    monkeypatch.setitem(
        save.EXPORTS, "native", (lambda x: written.append(x.shape) or {}, native_config)
    )
    save.check_export(model, params, "native")
    assert len(written) == 2 * 3  # layers; gate, up, down


def test_shards_are_filled_in_one_pass_over_many_tensors(tmp_path, monkeypatch):
    """Each expert is a few tensors: tens of thousands in all, whose bytes are asked for once."""
    asked = 0

    class Asked(np.ndarray):
        @property
        def nbytes(self):
            nonlocal asked
            asked += 1
            return super().nbytes

    monkeypatch.setattr(save, "SHARD_BYTES", 320)
    tensors = {f"t{i}": np.full(4, i, np.float32).view(Asked) for i in range(40)}
    write_tensors(tmp_path, iter(tensors.items()))
    assert asked <= 3 * len(tensors)  # by us and by safetensors
    sizes = sorted(len(read_safetensors_header(f)) for f in tmp_path.glob("*.safetensors"))
    assert sizes == [20, 20]  # 16 bytes each


def test_a_saved_folder_keeps_kv_scales_and_dtypes(tiny, write_hf, tmp_path):
    model = tiny("qwen2")
    fmt = QFormat.parse("fp8-e4m3-channel:dyn")
    tensors, weights = quantized_tensors(model, fmt, write_ct)
    halves = {
        name: t.astype(np.float16) if t.dtype == np.float32 and "scale" not in name else t
        for name, t in tensors.items()
    }
    folded = "model.layers.0.input_layernorm.weight"
    halves[folded] = tensors[folded]  # no f16 numbers
    scales = {0: {"k": 0.5, "v": 0.75}, 1: {"k": 1.5, "v": 0.3}}
    for layer, kinds in scales.items():
        for kind, scale in kinds.items():
            name = f"model.layers.{layer}.self_attn.{kind}_scale"
            halves[name] = np.array([scale], np.float32)
    hf = model.hf | {"quantization_config": ct_config(weights)}
    folder = write_hf(tmp_path / "m", hf | {"dtype": "float16"}, halves)
    checkpoint = open_checkpoint(folder)
    loaded, params = load(folder, dtype="float32")
    save_folder(
        tmp_path / "out",
        loaded,
        params,
        checkpoint.hf,
        export="compressed-tensors",
        dtype=checkpoint.dtype,
        extras=save.Extras(kv_scales=checkpoint.kv_scales),
    )
    saved = read_safetensors_header(tmp_path / "out" / "model.safetensors")
    saved = {name: stored.read() for name, stored in saved.items()}
    assert saved.keys() == halves.keys()
    for name, tensor in halves.items():
        assert saved[name].dtype == tensor.dtype, name
        assert saved[name].tobytes() == tensor.tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8 and config["ignore"] == ["lm_head"]
    static = open_checkpoint(tmp_path / "out").config.static_kv
    assert static == StaticKV(
        dtype="float8_e4m3fn", k=((0.5,), (1.5,)), v=((0.75,), (np.float32(0.3),)), is_default=True
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "aqlm"}, ("'aqlm'", "not supported", "compressed-tensors")),
        ({"quant_method": "gptq", "bits": 4}, ("says that it is quantized", "gptq")),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ("gemv", "supported: gemm")),
    ],
)
def test_bad_configs_are_one_line(config, words, tiny, write_hf, tmp_path, one_line):
    model = tiny("llama")
    folder = write_hf(tmp_path / "m", model.hf | {"quantization_config": config}, model.tensors())
    with pytest.raises(ValueError) as error:
        load(folder)
    one_line(error.value, str(folder), *words)


MALFORMED = {
    "a list": ([4], "must be an object"),
    "dynamic": ({"quant_method": "gptq", "bits": 4, "dynamic": 5}, "gptq quantization_config"),
    "regex": ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:*": {}}}, "nothing to repeat"),
    "groups": ({"quant_method": "compressed-tensors", "config_groups": [5]}, "malformed"),
    "targets": (
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"a": {"targets": ["re:*x"]}},
        },
        "nothing to repeat",
    ),
    "block": ({"quant_method": "fp8", "weight_block_size": 128}, "fp8 quantization_config"),
    "formats": ({"quant_method": "jinfer", "formats": {"a": 5}}, "must list its formats"),
    "none": (None, "model.layers.0.mlp.down_proj.qweight), but its config.json has no"),
}


@pytest.mark.parametrize(("config", "words"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_configs_are_one_line(config, words, tiny, write_hf, tmp_path, one_line):
    model = tiny("llama")
    tensors, _ = quantized_tensors(model, QFormat.parse("int4-g32"), write_gptq)
    folder = write_hf(tmp_path / "m", model.hf | {"quantization_config": config}, tensors)
    with pytest.raises(ValueError) as error:
        load(folder)
    one_line(error.value, str(folder), words)


@pytest.mark.parametrize(
    ("text", "write", "config_of", "leaf"),
    [
        ("fp8-e4m3-channel", write_ct, ct_config, "weight"),
        ("fp8-e4m3-tensor:dyn", write_fp8, fp8_config, "weight"),
        ("int8-channel:outlier", write_bnb, bnb_config, "weight"),
        ("nf4-g32-dq", write_bnb, bnb_config, "weight.quant_map"),
        ("nf4-g32-dq", write_bnb, bnb_config, "weight.nested_quant_map"),
        ("int3-g32", write_native, native_config, "qshape"),
        ("int4-g32", write_ct, ct_config, "weight_shape"),
    ],
)
def test_a_tensor_that_a_module_lacks_is_named(
    text, write, config_of, leaf, tiny, write_hf, tmp_path, one_line
):
    model = tiny("llama")
    tensors, weights = quantized_tensors(model, QFormat.parse(text), write)
    del tensors[f"model.layers.1.mlp.up_proj.{leaf}"]
    hf = model.hf | {"quantization_config": config_of(weights)}
    with pytest.raises(ValueError) as error:
        load(write_hf(tmp_path / "m", hf, tensors))
    one_line(error.value, "layers.1.mlp.up_proj", f"no {leaf}", str(tmp_path / "m"))


def test_a_type_that_numpy_lacks_is_named(tiny, write_hf, tmp_path, one_line):
    """MX scales, F8_E8M0, say."""
    model = tiny("llama")
    tensors, weights = quantized_tensors(model, QFormat.parse("fp8-e4m3-tensor:dyn"), write_fp8)
    for module in weights:
        tensors[f"{module}.weight_scale"] = np.zeros((1, 1), np.uint8)
    folder = write_hf(
        tmp_path / "m", model.hf | {"quantization_config": fp8_config(weights)}, tensors
    )
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].replace(b'"dtype":"U8"', b'"dtype":"F8_E8M0"')  # longer
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    with pytest.raises(ValueError) as error:
        load(folder)
    one_line(error.value, str(folder), "F8_E8M0")


def test_configs_of_old_are_found_where_they_were(tiny, write_hf, tmp_path):
    model = tiny("llama")
    tensors, weights = quantized_tensors(model, QFormat.parse("int4-g32"), write_ct)
    folder = write_hf(
        tmp_path / "ct", model.hf | {"compression_config": ct_config(weights)}, tensors
    )
    assert open_checkpoint(folder).is_quantized  # compressed-tensors before 0.6
    tensors, weights = quantized_tensors(model, QFormat.parse("int4-g32-asym"), write_awq)
    folder = write_hf(tmp_path / "awq", model.hf, tensors)
    config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(config))  # AutoAWQ's
    _, params = load(folder)
    np.testing.assert_array_equal(
        params["layers"][0]["attn"]["q"]["w"].q, weights["model.layers.0.self_attn.q_proj"].q
    )
    bare = {"quant_method": "awq", "bits": 4, "group_size": 32}  # GEMM is the default
    load(write_hf(tmp_path / "bare", model.hf | {"quantization_config": bare}, tensors))


def test_old_gptq_folders_state_their_config_beside(tiny, write_hf, tmp_path):
    model = tiny("llama")
    tensors, weights = quantized_tensors(
        model, QFormat.parse("int4-g32"), lambda x: write_gptq(x, version=1)
    )
    folder = write_hf(tmp_path / "m", model.hf, tensors)
    (folder / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "sym": True})
    )
    _, params = load(folder)
    np.testing.assert_array_equal(
        params["layers"][0]["attn"]["q"]["w"].q, weights["model.layers.0.self_attn.q_proj"].q
    )
