"""Speculation in the engine: whatever is drafted, the tokens are those of plain decoding."""

import dataclasses
import itertools
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import byte_tokenizer, make_config

from jinfer import LLM, SamplingParams
from jinfer.models.model import Model
from jinfer.speculation import medusa
from jinfer.training import loop as training

VOCAB = 300
CONFIG = make_config(
    VOCAB, max_position_embeddings=256, eos_token_ids=(7,), tie_word_embeddings=True
)
MODEL = Model(CONFIG)
LIMITS = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 24, "block_size": 8}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False}
SELF = {**NGRAM, "method": "self", "format": "int4-g32"}
SLOW = ("self", "draft", "medusa", "lookahead")


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(3))


@pytest.fixture(scope="module")
def make_llm(params):
    def make(**options):
        return LLM(MODEL, params=params, tokenizer=byte_tokenizer(VOCAB), **{**LIMITS, **options})

    return make


@pytest.fixture(scope="module")
def heads(params, tmp_path_factory):
    """Untrained heads: each repeats the model's own guess, which this model's loops make good."""
    folder = tmp_path_factory.mktemp("heads")
    config = medusa.MedusaConfig(
        num_heads=2, hidden_size=32, vocab_size=VOCAB, shared_unembedding=True
    )
    tree = ((0,), (1,), (0, 0), (2,), (1, 0), (0, 1))
    weights = medusa.init(config, MODEL, params)
    medusa.save(folder, config, weights, rank_accuracies=[[0.5]], tree=tree)
    return str(folder)


@pytest.fixture(scope="module")
def few_heads(params, tmp_path_factory):
    """The same for every second token only, backwards, and now and then what the root adds."""
    folder = tmp_path_factory.mktemp("few_heads")
    tokens = np.arange(VOCAB - 2, 0, -2, dtype=np.int32)
    config = medusa.MedusaConfig(
        num_heads=2,
        hidden_size=32,
        vocab_size=VOCAB,
        shared_unembedding=True,
        draft_vocab_size=len(tokens),
        reads_root=True,
    )
    weights = medusa.init(config, MODEL, params, tokens)
    weights["u"] = jax.random.normal(jax.random.key(5), weights["u"].shape) * 0.2
    medusa.save(folder, config, weights, rank_accuracies=[[0.5]], tree=((0,), (1,), (0, 0)))
    return str(folder)


@pytest.fixture(scope="module")
def draft(params):
    """A drafter of one layer, the target's first: right now and then."""
    model = Model(dataclasses.replace(CONFIG, num_layers=1, layer_types=CONFIG.layer_types[:1]))
    return {
        **NGRAM,
        "method": "draft",
        "model": model,
        "params": {**params, "layers": params["layers"][:1]},
    }


@pytest.fixture(scope="module")
def config_of(heads, few_heads, draft):
    """The `speculative_config` of each method."""
    return {
        "ngram": NGRAM,
        "self": SELF,
        "draft": draft,
        "medusa": {"method": "medusa", "heads": heads, "adaptive": False},
        "medusa-few": {"method": "medusa", "heads": few_heads, "adaptive": False},
        "lookahead": {
            "method": "lookahead",
            "window": 2,
            "ngram_size": 3,
            "num_guesses": 2,
            "adaptive": False,
        },
    }.__getitem__


def make_prompts():
    """Prompts that repeat themselves, of lengths around pages of 8 and chunks of 24."""
    rng = np.random.default_rng(0)
    prompts = []
    for n in (1, 7, 8, 9, 23, 25, 40, 70, 70):
        words = rng.integers(10, 20, max(1, n // 2)).tolist()
        prompts.append((words * 3)[:n])
    prompts[-1] = prompts[-2][:60] + prompts[-1][60:]  # a prefix hit
    return prompts


PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=30, logprobs=2),
    SamplingParams(temperature=0.4, seed=1, max_tokens=25, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=24, repetition_penalty=1.1, frequency_penalty=0.1),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.9, seed=2, max_tokens=17, logprobs=-1),
    SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=1, stop=["a"]),
    SamplingParams(temperature=0.3, min_p=0.1, seed=3, max_tokens=20, n=2),
    SamplingParams(temperature=0, max_tokens=12, min_tokens=12, logit_bias={7: 5.0}),
    SamplingParams(temperature=0, max_tokens=20, bad_words=["ab", "c"], ignore_eos=True),
]


def run(llm):
    return llm.generate(make_prompts(), PARAMS, use_tqdm=False)


@pytest.fixture(scope="module")
def plain(make_llm):
    return run(make_llm())


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            assert x.token_ids == y.token_ids
            assert (x.text, x.finish_reason, x.stop_reason) == (
                y.text,
                y.finish_reason,
                y.stop_reason,
            )
            for p, q in zip(x.logprobs or [], y.logprobs or [], strict=True):
                assert p.keys() == q.keys()
                assert np.allclose(
                    [v.logprob for v in p.values()], [v.logprob for v in q.values()], atol=1e-4
                )


@pytest.mark.parametrize(
    ("method", "pages"),
    [
        ("ngram", None),
        ("ngram", 19),
        pytest.param("medusa", None, marks=pytest.mark.slow),
        pytest.param("medusa", 19, marks=pytest.mark.slow),
        ("medusa-few", None),
        pytest.param("lookahead", None, marks=pytest.mark.slow),
        ("lookahead", 19),
        *(pytest.param("self", pages, marks=pytest.mark.slow) for pages in (None, 19)),
        pytest.param("draft", None, marks=pytest.mark.slow),
    ],
)
def test_speculation_gives_the_tokens_of_plain_decoding(make_llm, plain, config_of, method, pages):
    llm = make_llm(num_gpu_blocks_override=pages, speculative_config=config_of(method))
    outputs = run(llm)
    assert_same(outputs, plain)
    metrics = llm.get_metrics()
    assert metrics["num_accepted_tokens"] > 20
    assert metrics["num_drafted_tokens"] > metrics["num_accepted_tokens"]
    assert metrics["num_cached_tokens"] > 0
    assert (metrics["num_preemptions"] > 0) == (pages is not None)
    assert metrics["num_running"] == 0
    llm.check_integrity()
    assert metrics["num_free_pages"] + metrics["num_cached_pages"] == metrics["num_pages"]


def test_heads_guess_from_the_last_draft_that_stands_and_the_token_after_it(
    make_llm, params, config_of
):
    """Against guesses made of the whole text at once."""
    config = config_of("medusa-few")
    llm = make_llm(speculative_config=config, max_num_seqs=1)
    verify, found = llm.loop.engine.runner.verify_tree, []
    llm.loop.engine.runner.verify_tree = lambda *args: found.append(verify(*args)) or found[-1]
    prompt = make_prompts()[6]
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    text = [*prompt, *llm.generate([prompt], greedy, use_tqdm=False)[0].outputs[0].token_ids]
    hidden = jax.jit(training.hidden_states, static_argnums=0)(MODEL, params, np.array([text]))[0]
    _, heads, _ = medusa.load(config["heads"], CONFIG)
    place, counts = len(prompt) - 1, []
    for out in found:
        count = int(out.counts[0])
        if count == 0:  # a chunk of the prompt
            continue
        counts.append(count)
        place += count
        if place < len(text):
            root = np.array(text[place : place + 1])
            want = medusa.guess(MODEL, params, heads, hidden[place - 1 : place], root, num_ranks=2)
            assert out.guesses[0].tolist() == want[0].tolist()
    assert place >= len(text) - 1 and 1 in counts and max(counts) > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["self", "draft"])
def test_models_draft_the_tokens_of_plain_decoding(make_llm, plain, config_of, method):
    """As above in fewer programs: two sequences at most, two drafts."""
    config = {**config_of(method), "num_speculative_tokens": 2}
    limits = {"max_model_len": 104, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    llm = make_llm(speculative_config=config, num_gpu_blocks_override=13, **limits)
    assert_same(run(llm), plain)
    metrics = llm.get_metrics()
    assert metrics["num_drafted_tokens"] > metrics["num_accepted_tokens"] > 20
    assert metrics["num_preemptions"] > 0 and metrics["num_cached_tokens"] > 0
    llm.check_integrity()


def rest_at_random(llm, rng):
    """Has the engine draft or rest for some steps as it comes, whatever is measured."""
    length = llm.loop.engine.scheduler.speculation.length
    most = length.sizes[-1]
    length.choose = lambda lengths, may_try: rng.choice((0, most)) if any(lengths) else 0
    length.num_steps_without = lambda lengths: rng.randint(0, 4)


@pytest.mark.parametrize(
    "method",
    ["self", "draft", *(pytest.param(m, marks=pytest.mark.slow) for m in ("medusa", "lookahead"))],
)
@pytest.mark.thorough
def test_rests_change_no_token_and_no_draft(make_llm, params, config_of, method):
    """Few pages and chunks of 16; a drafter with KV of its own misses steps and catches up."""
    config = {**config_of(method), "adaptive": True}
    if method == "draft":  # the model itself: if it is fed correctly, all drafts are accepted
        config |= {"model": MODEL, "params": params, "num_speculative_tokens": 2}
    limits = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    prompts = [prompt[:40] for prompt in make_prompts()[3:]]
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    expected = make_llm(**limits).generate(prompts, greedy, use_tqdm=False)
    llm = make_llm(speculative_config=config, num_gpu_blocks_override=11, **limits)
    rng = random.Random(0)
    rest_at_random(llm, rng)
    plans = []
    launch, verify_tree = llm.loop.engine.runner.launch, llm.loop.engine.runner.verify_tree
    llm.loop.engine.runner.launch = lambda plan: plans.append(plan) or launch(plan)
    trees = []
    llm.loop.engine.runner.verify_tree = lambda *args: (
        trees.append((plans[-1], args)) or verify_tree(*args)
    )
    for _ in range(3):
        assert_same(llm.generate(prompts, greedy, use_tqdm=False), expected)
    # Trees are as wide as they may be, or not there at all.
    widths = [(len(args[0].parents) - 1, plan.max_drafts) for plan, args in trees]
    assert all((width > 0) == (most > 0) for width, most in widths)
    assert (method in ("medusa", "lookahead")) == bool(widths)
    metrics = llm.get_metrics()
    assert metrics["num_preemptions"] > 0 and metrics["num_cached_tokens"] > 0
    paused = [
        plan.is_speculation_paused for plan in plans if not any(s.is_prefill for s in plan.seqs)
    ]
    assert 0.3 < np.mean(paused) < 0.9
    assert any(s.is_prefill and s.start for plan in plans for s in plan.seqs)  # chunks
    assert metrics["num_accepted_tokens"] > 20
    if method == "draft":
        assert metrics["acceptance_rate"] == 1.0
    llm.check_integrity()


@pytest.mark.thorough
def test_a_draft_model_is_fed_later_what_steps_without_drafts_computed(make_llm, params):
    """Every third step there are none; the model itself drafts: it needs the same KV.

    A verification is compiled for one number of drafts, plain steps as they are without a drafter.
    """
    config = {**NGRAM, "method": "draft", "model": MODEL, "params": params}
    limits = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 32}
    llm = make_llm(speculative_config=config, **limits)
    runner, plans, verified, plain, gaps = llm.loop.engine.runner, [], [], [], []
    proposer = llm.loop.engine.scheduler.speculation.proposer
    propose = proposer.propose
    proposer.propose = lambda *args: propose(*args) if len(plans) % 3 else ()
    launch, verify, forward = runner.launch, runner.verify, runner.forward

    def check_and_verify(*args):
        verified.append(args[-1])
        for seq in plans[-1].seqs:
            if seq.num_drafts:
                pages = seq.request.pages[: -(-seq.start // LIMITS["block_size"])]
                ours, theirs = (
                    np.concatenate([kv.k[page] for page in pages], axis=1)[:, : seq.start]
                    for kv in (runner.pool.kv, runner.pool.draft_kv)
                )
                gaps.append(np.max(np.abs(theirs - ours)))
        return verify(*args)

    runner.launch = lambda plan: plans.append(plan) or launch(plan)
    runner.verify = check_and_verify
    runner.forward = lambda *args, **options: plain.append(plans[-1]) or forward(*args, **options)
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    prompts = [prompt[:18] for prompt in make_prompts()[5:7]]
    llm.generate(prompts, greedy, use_tqdm=False)
    widths = [plan.max_drafts for plan in plans if not any(seq.is_prefill for seq in plan.seqs)]
    assert any(not a and b for a, b in itertools.pairwise(widths))  # none, then some
    assert set(verified) == {3} and max(gaps) < 1e-4
    assert plain and all(any(seq.is_prefill for seq in plan.seqs) for plan in plain)


def test_an_adaptive_number_of_drafts_changes_no_token(make_llm, plain):
    llm = make_llm(speculative_config={**NGRAM, "adaptive": True})
    for _ in range(2):  # with measured costs the second time
        assert_same(run(llm), plain)
    assert llm.get_metrics()["num_drafted_tokens"] > 0
    llm.check_integrity()


def test_metrics_tell_tokens_a_step(make_llm, plain):
    llm = make_llm(speculative_config=NGRAM)
    output = llm.generate([make_prompts()[0]], PARAMS[0], use_tqdm=False)[0]
    metrics, times = llm.get_metrics(), output.metrics
    assert times.num_decode_tokens >= 23  # the first came with the prompt
    assert times.tokens_per_step == metrics["tokens_per_step"] > 1.0
    assert times.num_accepted_tokens == metrics["num_accepted_tokens"]
    rates = [metrics[f"acceptance_at_{i}"] for i in (1, 2, 3)]
    assert rates == sorted(rates, reverse=True)
    assert times.acceptance_at[:3] == tuple(rates)


@pytest.mark.parametrize(
    "method", ["ngram", *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW)]
)
def test_nothing_compiles_after_warmup(make_llm, config_of, method):
    llm = make_llm(speculative_config=config_of(method))
    llm.warmup()
    before = llm.num_compilations
    run(llm)
    assert llm.num_compilations == before


@pytest.mark.parametrize(
    "config, message",
    [
        ({"method": "oracle"}, "method must be one of ngram"),
        ({"method": "lookahead", "window": 60}, "must be 1 to 63, got 195"),
        ({"method": "lookahead", "ngram_size": 1}, "must be 1 to 63, got 0"),
        ({"method": "medusa"}, 'needs "heads"'),
        ({"method": "medusa", "heads": "/nowhere"}, "jinfer train-medusa"),
        ({"method": "medusa", "heads": "x", "acceptance": "some"}, '"lossless" or "typical"'),
        ({"method": "medusa", "heads": "x", "epsilon": 0}, "epsilon must be above 0"),
        (
            {"method": "medusa", "heads": "x", "alpha": 0.2},
            'alpha goes with "acceptance": "typical"',
        ),
        ({"method": "medusa", "heads": "x", "format": "int4"}, "has no 'format'"),
        ({"method": "medusa", "heads": Path("/nowhere")}, "no medusa.json in heads"),
        ({"method": "lookahead", "adaptive": 1}, "must be True or False"),
        ({}, "method must be one of ngram"),
        ("ngram", 'must be a dict like {"method": "ngram"}, got str'),
        ({"method": "ngram", "model": "x"}, "has no 'model'"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "must be a positive integer"),
        ({"method": "ngram", "num_speculative_tokens": 99}, "at most"),
        ({"method": "ngram", "adaptive": 1}, "must be True or False"),
        ({"method": "ngram", "prompt_lookup_min": 5}, "must not exceed"),
        ({"method": "self", "prompt_lookup_min": 1}, "has no 'prompt_lookup_min'"),
        ({"method": "self", "format": "int4-g32:gptq"}, "'int4-g32:gptq' does not fit this model"),
        ({"method": "draft"}, 'needs a "model"'),
    ],
)
def test_what_cannot_be_met_is_refused(make_llm, config, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as error:
        make_llm(speculative_config=config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([[0], [0, 0], [0, 0, 0]], "3 levels deep at node .* and there are 2 heads"),
        ([[0, 1]], "without its parent"),
        ("deep", "tree must be a list"),
        ([], "1 to 63 nodes"),
        ([[300]], "rank 300, but the heads rank only 300 tokens"),
    ],
)
def test_a_tree_that_does_not_suit_is_refused(make_llm, heads, tree, message):
    with pytest.raises(ValueError, match=message):
        make_llm(speculative_config={"method": "medusa", "heads": heads, "tree": tree})


def test_a_tree_of_more_ranks_than_the_draft_vocabulary_is_refused(make_llm, few_heads):
    with pytest.raises(ValueError, match="rank 150, but the heads rank only 149 tokens"):
        config = {"method": "medusa", "heads": few_heads, "tree": [[150]]}
        make_llm(speculative_config=config)


def test_heads_of_another_width_are_refused(make_llm, params, tmp_path):
    config = medusa.MedusaConfig(
        num_heads=1, hidden_size=16, vocab_size=VOCAB, shared_unembedding=True
    )
    weights = {"w": np.zeros((1, 16, 16), np.float32), "b": np.zeros((1, 16), np.float32)}
    medusa.save(tmp_path, config, weights, rank_accuracies=[[0.5]], tree=((0,),))
    with pytest.raises(ValueError, match=r"hidden_size=16, the model \(llama\) has hidden_size=32"):
        make_llm(speculative_config={"method": "medusa", "heads": str(tmp_path)})


def test_a_draft_model_of_another_vocabulary_is_refused_with_both_named(make_llm, draft, params):
    other = Model(dataclasses.replace(draft["model"].config, vocab_size=310))
    config = {**draft, "model": other, "params": other.init(jax.random.key(0))}
    with pytest.raises(ValueError, match=r"the draft model has a vocabulary of 310 tokens.*of 300"):
        make_llm(speculative_config=config)


def test_a_draft_model_of_another_tokenizer_is_refused_with_both_named(make_llm, draft):
    other = byte_tokenizer(VOCAB)
    other.add_tokens(["<more>"])
    with pytest.raises(ValueError, match=r"tokenizer of the draft model .* '<more>' is 300 there"):
        make_llm(speculative_config={**draft, "tokenizer": other})


def test_a_draft_model_with_a_shorter_context_is_refused(make_llm, draft):
    short = Model(dataclasses.replace(draft["model"].config, max_position_embeddings=64))
    with pytest.raises(ValueError, match="has 64 positions, fewer than max_model_len=128"):
        make_llm(speculative_config={**draft, "model": short})


def test_quantized_weights_do_not_draft_for_themselves(make_llm):
    with pytest.raises(ValueError, match="quantized already"):
        make_llm(speculative_config=SELF, quantization="int8")


def test_new_weights_are_rounded_anew_for_the_drafts(make_llm, params):
    llm = make_llm(speculative_config=SELF)
    other = MODEL.init(jax.random.key(4))
    llm.update_weights(other)
    got = llm.loop.engine.runner.drafter.params["layers"][0]["mlp"]["up"]["w"]
    assert 0.0 < np.max(np.abs(got - other["layers"][0]["mlp"]["up"]["w"])) < 0.2
