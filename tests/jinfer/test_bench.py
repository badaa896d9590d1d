"""The benches at toy sizes: that they measure what they say and write the common form."""

import json

import jax
import pytest

import jinfer
from jinfer import cli
from jinfer.config import ModelConfig
from jinfer.models.model import Model

FIELDS = {"case", "metric", "unit", "value", "peer", "peer_value", "ratio", "goal", "limit", "own"}


@pytest.fixture
def tiny_model(monkeypatch):
    """Puts a tiny random model in the place of whatever `jinfer.load` would load."""
    config = ModelConfig(
        family="llama",
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    model = Model(config)
    loaded = model, model.init(jax.random.key(0))
    monkeypatch.setattr(jinfer, "load", lambda *args, **options: loaded)
    monkeypatch.setattr(jinfer.LLM, "warmup", lambda llm: 0.0)  # compile what is used only
    return loaded


def bench(tmp_path, *argv):
    file = tmp_path / "out.json"
    assert cli.main(["bench", *map(str, argv), "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert {"device", "versions", "command", "date", "rows"} <= set(report)
    assert all(set(row) == FIELDS for row in report["rows"])
    return {(row["case"], row["metric"]): row for row in report["rows"]}


def test_the_tree_bench_fills_looks_up_and_evicts(tmp_path):
    rows = bench(tmp_path, "prefix", "--case", "tree", "--tree-pages", 1000)
    assert {metric for _, metric in rows} == {"lookup_us_per_page", "evict_us_per_page"}
    assert all(row["value"] > 0 and row["limit"] == 50 for row in rows.values())


def test_the_prefix_bench_counts_the_prompt_tokens_that_were_computed(tmp_path, tiny_model):
    argv = ("--requests", 6, "--system-tokens", 150, "--own-tokens", 10, "--cold-tokens", 40)
    argv += ("--output-tokens", 4, "--cold-repeats", 1, "--max-num-seqs", 2)
    argv += ("--max-num-batched-tokens", 16, "--case", "shared", "cold")
    rows = bench(tmp_path, "prefix", *argv)
    work = rows["shared", "prefilled_tokens"]
    assert work["peer_value"] == 6 * 160  # cache off: every prompt whole
    assert work["value"] == 6 * 160 - 5 * 128  # on: two whole pages of the system prompt once
    cold = rows["cold", "prefilled_tokens"]
    assert cold["value"] == cold["peer_value"] == 6 * 40
    assert rows["shared", "requests_per_s"]["goal"] == 3


def test_the_beam_bench_compares_two_searches_that_find_the_same(tmp_path, tiny_model):
    argv = ("--prompts", 1, "--num-beams", 2, "--prompt-tokens", 20, "--output-tokens", 6)
    (row,) = bench(tmp_path, "beam", *argv, "--repeats", 1).values()
    assert row["goal"] == 3 and row["peer"] == "one-token requests"
    times = json.loads((tmp_path / "out.json").read_text())["times"]["prompts 1, beams 2"]
    assert times["prompts_with_the_same_best_text"] == 1
    assert all(len(times[name]) == 1 for name in ("beam search", "one-token requests"))


def test_a_bench_needs_a_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench"])
    assert "BENCH" in capsys.readouterr().err
