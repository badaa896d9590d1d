"""A request whose constraints leave no token ends by name, in every kind of step, and alone."""

import dataclasses

import jax
import pytest
from tiny_models import byte_tokenizer, make_config

from jinfer import LLM, BeamSearchParams, SamplingParams
from jinfer.models.model import Model
from jinfer.speculation import medusa
from jinfer.speculation.ngram import NgramIndex

VOCAB = 300
EOS = 299
MODEL = Model(make_config(VOCAB, eos_token_ids=(EOS,), tie_word_embeddings=True))
LIMITS = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "block_size": 8,
    "num_gpu_blocks_override": 40,
}
A, B = byte_tokenizer(VOCAB).convert_tokens_to_ids(["a", "b"])
PAIRS = ("aa", "ab", "ba", "bb")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[*range(30, 30 + n)] for n in (3, 9, 20)]
# Fields, and how many tokens there are before nothing is left.
DEAD_ENDS = {
    "after one token": ({"allowed_token_ids": [A, B], "bad_words": PAIRS}, 1),
    "before min_tokens": (
        {"allowed_token_ids": [A, EOS], "bad_words": ["aaa"], "min_tokens": 6},
        2,
    ),
    "in the middle of drafts": ({"allowed_token_ids": [A], "bad_words": ["aaaaa"]}, 4),
}
DRAWS = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    "unseeded": {"temperature": 1.0, "top_k": 5, "min_p": 0.01},
}


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(3))


@pytest.fixture(scope="module")
def make_llm(params, tmp_path_factory):
    one_layer = Model(
        dataclasses.replace(MODEL.config, num_layers=1, layer_types=MODEL.config.layer_types[:1])
    )
    folder = tmp_path_factory.mktemp("heads")
    heads = medusa.MedusaConfig(
        num_heads=2, hidden_size=32, vocab_size=VOCAB, shared_unembedding=True
    )
    medusa.save(
        folder,
        heads,
        medusa.init(heads, MODEL, params),
        rank_accuracies=[[0.5]],
        tree=((0,), (1,), (0, 0)),
    )
    methods = {
        "ngram": {"num_speculative_tokens": 3},
        "self": {"num_speculative_tokens": 3, "format": "int4-g32"},
        "draft": {
            "num_speculative_tokens": 3,
            "model": one_layer,
            "params": {**params, "layers": params["layers"][:1]},
        },
        "medusa": {"heads": str(folder)},
        "typical": {"heads": str(folder), "acceptance": "typical"},
        "lookahead": {"window": 2, "ngram_size": 3, "num_guesses": 2},
    }

    def make(kind):
        options = {"loop": {"num_decode_steps": 4}, "plain": {}}.get(kind)
        if options is None:
            method = "medusa" if kind == "typical" else kind
            config = {"method": method, "adaptive": False, **methods[kind]}
            options = {"speculative_config": config}
        return LLM(MODEL, params=params, tokenizer=byte_tokenizer(VOCAB), **LIMITS, **options)

    return make


def run(llm, prompts, params):
    return [x.outputs[0] for x in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def alone(make_llm):
    return [output.token_ids for output in run(make_llm("plain"), PROMPTS, GREEDY)]


SLOW = ("self", "draft", "typical", "lookahead")
KINDS = ("plain", "loop", "ngram", "medusa", *SLOW)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in KINDS]
)
def test_a_row_without_a_token_ends_that_request_alone(make_llm, alone, monkeypatch, kind):
    # The n-grams keep drafting: one right draft, and then no token is left.
    monkeypatch.setattr(NgramIndex, "propose", lambda self, tokens, n: [A] * n)
    llm = make_llm(kind)
    for fields, num_tokens in DEAD_ENDS.values():
        dead = [SamplingParams(max_tokens=12, **fields, **draw) for draw in DRAWS.values()]
        outputs = run(llm, [*PROMPTS, *PROMPTS], [GREEDY] * 3 + dead)
        assert [output.token_ids for output in outputs[:3]] == alone
        for output in outputs[3:]:
            assert output.finish_reason == "error"
            assert len(output.token_ids) == num_tokens
            assert set(output.token_ids) <= set(fields["allowed_token_ids"])
            assert len(output.text) <= num_tokens and set(output.text) <= {"a", "b"}
            names = [name for name in ("allowed_token_ids", "bad_words", "min_tokens")]
            assert [name in output.error for name in names] == [name in fields for name in names]
            assert f"after {num_tokens} output tokens" in output.error
        llm.check_integrity()
    metrics = llm.get_metrics()
    # The computed KV is valid: no request is computed again, and the cache keeps its pages.
    assert metrics["num_errors"] == 9 and not metrics["num_failed_steps"]
    assert not metrics["num_preemptions"]
    [again] = llm.generate([PROMPTS[2]], GREEDY, use_tqdm=False)
    assert again.num_cached_tokens >= 16


def test_beams_without_a_token_end_that_search_alone(make_llm):
    llm = make_llm("plain")
    params = BeamSearchParams(beam_width=2, max_tokens=5)
    want = llm.beam_search(PROMPTS, params)
    got = llm.beam_search(
        PROMPTS,
        params,
        prefix_allowed_tokens_fn=lambda i, tokens: (
            [A, B] if i == 1 and len(tokens) < 11 else [] if i == 1 else range(VOCAB)
        ),
    )
    assert "prompt 1" in got[1].error and "prefix_allowed_tokens_fn" in got[1].error
    assert not got[1].sequences
    for i in (0, 2):
        assert got[i].error is None
        assert [x.tokens for x in got[i].sequences] == [x.tokens for x in want[i].sequences]
    llm.check_integrity()
