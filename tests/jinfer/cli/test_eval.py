"""`jinfer eval`: the command around `quant.evaluate`."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from tiny_models import make_config

import jinfer
from jinfer.cli import main as cli
from jinfer.models.model import Model

CONFIG = make_config(128, max_position_embeddings=64)


class Characters:
    """A tokenizer of one token a character."""

    def __init__(self, first="\0", merges=False):
        self.first, self.merges = first, merges

    def get_vocab(self):
        return {self.first: 0} | {chr(i): i for i in range(1, 128)}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) for c in (text.replace("th", "\1") if self.merges else text)]


@pytest.fixture
def models(monkeypatch):
    model = Model(CONFIG)
    loaded = {name: (model, model.init(jax.random.key(i))) for i, name in enumerate("ab")}
    monkeypatch.setattr(jinfer, "load", lambda name, **options: loaded[name])
    monkeypatch.setattr("jinfer.checkpoints.load.load_config", lambda name: loaded[name][0].config)
    monkeypatch.setattr("jinfer.checkpoints.tokenizer.load_tokenizer", lambda name: Characters())
    return loaded


def test_windows_are_scored_without_their_first_tokens(models, tmp_path, capsys):
    text, file = "the quick brown fox jumps over it", tmp_path / "out" / "report.json"
    (tmp_path / "text.txt").write_text(text)
    argv = ["eval", "--model", "a", "--text", str(tmp_path / "text.txt"), "--context", "10"]
    assert cli.main([*argv, "--against", "b", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    tokens = jnp.array([[ord(c) for c in text[i : i + 10]] for i in (0, 10, 20)])
    logp = jax.nn.log_softmax(models["a"][0].logits(models["a"][1], tokens))
    scored = jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)
    assert report["perplexity"] == pytest.approx(math.exp(-float(scored.mean())), rel=1e-4)
    assert (report["num_windows"], report["length"], report["num_scored"]) == (3, 10, 27)
    assert report["kl"] > 0 and 0 <= report["top1"] < 1
    assert "perplexity" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--context", "1"], "at least 2 tokens"),
        (["--context", "10", "--windows", "4"], "has 3 windows"),
        (["--context", "40"], "has 0 windows"),
        (["--context", "99"], "--context 99 exceeds the model's 64 positions"),
    ],
)
def test_bad_input_is_one_line(models, tmp_path, capsys, more, message):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over it")
    argv = ["eval", "--model", "a", "--text", str(tmp_path / "text.txt"), *more]
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "tokenizer, vocab_size, message",
    [
        (Characters("pad"), 128, "(token 0 is '\\x00' in one and 'pad' in the other)"),
        (Characters(merges=True), 128, "this text gives different tokens"),
        (Characters(), 160, "a has a vocabulary of 128 tokens and --against c of 160"),
    ],
)
def test_models_of_different_tokens_are_not_compared(
    models, monkeypatch, tmp_path, capsys, tokenizer, vocab_size, message
):
    model = Model(dataclasses.replace(CONFIG, vocab_size=vocab_size))
    models["c"] = (model, model.init(jax.random.key(0)))
    tokenizers = {"a": Characters(), "c": tokenizer}
    monkeypatch.setattr("jinfer.checkpoints.tokenizer.load_tokenizer", tokenizers.get)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over it")
    argv = ["eval", "--model", "a", "--text", str(tmp_path / "text.txt"), "--context", "10"]
    assert cli.main([*argv, "--against", "c", "--json", str(tmp_path / "report.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "--against c" in error
    assert not (tmp_path / "report.json").exists()
