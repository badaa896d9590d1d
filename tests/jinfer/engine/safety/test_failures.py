"""Errors of one request or step do not affect other requests and leave no inconsistent page."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import byte_tokenizer, make_model

from jinfer import LLM, SamplingParams
from jinfer.engine import engine as core
from jinfer.engine.device.runner import Runner
from jinfer.engine.pages.holdings import Holdings
from jinfer.engine.pages.pool import PagePool
from jinfer.engine.pages.prefix import PrefixCache
from jinfer.engine.request import Request
from jinfer.engine.safety import recovery, watchdog
from jinfer.engine.safety.watchdog import Watchdog
from jinfer.engine.scheduler import Scheduler
from jinfer.speculation.ngram import NgramIndex
from jinfer.text.detokenizer import Detokenizer

POISON = 13  # the token whose embedding is NaN
NAMESPACE = ("float32", None)
MODEL = make_model(199)
LIMITS = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "num_gpu_blocks_override": 40,
    "skip_tokenizer_init": True,
}
NGRAM = {"method": "ngram", "adaptive": False}
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(0))
    embed = params["embed"]["w"].at[POISON].set(jnp.nan)
    head = params.get("lm_head") or {"w": params["embed"]["w"].T}
    return {**params, "embed": {**params["embed"], "w": embed}, "lm_head": head}


@pytest.fixture(scope="module")
def make_llm(params):
    return lambda **options: LLM(MODEL, params=params, **{**LIMITS, **options})


def make_prompt(seed, length):
    return np.random.default_rng(seed).integers(20, 199, length).tolist()


PROMPTS = [make_prompt(i, n) for i, n in enumerate((3, 9, 21, 30, 17))]


@pytest.fixture(scope="module")
def alone(make_llm):
    llm = make_llm(enable_prefix_caching=False)
    return [llm.generate([p], GREEDY, use_tqdm=False)[0].outputs[0].token_ids for p in PROMPTS]


def run(llm, prompts, params=GREEDY):
    return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


def check_whole(llm):
    while llm.loop.engine.has_work():
        llm.step()
    llm.check_integrity()
    metrics = llm.get_metrics()
    assert metrics["num_free_pages"] + metrics["num_cached_pages"] == metrics["num_pages"]
    assert not metrics["num_running"] and not metrics["num_waiting"]


def launch(llm):
    """Dispatches a step that nobody has fetched yet."""
    engine = llm.loop.engine
    llm.loop.call(lambda: engine.in_flight.append(engine.runner.launch(engine.scheduler.plan())))


def check_no_nan_is_left(llm):
    run(llm, [make_prompt(99, 2)])  # its first step clears what was spoilt
    for pool in jax.tree.leaves(llm.loop.engine.runner.pool.kv):
        assert np.isfinite(np.asarray(pool)).all()


# ---------------------------------------------------------------------- NaN


@pytest.mark.parametrize("num_decode_steps", [1, 4])
@pytest.mark.parametrize("place", [0, 5, 20, 29])
def test_nan_in_a_prompt_ends_that_request_alone(make_llm, alone, place, num_decode_steps):
    llm = make_llm(num_decode_steps=num_decode_steps)
    bad = make_prompt(50, 30)
    bad[place] = POISON
    for _ in range(2):
        *good, error = run(llm, [*PROMPTS, bad])
        assert [output.token_ids for output in good] == alone
        assert error.finish_reason == "error" and not error.token_ids
        assert "NaN" in error.error and "/0" in error.error
        check_whole(llm)
        # Whole pages before the chunk that failed are sound, and stay; none of the others does.
        found = llm.loop.engine.scheduler.prefix.find(NAMESPACE, bad, 99)
        assert len(found) <= place // 8
    assert llm.get_metrics()["num_errors"] == 2
    check_no_nan_is_left(llm)


@pytest.mark.parametrize("num_decode_steps", [1, 4])
def test_nan_while_decoding_ends_that_request_alone(make_llm, alone, num_decode_steps):
    llm = make_llm(num_decode_steps=num_decode_steps)
    to_poison = SamplingParams(temperature=0, max_tokens=9, logit_bias={POISON: 1e6})
    bad = make_prompt(51, 12)
    outputs = run(llm, [*PROMPTS[:2], bad, *PROMPTS[2:]], [GREEDY] * 2 + [to_poison] + [GREEDY] * 3)
    error = outputs.pop(2)
    assert [output.token_ids for output in outputs] == alone
    assert error.finish_reason == "error" and set(error.token_ids) <= {POISON}
    check_whole(llm)
    assert len(llm.loop.engine.scheduler.prefix.find(NAMESPACE, [*bad, POISON, 0, 0, 0], 99)) == 1
    check_no_nan_is_left(llm)


@pytest.mark.parametrize("length", [5, 12, 24])
def test_a_request_aborted_during_its_step_leaves_no_nan_behind(make_llm, length):
    llm = make_llm()
    bad = make_prompt(52, length)
    bad[2] = POISON
    llm.add_request("bad", bad, GREEDY)
    launch(llm)
    llm.abort("bad")
    engine = llm.loop.engine
    llm.check_integrity()
    assert len(engine.scheduler.prefix.find(NAMESPACE, bad, 99)) == min(length, 16) // 8
    check_whole(llm)
    assert not engine.scheduler.prefix.find(NAMESPACE, bad, 99)
    check_no_nan_is_left(llm)


def test_pages_with_a_new_owner_are_not_cleared(make_llm, alone):
    """The step of a request that is aborted, and its pages another one's, when it turns out bad."""
    llm = make_llm()
    bad = make_prompt(52, 16)
    bad[7] = POISON
    llm.add_request("bad", bad, GREEDY)
    launch(llm)
    engine = llm.loop.engine
    [request] = engine.scheduler.running
    pages = set(request.pages)
    llm.abort("bad")
    llm.reset_prefix_cache()
    llm.add_request("good", PROMPTS[0], GREEDY)
    launch(llm)
    [request] = engine.scheduler.running
    assert set(request.pages) < pages
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert outputs[0].outputs[0].token_ids == alone[0]
    check_whole(llm)


def test_a_request_that_shares_the_beginning_of_a_bad_prompt_does_not_fail(make_llm):
    """NaN at one place reaches the whole chunk, and in the same step all readers of its pages."""
    llm = make_llm()
    good = [[*make_prompt(55, 24)[:23], i] for i in (30, 31)]
    expected = [output.token_ids for output in run(llm, good)]
    llm.reset_prefix_cache()
    bad = [*good[0][:20], POISON, 40]
    for shared in (good, good[::-1]):
        error, *outputs = run(llm, [bad, *shared])
        assert error.finish_reason == "error"
        assert [o.token_ids for o in outputs] == (expected if shared is good else expected[::-1])
        check_whole(llm)
    assert llm.get_metrics()["num_errors"] == 2
    check_no_nan_is_left(llm)


def test_nan_weights_end_every_request_and_the_engine_goes_on(make_llm, params, alone):
    llm = make_llm()
    nan = jax.tree.map(lambda x: x * jnp.nan, params)
    llm.update_weights(nan)
    assert {output.finish_reason for output in run(llm, PROMPTS)} == {"error"}
    check_whole(llm)
    assert llm.get_metrics()["num_cached_pages"] == 0
    llm.update_weights(params)
    assert [output.token_ids for output in run(llm, PROMPTS)] == alone


# ---------------------------------------------------------------------- failed steps


class Fault:
    """Makes the n-th call of a method of the runner fail, or every call that `applies`."""

    def __init__(self, monkeypatch, name, nth=None, applies=None, error=RuntimeError):
        method = getattr(Runner, name)
        self.num_calls = self.num_faults = 0

        def call(runner, arg):
            self.num_calls += 1
            plan = arg if name == "launch" else arg.plan
            if self.num_calls == nth or (applies is not None and applies(plan)):
                self.num_faults += 1
                for leaf in jax.tree.leaves(runner.pool):
                    leaf.delete()  # as a failed call leaves what was donated to it
                raise error("RESOURCE_EXHAUSTED: out of memory\nand more lines")
            return method(runner, arg)

        monkeypatch.setattr(Runner, name, call)


@pytest.mark.parametrize("name", ["launch", "fetch"])
@pytest.mark.parametrize("nth", [1, 2, 3, 5, 9])
def test_after_a_failed_step_every_request_goes_on(make_llm, alone, monkeypatch, name, nth):
    llm = make_llm(num_gpu_blocks_override=14)
    fault = Fault(monkeypatch, name, nth)
    assert [output.token_ids for output in run(llm, PROMPTS)] == alone
    assert fault.num_faults == llm.get_metrics()["num_failed_steps"] == 1
    check_whole(llm)


# ---------------------------------------------------------------------- with drafts in the step


def draft_what_comes(monkeypatch, texts, wrong=()):
    """Drafts the tokens that plain decoding gave, with those of `wrong` behind the first."""

    def propose(index, tokens, num_tokens):
        for text in texts:
            if text[: len(tokens)] == tokens:
                true = text[len(tokens) : len(tokens) + num_tokens]
                return [*true[:1], *wrong, *true[1:]][:num_tokens]
        return []

    monkeypatch.setattr(NgramIndex, "propose", propose)


@pytest.mark.parametrize("name", ["launch", "fetch"])
@pytest.mark.parametrize("nth", [2, 4, 5, 6])
@pytest.mark.parametrize("wrong", [(), (21,)], ids=["right", "half wrong"])
def test_after_a_failed_step_with_drafts_every_request_goes_on(
    make_llm, alone, monkeypatch, name, nth, wrong
):
    llm = make_llm(num_gpu_blocks_override=14, speculative_config=NGRAM)
    draft_what_comes(monkeypatch, [[*p, *a] for p, a in zip(PROMPTS, alone)], wrong)
    fault = Fault(monkeypatch, name, nth)
    assert [output.token_ids for output in run(llm, PROMPTS)] == alone
    metrics = llm.get_metrics()
    assert fault.num_faults == metrics["num_failed_steps"] == 1
    assert metrics["num_accepted_tokens"] > 0
    assert (metrics["num_accepted_tokens"] < metrics["num_drafted_tokens"]) == bool(wrong)
    check_whole(llm)


def test_nan_under_verification_ends_that_request_alone(make_llm, alone, monkeypatch):
    """A draft that the model cannot compute; its KV would lie under tokens to come."""
    llm = make_llm(speculative_config=NGRAM)
    bad = [*PROMPTS[1], *alone[1]]
    draft_what_comes(monkeypatch, [bad], wrong=(POISON,))
    outputs = run(llm, PROMPTS)
    error = outputs.pop(1)
    assert [output.token_ids for output in outputs] == [alone[0], *alone[2:]]
    assert error.finish_reason == "error" and "NaN" in error.error
    assert error.token_ids == alone[1][: len(error.token_ids)]
    check_whole(llm)
    check_no_nan_is_left(llm)


def test_an_abort_during_verification_leaves_whole_pages(make_llm, alone, monkeypatch):
    llm = make_llm(speculative_config=NGRAM)
    texts = [[*p, *a] for p, a in zip(PROMPTS, alone)]
    draft_what_comes(monkeypatch, texts, wrong=(21, 22))
    llm.add_request("gone", PROMPTS[1], GREEDY)
    engine = llm.loop.engine
    while not any(seq.num_drafts for launched in engine.in_flight for seq in launched.plan.seqs):
        llm.step()
        plan = llm.loop.call(engine.scheduler.plan)
        if plan is not None:
            launched = llm.loop.call(lambda plan=plan: engine.runner.launch(plan))
            engine.in_flight.append(launched)
    llm.abort("gone")
    check_whole(llm)
    again = run(llm, PROMPTS)
    assert [output.token_ids for output in again] == alone
    check_whole(llm)


@pytest.mark.parametrize("name", ["launch", "fetch"])
def test_a_request_that_breaks_its_steps_fails_alone(make_llm, alone, monkeypatch, name):
    llm = make_llm()
    bad = make_prompt(53, 11)
    fault = Fault(
        monkeypatch,
        name,
        applies=lambda plan: any(seq.request.prompt_token_ids == bad for seq in plan.seqs),
    )
    outputs = run(llm, [*PROMPTS[:2], bad, *PROMPTS[2:]])
    error = outputs.pop(2)
    assert [output.token_ids for output in outputs] == alone
    assert error.finish_reason == "error"
    assert "3 steps that failed, the last with RuntimeError: RESOURCE_EXHAUSTED" in error.error
    assert fault.num_faults == recovery.MAX_FAILED_STEPS
    check_whole(llm)


def test_when_every_step_fails_every_request_ends_by_name(make_llm, monkeypatch):
    llm = make_llm()
    fault = Fault(monkeypatch, "launch", applies=lambda plan: True)
    outputs = run(llm, PROMPTS)
    assert {output.finish_reason for output in outputs} == {"error"}
    assert len({output.error.split()[1] for output in outputs}) == len(PROMPTS)
    assert fault.num_faults <= recovery.MAX_FAILED_STEPS * len(PROMPTS)
    check_whole(llm)


@pytest.mark.parametrize("name", ["launch", "fetch"])
def test_an_interrupt_is_raised_and_blames_no_request(make_llm, alone, monkeypatch, name):
    llm = make_llm()
    Fault(monkeypatch, name, 3, error=KeyboardInterrupt)
    for i, prompt in enumerate(PROMPTS):
        llm.add_request(str(i), prompt, GREEDY)
    done = {}
    with pytest.raises(KeyboardInterrupt):
        while True:
            done |= {o.request_id: o for o in llm.step() if o.finished}
    assert not any(r.num_failed_steps for r in llm.loop.engine.scheduler.requests())
    while llm.has_unfinished_requests():
        done |= {o.request_id: o for o in llm.step() if o.finished}
    assert [done[str(i)].outputs[0].token_ids for i in range(len(PROMPTS))] == alone
    check_whole(llm)


def interrupt(monkeypatch, owner, name, nth):
    """Has the n-th call of a method interrupted, at its very end, and no other."""
    method, num_calls = getattr(owner, name), itertools.count(1)

    def call(*args, **fields):
        result = method(*args, **fields)
        if next(num_calls) == nth:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, call)


HOST_WORK = [
    *((Scheduler, name) for name in ("plan", "commit", "_admit", "_schedule_chunk", "retire")),
    *((Holdings, name) for name in ("take", "fill", "give_back", "take_moves")),
    *((PagePool, name) for name in ("alloc", "fork", "free")),
    (PrefixCache, "_add"),
    (Request, "end"),
    (Detokenizer, "push"),
]


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize(("owner", "name"), HOST_WORK, ids=[name for _, name in HOST_WORK])
def test_an_interrupt_of_the_hosts_own_work_leaves_the_engine_whole(
    make_llm, alone, monkeypatch, owner, name, nth
):
    llm = make_llm(
        num_gpu_blocks_override=14, skip_tokenizer_init=False, tokenizer=byte_tokenizer(199 + 100)
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, owner, name, nth)
        run(llm, PROMPTS)
    check_whole(llm)
    assert [output.token_ids for output in run(llm, PROMPTS)] == alone
    check_whole(llm)


@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize(
    ("owner", "name"), [(Scheduler, "commit"), (Scheduler, "retire"), (Request, "end")]
)
def test_an_interrupt_loses_no_output_of_requests_that_go_on(
    make_llm, alone, monkeypatch, owner, name, nth
):
    llm = make_llm()
    done = {}
    for i, prompt in enumerate(PROMPTS):
        llm.add_request(str(i), prompt, GREEDY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, owner, name, nth)
        while llm.has_unfinished_requests():
            done |= {o.request_id: o for o in llm.step() if o.finished}
    for _ in range(100):
        done |= {o.request_id: o for o in llm.step() if o.finished}
    assert not llm.has_unfinished_requests()
    assert [done[str(i)].outputs[0].token_ids for i in range(len(PROMPTS))] == alone
    check_whole(llm)


def test_an_interrupt_while_the_engine_recovers_from_one_is_survived(make_llm, alone, monkeypatch):
    llm = make_llm()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, Scheduler, "plan", 3)
        interrupt(patch, PagePool, "clear", 1)
        run(llm, PROMPTS)
    assert [output.token_ids for output in run(llm, PROMPTS)] == alone
    check_whole(llm)


# ---------------------------------------------------------------------- requests that are stuck


def test_the_watchdog_names_requests_without_progress(make_llm, caplog):
    llm = make_llm()
    scheduler = llm.loop.engine.scheduler
    clock = [0.0]
    dog = Watchdog(scheduler, now=lambda: clock[0])

    def observe(seconds):
        for _ in range(watchdog.STUCK_AFTER_STEPS):
            clock[0] += seconds / watchdog.STUCK_AFTER_STEPS
            dog.observe()

    llm.add_request("slow", PROMPTS[0], GREEDY)
    llm.add_request("last", PROMPTS[1], GREEDY)
    llm.step()
    observe(watchdog.STUCK_AFTER_S / 2)
    assert not dog.stuck
    for _ in range(2):
        observe(watchdog.STUCK_AFTER_S)
    assert set(dog.stuck) == {"slow/0", "last/0"}
    assert "'slow/0', running" in dog.stuck["slow/0"] and "pages" in dog.stuck["slow/0"]
    assert caplog.text.count("'slow/0'") == 1
    llm.step()
    observe(watchdog.STUCK_AFTER_S / 4)
    assert not dog.stuck
    check_whole(llm)


def test_a_queue_that_cannot_advance_ends_with_an_error(make_llm, monkeypatch):
    llm = make_llm()
    pages = llm.loop.engine.scheduler.prefix.alloc(38)  # somebody else's
    [error] = run(llm, [make_prompt(54, 30)])
    assert error.finish_reason == "error" and "no step can be planned" in error.error
    assert core.MAX_IDLE_STEPS > 1
    llm.loop.engine.scheduler.prefix.free(pages)
    check_whole(llm)
