"""`jinfer train-medusa` from end to end on a tiny random model."""

import gzip
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jinfer
from jinfer.checkpoints import tokenizer
from jinfer.cli import main as cli
from jinfer.cli import training as commands_training
from jinfer.config.model import ModelConfig
from jinfer.models.model import Model
from jinfer.speculation import medusa
from jinfer.training import loop as training
from jinfer.training import medusa as medusa_training

VOCAB = 61
MODEL = Model(
    ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        eos_token_ids=(7,),
    )
)
SMALL = ("--window", 24, "--batch-size", 2, "--steps", 4, "--num-heads", 2, "--tree-nodes", 5)
SMALL += ("--checkpoint-every", 2, "--max-texts", 4, "--max-tokens", 60)
FILES = ("heads.safetensors", "medusa.json")


@pytest.fixture(scope="module")
def loaded():
    return MODEL, MODEL.init(jax.random.key(0))


@pytest.fixture(autouse=True)
def tiny_model(loaded, monkeypatch):
    """Puts a tiny model, and a token a letter, in the place of whatever would be loaded."""
    letters = types.SimpleNamespace(
        bos_token_id=1, eos_token_id=7, encode=lambda text: [ord(c) % VOCAB for c in text]
    )
    monkeypatch.setattr(jinfer, "load", lambda *args, **options: loaded)
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda *args, **options: letters)


def train(*argv):
    return cli.main(["train-medusa", "--model", "tiny", *map(str, argv)])


def test_heads_from_texts_that_the_model_writes_and_a_second_run_does_nothing(
    tmp_path, capsys, monkeypatch
):
    assert train("--output", tmp_path, *SMALL) == 0
    report = capsys.readouterr().out
    config, heads, tree = medusa.load(tmp_path, MODEL.config)
    assert config.num_heads == heads["w"].shape[0] == 2 and 1 <= len(tree) <= 5
    assert config.shared_unembedding  # of a model as small as this
    assert config.reads_root and heads["u"].shape == (2, 24, 24) and heads["u"].any()
    assert "top-1" in report and f"tree of {len(tree)} guesses" in report

    def refuse(*args, **options):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(training, "train_step", refuse)
    monkeypatch.setattr(jinfer.LLM, "step", refuse)
    assert train("--output", tmp_path, *SMALL) == 0
    assert capsys.readouterr().out == report
    assert train("--output", tmp_path, *SMALL, "--seed", 3) == 2
    error = capsys.readouterr().err
    assert "{'seed': '0'}" in error and "{'seed': '3'}" in error


def cut_after(count, owner, name, monkeypatch, made=len):
    """Has a function die once its results made so many; returns those."""
    function, done = getattr(owner, name), []

    def call_or_die(*args):
        if made(done) >= count:
            raise OSError("the machine is gone")
        done.append(function(*args))
        return done[-1]

    monkeypatch.setattr(owner, name, call_or_die)
    return done


def num_texts(steps):
    return sum(output.finished for outputs in steps for output in outputs)


@pytest.mark.thorough
def test_the_same_command_makes_the_same_bytes(tmp_path, capsys, monkeypatch):
    argv = (*SMALL, "--draft-vocab-size", 9, "--temperature", 0, "--num-heads", 3)
    argv += ("--max-num-seqs", 2)
    # a cut in the midst of the texts, and of a line
    with monkeypatch.context() as patch:
        cut_after(2, jinfer.LLM, "step", patch, num_texts)
        assert train("--output", tmp_path / "a", *argv) != 0
    answers = tmp_path / "a" / "answers.jsonl"
    first, *others = filter(None, answers.read_text().splitlines())
    assert others
    answers.write_text(answers.read_text()[:-3])
    # and one among the hidden states
    for most, num_made in ((2, 2), (9, 1)):
        with monkeypatch.context() as patch:
            made = cut_after(most, medusa_training, "_hidden_states", patch)
            assert (train("--output", tmp_path / "a", *argv) == 0) == (most == 9)
            assert len(made) == num_made
    capsys.readouterr()
    for name in ("a", "b"):
        assert train("--output", tmp_path / name, *argv) == 0
        report = capsys.readouterr().out
        assert "% of the held-out tokens are in the draft vocabulary" in report
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    _, heads, _ = medusa.load(tmp_path / "a", MODEL.config)
    assert heads["tokens"].shape == (9,)
    assert answers.read_text().splitlines().count(first) == 1  # not written again
    # a cut after the data were made, and after a checkpoint
    (tmp_path / "a" / FILES[1]).unlink()
    (tmp_path / "a" / "hidden.npz").unlink()
    (tmp_path / "a" / "checkpoints" / "4").rename(tmp_path / "gone")
    assert train("--output", tmp_path / "a", *argv) == 0
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_texts_are_learnt_as_they_are_and_other_lines_are_refused(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "abcdefgh" * 6}) + "\n" for _ in range(8)))
    assert train("--output", tmp_path / "a", "--data", data, *SMALL, "--no-reads-root") == 0
    config, heads, _ = medusa.load(tmp_path / "a", MODEL.config)
    assert not config.reads_root and "u" not in heads
    data.write_text(json.dumps({"question": "why?"}) + "\n")
    assert train("--output", tmp_path / "b", "--data", data, *SMALL) == 2
    assert "line 1: it must have" in capsys.readouterr().err


def test_a_mistake_in_data_is_named_and_leaves_no_folder_behind(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    assert train("--output", tmp_path / "a", "--data", data, *SMALL) == 1
    assert f"{data}: No such file" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    for row, message in (
        (b"{", "line 2: not JSON"),
        (b"5", 'line 2: it must have "text" or a prompt, got int'),
        (b'{"text": 5}', 'line 2: "text" cannot be int'),
        (b'{"text": "caf\xff"}', "line 2: not UTF-8"),
    ):
        data.write_bytes(b'{"text": "abc"}\n' + row)
        assert train("--output", tmp_path / "b", "--data", data, *SMALL) == 2
        assert f"{data} {message}" in capsys.readouterr().err


def test_separators_that_json_allows_in_a_string_do_not_cut_a_line(tmp_path):
    data = tmp_path / "data.jsonl"
    text = "abc\u2028defgh\x85" * 6
    row = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    data.write_text(row * 8)
    assert train("--output", tmp_path / "a", "--data", data, *SMALL) == 0


def read_texts(tmp_path, lines):
    """The texts of a JSONL file, which no model has to answer."""
    args = types.SimpleNamespace(data=tmp_path / "lines.jsonl", max_texts=9)
    args.data.write_text(lines, encoding="utf-8")
    letters = tokenizer.load_tokenizer("tiny")
    return list(
        commands_training._texts(args, types.SimpleNamespace(get_tokenizer=lambda: letters))
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_packed_data_is_read_and_other_encodings_are_refused(tmp_path, name):
    letters = tokenizer.load_tokenizer("tiny")
    llm = types.SimpleNamespace(get_tokenizer=lambda: letters)
    text = '{"text": "abc"}\n' if name == "a.jsonl" else "abc"
    found = []
    for file, content in ((name, text.encode()), (f"{name}.gz", gzip.compress(text.encode()))):
        (tmp_path / file).write_bytes(content)
        args = types.SimpleNamespace(data=tmp_path / file, max_texts=9)
        found.append(list(commands_training._texts(args, llm)))
    assert found[0] == found[1] == [(letters.encode("abc"), 0)]
    for file, content in ((name, text.encode("utf-16")), (f"{name}.gz", b"no gzip \xff")):
        (tmp_path / file).write_bytes(content)
        args = types.SimpleNamespace(data=tmp_path / file, max_texts=9)
        with pytest.raises(ValueError, match=r"UTF-8|not JSON"):
            list(commands_training._texts(args, llm))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ('["text"]', "must have .* got list"),
        ('{"text": ["a"]}', '"text" cannot be list'),
        ('{"prompt_token_ids": "a"}', '"prompt_token_ids" cannot be str'),
        ('{"prompt_token_ids": [0.5]}', "text or token ids"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_in_the_file(tmp_path, line, message):
    with pytest.raises(ValueError, match=f"lines.jsonl line 3: .*{message}"):
        read_texts(tmp_path, '{"text": "abc"}\n\n' + line + "\n")


def test_a_prompt_that_is_too_long_is_named_by_its_line(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "abc"}\n\n' + json.dumps({"prompt_token_ids": [1] * 64}) + "\n")
    assert train("--output", tmp_path / "out", "--data", data, *SMALL) == 2
    assert "data.jsonl line 3: the prompt has 64 tokens" in capsys.readouterr().err


def test_answers_to_other_prompts_are_not_taken(tmp_path, capsys):
    """The file has its old name and new lines."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"question": 1}\n')
    for _ in range(2):  # the second run is the same as the first
        assert train("--output", out, "--data", data, *SMALL) == 2
        assert "must have" in capsys.readouterr().err
    (out / "answers.jsonl").touch()
    data.write_text('{"question": 2}\n')
    assert train("--output", out, "--data", data, *SMALL) == 2
    assert "holds a run with {'data_sha256': " in capsys.readouterr().err
    run = json.loads((out / "run.json").read_text())
    del run["data_sha256"]  # as of a version that did not look
    (out / "run.json").write_text(json.dumps(run))
    assert train("--output", out, "--data", data, *SMALL) == 2
    assert "must have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--learning-rate", "inf", "learning_rate must lie in 0..1e6, got inf"),
        ("--learning-rate", "nan", "learning_rate must lie in 0..1e6, got nan"),
        ("--learning-rate", 0, "learning_rate must be positive"),
        ("--weight-decay", -1, "weight_decay must lie in 0..1e6, got -1.0"),
        ("--seed", -1, "seed must lie in [0, 2**63), got -1"),
        ("--temperature", "nan", "temperature must be a number, got NaN"),
    ],
)
def test_settings_that_no_run_has_make_no_folder(tmp_path, capsys, flag, value, message):
    out = tmp_path / "out"
    assert train("--output", out, *SMALL, f"{flag}={value}") == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_a_loss_that_is_not_finite_ends_the_training():
    def objective(params, weights, batch):
        loss = jnp.where(weights[0] < 1, jnp.nan, weights.sum())
        return loss, loss[None]

    config = training.TrainingConfig(num_steps=4, batch_size=2, learning_rate=0.5, warmup=0)
    with pytest.raises(ValueError, match=r"loss at step 2 is \[nan\]: lower the learning rate"):
        training.train(objective, (), jnp.ones(2), [np.ones((4, 1), np.float32)], config)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--tree-nodes", 64, "--tree-nodes must be 1 to 63, got 64"),
        ("--tree-nodes", 0, "--tree-nodes: expected an integer in 1..2**31-1, got '0'"),
        ("--steps", 0, "--steps: expected an integer in 1..2**31-1, got '0'"),
        ("--window", 0, "--window: expected an integer in 1..2**31-1, got '0'"),
    ],
)
def test_what_no_heads_can_be_made_with_is_refused_before_any_work(
    tmp_path, capsys, monkeypatch, flag, value, message
):
    monkeypatch.setattr(jinfer, "load", None)
    try:
        status = train("--output", tmp_path, flag, value)
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and message in capsys.readouterr().err
