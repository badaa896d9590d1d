"""Warm = cold on a tiny model, with counters that show that the warm runs were warm.

Few programs are compiled: a step holds 16 tokens, of one sequence or of up to four.
"""

import jax
import numpy as np
import pytest
from tiny_models import make_model

from jinfer import LLM, SamplingParams
from jinfer.config.model import RopeConfig

PAGE, CHUNK = 8, 16
MODEL = make_model(211)
LIMITS = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": CHUNK,
    "block_size": PAGE,
    "num_gpu_blocks_override": 96,
    "skip_tokenizer_init": True,
}
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def cold(params):
    return LLM(MODEL, params=params, enable_prefix_caching=False, **LIMITS)


@pytest.fixture(scope="module")
def warm(params):
    return LLM(MODEL, params=params, **LIMITS)


@pytest.fixture
def tight(params):
    return LLM(MODEL, params=params, **{**LIMITS, "num_gpu_blocks_override": 14})


@pytest.fixture(autouse=True)
def engine_is_whole(request):
    if "warm" in request.fixturenames:
        request.getfixturevalue("warm").reset_prefix_cache()
    yield
    if "warm" in request.fixturenames:
        llm = request.getfixturevalue("warm")
        while llm.loop.engine.has_work():
            llm.step()
        llm.check_integrity()
        metrics = llm.get_metrics()
        assert metrics["num_free_pages"] + metrics["num_cached_pages"] == metrics["num_pages"]


def make_prompt(seed, length):
    return np.random.default_rng(seed).integers(1, 211, length).tolist()


def run(llm, prompts, params=GREEDY):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [o.outputs[0].token_ids for o in outputs], [o.num_cached_tokens for o in outputs]


LENGTHS = sorted({k * n + d for k in (1, 2, 3) for n in (PAGE, CHUNK) for d in (-1, 0, 1)})


def test_warm_tokens_are_cold_tokens_around_every_multiple_of_page_and_chunk(cold, warm):
    prompts = [[i, *make_prompt(n, n - 1)] for i, n in enumerate(LENGTHS)]
    expected = [run(cold, [prompt]) for prompt in prompts]
    assert all(cached == [0] for _, cached in expected)
    for prompt, (tokens, _) in zip(prompts, expected):
        assert run(warm, [prompt]) == (tokens, [0])
        assert run(warm, [prompt]) == (tokens, [len(prompt) - 1])
    # All of them at once, with other chunk borders because of their batch mates.
    tokens, cached = run(warm, prompts)
    assert tokens == [first for ([first], _) in expected]
    assert cached == [length - 1 for length in LENGTHS]


def test_texts_that_part_anywhere_in_a_page_have_the_tokens_of_a_cold_run(cold, warm):
    known = make_prompt(70, 3 * PAGE)
    run(warm, [known])
    before = warm.get_metrics()["num_copied_pages"]
    for num_shared in range(PAGE - 1, 2 * CHUNK):
        own = [1 + known[num_shared] % 210] if num_shared < len(known) else []
        text = known[:num_shared] + own + make_prompt(num_shared, 4)
        tokens, cached = run(warm, [text])
        assert cached == [min(num_shared, len(known))]
        assert run(cold, [text])[0] == tokens
        warm.reset_prefix_cache()
        run(warm, [known])
    assert warm.get_metrics()["num_copied_pages"] - before > PAGE


@pytest.mark.slow  # compiles an engine each; that scales are copied, test_kv_pages shows
@pytest.mark.parametrize("dtype", ["int8", "fp8", "int4"])
def test_copies_bring_the_scales_of_quantized_pages_along(params, dtype):
    llm = LLM(MODEL, params=params, kv_cache_dtype=dtype, **LIMITS)
    cold = SamplingParams(temperature=0, max_tokens=6, skip_reading_prefix_cache=True)
    prompts = [make_prompt(80 + n, n) for n in (PAGE - 1, PAGE + 5, CHUNK)]
    expected = run(llm, prompts, cold)
    assert expected[1] == [0, 0, 0]
    assert run(llm, prompts) == (expected[0], [len(prompt) - 1 for prompt in prompts])


def test_a_sample_that_comes_later_copies_the_page_that_another_goes_on_in(cold, warm):
    prompt = make_prompt(90, PAGE + 5)
    many = SamplingParams(temperature=1.0, seed=2, max_tokens=12)
    [[expected], _] = run(cold, [prompt], many)
    warm.add_request("first", prompt, many)
    for name in ("second", "third"):
        warm.step()
        warm.add_request(name, prompt, many)
    outputs = [output for _ in range(40) for output in warm.step() if output.finished]
    assert [output.num_cached_tokens for output in outputs] == [0, *[len(prompt) - 1] * 2]
    assert [output.outputs[0].token_ids for output in outputs] == [expected] * 3


def test_warm_logprobs_are_cold_logprobs_up_to_rounding(cold, warm):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=-1)
    for length in (CHUNK, CHUNK + 1, 3 * PAGE):
        prompt = make_prompt(50 + length, length)
        run(warm, [prompt])
        rows = []
        for llm in (cold, warm):
            [output] = llm.generate([prompt], params, use_tqdm=False)
            entries = output.outputs[0].logprobs
            rows.append([[e[t].logprob for t in range(211)] for e in entries])
        assert output.num_cached_tokens > 0
        np.testing.assert_allclose(rows[1], rows[0], atol=1e-5)


def test_the_next_turn_finds_what_was_generated(cold, warm):
    prompt = make_prompt(1, 13)
    params = SamplingParams(temperature=0, max_tokens=15)
    [[answer], _] = run(warm, [prompt], params)
    turn = prompt + answer + make_prompt(2, 5)
    tokens, cached = run(warm, [turn])
    assert cached == [13 + 15 - 1]
    assert run(cold, [turn])[0] == tokens


def test_samples_share_a_prompt_and_have_the_tokens_that_they_have_alone(cold, warm):
    prompt = make_prompt(3, 2 * PAGE + 3)
    params = SamplingParams(temperature=1.0, seed=4, n=3, max_tokens=9)
    before = warm.get_metrics()["num_scheduled_tokens"]
    outputs = [llm.generate([prompt], params, use_tqdm=False)[0].outputs for llm in (cold, warm)]
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]
    # The prompt once, its last 3 tokens twice more, and 8 decodes of each sample.
    num_computed = warm.get_metrics()["num_scheduled_tokens"] - before
    assert num_computed == len(prompt) + 2 * 3 + 3 * 8


@pytest.mark.thorough
def test_many_prompts_with_one_beginning_in_a_small_pool(cold, tight):
    shared = make_prompt(5, 3 * CHUNK)
    prompts = [shared + make_prompt(6 + i, 1 + 2 * i) for i in range(10)]
    several = SamplingParams(temperature=0, max_tokens=12)
    tokens, cached = run(tight, prompts, several)
    assert tokens == run(cold, prompts, several)[0]
    metrics = tight.get_metrics()
    assert metrics["num_evicted_pages"] > 0
    assert sum(cached) == metrics["num_cached_tokens"] >= 6 * len(shared)
    num_prompt_tokens = sum(map(len, prompts))
    assert metrics["prefix_cache_hit_rate"] == sum(cached) / num_prompt_tokens > 0.5
    tight.check_integrity()


def test_preempted_requests_take_their_pages_up_again(cold, tight):
    prompts = [make_prompt(20 + i, 10 + i) for i in range(5)]
    long = SamplingParams(temperature=0, max_tokens=40)
    tokens, _ = run(tight, prompts, long)
    assert tokens == run(cold, prompts, long)[0]
    metrics = tight.get_metrics()
    assert metrics["num_preemptions"] > 0
    everything = sum(map(len, prompts)) + 5 * 39
    assert metrics["num_scheduled_tokens"] < everything + metrics["num_preemptions"] * 40
    tight.check_integrity()


def test_new_weights_drop_the_cache(warm, params):
    prompt = make_prompt(30, 3 * PAGE)
    other = MODEL.init(jax.random.key(1))
    [old], _ = run(warm, [prompt])
    warm.add_request("under way", prompt, SamplingParams(temperature=0, max_tokens=30))
    warm.step()
    try:
        warm.update_weights(other)
        while warm.has_unfinished_requests():  # leaves nothing of the old weights behind
            warm.step()
        assert warm.get_metrics()["num_cached_pages"] == 0
        [new], cached = run(warm, [prompt])
        assert cached == [0]
        expected = LLM(MODEL, params=other, enable_prefix_caching=False, **LIMITS)
        assert run(expected, [prompt])[0] == [new] != [old]
    finally:
        warm.update_weights(params)
    assert run(warm, [prompt]) == ([old], [0])


def test_prompt_logprobs_are_whole_beside_a_cached_prompt(warm):
    prompt = make_prompt(40, 2 * PAGE)
    run(warm, [prompt])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    [output] = warm.generate([prompt], params, use_tqdm=False)
    assert output.num_cached_tokens == 0
    assert len(output.prompt_logprobs) == len(prompt) and all(output.prompt_logprobs[1:])


def test_a_salt_keeps_prompts_apart_and_skipping_reads_nothing(warm):
    prompt = make_prompt(41, 2 * PAGE + 1)

    def num_cached(salt, params=GREEDY):
        return run(warm, [{"prompt_token_ids": prompt, "cache_salt": salt}], params)[1]

    assert num_cached("a") == num_cached("b") == num_cached(None) == [0]
    assert num_cached("a") == [2 * PAGE]
    skip = SamplingParams(temperature=0, max_tokens=1, skip_reading_prefix_cache=True)
    assert num_cached("a", skip) == [0]
    for salt in ("", 3):
        with pytest.raises(ValueError, match="cache_salt must be a non-empty string"):
            num_cached(salt)
    warm.reset_prefix_cache()
    assert num_cached("a") == [0]


@pytest.mark.parametrize(
    ("scaling", "factors"),
    [("dynamic", {}), ("longrope", {"short_factor": (1.0,) * 4, "long_factor": (3.0,) * 4})],
)
@pytest.mark.thorough
def test_ropes_that_look_at_the_length_share_nothing_beyond_it(scaling, factors):
    rope = RopeConfig(scaling=scaling, factor=4.0, original_max_position=2 * CHUNK, **factors)
    model = make_model(211, rope=rope)
    params = model.init(jax.random.key(2))
    warm, cold = (
        LLM(model, params=params, enable_prefix_caching=is_warm, **LIMITS)
        for is_warm in (True, False)
    )
    prompt = make_prompt(60, 2 * CHUNK)
    many = SamplingParams(temperature=0, max_tokens=12)
    for length, expected in ((20, 0), (32, 20), (29, 28)):
        text = prompt[:length]
        tokens, cached = run(warm, [text], many)
        assert cached == [expected]
        assert run(cold, [text], many)[0] == tokens
    longer = prompt + make_prompt(61, 9)
    tokens, cached = run(warm, [longer], many)
    assert cached == [0] and run(cold, [longer], many)[0] == tokens
