"""KV scales of a checkpoint: found under all names, used or said not to be, kept by convert."""

import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import load
from jinfer.checkpoints.formats.kv_scales import kv_scale_of
from jinfer.checkpoints.hf_files import read_safetensors_header
from jinfer.checkpoints.load import open_checkpoint
from jinfer.checkpoints.save import EXPORTS
from jinfer.cli.main import main
from jinfer.config.quant_format import QFormat
from jinfer.config.static_kv import StaticKV
from jinfer.linear import qtensor

quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "scale_dtype"))
P = "model.layers.0.mlp.up_proj"
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
HEADS = FP8 | {"strategy": "attn_head", "observer": "mse", "observer_kwargs": {"grid": 20}}
INT8 = FP8 | {"type": "int"}


def tensor_scales(kinds="kv", shape=(1,), at="model.layers.{i}.self_attn.{kind}_scale"):
    rng = np.random.default_rng(0)
    return {
        at.format(i=i, kind=kind): rng.uniform(0.01, 0.1, shape).astype(np.float32)
        for i in range(2)
        for kind in kinds
    }


@pytest.fixture
def make(tiny, write_hf, tmp_path):
    """A folder with one quantized linear, or none, and KV scales."""

    def build(scheme, scales, export="gptq"):
        model = tiny("llama")
        tensors = model.tensors()
        config = {"quant_method": "compressed-tensors", "config_groups": {}}
        if export is not None:
            w = jnp.asarray(tensors.pop(f"{P}.weight").T)
            x = quantize(w, QFormat.parse("int4-g32"), scale_dtype=jnp.float16)
            write, config_of = EXPORTS[export]
            tensors |= {f"{P}.{leaf}": t for leaf, t in write(x).items()}
            config = config_of({P: x})
        hf = model.hf | {"quantization_config": config | {"kv_cache_scheme": scheme}}
        return write_hf(tmp_path / "m", hf, tensors | scales)

    return build


@pytest.mark.parametrize("scheme", [FP8, HEADS, INT8, FP8 | {"num_bits": 4}, "static"])
def test_convert_keeps_the_scheme_and_all_scales(scheme, make, tmp_path):
    shape = (2, 1, 1) if scheme == HEADS else (1,)
    scales = tensor_scales(shape=shape)
    source = folder = make(scheme, scales)
    for export in ("compressed-tensors", "native", "awq", "gptq"):
        output = tmp_path / export
        argv = ["convert", "--model", folder, "--export", export, "--output", output]
        assert main([*map(str, argv), "--debug"]) == 0
        folder = output
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config["kv_cache_scheme"] == scheme
        stored = read_safetensors_header(folder / "model.safetensors")
        for name, scale in scales.items():
            assert np.array_equal(stored[name].read(), scale) and stored[name].shape == shape
        assert open_checkpoint(folder).config == open_checkpoint(source).config


def test_scales_without_a_scheme_get_that_of_their_shape_from_convert(make, tmp_path):
    source = make(None, tensor_scales(shape=(2, 1, 1)))
    argv = ["convert", "--model", source, "--export", "compressed-tensors"]
    assert main([*map(str, argv), "--output", str(tmp_path / "out"), "--debug"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == "attn_head"


def test_gguf_refuses_them_unless_it_rounds(make, tmp_path):
    source = make(FP8, tensor_scales())
    argv = ["convert", "--model", str(source), "--export", "gguf", "--output", str(tmp_path / "o")]
    with pytest.raises(ValueError, match="cannot hold the KV cache scales"):
        main([*argv, "--debug"])


@pytest.mark.parametrize(
    ("scheme", "dtype", "is_default"),
    [
        (FP8, "float8_e4m3fn", True),
        (HEADS, "float8_e4m3fn", True),
        (INT8, "int8", True),
        ("static", "float8_e4m3fn", True),
        (None, "float8_e4m3fn", False),
    ],
)
def test_what_a_pool_can_use_is_in_the_config(scheme, dtype, is_default, make, caplog):
    scales = tensor_scales(shape=(2, 1, 1) if scheme == HEADS else (1,))
    static = open_checkpoint(make(scheme, scales)).config.static_kv
    k, v = (
        tuple(
            tuple(scales[f"model.layers.{i}.self_attn.{kind}_scale"].ravel().tolist())
            for i in range(2)
        )
        for kind in "kv"
    )
    assert static == StaticKV(dtype=dtype, k=k, v=v, is_default=is_default)
    assert not caplog.records


@pytest.mark.parametrize(
    ("scheme", "scales", "words"),
    [
        (FP8 | {"num_bits": 4}, tensor_scales(), "num_bits 4"),
        (FP8 | {"symmetric": False}, tensor_scales(), "symmetric False"),
        (FP8 | {"dynamic": True}, {}, "dynamic True"),
        (FP8 | {"strategy": "channel"}, tensor_scales(), "strategy 'channel'"),
        ("dynamic", {}, "'dynamic'"),
        (FP8, {}, "none for k of layer 0"),
        (FP8, tensor_scales("k"), "none for v of layer 0"),
        (FP8, tensor_scales(shape=(3,)), r"layer 0 has \[3\] for k, expected one or 2"),
        (
            FP8,
            tensor_scales("qkv"),
            "come with q_scale, which is not supported",
        ),
        (
            FP8,
            tensor_scales() | {"model.layers.0.self_attn.k_zero_point": np.array([3], np.int8)},
            "k_zero_point",
        ),
    ],
)
def test_one_line_says_what_is_not_used(scheme, scales, words, make, caplog):
    with caplog.at_level(logging.WARNING):
        model, _ = load(make(scheme, scales))
    assert model.config.static_kv is None
    (record,) = caplog.records
    text = record.getMessage()
    assert "its scales of a KV cache are not used: " in text and "\n" not in text
    assert re.search(words, text)


def test_a_checkpoint_with_a_kv_scheme_alone_loads(make, tiny):
    folder = make(FP8, tensor_scales(), export=None)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.is_quantized and checkpoint.config.static_kv is not None
    _, params = load(folder)
    want = tiny("llama").params["layers"][0]["mlp"]["up"]["w"]
    np.testing.assert_array_equal(params["layers"][0]["mlp"]["up"]["w"], want)


@pytest.mark.parametrize("export", ["gptq", None])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_kv_scale_that_cannot_be_is_refused_by_name(value, export, make):
    scales = tensor_scales()
    scales["model.layers.1.self_attn.v_scale"][0] = value
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn: v_scale must be positive"):
        open_checkpoint(make(FP8, scales, export))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.self_attn.k_scale", (3, "k")),
        ("language_model.model.layers.3.self_attn.attn.v_scale", (3, "v")),
        ("model.layers.3.self_attn.kv_scale", (3, "kv")),
        ("model.layers.3.self_attn.k_proj.k_scale", (3, "k")),
        ("model.layers.3.self_attn.qkv_proj.v_scale", (3, "v")),
        ("model.layers.12.self_attn.v_proj.output_scale", (12, "v")),
        ("model.layers.3.self_attn.q_scale", (3, "q_scale")),
        ("model.layers.3.self_attn.v_zero_point", (3, "v_zero_point")),
        ("model.layers.3.self_attn.k_proj.weight_scale", None),
        ("model.layers.3.self_attn.k_proj.input_scale", None),
        ("model.layers.3.self_attn.k_norm.weight", None),
        ("vision_tower.layers.3.self_attn.k_scale", None),
    ],
)
def test_names_of_kv_scales(name, found):
    assert kv_scale_of(name) == found


def test_one_scale_for_both_is_taken_for_each(make):
    scales = tensor_scales(("kv",))
    static = open_checkpoint(make("static", scales)).config.static_kv
    assert static is not None and static.k == static.v
    assert static.k == tuple((float(x[0]),) for x in scales.values())
