"""Several callers of one LLM: each gets its own outputs, whoever runs the steps."""

import threading

import jax
import numpy as np
import pytest
from tiny_models import make_model

from jinfer import LLM, SamplingParams
from jinfer.engine.engine import Engine
from jinfer.engine.pages.holdings import Holdings
from jinfer.engine.scheduler import Scheduler

VOCAB = 199
MODEL = make_model(VOCAB)
LIMITS = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "num_gpu_blocks_override": 24,
    "skip_tokenizer_init": True,
}
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


def make_prompt(seed, length):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


PROMPTS = [make_prompt(i, n) for i, n in enumerate((3, 9, 21, 30))]


@pytest.fixture(scope="module")
def make_llm():
    params = MODEL.init(jax.random.key(0))
    return lambda **options: LLM(MODEL, params=params, **{**LIMITS, **options})


@pytest.fixture(scope="module")
def alone(make_llm):
    llm = make_llm()
    return [tokens_of(llm, prompt) for prompt in PROMPTS]


@pytest.fixture
def llm(make_llm):
    llm = make_llm()
    yield llm
    assert not llm.has_unfinished_requests() and not llm.client.num_open
    while llm.loop.engine.has_work():
        llm.step()
    llm.check_integrity()
    assert llm.get_metrics()["num_running"] == llm.get_metrics()["num_waiting"] == 0


def tokens_of(llm, prompt):
    return llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def read(stream):
    return [token for delta in stream for token in delta.outputs[0].token_ids]


def test_streams_can_be_read_in_turns(llm, alone):
    streams = [llm.stream([prompt], GREEDY) for prompt in PROMPTS]
    found = [[] for _ in PROMPTS]
    for deltas in zip(*streams, strict=True):
        for tokens, delta in zip(found, deltas):
            tokens += delta.outputs[0].token_ids
    assert found == alone


def test_generate_may_be_called_between_the_deltas_of_a_stream(llm, alone):
    found = []
    for delta in llm.stream(PROMPTS[0], GREEDY):
        found += delta.outputs[0].token_ids
        assert tokens_of(llm, PROMPTS[2]) == alone[2]
    assert found == alone[0]


def test_step_leaves_a_stream_what_is_its_own(llm, alone):
    stream = llm.stream(PROMPTS[0], GREEDY)
    found = next(stream).outputs[0].token_ids
    llm.add_request("mine", PROMPTS[1], GREEDY)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert {output.request_id for output in outputs} == {"mine"}
    assert outputs[-1].outputs[0].token_ids == alone[1]
    assert [*found, *read(stream)] == alone[0]


def test_nothing_comes_of_an_aborted_request(llm, alone):
    for name, prompt in zip("ab", PROMPTS):
        llm.add_request(name, prompt, GREEDY)
    assert tokens_of(llm, PROMPTS[2]) == alone[2]
    llm.abort("a")
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert {output.request_id for output in outputs} == {"b"}
    assert outputs[-1].outputs[0].token_ids == alone[1]


def test_threads_take_turns(llm, alone):
    found = [[] for _ in PROMPTS]

    def generate(i):
        for _ in range(3):
            found[i].append(tokens_of(llm, PROMPTS[i]))
            found[i].append(read(llm.stream(PROMPTS[i], GREEDY)))

    threads = [threading.Thread(target=generate, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == [[tokens] * 6 for tokens in alone]


@pytest.mark.parametrize("owner, name", [(Holdings, "take"), (Scheduler, "commit")])
def test_a_stream_may_be_collected_in_the_middle_of_a_step(llm, alone, monkeypatch, owner, name):
    """As Python does with what hangs in a cycle: whenever anything is allocated."""
    streams = [llm.stream([make_prompt(9 + i, 14)], GREEDY) for i in range(2)]
    for stream in streams:
        next(stream)
    method = getattr(owner, name)

    def collect_and_call(*args, **fields):
        if streams:
            streams.pop().close()
        return method(*args, **fields)

    monkeypatch.setattr(owner, name, collect_and_call)
    assert [tokens_of(llm, prompt) for prompt in PROMPTS] == alone
    assert not streams


def test_whose_requests_are_aborted_by_others_is_told(llm, monkeypatch):
    step = Engine.step

    def abort_and_step(engine):
        llm.abort("generate-0")
        return step(engine)

    monkeypatch.setattr(Engine, "step", abort_and_step)
    with pytest.raises(RuntimeError, match="aborted"):
        tokens_of(llm, PROMPTS[0])


def test_samples_with_prompt_logprobs_compute_the_prompt_once(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=2, ignore_eos=True, prompt_logprobs=1)
    [output] = llm.generate([PROMPTS[3]], params, use_tqdm=False)
    assert len(output.prompt_logprobs) == len(PROMPTS[3])
    # 30 tokens once, the last one of each other sample, and what the first token leads to.
    assert llm.get_metrics()["num_scheduled_tokens"] < 2 * len(PROMPTS[3])
