"""`jinfer quantize` on a tiny folder: what it prints, and bad input: one line, nothing written."""

import argparse
import contextlib
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import hf_llama, make_model

from jinfer.checkpoints.files import writing
from jinfer.checkpoints.gguf.write import write_gguf
from jinfer.checkpoints.save import save_folder
from jinfer.cli import main as cli
from jinfer.cli.quantize import sequences

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
    monkeypatch.setattr(
        "jinfer.checkpoints.tokenizer.load_tokenizer", lambda *_, **__: Characters()
    )
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
        ("--target-bits and --recipe exclude each other",),
    ),
    "no text": (
        ("--method", "rtn", "--held-out", "0", "--length", "32"),
        ("has no effect: --method rtn with --held-out 0 reads no text",),
    ),
    "too long": (("--length", "65"), ("--length 65 exceeds the model's 64 positions",)),
    "self, too long": (
        ("--calibration", "self", "--length", "20000"),
        ("--length 20000 exceeds the model's 64 positions",),
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
        (None, "gptq", ("embed: weight holds 1 NaN or infinite",)),
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


@pytest.mark.parametrize("calibration", ["self", "numbers.txt"])
def test_methods_are_judged_on_the_same_held_out_texts(params, quantize, tmp_path, calibration):
    (tmp_path / "numbers.txt").write_text(" ".join(str(i) for i in range(1000)))
    source = "self" if calibration == "self" else tmp_path / calibration
    args = argparse.Namespace(model="m", revision=None, calibration=source, length=16, seed=3)
    args.held_out = 3
    judged, calibrated = [], []
    for args.num_sequences, calibrates in ((8, False), (8, True), (40, True), (8, True)):
        tokens, held_out = sequences(args, MODEL, params, calibrates)
        assert (tokens is not None) == calibrates and held_out.shape == (3, 16)
        judged.append(held_out)
        if calibrates:
            calibrated.append(tokens)
    for held_out in judged[1:]:
        np.testing.assert_array_equal(held_out, judged[0])
    assert [len(tokens) for tokens in calibrated] == [8, 40, 8]
    np.testing.assert_array_equal(calibrated[0], calibrated[2])
    rows = {tuple(row) for row in calibrated[1].tolist()}
    assert not rows & {tuple(row) for row in judged[0].tolist()}


def test_a_run_without_a_terminal_logs_each_layer_and_that_it_goes_on(
    params, quantize, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise RuntimeError("cut")

    with monkeypatch.context() as patch:
        patch.setattr("jinfer.quant.run.job.save_folder", fail)
        status, _, err = quantize(params, "--method", "rtn", "--format", "int4-g32")
    assert status == 1 and "jinfer: quantizing: layer 1 of 1, " in err and "left them" not in err
    status, _, err = quantize(params, "--method", "rtn", "--format", "int4-g32")
    assert status == 0
    left = tmp_path / "out.unfinished"
    assert f"jinfer: 1 of 1 layers were done by an earlier run, in {left}\n" in err


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """Lets writes beyond a size fail, as they do on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_takes_no_more_is_named_with_what_is_left(params, quantize, tmp_path):
    rtn = ("--method", "rtn", "--format", "int4-g32")
    quantize(params, "--method", "awq", "--format", "int8-channel:dyn")  # writes the source
    for num_bytes, parts in {
        100: ("out.unfinished/key.json: File too large; nothing is left",),
        4000: ("out.unfinished: File too large; 0 finished layers are kept there: run the same",),
        40_000: ("out: File too large; nothing of it is left",),
    }.items():
        with files_of_at_most(num_bytes):
            status, _, err = quantize(params, *rtn)
        last = err.splitlines()[-1]
        assert status == 1 and last.startswith(f"jinfer: error: {tmp_path}"), err
        assert all(part in last for part in parts), err
        left = [f.name for f in tmp_path.iterdir() if f.name.startswith("out")]
        assert left == (["out.unfinished"] if num_bytes > 100 else [])
    file = tmp_path / "out.gguf"
    with files_of_at_most(40_000), pytest.raises(OSError, match="nothing of it is left") as error:
        write_gguf(file, MODEL, params)
    assert error.value.filename == str(file) and not list(tmp_path.glob("out.gguf*"))


@pytest.mark.parametrize("command", ["convert", "eval", "train-draft", "train-medusa"])
def test_no_command_takes_sequences_beyond_the_models_positions(
    params, quantize, tmp_path, command, capsys
):
    save_folder(tmp_path / "m", MODEL, params, HF, dtype="float32")
    text = tmp_path / "long.txt"
    argv = {
        "convert": ["--export", "gguf", "--type", "Q8_0", "--calibration", text, "--length", 65],
        "eval": ["--text", text, "--context", 65],
        "train-draft": ["--data", text, "--window", 65, "--num-layers", 1],
        "train-medusa": ["--data", text, "--window", 65],
    }[command]
    if command != "eval":
        argv = [*argv, "--output", tmp_path / "out"]
    assert cli.main([command, "--model", str(tmp_path / "m"), *map(str, argv)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "65 exceeds the model's 64 positions" in err
    assert not (tmp_path / "out").exists()


def test_errors_that_name_a_file_or_no_disk_pass_unchanged(tmp_path):
    for error in (ValueError("x"), FileNotFoundError(2, "No such file", "a"), BrokenPipeError()):
        with pytest.raises(type(error)) as raised, writing(tmp_path, left="nothing"):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_a_default_length_is_one_that_the_model_has(params, tmp_path, monkeypatch, command):
    """The defaults, 512 and 1024, are more than this model's 64 positions."""
    monkeypatch.setattr(
        "jinfer.checkpoints.tokenizer.load_tokenizer", lambda *_, **__: Characters()
    )
    save_folder(tmp_path / "m", MODEL, params, HF, dtype="float32")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 20)
    argv = {
        "quantize": ["--method", "rtn", "--format", "int4-g32", "--held-out", 1],
        "eval": ["--text", text],
    }[command]
    if command == "quantize":
        argv = [*argv, "--calibration", text, "--output", tmp_path / "out"]
    assert cli.main([command, "--model", str(tmp_path / "m"), *map(str, argv)]) == 0
