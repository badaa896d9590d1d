"""The doctor finds nothing in a sound folder, and each way in which a folder can lie."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import hf_llama

from jinfer.checkpoints.load import open_checkpoint
from jinfer.checkpoints.save import save_folder
from jinfer.quant.recipe import Recipe, make_method
from jinfer.quant.run.doctor import examine
from jinfer.quant.run.job import Job, run_job

TOKENS = np.random.default_rng(0).integers(0, 96, (4, 32)).astype(np.int32)
HF = hf_llama()


@pytest.fixture
def make_folder(make_model, tmp_path):
    def make(method="rtn", fmt="int4-g32-asym", export="native"):
        model, params = make_model("llama")
        source = tmp_path / "float"
        if not source.exists():
            save_folder(source, model, params, HF, dtype="float32")
        recipe = Recipe.uniform(make_method(method, fmt))
        tokens = TOKENS if recipe.needs_calibration else None
        job = Job(
            output=tmp_path / "out", recipe=recipe, label=method, export=export, tokens=tokens
        )
        run_job(job, open_checkpoint(source), model, params)
        return job.output

    return make


def rewrite(folder: pathlib.Path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_sound_folder_is_compared_with_its_float_model(make_folder):
    diagnosis = examine(make_folder("awq"))
    assert diagnosis.problems == []
    text = "\n".join(diagnosis.facts)
    assert "14 quantized weights (14 int4-g32-asym)" in text
    assert "folding was checked" in text and "14 weights compared with" in text


def test_values_that_are_not_finite_are_named(make_folder):
    folder = make_folder()
    name = "model.layers.1.mlp.up_proj"

    def spoil(tensors):
        tensors[f"{name}.qscale"][0, 0] = np.nan
        tensors["model.norm.weight"][3] = np.inf

    rewrite(folder, spoil)
    problems = dict(examine(folder).problems)
    assert "qscale must be finite, got nan (1 of 192)" in problems[name]
    assert "1 of 64 values are NaN" in problems["model.norm.weight"]


def test_inverted_scales_are_seen_without_the_float_model(make_folder):
    folder = make_folder(fmt="int8-channel:dyn")
    name = "model.layers.0.self_attn.q_proj.qscale"
    rewrite(folder, lambda tensors: tensors.update({name: 1 / tensors[name]}))
    (folder / "quantization.json").unlink()
    ((module, problem),) = examine(folder).problems
    assert module == "model.layers.0.self_attn.q_proj" and "inverted" in problem


def test_zero_points_of_the_other_gptq_version_are_seen(make_folder):
    folder = make_folder()
    name = "model.layers.0.mlp.gate_proj.qzero"
    # v1 stores one less than v2, so that a wrong label moves all of them by one
    rewrite(folder, lambda tensors: tensors.update({name: np.clip(tensors[name] - 1, -8, 7)}))
    ((module, problem),) = examine(folder).problems
    assert module == "model.layers.0.mlp.gate_proj" and "GPTQ version" in problem


def test_a_norm_that_does_not_fit_its_weights_is_seen_beside_the_float_model(make_folder):
    folder = make_folder("awq")
    name = "model.layers.0.input_layernorm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name] * 3}))
    modules = [module for module, _ in examine(folder).problems]
    assert modules == ["layers.0.attn.k", "layers.0.attn.q"]


def test_a_feature_that_the_norm_takes_out_is_no_problem(make_folder, tmp_path):
    folder = make_folder()

    def take_out(tensors):
        tensors["model.layers.0.input_layernorm.weight"][3] = 0

    rewrite(tmp_path / "float", take_out)
    rewrite(folder, take_out)
    assert examine(folder).problems == []


def test_a_truncated_folder_and_a_float_one_are_refused(make_folder, tmp_path):
    folder = make_folder()
    with pytest.raises(ValueError, match="is not a quantized folder"):
        examine(tmp_path / "float")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="truncated"):
        examine(folder)
