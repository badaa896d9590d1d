"""The experts of one layer in mixed forms: the model is that of each expert decoded by itself."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import load
from jinfer.checkpoints.convert import convert_folder
from jinfer.checkpoints.formats.awq import awq_config, write_awq
from jinfer.checkpoints.formats.bnb import bnb_config, write_bnb
from jinfer.checkpoints.formats.compressed_tensors import ct_config, write_ct
from jinfer.checkpoints.formats.expert_stack import common_format
from jinfer.checkpoints.formats.fp8 import fp8_config, write_fp8
from jinfer.checkpoints.formats.gptq import gptq_config, write_gptq
from jinfer.checkpoints.formats.native import native_config, write_native
from jinfer.checkpoints.load import open_checkpoint
from jinfer.checkpoints.save import save_folder
from jinfer.config.quant_format import QFormat
from jinfer.linear import qtensor
from jinfer.linear.placement import widen_on_cpu
from jinfer.linear.qtensor import QTensor
from jinfer.models.model import Model
from jinfer.quant.methods.rtn import with_static_inputs
from jinfer.quant.run.doctor import examine
from jinfer.quant.run.job import check_source

quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "scale_dtype"))
dequantize = jax.jit(qtensor.dequantize)
TOKENS = jnp.arange(3, 12)[None]
SIZES = {"num_hidden_layers": 1, "intermediate_size": 64}
WRITERS = {
    "ct": (write_ct, ct_config),
    "bnb": (write_bnb, lambda weights: bnb_config({"": next(iter(weights.values()))})),
    "gptq": (write_gptq, gptq_config),
    "awq": (write_awq, awq_config),
    "fp8": (write_fp8, lambda weights: fp8_config({"": next(iter(weights.values()))})),
    "native": (write_native, native_config),
}
FLOAT, INT4, ASYM = "float", "int4-g32", "int4-g32-asym"
FP8, BLOCKS = "fp8-e4m3-channel", "fp8-e4m3-block128:dyn"
# Reader, the forms of experts 0 to 3, and the one form that holds them all; None: held in float.
CASES = {
    "ct fp8, a float one first": ("ct", (FLOAT, FP8, FP8, FP8), None),
    "ct fp8, a float one last": ("ct", (FP8, FP8, FP8, FLOAT), None),
    "ct fp8 with quantized inputs": ("ct", (FP8 + ":dyn", FLOAT, FP8 + ":dyn", FLOAT), None),
    "ct fp8 with static inputs": ("ct", ("fp8-e4m3-tensor:static", FLOAT) * 2, None),
    "ct int8, a float one first": ("ct", (FLOAT, *["int8-channel:dyn-full"] * 3), None),
    "ct packed, a float one first": ("ct", (FLOAT, INT4, INT4, INT4), None),
    "ct packed, bits": ("ct", ("int3-g32", INT4, "int8-g32", INT4), "int8-g32"),
    "ct packed, groups": ("ct", (INT4, "int4-g16", "int4-channel", INT4), "int4-g16"),
    "ct packed, groups that do not nest": ("ct", (INT4, "int4-g24", INT4, INT4), None),
    "ct packed, zero points": ("ct", (INT4, ASYM, INT4, ASYM), ASYM),
    "ct, two kinds of codes": ("ct", (INT4, FP8, INT4, FP8), None),
    "ct, one with quantized inputs": ("ct", ("int8-channel", "int8-channel:dyn") * 2, None),
    "bnb int8, a float one first": ("bnb", (FLOAT, *["int8-channel:outlier"] * 3), None),
    "bnb int8, a float one last": ("bnb", (*["int8-channel:outlier"] * 3, FLOAT), None),
    "bnb nf4, a float one first": ("bnb", (FLOAT, *["nf4-g32-dq"] * 3), None),
    "bnb fp4, a float one last": ("bnb", (*["fp4-g32"] * 3, FLOAT), None),
    "bnb nf4 and fp4": ("bnb", ("nf4-g32", "fp4-g32") * 2, None),
    "bnb double and plain scales": (
        "bnb",
        ("nf4-g32-dq", "nf4-g64", "nf4-g32", "nf4-g64"),
        "nf4-g32",
    ),
    "gptq, a float one first": ("gptq", (FLOAT, INT4, INT4, INT4), None),
    "gptq, a float one last": ("gptq", (INT4, INT4, INT4, FLOAT), None),
    "gptq, bits and zero points": ("gptq", ("int2-g32", ASYM, "int8-g32", INT4), "int8-g32-asym"),
    "gptq, groups": ("gptq", ("int4-channel", "int4-g16-asym", INT4, INT4), "int4-g16-asym"),
    "gptq, orders": ("gptq", (INT4, INT4 + " ordered", INT4, ASYM + " ordered"), ASYM),
    "gptq, uneven groups": ("gptq", (INT4, INT4 + " uneven", INT4, INT4), None),
    "awq, a float one first": ("awq", (FLOAT, ASYM, ASYM, ASYM), None),
    "awq, zero points": ("awq", (ASYM, INT4, INT4, INT4), ASYM),
    "fp8, a float one first": ("fp8", (FLOAT, *["fp8-e4m3-tensor:dyn"] * 3), None),
    "fp8, tensors and blocks": ("fp8", ("fp8-e4m3-tensor:dyn", "fp8-e4m3-block128:dyn") * 2, None),
    "native, a float one first": ("native", (FLOAT, "int3-g32", "int3-g32", "int3-g32"), None),
    "native, all kinds": ("native", ("int5-g32", "nf4-g32", FP8, "int4-g32-asymf"), None),
    "native, tensor and channel": ("native", ("fp8-e4m3-tensor", FP8) * 2, FP8),
    "native, float zero points": ("native", ("int4-g32-asymf", INT4, INT4, INT4), "int4-g32-asymf"),
}


def make_weight(w, form):
    """A QTensor of [I, O] in a form of `CASES`."""
    text, _, order = form.partition(" ")
    fmt = QFormat.parse(text)
    plain = dataclasses.replace(fmt, act=None) if fmt.act == "static" else fmt
    x = quantize(jnp.asarray(w), plain, scale_dtype=jnp.float16 if fmt.act is None else jnp.float32)
    if fmt.act == "static":
        x = with_static_inputs(x, 4.0)
    if order == "ordered":
        perm = np.random.default_rng(0).permutation(x.shape[0])
        x = dataclasses.replace(x, perm=jnp.asarray(perm, jnp.int32))
    return x


def write_module(write, x, form):
    """A module's tensors, and what they decode to, [O, I]."""
    leaves, values = write(x), np.asarray(dequantize(x)).T
    if form.endswith("uneven"):
        g_idx = leaves["g_idx"].copy()
        g_idx[0] = 1 - g_idx[0]  # 31 and 33 inputs
        codes = np.asarray(x.codes(), np.float32)
        values = (codes * np.asarray(x.scale, np.float32)[g_idx]).T
        leaves["g_idx"] = g_idx
    return leaves, np.ascontiguousarray(values)


@pytest.fixture
def mixed(tiny, write_hf, tmp_path):
    """Writes a Mixtral with experts in the forms of a case, and the same model decoded."""

    def make(reader, forms, **sizes):
        model = tiny("mixtral", **SIZES, **sizes)
        write, config_of = WRITERS[reader]
        tensors, plain, weights = {}, {}, {}
        for name, tensor in model.tensors().items():
            tensors[name] = plain[name] = tensor
            if ".experts." not in name:
                continue
            module = name.removesuffix(".weight")
            form = forms[int(module.split(".")[-2]) % len(forms)]
            if form != FLOAT:
                weights[module] = make_weight(tensor.T, form)
                del tensors[name]
                leaves, plain[name] = write_module(write, weights[module], form)
                tensors |= {f"{module}.{leaf}": t for leaf, t in leaves.items()}
        config = config_of(weights)
        hf = model.hf | {"quantization_config": config}
        return (
            write_hf(tmp_path / "mixed", hf, tensors),
            write_hf(tmp_path / "plain", model.hf, plain),
        )

    return make


@functools.cache
def logits_of(config):
    return jax.jit(Model(config).logits)


def assert_same_model(params, expected, dense):
    for got, want in zip(jax.tree.leaves(dense(params)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("reader", "forms", "held"), CASES.values(), ids=CASES)
def test_experts_in_mixed_forms_are_those_decoded_one_by_one(
    reader, forms, held, mixed, dense, caplog
):
    folder, plain = mixed(reader, forms)
    with caplog.at_level(logging.WARNING):
        model, params = load(folder)
    _, expected = load(plain)
    assert_same_model(params, expected, dense)
    logits = logits_of(model.config)
    np.testing.assert_allclose(
        logits(widen_on_cpu(params), TOKENS), logits(expected, TOKENS), atol=1e-4
    )
    stacks = [params["layers"][0]["mlp"][part]["w"] for part in ("gate", "up", "down")]
    found = {str(w.fmt) if isinstance(w, QTensor) else None for w in stacks}
    assert found == {held}
    is_told = "3 stacks, the first layers.0.mlp." in caplog.text
    assert is_told == (held is None)


OF_EACH_KIND = (  # of `CASES`: held quantized and in float
    *("ct packed, bits", "bnb nf4, a float one first"),
    *("gptq, orders", "fp8, tensors and blocks", "native, all kinds"),
)


@pytest.mark.parametrize(
    "case", ["gptq, uneven groups", "ct fp8 with static inputs", "gptq, bits and zero points"]
)
def test_the_doctor_calls_mixed_experts_sound_and_tells_what_is_held_in_float(case, mixed):
    reader, forms, held = CASES[case]
    diagnosis = examine(*mixed(reader, forms))
    assert diagnosis.problems == []
    facts = "\n".join(diagnosis.facts)
    assert ("3 stacks of experts have no quantized form in common" in facts) == (held is None)
    assert "19 weights compared" in facts or "16 weights compared" in facts


@pytest.mark.parametrize("case", OF_EACH_KIND)
def test_mixed_experts_are_converted_and_saved_as_they_are(case, mixed, dense, tmp_path):
    reader, forms, _ = CASES[case]
    folder, plain = mixed(reader, forms)
    model, params = load(folder)
    convert_folder(open_checkpoint(folder), tmp_path / "native", "native")
    _, again = load(tmp_path / "native")
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    saved = tmp_path / "saved"
    save_folder(saved, model, params, open_checkpoint(folder).hf, dtype="float32")
    assert_same_model(load(saved)[1], load(plain)[1], dense)


FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
PARTS = {part: ("self_attn", "attn") for part in "qkvo"}
PARTS |= {part: ("mlp", "mlp") for part in ("gate", "up", "down")}
# The linears of a block in forms of their own, in both spellings of what a family fuses.
PROJECTIONS = {
    "llama, split": ("llama", "native", {"q": INT4, "v": FP8, "gate": "nf4-g32", "down": ASYM}),
    "llama, fused": ("llama", "ct", {"qkv": "int8-channel", "o": INT4, "gate_up": FP8}),
    "phi3, split": ("phi3", "gptq", {"k": INT4, "v": "int8-g32", "up": ASYM}),
    "phi3, fused": ("phi3", "ct", {"qkv": INT4, "down": "fp8-e4m3-tensor"}),
    "cuts through blocks": ("phi3", "fp8", dict.fromkeys(("qkv", "gate_up"), BLOCKS)),
}


@pytest.mark.parametrize(("family", "reader", "forms"), PROJECTIONS.values(), ids=PROJECTIONS)
def test_projections_in_mixed_forms_are_those_decoded_one_by_one(
    family, reader, forms, tiny, write_hf, tmp_path, dense
):
    model = tiny(family, num_hidden_layers=1)
    write, config_of = WRITERS[reader]
    flat = {path[2:]: w for path, w in model.flat.items() if path[0] == "layers"}
    tensors = {n: t for n, t in model.tensors().items() if "proj" not in n}
    plain, weights = dict(tensors), {}
    joined = {part for name in forms for part in FUSED.get(name, ())}
    for name in [*FUSED.keys() & forms.keys(), *(PARTS.keys() - joined)]:
        parts = FUSED.get(name, (name,))
        block, owner = PARTS[parts[0]]
        module = f"model.layers.0.{block}.{name}_proj"
        w = np.concatenate([flat[owner, part, "w"] for part in parts], axis=1)
        plain[f"{module}.weight"] = np.ascontiguousarray(w.T)
        if name not in forms:
            tensors[f"{module}.weight"] = plain[f"{module}.weight"]
            continue
        weights[module] = make_weight(w, forms[name])
        leaves, plain[f"{module}.weight"] = write_module(write, weights[module], forms[name])
        tensors |= {f"{module}.{leaf}": t for leaf, t in leaves.items()}
    hf = model.hf | {"quantization_config": config_of(weights)}
    loaded, params = load(write_hf(tmp_path / "mixed", hf, tensors))
    _, expected = load(write_hf(tmp_path / "plain", model.hf, plain))
    assert_same_model(params, expected, dense)
    assert examine(tmp_path / "mixed", tmp_path / "plain").problems == []
    if (family, reader) == ("phi3", "gptq"):  # its files join k and v, and gate and up
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.qkv_proj is one tensor"):
            save_folder(tmp_path / "out", loaded, params, model.hf)


def test_parts_of_two_formats_are_not_joined(tiny, tmp_path):
    model = tiny("phi3", num_hidden_layers=1)
    params = model.params
    for part, form in (("gate", INT4), ("up", "int8-g32")):
        params["layers"][0]["mlp"][part]["w"] = make_weight(
            model.flat["layers", 0, "mlp", part, "w"], form
        )
    with pytest.raises(ValueError, match=r"mlp\.gate_up_proj .* int4-g32, int8-g32"):
        save_folder(tmp_path / "out", Model(model.config), params, model.hf)


def test_stacks_brought_into_one_form_are_multiplied_as_such(mixed):
    folder, plain = mixed("gptq", ("int2-g32", "int4-g16-asym ordered", "int8-channel", INT4))
    model, params = load(folder)
    assert isinstance(params["layers"][0]["mlp"]["up"]["w"], QTensor)
    logits = logits_of(model.config)
    np.testing.assert_allclose(logits(params, TOKENS), logits(load(plain)[1], TOKENS), atol=1e-4)


def test_experts_stored_quantized_are_not_quantized_again(mixed, one_line):
    folder, _ = mixed("ct", (FLOAT, FP8, FP8, FP8))
    with pytest.raises(ValueError) as error:
        load(folder, quantization="int4-g32:rtn")
    one_line(error.value, str(folder), "layers.0.mlp.", "leave quantization out")
    with pytest.raises(ValueError) as error:
        check_source(open_checkpoint(folder))
    one_line(error.value, str(folder), "experts.1.w1", "quantized already")


def test_the_doctor_sees_one_wrong_expert_of_many(mixed, tiny, write_hf, tmp_path):
    """Its share of the error of all of them is small."""
    folder, plain = mixed("ct", (INT4,), num_local_experts=16)
    assert examine(folder, plain).problems == []
    model = tiny("mixtral", **SIZES, num_local_experts=16)
    tensors = model.tensors()
    name = "model.layers.0.block_sparse_moe.experts.5.w2.weight"
    tensors[name] = tensors[name][::-1].copy()
    other = write_hf(tmp_path / "other", model.hf, tensors)
    ((module, problem),) = examine(folder, other).problems
    assert module == "layers.0.mlp.down, expert 5" and "differs from its float" in problem


def test_the_doctor_refuses_what_does_not_load(mixed, one_line):
    from safetensors.numpy import load_file, save_file

    folder, _ = mixed("ct", (INT4, FLOAT, INT4, INT4))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        examine(folder)
    one_line(error.value, str(folder), "lacks", "experts.1.w3")


@pytest.mark.parametrize("reader", ["ct", "ct packed", "gptq", "awq", "bnb", "native"])
def test_floats_in_the_place_of_codes_are_refused_by_name(reader, mixed, one_line):
    """An expert left in float beside scales that remained of another try."""
    from safetensors.numpy import load_file, save_file

    text = {"ct": "int8-channel:dyn", "bnb": "nf4-g32"}.get(reader, INT4)
    leaf = {"ct": "weight", "ct packed": "weight_packed", "bnb": "weight", "native": "qcodes"}
    folder, _ = mixed(reader.split()[0], (text,))
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.block_sparse_moe.experts.2.w1.{leaf.get(reader, 'qweight')}"
    shape = (64, 64) if reader == "bnb" else tensors[name].shape
    tensors[name] = np.full(shape, 0.25, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(folder)
    one_line(error.value, "layers.0.block_sparse_moe.experts.2.w1")


def test_formats_have_one_in_common_or_none():
    def common(*texts):
        found = common_format([QFormat.parse(t) for t in texts], 128)
        return None if found is None else str(found)

    assert common("int4-g128", "int4-channel") == "int4-channel"  # one group either way
    assert common("int4-g256", "int4-g64") == "int4-g64"
    assert common("int4-tensor", "int4-tensor") == "int4-tensor"
    assert common("int4-tensor", "int5-channel-asym") == "int5-channel-asym"
    assert common("int4-g48", "int4-g32") is None
    assert common("int8-channel:dyn", "int8-channel:dyn-full") is None
    assert common("int4-g32-asym", "int4-g32-asymf") is None
    assert common("fp8-e4m3-block128", "fp8-e4m3-channel") is None
    assert common_format([None, QFormat()], 128) is None
