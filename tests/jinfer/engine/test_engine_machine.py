"""Any order of events on the real engine: each request has the tokens that it has alone.

Greedy, in float32, on a tiny model; a step holds 16 tokens, so that few programs are compiled.
"""

import collections
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_models import make_model

from jinfer import LLM, SamplingParams
from jinfer.engine.device.host_pages import HostPages
from jinfer.engine.device.runner import Runner
from jinfer.engine.pages.costs import TransferCosts
from jinfer.engine.pages.holdings import Holdings
from jinfer.engine.pages.pool import PagePool
from jinfer.engine.safety import recovery

NUM_HOST_PAGES = 10
POISON = 1  # the token whose embedding is NaN
MODEL = make_model(151, max_position_embeddings=64)
LIMITS = {
    "max_model_len": 48,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "skip_tokenizer_init": True,
    "num_decode_steps": 2,
}
# Prompts of every kind of length, which begin alike in part.
TEXT = [int(x) for x in jax.random.randint(jax.random.key(1), (60,), 2, 151)]
PROMPTS = [TEXT[:n] for n in (1, 4, 7, 8, 9, 17, 24)] + [TEXT[:10] + TEXT[40:46], TEXT[20:33]]


@pytest.fixture(scope="module")
def engines():
    """(an engine with 14 pages, tokens of each prompt run alone, one with a host tier as well)."""
    params = MODEL.init(jax.random.key(0))
    embed = params["embed"]["w"].at[POISON].set(jnp.nan)
    head = {"w": params["embed"]["w"].T}
    params = {**params, "embed": {"w": embed}, "lm_head": params.get("lm_head", head)}
    llm = LLM(MODEL, params=params, num_gpu_blocks_override=14, **LIMITS)
    page_bytes = llm.loop.engine.runner.kv_bytes // 14
    tiered = LLM(
        MODEL,
        params=params,
        num_gpu_blocks_override=14,
        cpu_offload_gb=NUM_HOST_PAGES * page_bytes / 2**30,
        **LIMITS,
    )
    tiered.loop.engine.tier.costs = TransferCosts(LIMITS["block_size"], token_s=1.0)
    alone = []
    for prompt in PROMPTS:
        llm.reset_prefix_cache()
        [output] = llm.generate([prompt], make_params(24), use_tqdm=False)
        alone.append(output.outputs[0].token_ids)
    return llm, alone, tiered


def make_params(max_tokens, n=1):
    """Greedy; n > 1 wants a temperature, and the best token alone is greedy, too."""
    return SamplingParams(
        temperature=0 if n == 1 else 1,
        top_k=1,
        n=n,
        max_tokens=max_tokens,
        ignore_eos=True,
        logit_bias={POISON: -100},
    )


class Machine(RuleBasedStateMachine):
    """Requests come, go on, are aborted, preempted, sent back, evicted; steps fail."""

    llm: ClassVar[LLM]
    alone: ClassVar[list]
    counts: ClassVar = collections.Counter()
    num_added: ClassVar = 0

    def __init__(self):
        super().__init__()
        self.llm.reset_prefix_cache()
        self.live = {}

    @property
    def scheduler(self):
        return self.llm.loop.engine.scheduler

    @rule(
        prompts=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=4),
        max_tokens=st.sampled_from([1, 2, 5, 24]),
        n=st.sampled_from([1, 1, 2]),
        priority=st.integers(0, 1),
    )
    def add(self, prompts, max_tokens, n, priority):
        for idx in prompts:
            params = make_params(max_tokens, n)
            self.submit(PROMPTS[idx], params, self.alone[idx][:max_tokens], priority)

    @rule(idx=st.integers(0, len(PROMPTS) - 1), at=st.integers(0, 99))
    def add_poisoned(self, idx, at):
        prompt = list(PROMPTS[idx])
        prompt[at % len(prompt)] = POISON
        self.submit(prompt, make_params(5), None, 0)

    def submit(self, prompt, params, expected, priority):
        Machine.num_added += 1
        request_id = str(Machine.num_added)
        self.llm.add_request(request_id, prompt, params, priority=priority)
        self.live[request_id] = expected

    @rule(n=st.integers(1, 8))
    def steps(self, n):
        for _ in range(n):
            self.step()

    def step(self):
        for output in self.llm.step():
            if output.finished:
                expected = self.live.pop(output.request_id)
                for completion in output.outputs:
                    if "steps that failed" in (completion.error or ""):
                        assert f"part of {recovery.MAX_FAILED_STEPS} steps" in completion.error
                        self.counts["blamed"] += 1
                    elif expected is None:
                        assert completion.finish_reason == "error" and "NaN" in completion.error
                        self.counts["errors"] += 1
                    else:
                        assert completion.token_ids == expected
                        self.counts["finished"] += 1

    @precondition(lambda self: self.live)
    @rule(i=st.integers(0, 99))
    def abort(self, i):
        request_id = list(self.live)[i % len(self.live)]
        self.llm.abort(request_id)
        del self.live[request_id]

    @precondition(lambda self: self.scheduler.num_running)
    @rule()
    def preempt(self):
        self.scheduler._preempt(self.scheduler.running[-1])

    @rule(n=st.integers(1, 6))
    def evict(self, n):
        prefix = self.scheduler.prefix
        prefix.free(prefix.alloc(min(n, prefix.num_available)))

    @rule()
    def reset(self):
        self.llm.reset_prefix_cache()

    @precondition(lambda self: self.scheduler.has_work())
    @rule(name=st.sampled_from(["launch", "fetch"]))
    def fail(self, name):
        method = getattr(Runner, name)

        def broken(runner, arg):
            setattr(Runner, name, method)
            raise RuntimeError("out of memory")

        setattr(Runner, name, broken)
        try:
            self.step()
        finally:
            setattr(Runner, name, method)

    @invariant()
    def books_are_whole(self):
        self.llm.check_integrity()

    def teardown(self):
        for _ in range(2000):
            if not self.llm.loop.engine.has_work():
                break
            self.step()
        assert not self.live and not self.llm.loop.engine.has_work()
        self.llm.check_integrity()
        metrics = self.llm.get_metrics()
        assert metrics["num_free_pages"] + metrics["num_cached_pages"] == metrics["num_pages"]


def run_machine(llm, alone, max_examples, step_count):
    Machine.llm, Machine.alone = llm, alone
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=step_count,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),  # one engine for all examples: its ids and seeds go on
            print_blob=False,
        ),
    )


@pytest.mark.parametrize(
    ("max_examples", "step_count"), [(12, 25), pytest.param(250, 50, marks=pytest.mark.slow)]
)
def test_in_any_order_of_events_each_request_has_its_own_tokens(engines, max_examples, step_count):
    llm, alone, _ = engines
    gained = run_and_count(llm, alone, max_examples, step_count)
    assert Machine.counts["finished"] > 5 * max_examples // 2 and Machine.counts["errors"] > 3
    for name in ("preemptions", "cached_tokens", "copied_pages", "evicted_pages", "failed_steps"):
        assert gained[f"num_{name}"] > 3, name


@pytest.mark.parametrize(
    ("max_examples", "step_count"), [(12, 25), pytest.param(250, 50, marks=pytest.mark.slow)]
)
def test_the_same_with_pages_that_come_and_go_between_device_and_host(
    engines, max_examples, step_count
):
    _, alone, tiered = engines
    gained = run_and_count(tiered, alone, max_examples, step_count)
    assert Machine.counts["finished"] > 2 * max_examples
    for name in ("num_loaded_pages", "num_swaps", "num_host_dropped_pages"):
        assert gained[name] > 1, name


def run_and_count(llm, alone, max_examples, step_count):
    Machine.counts.clear()
    before = llm.get_metrics()
    run_machine(llm, alone, max_examples, step_count)
    return {name: value - before[name] for name, value in llm.get_metrics().items()}


# Each of these is sure to be met by two requests that share a beginning and outgrow 14 pages.


def scenario(llm, alone):
    ids = (6, 6, 5, 4)
    outputs = llm.generate([PROMPTS[i] for i in ids], make_params(24), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [alone[i] for i in ids]
    llm.check_integrity()


def a_page_freed_twice(monkeypatch):
    free = PagePool.free
    monkeypatch.setattr(PagePool, "free", lambda self, p: (free(self, p), free(self, p[:1])))


def a_reference_not_counted(monkeypatch):
    monkeypatch.setattr(PagePool, "fork", lambda self, pages: list(pages))


def a_page_border_off_by_one(monkeypatch):
    missing = Holdings.num_missing_pages

    def one_too_few(self, request, num_steps):
        return missing(self, request, num_steps - 1) if num_steps > 1 else 0

    monkeypatch.setattr(Holdings, "num_missing_pages", one_too_few)


@pytest.mark.parametrize(
    "mutate", [a_page_freed_twice, a_reference_not_counted, a_page_border_off_by_one]
)
def test_a_seeded_bug_is_seen(engines, mutate, monkeypatch):
    llm, alone, _ = engines
    scenario(llm, alone)
    broken = LLM(MODEL, params=llm.loop.engine.runner.params, num_gpu_blocks_override=14, **LIMITS)
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        scenario(broken, alone)


def saves_left_out(monkeypatch):
    monkeypatch.setattr(HostPages, "save", lambda self, kv, moves: None)


def saves_after_the_step(monkeypatch):
    launch = Runner.launch

    def launch_first(self, plan):
        moves = dataclasses.replace(plan.moves, saved=())
        launched = launch(self, dataclasses.replace(plan, moves=moves))
        self.host.save(self.kv, plan.moves.saved)
        return dataclasses.replace(launched, plan=plan)

    monkeypatch.setattr(Runner, "launch", launch_first)


def loads_left_out(monkeypatch):
    monkeypatch.setattr(HostPages, "load", lambda self, kv, moves: kv)


@pytest.mark.parametrize("mutate", [saves_left_out, saves_after_the_step, loads_left_out])
def test_a_seeded_bug_of_the_host_tier_is_seen(engines, mutate, monkeypatch):
    _, alone, tiered = engines
    for _ in range(2):
        tiered.reset_prefix_cache()
        scenario(tiered, alone)
    mutate(monkeypatch)
    tiered.reset_prefix_cache()
    runner = tiered.loop.engine.runner
    runner.host = HostPages(NUM_HOST_PAGES, runner.placement)
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        for _ in range(2):
            scenario(tiered, alone)
    while tiered.loop.engine.has_work():
        tiered.step()
