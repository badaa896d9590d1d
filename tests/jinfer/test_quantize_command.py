"""`jinfer quantize` on a tiny folder: what it prints, and bad input: one line, nothing written."""

import json

import jax
import jax.numpy as jnp
import pytest
from tiny_models import hf_llama, make_model

from jinfer import cli
from jinfer.weights.save import save_folder

MODEL = make_model(
    128, num_layers=1, hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=64
)
HF = hf_llama(vocab_size=128, num_hidden_layers=1, max_position_embeddings=64)


class Characters:
    """A tokenizer of one token a character."""

    def encode(self, text, add_special_tokens):
        return [ord(c) for c in text]

    def save_pretrained(self, folder):
        pass


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture
def quantize(tmp_path, monkeypatch, capsys):
    """Runs the command on params; returns status, standard output and standard error."""
    monkeypatch.setattr("jinfer.tokenizer.load_tokenizer", lambda *_, **__: Characters())
    (tmp_path / "long.txt").write_text("the quick brown fox " * 100)
    (tmp_path / "empty.txt").write_text(" \n")

    def run(params, *argv, calibration="long.txt"):
        source = tmp_path / "m"
        if not source.exists():
            save_folder(source, MODEL, params, HF, dtype="float32")
        command = ["quantize", "--model", source, "--output", tmp_path / "out"]
        command += ["--calibration", tmp_path / calibration, "--num-sequences", 4, "--length", 16]
        try:
            status = cli.main([str(arg) for arg in (*command, "--held-out", 1, *argv)])
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return run


def is_refused(result, folder, *parts):
    """Checks for one line on standard error that holds the parts, and no trace of an output."""
    status, _, err = result
    assert status in (1, 2) and err.count("\n") == 1 and err.startswith("jinfer: error: "), err
    assert all(part in err for part in parts), err
    assert not [f.name for f in folder.iterdir() if f.name.startswith("out")]


@pytest.mark.slow
def test_target_bits_choose_a_recipe_that_the_report_holds(params, quantize, tmp_path):
    status, out, err = quantize(
        params, "--method", "rtn", "--target-bits", 5, "--format", "int4-g32"
    )
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert 4.5 < report["bytes_per_param"] * 8 <= 5
    chosen = {m: c["format"] for c in report["choices"] for m in c["modules"]}
    assert chosen == {row["match"]: row["format"] for row in report["rules"]}
    assert chosen == {row["module"]: row["format"] for row in report["rows"]}
    assert len(set(chosen.values())) > 1
    assert "KL of them alone" in (tmp_path / "out" / "quantization.md").read_text()
    assert "rtn int4-g32 at 5 bits" in out + err


def test_resident_and_disk_bytes_of_a_quantized_parameter_are_printed(params, quantize, tmp_path):
    status, out, err = quantize(params, "--method", "rtn", "--format", "int4-g32")
    assert status == 0, err
    printed = out + err
    assert "0.562 bytes a quantized parameter resident (4.50 bits)" in printed
    assert ", 0.566 on disk, " in printed and " bytes on disk in all" in printed
    report = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert 0.5625 <= report["disk_bytes_per_param"] < 0.57  # a few bytes tell the format


REFUSED = {
    "group zero": (("--format", "int4-g0"), ("format 'int4-g0' is not understood",)),
    "method and format": (("--method", "awq", "--format", "int8-channel:dyn"), ("awq takes",)),
    "mixed export": (
        ("--target-bits", "5", "--export", "gptq"),
        ("o_proj: GPTQ holds", "int5-g64"),
    ),
    "short last groups in AWQ": (  # 64 and 96 inputs
        ("--method", "awq", "--format", "int4-g48-asym", "--export", "awq"),
        (
            "q_proj: AWQ's readers",
            "48 does not divide 64",
            "groups of 16, 32, a whole channel work",
        ),
    ),
    "group too long": (("--format", "int4-g1000"), ("a group of 1000 inputs", "at most 96")),
    "target too low": (("--target-bits", "3"), ("must lie in 3.27..8.27", "got 3")),
    "target and recipe": (
        ("--target-bits", "5", "--recipe", "r.json"),
        ("--target-bits makes a recipe",),
    ),
}


@pytest.mark.parametrize(("argv", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(
    params, quantize, tmp_path, argv, parts
):
    is_refused(quantize(params, *argv), tmp_path, *parts)


def test_calibration_that_is_empty_or_too_short_is_refused(params, quantize, tmp_path):
    is_refused(quantize(params, calibration="empty.txt"), tmp_path, "empty.txt holds no text")
    result = quantize(params, "--num-sequences", 400)
    is_refused(result, tmp_path, "wants 401 sequences of 16 tokens, the text has 2002 tokens")
    is_refused(quantize(params, calibration="none.txt"), tmp_path, "none.txt")


@pytest.mark.parametrize(
    ("path", "method", "parts"),
    [
        (("attn", "o"), "rtn", ("layers.0.attn.o: weight holds 1 NaN or infinite",)),
        (("attn", "v"), "gptq", ("layers.0.attn.v: weight holds 1 NaN or infinite",)),
        (None, "gptq", ("inputs of layers.0.attn.q hold NaN or infinity", "activations")),
    ],
)
def test_values_that_are_not_finite_are_named(params, quantize, tmp_path, path, method, parts):
    spoilt = jax.tree.map(lambda a: a, params)
    place = spoilt["embed"] if path is None else spoilt["layers"][0][path[0]][path[1]]
    place["w"] = place["w"].at[ord("q") if path is None else 0, 0].set(jnp.nan)
    is_refused(quantize(spoilt, "--method", method, "--format", "int4-g32"), tmp_path, *parts)


def test_a_truncated_and_a_mislabelled_checkpoint_are_refused(params, quantize, tmp_path):
    source = tmp_path / "m"
    save_folder(source, MODEL, params, HF, dtype="float32")
    config = json.loads((source / "config.json").read_text())
    label = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": label}))
    is_refused(quantize(params), tmp_path, "method gptq", "none of its tensors")
    (source / "config.json").write_text(json.dumps(config))
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    is_refused(quantize(params), tmp_path, "truncated")
