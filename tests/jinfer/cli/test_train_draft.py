"""Draft models: what they learn of their target, and `jinfer train-draft` from end to end."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

import jinfer
from jinfer import LLM, SamplingParams
from jinfer.checkpoints import tokenizer
from jinfer.checkpoints.families import config_from_hf
from jinfer.checkpoints.save import save_folder
from jinfer.cli import main as cli
from jinfer.models.model import Model
from jinfer.training import draft as draft_training
from jinfer.training import loop as training

VOCAB = 61
HF = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}
TARGET = Model(config_from_hf(HF))
DRAFT = Model(config_from_hf({**HF, "num_hidden_layers": 1}))


@pytest.fixture(scope="module")
def params():
    """A target whose layers matter and whose distributions are not flat."""
    params = TARGET.init(jax.random.key(0))
    return {**params, "embed": {"w": 4.0 * params["embed"]["w"]}}


def test_a_draft_learns_what_its_target_says(params):
    rng = np.random.default_rng(0)
    tokens, spans = training.windows(
        [(t, 0) for t in rng.integers(0, VOCAB, (24, 20)).tolist()], 20
    )
    start = draft_training.init(params, DRAFT.config)
    losses = []
    config = training.TrainingConfig(num_steps=60, batch_size=8, learning_rate=1e-2)
    trained = training.train(
        draft_training.Distillation(TARGET, DRAFT, draft_training.most_places(spans)),
        *(params, start, (tokens, spans), config),
        on_step=lambda _, each: losses.append(float(each[0])),
    )
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    before, after = (
        draft_training.agreement(TARGET, DRAFT, params, weights, tokens, spans)
        for weights in (start, trained)
    )
    assert all(a > b + 0.03 for a, b in zip(after, before))


def test_a_draft_of_16_bit_weights_learns_in_small_steps(params):
    """Of a norm's scale near 1 such a step is less than half the last of 8 bits."""
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    tokens, spans = training.windows([(list(range(20)), 0)] * 4, 20)
    start = draft_training.init(half, DRAFT.config)
    trained = training.train(
        draft_training.Distillation(TARGET, DRAFT, draft_training.most_places(spans)),
        *(half, start, (tokens, spans)),
        training.TrainingConfig(num_steps=4, batch_size=4, learning_rate=1e-3),
    )
    before, after = (np.asarray(x["final_norm"]["scale"], np.float32) for x in (start, trained))
    assert 0.0 < np.max(np.abs(after - before)) < 0.01


def test_a_target_that_drafts_for_itself_is_always_right(params):
    tokens, spans = training.windows([(list(range(20)), 4), ([3, 4, 5], 0)], 20)
    weights = {"layers": params["layers"], "final_norm": params["final_norm"]}
    rates = draft_training.agreement(TARGET, TARGET, params, weights, tokens, spans)
    assert rates == pytest.approx((1.0, 1.0), abs=1e-5)
    objective = draft_training.Distillation(TARGET, TARGET, draft_training.most_places(spans))
    loss, _ = jax.jit(objective)(params, weights, tokens, spans)
    assert float(loss) == pytest.approx(0.0, abs=1e-5)


def test_the_loss_is_that_of_the_places_from_before_the_first_token_to_learn(params):
    """Against all logits of each text, one by one, of unequal lengths."""
    texts = [(list(range(20)), 4), ([3, 4, 5, 6], 0), (list(range(30, 12, -1)), 17)]
    tokens, spans = training.windows(texts, 20)
    assert draft_training.most_places(spans) == 17
    weights = draft_training.init(params, DRAFT.config)
    each = []
    for text, (first, end) in zip(tokens, spans.tolist(), strict=True):
        log_p, log_q = (
            np.asarray(jax.nn.log_softmax(model.logits({**params, **part}, text[None, :end])))[0]
            for model, part in ((TARGET, {}), (DRAFT, weights))
        )
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        each += kl[max(first - 1, 0) :].tolist()
    for most in (17, 20):
        objective = draft_training.Distillation(TARGET, DRAFT, most)
        loss, _ = jax.jit(objective)(params, weights, tokens, spans)
        assert float(loss) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("num_layers", [3, 4])
def test_a_draft_must_have_fewer_layers(params, num_layers):
    config = dataclasses.replace(
        TARGET.config, num_layers=num_layers, layer_types=TARGET.config.layer_types[:1] * num_layers
    )
    with pytest.raises(ValueError, match=f"{num_layers} layers for one of 3: give 1 to 2"):
        draft_training.init(params, config)


@pytest.mark.slow
def test_the_command_makes_a_model_that_drafts(params, tmp_path, monkeypatch, capsys):
    letters = types.SimpleNamespace(
        bos_token_id=1, eos_token_id=7, encode=lambda text: [ord(c) % VOCAB for c in text]
    )
    letters.get_vocab = lambda: {str(i): i for i in range(VOCAB)}
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda *args, **options: letters)
    monkeypatch.setattr(tokenizer, "tokenizer_files", lambda *args: {"tokenizer.json": "{}"})
    save_folder(tmp_path / "target", TARGET, params, HF, dtype="float32")
    argv = ["--model", tmp_path / "target", "--output", tmp_path / "out", "--num-layers", 2]
    (tmp_path / "text.txt").write_text("a text to learn from " * 12)
    argv += ["--window", 24, "--steps", 4, "--data", tmp_path / "text.txt"]
    for _ in range(2):  # the second run has nothing left to do
        assert cli.main(["train-draft", *map(str, argv)]) == 0
        assert "tokens per step expected" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0.0 < report["greedy"] <= 1.0 and 0.0 < report["sampled"] <= 1.0
    config = {"method": "draft", "model": str(tmp_path / "out" / "model"), "adaptive": False}
    llm = LLM(tmp_path / "target", speculative_config=config)
    plain = LLM(tmp_path / "target")
    greedy = SamplingParams(temperature=0, max_tokens=20, detokenize=False)
    prompts = [{"prompt_token_ids": [1, 2, 3]}]
    texts = [x.generate(prompts, greedy, use_tqdm=False)[0].outputs[0] for x in (llm, plain)]
    assert texts[0].token_ids == texts[1].token_ids
    assert llm.get_metrics()["num_drafted_tokens"] > 0
    draft, _ = jinfer.load(tmp_path / "out" / "model")
    assert draft.config.num_layers == 2
