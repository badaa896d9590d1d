"""Beam search: equal to that of transformers, and a good neighbour of the engine's requests."""

import dataclasses

import jax
import numpy as np
import pytest

from jinfer import LLM, BeamSearchParams, SamplingParams
from jinfer.engine.beam.searcher import BeamSearcher
from jinfer.engine.pages.holdings import Holdings
from jinfer.sampling.logprobs import best_continuations
from jinfer.sampling.state import pack_bits
from jinfer.steps import beam

VOCAB, PAGE = 97, 4
EOS = (5, 11, 40)
LIMITS = {
    "max_model_len": 64,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "block_size": PAGE,
    "num_gpu_blocks_override": 96,
    "skip_tokenizer_init": True,
    "generation_config": "none",
}
# Sums of float32 log probabilities of two programs, of size 10 to 40.
TOLERANCE = 2e-4


def draw_prompts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(50, VOCAB, n).tolist() for n in lengths]


MANY = draw_prompts(0, (7, 12, 1, 8, 9))  # around pages of 4 tokens
PROMPTS = MANY[:3]


@pytest.fixture(scope="module")
def oracle():
    """A tiny random Llama of transformers, its end tokens likely enough to come now and then."""
    torch = pytest.importorskip("torch", reason="the parity oracle, torch, is not installed")
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=list(EOS),
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.set_num_threads(1)  # its threads wait for each other where cores are shared
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0.0, (1.2 if "lm_head" in path else 1.5) * p.shape[-1] ** -0.5)
        model.lm_head.weight[list(EOS)] *= 2.5
    return model.eval()


@pytest.fixture(scope="module")
def oracle_path(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("oracle")
    oracle.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(oracle_path):
    return LLM(oracle_path, dtype="float32", **LIMITS)


@pytest.fixture(autouse=True)
def pages_are_whole(request):
    yield
    if "llm" in request.fixturenames:
        check_idle(request.getfixturevalue("llm"))


def check_idle(llm):
    assert not llm.has_unfinished_requests()
    llm.check_integrity()
    assert not llm.loop.engine.scheduler.reserved
    metrics = llm.get_metrics()
    assert metrics["num_free_pages"] + metrics["num_cached_pages"] == metrics["num_pages"]


def ask_oracle(oracle, prompt, params, *, eos=EOS, allowed=None):
    """Returns [(tokens found, score)] of transformers, best first."""
    import torch
    import transformers

    config = transformers.GenerationConfig(
        num_beams=params.beam_width,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        num_return_sequences=params.num_returned,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(eos) or [VOCAB],  # None would mean the model's own
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = torch.tensor([prompt])
    out = oracle.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=config,
        prefix_allowed_tokens_fn=allowed,
    )
    texts = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist()):
        found = row[len(prompt) :]
        ends = [i for i, token in enumerate(found) if token in eos]
        texts.append((found[: ends[0] + 1] if ends else found, score))
    return texts


def assert_equal(output, want):
    got = [(text.output_token_ids, text.score) for text in output.sequences]
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    scores = [score for _, score in got]
    np.testing.assert_allclose(scores, [score for _, score in want], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beam_width", [2, 4])
def test_it_equals_transformers(llm, oracle, beam_width, length_penalty, early_stopping):
    params = BeamSearchParams(
        beam_width=beam_width,
        max_tokens=14,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    outputs = llm.beam_search(MANY, params)
    for prompt, output in zip(MANY, outputs, strict=True):
        assert len(output.sequences) == beam_width
        assert_equal(output, ask_oracle(oracle, prompt, params))


def test_a_negative_length_penalty_equals_transformers(llm, oracle):
    params = BeamSearchParams(
        beam_width=4, max_tokens=14, length_penalty=-0.5, early_stopping="never"
    )
    assert_equal(llm.beam_search(MANY[:1], params)[0], ask_oracle(oracle, MANY[0], params))


def test_the_modes_differ_and_texts_end_in_many_ways(llm):
    """Or else the test above would compare little."""
    ends, found = set(), {}
    for early_stopping in (False, True, "never"):
        for length_penalty in (-0.5, 0.5, 2.0):
            params = BeamSearchParams(
                beam_width=4,
                max_tokens=14,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
            )
            outputs = llm.beam_search(MANY, params)
            texts = [text for output in outputs for text in output.sequences]
            ends |= {(text.finish_reason, len(text.output_token_ids)) for text in texts}
            found[early_stopping, length_penalty] = [text.tokens for text in texts]
    assert ("length", 14) in ends
    assert len({length for reason, length in ends if reason == "stop"}) >= 5
    assert len({repr(texts) for texts in found.values()}) >= 4


def test_without_end_tokens_all_beams_run_to_the_end(llm, oracle):
    params = BeamSearchParams(beam_width=2, max_tokens=14, ignore_eos=True, num_return_sequences=1)
    output = llm.beam_search([PROMPTS[0]], params)[0]
    assert len(output.sequences) == 1
    assert output.sequences[0].finish_reason == "length"
    assert_equal(output, ask_oracle(oracle, PROMPTS[0], params, eos=()))


def test_stop_token_ids_end_texts_beside_the_models_own(llm, oracle):
    free = BeamSearchParams(beam_width=2, max_tokens=14, ignore_eos=True)
    stop = llm.beam_search([PROMPTS[0]], free)[0].sequences[0].output_token_ids[3]
    params = dataclasses.replace(free, ignore_eos=False, stop_token_ids=[stop])
    output = llm.beam_search([PROMPTS[0]], params)[0]
    assert_equal(output, ask_oracle(oracle, PROMPTS[0], params, eos=(*EOS, stop)))
    assert stop in [text.stop_reason for text in output.sequences]


def test_a_mask_for_each_beam_is_honoured_as_in_transformers(llm, oracle):
    """What may follow depends on the beam's own last token."""
    params = BeamSearchParams(beam_width=4, max_tokens=10)

    def allowed(last):
        return [*EOS, *(token for token in range(VOCAB) if (token - last) % 3 == 1)]

    outputs = llm.beam_search(
        PROMPTS[:2], params, prefix_allowed_tokens_fn=lambda _, tokens: allowed(tokens[-1])
    )
    for prompt, output in zip(PROMPTS, outputs):
        want = ask_oracle(
            oracle, prompt, params, allowed=lambda _, tokens: allowed(int(tokens[-1]))
        )
        assert_equal(output, want)
        for text in output.sequences:
            for last, token in zip(text.tokens[len(prompt) - 1 :], text.output_token_ids):
                assert token in allowed(last)


def test_where_masks_leave_one_text_one_is_found(llm):
    params = BeamSearchParams(beam_width=4, max_tokens=3, allowed_token_ids=[60])
    output = llm.beam_search([PROMPTS[0]], params)[0]
    assert [text.output_token_ids for text in output.sequences] == [[60, 60, 60]]


def test_one_beam_is_greedy(llm):
    found = llm.beam_search([PROMPTS[1]], BeamSearchParams(beam_width=1, max_tokens=14))
    greedy = llm.generate(
        [PROMPTS[1]], SamplingParams(temperature=0, max_tokens=14), use_tqdm=False
    )
    assert found[0].sequences[0].output_token_ids == greedy[0].outputs[0].token_ids


def test_what_a_text_says_of_itself_agrees(llm):
    params = BeamSearchParams(beam_width=4, max_tokens=14, length_penalty=0.5)
    for text in llm.beam_search([PROMPTS[0]], params)[0].sequences:
        assert text.tokens == [*PROMPTS[0], *text.output_token_ids]
        entries = [entry[token] for entry, token in zip(text.logprobs, text.output_token_ids)]
        total = sum(entry.logprob for entry in entries)
        assert text.cum_logprob == pytest.approx(total, abs=TOLERANCE)
        assert text.score == pytest.approx(total / len(entries) ** 0.5, abs=TOLERANCE)
        assert (text.finish_reason == "stop") == (text.output_token_ids[-1] in EOS)


# ---------------------------------------------------------------------- the engine around it


def run(searcher, llm, prompts, done=None):
    """Runs searches and requests side by side; checks the bookkeeping after every step.

    What requests have found when they end goes into `done`.
    """
    for prompt in prompts:
        searcher.add(prompt)
    found = {}
    while searcher.has_work():
        found |= dict(searcher.step())
        llm.check_integrity()
        if llm.loop.engine.has_work():
            done |= {out.request_id: out.outputs[0] for out in llm.step() if out.finished}
            llm.check_integrity()
        else:
            assert not searcher.is_stuck
    return [[[t.token for t in x.last.path()] for x in found[i]] for i in range(len(prompts))]


PARAMS = BeamSearchParams(beam_width=4, max_tokens=14)


@pytest.fixture(scope="module")
def alone(llm):
    """What is found for each prompt by itself, from a cold cache."""
    texts = []
    for prompt in PROMPTS:
        llm.reset_prefix_cache()
        output = llm.beam_search([prompt], PARAMS)[0]
        texts.append([text.output_token_ids for text in output.sequences])
    return texts


def test_batch_mates_and_cached_prefixes_change_nothing(llm, alone):
    llm.reset_prefix_cache()
    assert run(BeamSearcher(llm.loop.engine, PARAMS), llm, PROMPTS) == alone
    hits = llm.get_metrics()["num_cached_tokens"]
    assert run(BeamSearcher(llm.loop.engine, PARAMS, concurrency_limit=1), llm, PROMPTS) == alone
    assert llm.get_metrics()["num_cached_tokens"] > hits


def test_requests_go_on_beside_searches_and_neither_changes_the_other(llm, alone):
    prompts = draw_prompts(1, (3, 9, 20))
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    want = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
    for i, prompt in enumerate(prompts):
        llm.add_request(f"beside-{i}", prompt, params)
    outputs = llm.beam_search(PROMPTS, PARAMS)
    assert [[t.output_token_ids for t in out.sequences] for out in outputs] == alone
    done = {}
    while llm.has_unfinished_requests():
        done |= {out.request_id: out.outputs[0].token_ids for out in llm.step() if out.finished}
    assert [done[f"beside-{i}"] for i in range(len(prompts))] == want


def test_searches_wait_for_pages_and_requests_give_theirs_up(oracle_path, alone):
    """A search of 12 + 14 tokens and 4 beams needs 19 pages; there are 22."""
    llm = LLM(oracle_path, dtype="float32", **{**LIMITS, "num_gpu_blocks_override": 22})
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    llm.add_request("beside", draw_prompts(1, (9,))[0], params)
    llm.step()
    done = {}
    assert run(BeamSearcher(llm.loop.engine, PARAMS), llm, PROMPTS, done) == alone
    while llm.has_unfinished_requests():
        done |= {out.request_id: out.outputs[0] for out in llm.step() if out.finished}
    assert len(done["beside"].token_ids) == 30
    check_idle(llm)


def test_two_searchers_on_one_pool_do_not_wait_for_each_other_forever(oracle_path):
    llm = LLM(oracle_path, dtype="float32", **{**LIMITS, "num_gpu_blocks_override": 22})
    first = BeamSearcher(llm.loop.engine, PARAMS)
    first.add(PROMPTS[1])
    first.step()
    with pytest.raises(RuntimeError, match="held by another search"):
        llm.beam_search([PROMPTS[1]], PARAMS)
    first.close()
    assert llm.beam_search([PROMPTS[1]], PARAMS)[0].sequences
    check_idle(llm)


def test_a_failed_step_leaves_an_engine_that_works(oracle_path, alone, monkeypatch):
    llm = LLM(oracle_path, dtype="float32", **LIMITS)
    whole = beam.beam_step

    def fail(model, params, pool, *args, **kwargs):
        jax.tree.map(lambda x: x.delete(), pool)
        raise RuntimeError("out of memory")

    greedy = SamplingParams(temperature=0, max_tokens=8)
    [prompt] = draw_prompts(1, (9,))
    llm.add_request("beside", prompt, greedy)
    llm.step()
    monkeypatch.setattr(beam, "beam_step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        llm.beam_search(PROMPTS, PARAMS)
    monkeypatch.setattr(beam, "beam_step", whole)
    while llm.has_unfinished_requests():
        outputs = llm.step()
    [again] = llm.generate([prompt], greedy, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == again.outputs[0].token_ids
    check_idle(llm)
    outputs = llm.beam_search(PROMPTS, PARAMS)
    assert [[t.output_token_ids for t in out.sequences] for out in outputs] == alone


def test_a_search_that_is_interrupted_while_it_takes_pages_loses_none(oracle_path, monkeypatch):
    llm = LLM(oracle_path, dtype="float32", **LIMITS)
    take = Holdings.take

    def take_and_stop(holdings, *args, **fields):
        take(holdings, *args, **fields)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Holdings, "take", take_and_stop)
        llm.beam_search(PROMPTS, PARAMS)
    check_idle(llm)
    assert llm.beam_search(PROMPTS[:1], PARAMS)[0].sequences


def test_a_failed_step_of_the_engine_ends_the_search(oracle_path):
    llm = LLM(oracle_path, dtype="float32", **LIMITS)
    searcher = BeamSearcher(llm.loop.engine, PARAMS)
    searcher.add(PROMPTS[0])
    searcher.step()
    llm.loop.engine.lose_steps()
    llm.check_integrity()
    with pytest.raises(RuntimeError, match="took the beams' KV along"):
        searcher.step()
    searcher.close()
    check_idle(llm)


def test_logits_that_are_not_finite_are_an_error(oracle_path):
    llm = LLM(oracle_path, dtype="float32", **LIMITS)
    params = llm.loop.engine.runner.params
    llm.update_weights({**params, "final_norm": {"scale": params["final_norm"]["scale"] * np.nan}})
    with pytest.raises(RuntimeError, match="prompt 0 met logits that are not finite"):
        llm.beam_search(PROMPTS[:1], PARAMS)
    llm.update_weights(params)
    assert llm.beam_search(PROMPTS[:1], PARAMS)[0].sequences
    check_idle(llm)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, "beam_width must be positive, got 0"),
        ({"beam_width": 2.0}, "beam_width must be an integer"),
        ({"num_return_sequences": 5}, "num_return_sequences=5 is more than beam_width=4"),
        ({"early_stopping": "always"}, 'early_stopping must be True, False or "never"'),
        ({"length_penalty": float("nan")}, "length_penalty must be a number, got NaN"),
        ({"length_penalty": float("inf")}, "length_penalty must be finite"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"structured_outputs": {"json": "{}"}}, "structured_outputs are not built"),
        ({"beam_width": 9}, "beam_width=9 is more than max_num_seqs=8"),
        ({"stop_token_ids": [VOCAB]}, f"stop_token_ids holds {VOCAB}"),
    ],
)
def test_what_cannot_be_met_is_refused_by_name(llm, fields, message):
    with pytest.raises(ValueError, match=message):
        llm.beam_search(
            PROMPTS[:1], BeamSearchParams(**{"beam_width": 4, "max_tokens": 3, **fields})
        )


def test_a_pool_too_small_for_the_beams_is_refused_with_the_numbers(llm):
    params = BeamSearchParams(beam_width=8, max_tokens=60)
    with pytest.raises(ValueError, match=r"8 beams of 4 \+ 60 tokens may need 121 pages of 4"):
        llm.beam_search([[1, 2, 3, 4]], params)
    with pytest.raises(TypeError, match="params must be BeamSearchParams, got SamplingParams"):
        llm.beam_search([PROMPTS[0]], SamplingParams())


# ---------------------------------------------------------------------- the choice on the device


@pytest.mark.parametrize("vocab_size", [50, 3000])  # all in one row; blocks of 64
def test_the_best_continuations_are_those_of_a_sort(vocab_size):
    rng = np.random.default_rng(0)
    beams, k = 4, 12
    logits = rng.normal(0, 3, (2 * beams, vocab_size)).astype(np.float32)
    totals = rng.normal(-3, 1, 2 * beams).astype(np.float32)
    totals[[1, 6, 7]] = -np.inf
    logits[6] = np.nan  # a padding row may hold anything
    temperature = np.full(2 * beams, 0.7, np.float32)
    banned = rng.random((2 * beams, vocab_size)) < 0.3
    mask = np.stack([pack_bits(np.flatnonzero(~row), vocab_size) for row in banned])
    which, best, own = best_continuations(logits, totals, temperature, mask, num_beams=beams, k=k)

    x = logits.astype(np.float64) / 0.7
    logprobs = x - np.log(np.exp(x).sum(-1, keepdims=True))
    sums = np.where(banned | np.isinf(totals)[:, None], -np.inf, logprobs + totals[:, None])
    sums = sums.reshape(2, -1)
    order = np.argsort(-sums, axis=-1)[:, :k]
    np.testing.assert_array_equal(which, order)
    np.testing.assert_allclose(best, np.take_along_axis(sums, order, -1), rtol=1e-5)
    own_want = np.take_along_axis(logprobs.reshape(2, -1), order, -1)
    np.testing.assert_allclose(own, own_want, rtol=1e-5)


def test_a_search_with_few_continuations_ranks_only_those():
    logits = np.zeros((2, 3), np.float32)
    none = np.full(2, -np.inf, np.float32)
    _, best, _ = best_continuations(logits, none, np.ones(2, np.float32), None, num_beams=2, k=6)
    assert np.isneginf(best).all()
