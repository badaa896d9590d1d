"""Scales that no weight or input can have are refused by module and leaf, in every format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jinfer.checkpoints.formats.detect import READERS, QuantizedModules
from jinfer.checkpoints.save import EXPORTS
from jinfer.config.quant_format import QFormat
from jinfer.linear import qtensor
from jinfer.quant.methods.rtn import with_static_inputs
from jinfer.quant.run.doctor import examine

quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "scale_dtype"))
P = "model.layers.0.self_attn.q_proj"
NAN, INF = float("nan"), float("inf")
# Negative scales that files have: AutoRound's. Zero ones: groups of zeros, or underflow in f16.
WEIGHT, MAGNITUDE, INPUT = (NAN, INF, -INF), (NAN, INF, -0.5), (NAN, INF, -0.5, 0.0)
STATIC = "fp8-e4m3-tensor:static"
CASES = {
    ("gptq", "int4-g32", "scales"): WEIGHT,
    ("awq", "int4-g32-asym", "scales"): WEIGHT,
    ("compressed-tensors", "int4-g32", "weight_scale"): WEIGHT,
    ("compressed-tensors", "int8-channel:dyn", "weight_scale"): WEIGHT,
    ("compressed-tensors", "int8-channel:static", "input_scale"): INPUT,
    ("compressed-tensors", "fp8-e4m3-channel:dyn", "weight_scale"): (*MAGNITUDE, 0.0),
    ("compressed-tensors", STATIC, "input_scale"): INPUT,
    ("fp8", STATIC, "weight_scale"): (*MAGNITUDE, 0.0),
    ("fp8", STATIC, "input_scale"): INPUT,
    ("fp8", "fp8-e4m3-block128:dyn", "weight_scale_inv"): (*MAGNITUDE, 0.0),
    ("bitsandbytes", "int8-channel:dyn", "SCB"): MAGNITUDE,
    ("bitsandbytes", "nf4-g64", "weight.absmax"): MAGNITUDE,
    ("bitsandbytes", "nf4-g64", "weight.quant_map"): WEIGHT,
    ("bitsandbytes", "nf4-g64-dq", "weight.nested_absmax"): MAGNITUDE,
    ("bitsandbytes", "nf4-g64-dq", "weight.nested_quant_map"): WEIGHT,
    ("jinfer", "int4-g32-asymf", "qscale"): WEIGHT,
    ("jinfer", "int4-g32-asymf", "qzero"): WEIGHT,
    ("jinfer", "nf4-g64-dq", "qscale_absmax"): MAGNITUDE,
    ("jinfer", "nf4-g64-dq", "qscale_offset"): WEIGHT,
    ("jinfer", STATIC, "act_scale"): INPUT,
}


def module_of(method, text):
    """The config and the tensors of one module."""
    is_static = text.endswith(":static")
    w = jnp.asarray(np.random.default_rng(0).normal(size=(128, 128)) / 16, jnp.float32)
    scale_dtype = jnp.float16 if method in ("gptq", "awq") else jnp.float32
    x = quantize(w, QFormat.parse(text.removesuffix(":static")), scale_dtype=scale_dtype)
    if is_static:
        x = with_static_inputs(x, 3.0)
    write, config_of = EXPORTS["native" if method == "jinfer" else method]
    return config_of({P: x}), write(x)


def read(config, tensors):
    names = {f"{P}.{leaf}": tensor for leaf, tensor in tensors.items()}
    return QuantizedModules(config, names, names.__getitem__, "here").read(f"{P}.weight")


def spoil(tensors, leaf, value):
    spoilt = np.array(tensors[leaf])
    spoilt.reshape(-1)[-1] = value
    return tensors | {leaf: spoilt}


def test_all_readers_name_the_scales_of_their_formats():
    assert {method for method, _, _ in CASES} == READERS.keys()


@pytest.mark.parametrize(("method", "text", "leaf"), CASES)
def test_scales_that_cannot_be_are_refused_by_name(method, text, leaf):
    config, tensors = module_of(method, text)
    read(config, tensors)
    for value in CASES[method, text, leaf]:
        with pytest.raises(ValueError, match=f"^here: {P}: ") as error:
            read(config, spoil(tensors, leaf, value))
        assert leaf in str(error.value) or "a scale of fp8 is 0" in str(error.value)
        assert "\n" not in str(error.value)
    if CASES[method, text, leaf] == WEIGHT and leaf in ("scales", "weight_scale", "qscale"):
        for value in (-0.5, 0.0):
            read(config, spoil(tensors, leaf, value))


@pytest.mark.parametrize(
    ("method", "leaf"),
    [("compressed-tensors", "input_scale"), ("fp8", "input_scale"), ("jinfer", "act_scale")],
)
def test_static_inputs_without_their_scale_name_the_module(method, leaf):
    config, tensors = module_of(method, STATIC)
    del tensors[leaf]
    with pytest.raises(ValueError, match=f"^here: {P}: .*(input_scale|act_scale)"):
        read(config, tensors)


def test_a_block_of_zeros_may_have_a_scale_of_zero():
    config, tensors = module_of("fp8", "fp8-e4m3-block128:dyn")
    tensors = {"weight": np.zeros_like(tensors["weight"])} | {
        "weight_scale_inv": np.zeros_like(tensors["weight_scale_inv"])
    }
    assert not np.any(qtensor.dequantize(read(config, tensors)))


def test_the_check_of_a_folder_finds_bad_scales_and_goes_on(tiny, write_hf, tmp_path):
    model = tiny("llama")
    tensors, weights = {}, {}
    for name, tensor in model.tensors().items():
        module = name.removesuffix(".weight")
        if tensor.ndim != 2 or ".layers." not in name:
            tensors[name] = tensor
            continue
        x = quantize(jnp.asarray(tensor.T), QFormat.parse("fp8-e4m3-tensor"))
        weights[module] = with_static_inputs(x, 2.0)
        written = EXPORTS["compressed-tensors"][0](weights[module])
        tensors |= {f"{module}.{leaf}": t for leaf, t in written.items()}
    config = EXPORTS["compressed-tensors"][1](weights)
    folder = write_hf(tmp_path / "m", model.hf | {"quantization_config": config}, tensors)
    assert examine(folder).problems == []
    bad = dict(zip(weights, (NAN, 0.0, -1.0)))
    tensors |= {f"{m}.input_scale": np.array([v], np.float32) for m, v in bad.items()}
    save_file(tensors, folder / "model.safetensors")
    problems = examine(folder).problems
    assert {module for module, _ in problems} == bad.keys()
    assert all(text.startswith("input_scale must be positive and finite") for _, text in problems)


def test_the_check_finds_scales_of_zero_over_codes_that_are_not(tmp_path, write_hf, tiny):
    model = tiny("llama")
    tensors = model.tensors()
    w = jnp.asarray(tensors.pop(f"{P}.weight").T)
    x = quantize(w.at[:32, 0].set(0), QFormat.parse("int4-g32"), scale_dtype=jnp.float16)
    written = EXPORTS["gptq"][0](x)
    config = EXPORTS["gptq"][1]({P: x})
    written["scales"] = scales = np.array(written["scales"])
    scales[0, 0] = 0  # of zeros: sound
    tensors |= {f"{P}.{leaf}": t for leaf, t in written.items()}
    folder = write_hf(tmp_path / "m", model.hf | {"quantization_config": config}, tensors)
    assert examine(folder).problems == []
    scales[0, 1] = 0
    save_file(tensors, folder / "model.safetensors")
    ((module, problem),) = examine(folder).problems
    assert module == P and "codes are not zero, but their scales are" in problem
