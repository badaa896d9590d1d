"""A run from a checkpoint to a folder: it loads as it was saved, whole or not at all."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from tiny_models import hf_llama

from jinfer import load
from jinfer.linear.qtensor import QTensor
from jinfer.quant.pipeline import quantize_model
from jinfer.quant.recipe import Recipe, make_method, parse_quantization
from jinfer.quant.run.job import Job, run_job

TOKENS = np.random.default_rng(0).integers(0, 96, (4, 32)).astype(np.int32)
HF = hf_llama()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "float"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return types.SimpleNamespace(path=folder, dtype="float32", hf=HF)


def leaves(params):
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))


def job(tmp_path, method="rtn", fmt="int4-g32", **fields):
    recipe = Recipe.uniform(make_method(method, fmt))
    return Job(output=tmp_path / "out", recipe=recipe, label=method, **fields)


@pytest.mark.parametrize(
    ("method", "fmt"),
    [
        *(("rtn", "int3-g32-asym"), ("fp8", None), ("gptq", "int4-g32")),
        *(
            pytest.param(method, fmt, marks=pytest.mark.slow)
            for method, fmt in (
                *(("rtn", "int2-g32"), ("rtn", "int4-g32-asym"), ("rtn", "int8-channel:dyn")),
                *(("nf4", "nf4-g32"), ("hqq", "int4-g32-asymf")),
            )
        ),
    ],
)
def test_a_folder_loads_as_it_was_saved(make_model, source, tmp_path, method, fmt):
    model, params = make_model("llama")
    kept = {}

    def keep(i, rows):
        kept[i] = rows

    todo = job(tmp_path, method, fmt, tokens=TOKENS if method == "gptq" else None)
    report = run_job(todo, source, model, params, on_layer=keep)
    assert len(report.rows) == 14 and sorted(kept) == [0, 1]
    _, loaded = load(todo.output, dtype="float32")
    again = [x for x in leaves(loaded) if isinstance(x, QTensor)]
    assert len(again) == 14 and str(again[0].fmt) == report.rows[0].format
    tokens = None if todo.tokens is None else jax.numpy.asarray(TOKENS)
    expected, _ = quantize_model(model, params, todo.recipe, tokens)
    for name in ("q", "k", "v", "o"):
        a, b = (p["layers"][1]["attn"][name]["w"] for p in (loaded, expected))
        np.testing.assert_array_equal(a.codes(), b.codes())
        jax.tree.map(np.testing.assert_array_equal, (a.scale, a.zero), (b.scale, b.zero))
    assert not (tmp_path / "out.unfinished").exists()


def test_the_report_is_written_beside_and_agrees_with_the_disk(make_model, source, tmp_path):
    model, params = make_model("llama")
    todo = job(tmp_path, held_out=TOKENS, files={"tokenizer.json": b"{}"})
    report = run_job(todo, source, model, params)
    data = json.loads((todo.output / "quantization.json").read_text())
    assert data["quality"]["quantized"]["kl"] > 0 and data["quality"]["float"]["kl"] is None
    assert data["bytes_per_param"] == pytest.approx(0.5 + 2 / 32)
    assert data["disk_bytes"] == report.disk_bytes > report.quantized_bytes
    assert (todo.output / "tokenizer.json").read_bytes() == b"{}"
    assert "perplexity" in (todo.output / "quantization.md").read_text()
    assert (todo.output / "quantization.svg").read_text().startswith("<svg")


def test_a_killed_job_goes_on_from_disk_to_the_same_files(make_model, source, tmp_path):
    model, params = make_model("llama")
    todo = job(tmp_path, "gptq", tokens=TOKENS)

    def kill(i, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(todo, source, model, params, on_layer=kill)
    assert not todo.output.exists()
    seen = []
    report = run_job(todo, source, model, params, on_layer=lambda i, rows: seen.append(i))
    assert seen == [1] and len(report.rows) == 14
    resumed = (todo.output / "model.safetensors").read_bytes()
    todo.output.rename(tmp_path / "first")
    run_job(todo, source, model, params)
    assert (todo.output / "model.safetensors").read_bytes() == resumed
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        run_job(todo, source, model, params)


def test_a_killed_job_that_writes_into_the_models_folder_goes_on_too(make_model, source):
    model, params = make_model("llama")
    todo = job(source.path)

    def kill(i, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(todo, source, model, params, on_layer=kill)
    seen = []
    run_job(todo, source, model, params, on_layer=lambda i, rows: seen.append(i))
    assert seen == [1]


def test_layers_that_other_software_made_are_not_gone_on_from(make_model, source, tmp_path):
    model, params = make_model("llama")
    todo = job(tmp_path, versions={"jax": "1"})

    def kill(i, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(todo, source, model, params, on_layer=kill)
    seen = []
    newer = dataclasses.replace(todo, versions={"jax": "2"})
    run_job(newer, source, model, params, on_layer=lambda i, rows: seen.append(i))
    assert seen == [0, 1]


def test_a_format_that_cannot_hold_a_weight_names_it_and_leaves_no_folder(
    make_model, source, tmp_path
):
    model, params = make_model("llama")
    todo = job(tmp_path, "nf4", "nf4-g32", export="gptq")
    with pytest.raises(ValueError, match="nf4"):
        run_job(todo, source, model, params)
    assert not todo.output.exists() and not list(tmp_path.glob("*.writing-*"))


@pytest.mark.parametrize(
    ("name", "fmt", "options", "message"),
    [
        ("magic", None, {}, "method must be one of"),
        ("fp8", "int4-g64", {}, "fp8 does not take format int4-g64"),
        ("gptq", "int4-g64", {"best": 1}, "no options"),
        ("hqq", "int4-g64", {}, "hqq takes an asymmetric"),
        ("gptq", "int4-g64", {"order": "up"}, "order must be one of"),
        ("gptq", "int4-g64", {"scales": "best"}, "scales must be one of"),
        ("rtn", "int4-g64", {"scales": "hessian"}, "no Hessian; use mse"),
        ("hqq", None, {"scales": "mse"}, "finds its own scales"),
        ("nf4", "nf4-g64-dq", {"scales": "mse"}, "excludes double scales"),
        ("rtn", None, {"damp": 0.01}, "rtn has no use for damp, an option of gptq"),
        ("awq", None, {"order": "none"}, "awq has no use for order, an option of gptq"),
        ("gptq", None, {"alpha": 0.5}, "gptq has no use for alpha, an option of smoothquant"),
        ("smoothquant", None, {"clip": True}, "smoothquant has no use for clip, an option of awq"),
        ("gptq", None, {"damp": 0.0}, "damp must be positive, got 0.0"),
        ("gptq", None, {"damp": "much"}, "damp must be a number, got 'much'"),
        ("gptq", None, {"static_groups": "no"}, "static_groups must be true or false, got 'no'"),
        ("smoothquant", None, {"alpha": 1.5}, "alpha must lie in 0 .. 1, got 1.5"),
        ("rtn", 4, {}, "format must be a string such as int4-g64, got 4"),
    ],
)
def test_what_a_method_cannot_do_is_refused(name, fmt, options, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, fmt, **options)


def test_recipes_are_read_with_the_place_of_a_fault(tmp_path):
    path = tmp_path / "r.json"
    rules = [{"match": "layers.0.*", "method": None}, {"match": "*.down", "method": "int8"}]
    path.write_text(json.dumps({"rules": rules}))
    recipe = Recipe.read(path, make_method("rtn"))
    assert recipe.of("layers.0.attn.q") is None and recipe.of("layers.1.attn.q").name == "rtn"
    assert recipe.of("layers.1.mlp.down").name == "int8"
    path.write_text(json.dumps({"rules": [*rules, {"match": "*"}]}))
    with pytest.raises(ValueError, match="rule 3"):
        Recipe.read(path)
    for row, message in (
        ({"match": 5, "method": "rtn"}, "rule 1: match must be a pattern"),
        (
            {"match": "*", "method": None, "format": "int8-g64"},
            "rule 1: method null takes nothing else",
        ),
        ({"match": "*", "method": "gptq", "damp": "x"}, "rule 1: damp must be a number"),
        (
            {"match": "*", "metod": "rtn"},
            r"^recipe .*, rule 1: a rule needs 'method', got \['match', 'metod'\]$",
        ),
        ({"method": "rtn"}, r"rule 1: a rule needs 'match', got \['method'\]$"),
        ({"match": "*", "method": "rtn", "fmt": "int8-g64"}, "method rtn has no options"),
        ("rtn", "rule 1: a rule must be an object, got 'rtn'"),
        ([["match", "*"], ["method", "rtn"]], "rule 1: a rule must be an object"),
    ):
        path.write_text(json.dumps({"rules": [row]}))
        with pytest.raises(ValueError, match=message):
            Recipe.read(path)
    deep = "[" * 100_000
    for text in ("[]", '{"rules": 5}', '{"rules": {}}', '{"rule": []}', "{", deep, "{} " + deep):
        path.write_text(text)
        with pytest.raises(ValueError, match="must be a JSON object"):
            Recipe.read(path)


def test_a_recipe_may_give_a_method_the_solver_of_another():
    assert make_method("awq", "int4-g64-asym", solver="gptq", order="group").order == "group"


def test_only_methods_without_data_quantize_while_loading():
    assert str(parse_quantization("int4-g64:rtn").format) == "int4-g64"
    assert str(parse_quantization("int8").format) == "int8-channel:dyn"
    assert parse_quantization("fp8").format.kind == "fp8-e4m3"
    with pytest.raises(ValueError, match="needs calibration"):
        parse_quantization("int4-g64:gptq")
