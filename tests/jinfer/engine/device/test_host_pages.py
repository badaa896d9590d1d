"""`cpu_offload_gb`: pages come back from the host, and tokens are those of a cold run."""

import logging

import jax
import numpy as np
import pytest
from tiny_models import make_model

from jinfer import LLM, BeamSearchParams, SamplingParams
from jinfer.engine.pages.costs import TransferCosts

PAGE, CHUNK, NUM_HOST_PAGES = 8, 16, 60
MODEL = make_model(211)
WINDOWED = make_model(211, sliding_window=12, layer_types=("sliding", "full"))
PAGE_BYTES = 2 * 2 * 2 * 8 * 4 * PAGE  # K and V, layers, heads, width, f32, tokens
LIMITS = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": CHUNK,
    "block_size": PAGE,
    "num_gpu_blocks_override": 14,
    "skip_tokenizer_init": True,
}
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def cold(params):
    return LLM(MODEL, params=params, enable_prefix_caching=False, **LIMITS)


def make_tiered(params, *, model=MODEL, **costs):
    llm = LLM(model, params=params, cpu_offload_gb=NUM_HOST_PAGES * PAGE_BYTES / 2**30, **LIMITS)
    llm.loop.engine.tier.costs = TransferCosts(PAGE, **{"token_s": 1.0, **costs})
    return llm


@pytest.fixture(scope="module")
def tiered(params):
    return make_tiered(params)


def make_prompt(seed, length):
    return np.random.default_rng(seed).integers(1, 211, length).tolist()


PROMPTS = [make_prompt(i, 17 + 5 * i) for i in range(9)]  # 37 whole pages


def run(llm, prompts, params=GREEDY):
    before = llm.get_metrics()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.check_integrity()
    gained = {name: value - before[name] for name, value in llm.get_metrics().items()}
    return [o.outputs[0].token_ids for o in outputs], gained


def test_prompts_beyond_the_pool_come_back_from_the_host(cold, tiered):
    expected, _ = run(cold, PROMPTS)
    tiered.reset_prefix_cache()
    tokens, first = run(tiered, PROMPTS)
    assert tokens == expected and first["num_cached_tokens"] == 0
    tokens, second = run(tiered, PROMPTS)
    assert tokens == expected
    assert second["num_loaded_pages"] > 20 and second["num_host_hits"] > 5
    assert second["loaded_bytes"] == second["num_loaded_pages"] * PAGE_BYTES
    found = sum((len(prompt) - 1) // PAGE * PAGE for prompt in PROMPTS)
    assert second["num_cached_tokens"] == found  # all that can be
    assert second["num_scheduled_tokens"] == first["num_scheduled_tokens"] - found
    assert second["num_compilations"] == 0
    tiered.reset_prefix_cache()
    assert run(tiered, PROMPTS[:1])[1]["num_cached_tokens"] == 0
    tiered.loop.engine.lose_steps()
    tokens, third = run(tiered, PROMPTS)
    assert tokens == expected and third["num_compilations"] == 0


@pytest.mark.parametrize("load_s", [0, 1e9])
def test_preempted_requests_swap_or_are_computed_again_with_the_same_tokens(cold, params, load_s):
    prompts = [make_prompt(20 + i, 10 + i) for i in range(5)]
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    tokens, gained = run(make_tiered(params, load_s=load_s), prompts, long)
    assert tokens == run(cold, prompts, long)[0]
    assert gained["num_preemptions"] > 0
    assert (gained["num_swaps"] > 0, gained["num_recomputes"] > 0) == (load_s == 0, load_s > 0)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_quantized_pages_and_windows_come_back_as_they_were(params, kv, monkeypatch):
    monkeypatch.setitem(LIMITS, "kv_cache_dtype", kv)
    tokens, _ = run(LLM(WINDOWED, params=params, enable_prefix_caching=False, **LIMITS), PROMPTS)
    llm = make_tiered(params, model=WINDOWED)
    assert run(llm, PROMPTS)[0] == tokens
    again, gained = run(llm, PROMPTS)
    assert again == tokens and gained["num_loaded_pages"] > 20


def test_beams_find_pages_on_the_host(cold, tiered):
    tiered.reset_prefix_cache()
    beams = BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
    run(tiered, PROMPTS)
    before = tiered.get_metrics()["num_loaded_pages"]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:4]]
    outputs = [llm.beam_search(prompts, beams, use_tqdm=False) for llm in (cold, tiered)]
    texts = [[[s.tokens for s in output.sequences] for output in found] for found in outputs]
    assert texts[0] == texts[1]
    assert tiered.get_metrics()["num_loaded_pages"] > before
    tiered.check_integrity()


def test_costs_are_measured_and_the_size_is_logged(params, caplog):
    with caplog.at_level(logging.INFO, logger="jinfer"):
        llm = LLM(MODEL, params=params, cpu_offload_gb=0.001, **LIMITS)
    [line] = [r.message for r in caplog.records if "host tier" in r.message]
    assert line.startswith(f"host tier: {int(0.001 * 2**30) // PAGE_BYTES} pages of 8 tokens")
    costs = llm.loop.engine.tier.costs
    assert costs.load_page_s > 0 and costs.save_page_s > 0 and costs.token_s is None
    run(llm, PROMPTS)
    assert 0 < costs.token_s < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpu_offload_gb": -1}, "between 0 and this machine's memory"),
        ({"cpu_offload_gb": 1e6}, "between 0 and this machine's memory"),
        ({"cpu_offload_gb": 1e-9}, "no room for one page"),
        ({"cpu_offload_gb": 0.1, "enable_prefix_caching": False}, "needs enable_prefix_caching"),
    ],
)
def test_sizes_that_cannot_be_are_refused(params, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(MODEL, params=params, **LIMITS, **options)
