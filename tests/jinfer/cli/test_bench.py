"""The benches at toy sizes: that they measure what they say and write the common form."""

import json
import logging
import runpy
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_models import make_model

import jinfer
from jinfer.cli import main as cli
from jinfer.cli.bench import kv as bench_kv
from jinfer.cli.bench import soak as bench_soak
from jinfer.cli.bench import spec as bench_spec
from jinfer.config.outputs import RequestMetrics
from jinfer.engine.pages.costs import TransferCosts

FIELDS = {
    "case",
    "metric",
    "unit",
    "value",
    "peer",
    "peer_value",
    "ratio",
    "goal",
    "limit",
    "own",
    "parts",
}


@pytest.fixture
def tiny_model(monkeypatch):
    """Puts a tiny random model in the place of whatever `jinfer.load` would load."""
    model = make_model(2048, max_position_embeddings=512)
    loaded = model, model.init(jax.random.key(0))
    monkeypatch.setattr(jinfer, "load", lambda *args, **options: loaded)
    monkeypatch.setattr(jinfer.LLM, "warmup", lambda llm: 0.0)  # compile what is used only
    return loaded


class Characters:
    """A tokenizer of one token a character."""

    def encode(self, text, add_special_tokens):
        return [ord(c) for c in text]


def bench(tmp_path, *argv):
    file = tmp_path / "out.json"
    assert cli.main(["bench", *map(str, argv), "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert {"device", "versions", "command", "date", "rows"} <= set(report)
    assert all(set(row) == FIELDS for row in report["rows"])
    return {(row["case"], row["metric"]): row for row in report["rows"]}


def test_the_tree_bench_fills_looks_up_and_evicts(tmp_path):
    rows = bench(tmp_path, "prefix", "--case", "tree", "--tree-pages", 1000)
    assert [metric.partition("_")[0] for _, metric in rows] == [
        *("lookup", "evict"),
        *("insert", "lookup", "evict"),
    ]
    assert all(row["value"] > 0 and row["limit"] == 50 for row in rows.values())


@pytest.mark.thorough
def test_the_prefix_bench_counts_the_prompt_tokens_that_were_computed(tmp_path, tiny_model):
    argv = ("--requests", 6, "--system-tokens", 150, "--own-tokens", 10, "--cold-tokens", 40)
    argv += ("--output-tokens", 4, "--cold-repeats", 1, "--max-num-seqs", 2)
    argv += ("--max-num-batched-tokens", 16, "--case", "shared", "cold")
    rows = bench(tmp_path, "prefix", *argv)
    work = rows["shared", "prefilled_tokens"]
    assert work["peer_value"] == 6 * 160  # cache off: every prompt whole
    assert work["value"] == 6 * 160 - 5 * 150  # on: the system prompt once
    cold = rows["cold", "prefilled_tokens"]
    assert cold["value"] == cold["peer_value"] == 6 * 40
    assert rows["shared", "requests_per_s"]["goal"] == 3


@pytest.mark.thorough
def test_the_prefix_bench_counts_what_comes_back_from_the_host(tmp_path, tiny_model, monkeypatch):
    for name in ("is_worth_loading", "is_worth_saving"):
        monkeypatch.setattr(TransferCosts, name, lambda *args: True)
    argv = ("--host-prompts", 6, "--host-tokens", 70, "--output-tokens", 2, "--case", "host")
    rows = bench(tmp_path, "prefix", *argv, "--max-num-batched-tokens", 16)
    work = rows["host", "prefilled_tokens"]
    assert work["value"] == 6 * (70 - 64)  # each prompt's first page was on one side or the other
    assert work["peer_value"] > 2 * work["value"] and work["goal"] == 3


@pytest.mark.thorough
def test_the_beam_bench_compares_two_searches_that_find_the_same(tmp_path, tiny_model):
    argv = ("--prompts", 1, "--num-beams", 2, "--prompt-tokens", 20, "--output-tokens", 6)
    (row,) = bench(tmp_path, "beam", *argv, "--repeats", 1).values()
    assert row["goal"] == 3 and row["peer"] == "one-token requests"
    times = json.loads((tmp_path / "out.json").read_text())["times"]["prompts 1, beams 2"]
    assert times["prompts_with_the_same_best_text"] == 1
    assert all(len(times[name]) == 1 for name in ("beam search", "one-token requests"))


def test_the_kv_bench_scores_a_text_through_the_cache(tmp_path, tiny_model, monkeypatch):
    text = tmp_path / "text"
    text.write_text("0123456789" * 20)
    monkeypatch.setattr("jinfer.checkpoints.tokenizer.load_tokenizer", lambda *args: Characters())
    argv = ("--text", text, "--tokens", 80, "--context", 40, "--kv-cache-dtype", "int8")
    rows = bench(tmp_path, "kv", *argv)
    perplexity, size = rows["int8 KV", "perplexity"], rows["int8 KV", "pool bytes a token"]
    model, params = tiny_model
    tokens = jnp.asarray([[ord(c) for c in "0123456789" * 4]])  # both windows are so
    logprobs = jax.nn.log_softmax(jax.jit(model.logits)(params, tokens)[0])
    expected = jnp.exp(-logprobs[jnp.arange(39), tokens[0, 1:]].mean())
    assert perplexity["peer_value"] == pytest.approx(float(expected), rel=1e-4)
    assert 0.9 < perplexity["ratio"] < 1.1 and perplexity["ratio"] != 1
    assert size["value"] == size["limit"] == 2 * 2 * 2 * (8 + 4)
    assert size["peer_value"] == 2 * 2 * 2 * 32


def test_windows_cover_the_tokens_that_were_asked_for(tmp_path):
    text = tmp_path / "text"
    text.write_text("0123456789" * 20)
    windows = bench_kv.read_windows(Characters(), text, 100, 40)
    assert [len(w) for w in windows] == [40, 40, 20]
    assert [t for w in windows for t in w] == [ord(c) for c in "0123456789" * 10]
    assert [len(w) for w in bench_kv.read_windows(Characters(), text, 81, 40)] == [40, 40]
    with pytest.raises(ValueError, match="has 200 tokens, --tokens asks for 201"):
        bench_kv.read_windows(Characters(), text, 201, 40)


def test_the_latency_bench_times_every_gap(tmp_path, tiny_model):
    argv = ("--decodes", 2, "--short-tokens", 5, "--output-tokens", 12, "--long-tokens", 40)
    argv += ("--arrives-after", 4, "--max-num-batched-tokens", 16, "--repeats", 1)
    rows = bench(tmp_path, "latency", *argv)
    assert {row["peer"] for row in rows.values()} == {"whole prefill"}
    report = json.loads((tmp_path / "out.json").read_text())
    for runs in report["gaps_ms"].values():
        assert [len(gaps) for gaps in runs] == [2 * 11]
        assert all(gap > 0 for gaps in runs for gap in gaps)
    [p99] = [row for (_, metric), row in rows.items() if metric.startswith("p99")]
    assert p99["goal"] == 3


def test_a_bench_needs_a_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench"])
    assert "BENCH" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_loop_bench_measures_calls_during_a_step(tmp_path, tiny_model, monkeypatch):
    """Of their times only that a bound of nothing is exceeded: the machine may be busy."""
    path = Path(__file__).resolve().parents[3] / "scripts" / "bench_loop.py"
    loop_bench = runpy.run_path(str(path))
    monkeypatch.setitem(loop_bench["measure_thread"].__globals__, "PROMPT", [5, 17, 3])
    monkeypatch.setitem(
        loop_bench["main"].__globals__,
        "AsyncLLM",
        lambda name, **options: jinfer.AsyncLLM(
            tiny_model[0], params=tiny_model[1], skip_tokenizer_init=True, max_model_len=500
        ),
    )
    file = tmp_path / "out.json"
    argv = ["--sleep", "3", "--repeats", "1", "--limit-ms", "0", "--json", str(file)]
    assert loop_bench["main"](argv) == 1
    report = json.loads(file.read_text())
    assert all(set(row) == FIELDS for row in report["rows"])
    assert len(report["rows"]) == 2 * len(report["times_ms"]) == 24


@pytest.mark.thorough
def test_a_short_soak_ends_whole(tmp_path):
    rows = bench(tmp_path, "soak", "--minutes", 0.05, "--max-num-seqs", 2, "--pages", 13)
    values = {metric: row["value"] for (_, metric), row in rows.items()}
    assert values["requests_finished"] > 0 and values["integrity_checks"] > 1
    assert all(row["value"] <= row["limit"] for row in rows.values() if row["limit"] is not None)
    assert logging.getLogger("jinfer").level == logging.NOTSET  # silent for the soak only


@pytest.mark.thorough
def test_a_soak_sees_wrong_tokens(tmp_path, monkeypatch, capsys):
    from jinfer.engine.request import Request

    accept = Request.accept
    monkeypatch.setattr(Request, "accept", lambda self, token, *rest: accept(self, 7, *rest))
    make = bench_soak._make_llm

    def make_broken(args):
        llm = make(args)
        llm.reset_prefix_cache = lambda: monkeypatch.undo()  # the known tokens are all 7
        return llm

    monkeypatch.setattr(bench_soak, "_make_llm", make_broken)
    argv = ["bench", "soak", "--minutes", "0.2", "--max-num-seqs", "2", "--pages", "13"]
    assert cli.main(argv) == 1
    assert "requests_with_wrong_tokens" in capsys.readouterr().err


class Chat(Characters):
    """The same with a chat template: the message alone."""

    def apply_chat_template(self, conversation, **options):
        return conversation[0]["content"]


@pytest.mark.thorough
def test_the_speculation_bench_gives_the_tokens_of_plain_decoding(
    tmp_path, tiny_model, monkeypatch, capsys
):
    monkeypatch.setattr("jinfer.checkpoints.tokenizer.load_tokenizer", lambda name: Chat())
    file = tmp_path / "chats.jsonl"
    rows = [
        ("writing", "ab" * 9),
        ("coding", "abc" * 9),
        ("qa", "d\x85d"),
        ("qa", "e"),
        ("qa", "f"),
    ]
    rows.append(("rag", "x" * 999))  # too long
    lines = [json.dumps({"category": c, "turns": [t]}, ensure_ascii=False) for c, t in rows]
    file.write_text("\n".join(lines))
    argv = ("--prompts", file, "--limit", 2, "--output-tokens", 20, "--max-model-len", 64)
    got = bench(tmp_path, "spec", *argv, "--batch-sizes", 1, "--methods", "ngram")
    assert {case for case, _ in got} == {f"ngram/{c}/b1" for c in ("mt_bench", "qa", "overall")}
    assert got["ngram/overall/b1", "prompts with the same tokens"]["value"] == 4
    per_step = got["ngram/overall/b1", "tokens_per_step"]
    assert per_step["value"] > 1.0 and per_step["goal"] == 1.3
    acceptance = got["ngram/overall/b1", "acceptance"]
    assert len(acceptance["parts"]) == 4
    assert acceptance["parts"] == sorted(acceptance["parts"], reverse=True)
    assert 0.0 < acceptance["parts"][-1] < acceptance["value"] < acceptance["parts"][0] < 1.0
    speedup = got["ngram/qa/b1", "speedup"]
    assert speedup["value"] == pytest.approx(speedup["ratio"] * speedup["peer_value"])
    few = ("--prompts", file, "--limit", 1, "--output-tokens", 2, "--max-model-len", 512)
    few += ("--batch-sizes", 1, "--methods", "ngram", "--categories", "qa")  # a page of tokens
    assert (
        bench(tmp_path, "spec", *few)["ngram/qa/b1", "prompts with the same tokens"]["value"] == 1
    )
    capsys.readouterr()
    argv = ["bench", "spec", *map(str, argv), "--methods", "ngram", "--categories", "qa", "poems"]
    assert cli.main(argv) == 2
    assert "no category ['poems']" in capsys.readouterr().err
    for flag in ("--repeats", "--limit"):
        assert cli.main([*argv, flag, "0"]) == 2
        assert f"{flag} must be at least 1" in capsys.readouterr().err


class Turns:
    """An engine that compiles in its first turns, and tells how many there were."""

    compiled = 0

    def __init__(self, num_compiling):
        self.num_compiling, self.num_turns = num_compiling, 0

    @property
    def num_compilations(self):
        return Turns.compiled

    def generate(self, prompts, params, use_tqdm):
        self.num_turns += 1
        Turns.compiled += self.num_turns <= self.num_compiling
        metrics = RequestMetrics(num_decode_steps=1, num_decode_tokens=self.num_turns)
        outputs = [types.SimpleNamespace(token_ids=[1] * self.num_turns, error=None)]
        return [types.SimpleNamespace(outputs=outputs, metrics=metrics) for _ in prompts]


@pytest.mark.parametrize(("plain", "own", "num_turns"), [(0, 0, 1), (1, 0, 2), (1, 2, 3)])
def test_the_speculation_bench_counts_no_turn_that_compiled(plain, own, num_turns):
    engines = Turns(plain), Turns(own)
    slow, fast, num_same = bench_spec._measure(*engines, [[1], [2]], 2, 8, 1)
    assert [engine.num_turns for engine in engines] == [num_turns] * 2
    assert slow.tokens == fast.tokens == fast.decode_tokens == 2 * num_turns
    assert num_same == 2


def test_the_speculation_bench_takes_the_median_of_turns_in_both_orders(monkeypatch):
    seconds = {"plain": iter([5.0, 1.0, 2.0]), "own": iter([1.0, 9.0, 3.0])}
    order = []

    def generate(engine, prompts, batch_size, num_tokens):
        order.append(engine.name)
        is_odd = engine.name == "own" and len(order) == 6
        texts = [[1], [2 if is_odd else 1]]
        return bench_spec._Counts(seconds=next(seconds[engine.name]), tokens=8), texts

    monkeypatch.setattr(bench_spec, "_generate", generate)
    engines = [types.SimpleNamespace(name=name, num_compilations=0) for name in ("plain", "own")]
    slow, fast, num_same = bench_spec._measure(*engines, [[1], [2]], 2, 8, 3)
    assert order == ["plain", "own", "own", "plain", "plain", "own"]
    assert (slow.seconds, fast.seconds) == (3 * 2.0, 3 * 3.0)
    assert slow.tokens == fast.tokens == 3 * 8
    assert num_same == 1  # the second text differed once


def test_the_speculation_bench_asks_for_heads(tmp_path, capsys):
    argv = ["bench", "spec", "--prompts", str(tmp_path), "--methods", "medusa"]
    assert cli.main(argv) == 2
    assert "needs --heads DIR" in capsys.readouterr().err


def test_the_speculation_bench_wants_a_model_for_its_draft_methods(tmp_path, capsys):
    argv = ["bench", "spec", "--prompts", str(tmp_path), "--methods", "draft"]
    assert cli.main(argv) == 2
    assert "method draft needs a --draft-model" in capsys.readouterr().err
