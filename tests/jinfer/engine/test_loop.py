"""The thread that owns an engine: nobody waits for a step but who wants its outputs."""

import asyncio
import contextlib
import contextvars
import gc
import io
import pdb
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from tiny_models import byte_tokenizer, make_config, make_model

from jinfer import LLM, AsyncLLM, QueueFullError, RequestOutputKind, SamplingParams
from jinfer.engine.engine import Engine
from jinfer.engine.loop import LoopState
from jinfer.engine.scheduler import Scheduler
from jinfer.models.model import Model
from jinfer.text.detokenizer import Detokenizer
from pallas_kernels import compat, dispatch, target

HELPERS = Path(__file__).resolve().parents[2] / "helpers"
VOCAB = 300
MODEL = make_model(VOCAB)
LIMITS = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "num_gpu_blocks_override": 40,
}
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
PROMPT = [5, 17, 3]
TIMEOUT_S = 60


class GatedModel(Model):
    """Its steps wait in the middle while the gate is shut."""

    gate: ClassVar = threading.Event()
    waits: ClassVar = threading.Event()  # whether a step does

    def unembed(self, params, hidden):
        logits = super().unembed(params, hidden)

        def wait(x):
            if not self.gate.is_set():
                self.waits.set()
                assert self.gate.wait(TIMEOUT_S)
            return x

        return jax.pure_callback(wait, jax.ShapeDtypeStruct(logits.shape, logits.dtype), logits)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def make_llm(params):
    def make(model=MODEL, **options):
        return LLM(model, params=params, tokenizer=byte_tokenizer(VOCAB), **{**LIMITS, **options})

    return make


@pytest.fixture(scope="module")
def shared(make_llm):
    return make_llm()


@pytest.fixture
def llm(shared):
    yield shared
    shared.check_integrity()
    metrics = shared.get_metrics()
    assert not metrics["num_running"] and not metrics["num_waiting"]
    assert not shared.client.num_open


@pytest.fixture(scope="module")
def expected(shared):
    return tokens_of(shared.generate([PROMPT], GREEDY, use_tqdm=False)[0])


@pytest.fixture(scope="module")
def gated_llm(make_llm):
    return make_llm(GatedModel(make_config(VOCAB)))


@pytest.fixture
def gated(gated_llm):
    """An engine in the middle of a step that goes on when the gate is opened, and its handle.

    The first token of the handle's request has been computed and not been read.
    """
    GatedModel.gate.set()
    gated_llm.generate([PROMPT], GREEDY, use_tqdm=False)
    num_before = gated_llm.get_metrics()["num_output_tokens"]
    arrived = gated_llm.submit([9] * 8, LONG)
    while gated_llm.get_metrics()["num_output_tokens"] == num_before:
        time.sleep(0.001)
    GatedModel.gate.clear()
    GatedModel.waits.clear()
    assert GatedModel.waits.wait(TIMEOUT_S)
    yield gated_llm, arrived
    GatedModel.gate.set()
    arrived.abort()
    gated_llm.check_integrity()


def tokens_of(output):
    return output.outputs[0].token_ids


# ---------------------------------------------------------------------- nobody waits for a step


def test_adding_and_aborting_return_in_the_middle_of_a_step(gated):
    llm, _ = gated
    handle = llm.submit(PROMPT, GREEDY)
    llm.add_request("stepped", PROMPT, GREEDY)
    other = llm.submit(PROMPT, GREEDY, request_id="other")
    llm.abort("stepped")
    llm.abort("other")
    with pytest.raises(ValueError, match="empty"):
        llm.submit([], GREEDY)
    assert not GatedModel.gate.is_set()
    GatedModel.gate.set()
    assert len(tokens_of(list(handle)[-1])) == 9
    assert [output.outputs[0].finish_reason for output in other] == ["abort"]
    assert not llm.has_unfinished_requests()


def test_outputs_of_earlier_steps_are_read_in_the_middle_of_a_step(gated):
    _, handle = gated
    assert len(tokens_of(next(handle))) == 1


def test_asyncio_goes_on_in_the_middle_of_a_step(gated):
    llm, handle = gated

    async def read():
        await anext(handle)
        waiting = asyncio.ensure_future(anext(llm.submit(PROMPT, GREEDY)))
        await asyncio.sleep(0.01)
        assert not waiting.done() and not GatedModel.gate.is_set()
        GatedModel.gate.set()
        return await waiting

    assert len(tokens_of(asyncio.run(read()))) == 1


def test_text_and_logprobs_are_made_in_the_readers_thread(llm, monkeypatch):
    threads = set()
    for owner, name in ((llm.client, "format_logprobs"), (Detokenizer, "push")):
        function = getattr(owner, name)

        def note(*args, function=function):
            threads.add((function, threading.current_thread()))
            return function(*args)

        monkeypatch.setattr(owner, name, note)
    list(llm.stream(PROMPT, SamplingParams(max_tokens=3, logprobs=1)))
    assert [thread for _, thread in threads] == [threading.current_thread()] * 2


# ---------------------------------------------------------------------- handles


@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=lambda kind: kind.name)
@pytest.mark.parametrize("reader", ["thread", "asyncio"])
def test_a_handle_brings_the_outputs_of_each_kind(llm, expected, kind, reader):
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, output_kind=kind)
    handle = llm.submit(PROMPT, params)

    async def read():
        return [output async for output in handle]

    outputs = list(handle) if reader == "thread" else asyncio.run(read())
    tokens = [tokens_of(output) for output in outputs]
    if kind is RequestOutputKind.DELTA:
        assert tokens == [[token] for token in expected]
    elif kind is RequestOutputKind.CUMULATIVE:
        assert tokens == [expected[: i + 1] for i in range(9)]
    else:
        assert tokens == [expected]
    assert [output.finished for output in outputs] == [False] * (len(tokens) - 1) + [True]
    assert list(handle) == []


@pytest.mark.parametrize("stop", [None, ["K"]])
def test_samples_are_one_output_with_the_text_of_each(llm, stop):
    params = SamplingParams(n=3, seed=2, max_tokens=20, ignore_eos=True, stop=stop)
    *_, last = llm.submit(PROMPT, params)
    assert [completion.index for completion in last.outputs] == [0, 1, 2]
    for completion in last.outputs:
        text = llm.get_tokenizer().decode(completion.token_ids)
        assert completion.text == (text if stop is None else text.partition("K")[0])


def test_a_handle_that_is_dropped_ends_its_request(llm):
    handle = llm.submit(PROMPT, LONG)
    next(handle)
    del handle
    assert llm.get_metrics()["num_running"] == 0


def test_an_id_is_in_use_until_the_last_output_is_read(llm):
    handle = llm.submit(PROMPT, GREEDY, request_id="mine")
    with pytest.raises(ValueError, match="request id 'mine' is in use"):
        llm.submit(PROMPT, GREEDY, request_id="mine")
    list(handle)
    llm.submit(PROMPT, GREEDY, request_id="mine").abort()
    llm.submit(PROMPT, GREEDY, request_id="mine").abort()


def test_a_session_takes_all_its_requests_or_none(llm):
    groups = [llm.client.make_group(name, PROMPT, GREEDY) for name in ("a", "b", "a")]
    session = llm.session()
    with pytest.raises(ValueError, match="'a' is in use"):
        session.submit(groups)
    assert not session and not llm.client.num_open


# ---------------------------------------------------------------------- errors, drain, close


def test_an_error_of_a_step_reaches_every_handle_and_the_engine_goes_on(llm, expected, monkeypatch):
    handles = [llm.submit(PROMPT, LONG) for _ in range(3)]
    for handle in handles:
        next(handle)
    llm.add_request("stepped", PROMPT, GREEDY)
    with monkeypatch.context() as patch:
        error = ZeroDivisionError("a defect")
        patch.setattr(Scheduler, "plan", lambda scheduler: (_ for _ in ()).throw(error))
        for handle in handles:
            with pytest.raises(ZeroDivisionError, match="a defect"):
                list(handle)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert tokens_of(outputs[-1]) == expected


def test_step_raises_the_error_of_its_step(llm, monkeypatch):
    llm.add_request("stepped", PROMPT, GREEDY)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Scheduler, "plan", lambda scheduler: 1 / 0)
        llm.step()
    llm.abort("stepped")


def test_when_the_loop_itself_fails_everybody_is_told(make_llm, monkeypatch):
    llm = make_llm()
    handle = llm.submit(PROMPT, LONG)
    next(handle)
    monkeypatch.setattr(llm.loop, "_advance", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(handle)
    for call in (lambda: llm.submit(PROMPT, GREEDY), llm.get_metrics, llm.step):
        with pytest.raises(RuntimeError, match="the engine is failed"):
            call()


@pytest.fixture
def broken(make_llm, monkeypatch):
    """An engine with requests whose aborting fails, each time."""
    llm = make_llm()
    handles = [llm.submit(PROMPT, LONG) for _ in range(3)]
    for handle in handles:
        next(handle)
    monkeypatch.setattr(Engine, "abort", lambda engine, request_id: 1 / 0)
    return llm, handles


def ended(function, *args):
    """Returns the error that a call raises in a thread of its own, where it may not hang."""
    errors = []

    def run():
        try:
            function(*args)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "it waits for ever"
    return errors[0]


def test_nobody_hangs_when_a_step_fails_and_aborting_its_requests_fails_too(broken, monkeypatch):
    llm, handles = broken
    monkeypatch.setattr(Scheduler, "plan", lambda scheduler: [][0])
    assert isinstance(ended(llm.step), (IndexError, ZeroDivisionError, RuntimeError))
    for handle in handles:
        assert isinstance(ended(list, handle), (IndexError, ZeroDivisionError))


def test_nobody_hangs_when_closing_cannot_abort_the_requests(broken):
    llm, handles = broken
    llm.close()
    for handle in handles:
        assert "was closed" in str(ended(list, handle))


def test_nobody_hangs_when_the_loop_fails_between_two_requests_that_came_together(
    make_llm, monkeypatch
):
    llm = make_llm()
    monkeypatch.setattr(Engine, "queue", lambda engine, request: [][0])
    monkeypatch.setattr(Engine, "abort", lambda engine, request_id: 1 / 0)
    with llm.session() as session:
        session.submit([llm.client.make_group(name, PROMPT, GREEDY) for name in "abc"])
        for _ in "abc":
            assert isinstance(ended(session.read), (IndexError, ZeroDivisionError))
        assert not session


def test_a_call_raises_what_its_function_raises(llm):
    with pytest.raises(ZeroDivisionError):
        llm.loop.call(lambda: 1 / 0)
    assert llm.loop.call(lambda: threading.current_thread().name) == "jinfer-engine"


def test_the_engines_thread_refuses_to_wait_for_itself(llm):
    for ask in (
        lambda: llm.generate([PROMPT], GREEDY, use_tqdm=False),
        lambda: next(llm.submit(PROMPT, GREEDY)),
        lambda: llm.step(),
    ):
        with pytest.raises(RuntimeError, match="cannot wait for the engine"):
            llm.loop.call(ask)
    assert "num_running" in llm.loop.call(llm.get_metrics)  # what needs no waiting is answered


def test_drain_waits_for_no_request_that_the_engine_has_lost(make_llm):
    llm = make_llm()
    llm.add_request("stepped", PROMPT, LONG)
    llm.loop.call(lambda: llm.loop.engine.abort("stepped/0"))
    with pytest.raises(RuntimeError, match="aborted"):
        raise ended(lambda: (llm.drain(), llm.step()))
    llm.close()


def test_drain_lets_requests_end_and_takes_no_more(make_llm, expected):
    llm = make_llm()
    handle = llm.submit(PROMPT, GREEDY)
    llm.add_request("stepped", PROMPT, GREEDY)
    llm.drain()
    assert llm.get_metrics()["num_finished"] == 2
    assert tokens_of(list(handle)[-1]) == expected
    with pytest.raises(RuntimeError, match="the engine is draining"):
        llm.submit(PROMPT, GREEDY)
    assert tokens_of(llm.step()[-1]) == expected and not llm.has_unfinished_requests()


def test_close_ends_every_request_and_the_thread(make_llm):
    llm = make_llm()
    handle, thread = llm.submit(PROMPT, LONG), llm.loop.thread
    next(handle)
    llm.close()
    assert not thread.is_alive() and llm.loop.state is LoopState.CLOSED
    with pytest.raises(RuntimeError, match="was closed"):
        list(handle)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        llm.submit(PROMPT, GREEDY)
    llm.close()
    assert not llm.loop.engine.scheduler.num_running


def test_a_full_queue_refuses_requests_until_there_is_room(params):
    llm = AsyncLLM(
        MODEL,
        params=params,
        skip_tokenizer_init=True,
        max_queued_requests=3,
        **{**LIMITS, "max_num_seqs": 1},
    )

    async def run():
        release = threading.Event()
        held = llm.llm.loop.start(lambda: release.wait(TIMEOUT_S))
        iterators = [llm.generate(PROMPT, GREEDY, f"{i}") for i in range(3)]
        with pytest.raises(QueueFullError, match="max_queued_requests is 3"):
            llm.generate(PROMPT, GREEDY)
        release.set()
        await held.result_async()
        for iterator in iterators:
            assert [output async for output in iterator][-1].finished
        assert [output async for output in llm.generate(PROMPT, GREEDY, "0")][-1].finished
        await llm.check_integrity()

    asyncio.run(run())


# ---------------------------------------------------------------------- asyncio


@pytest.fixture(scope="module")
def async_llm(params):
    return AsyncLLM(MODEL, params=params, tokenizer=byte_tokenizer(VOCAB), **LIMITS)


def test_async_generate_gives_what_generate_gives(async_llm, expected):
    async def ask(request_id):
        async for output in async_llm.generate(PROMPT, GREEDY, request_id):
            assert output.request_id == request_id
        return tokens_of(output)

    async def run():
        return await asyncio.gather(*(ask(str(i)) for i in range(9)))

    assert asyncio.run(run()) == [expected] * 9
    assert asyncio.run(run()) == [expected] * 9  # another event loop


def test_a_cancelled_task_frees_its_request(async_llm):
    async def run():
        seen = asyncio.Event()

        async def read():
            async for _ in async_llm.generate(PROMPT, LONG):
                seen.set()

        task = asyncio.create_task(read())
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await async_llm.get_metrics()

    assert asyncio.run(run())["num_running"] == 0


def test_an_aborted_request_has_a_last_output(async_llm):
    async def run():
        reasons = []
        async for output in async_llm.generate(PROMPT, LONG, "mine"):
            reasons.append(output.outputs[0].finish_reason)
            async_llm.abort("mine")
        return reasons

    *others, last = asyncio.run(run())
    assert last == "abort" and set(others) == {None}


def test_a_request_whose_iterator_is_dropped_unread_ends(async_llm):
    async def run():
        async_llm.generate(PROMPT, LONG)
        iterator = async_llm.generate(PROMPT, LONG)
        await anext(iterator)
        del iterator
        for _ in range(3):
            await asyncio.sleep(0)  # asyncio closes it in a task of its own
        return await async_llm.get_metrics()

    metrics = asyncio.run(run())
    assert metrics["num_running"] == metrics["num_waiting"] == 0
    assert not async_llm.llm.client.num_open


def test_cancelling_a_wait_in_the_middle_of_a_step_ends_the_request(gated):
    llm, _ = gated

    async def run():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(llm.submit(PROMPT, LONG)), 0.01)
        assert not GatedModel.gate.is_set()

    asyncio.run(run())
    assert llm.client.num_open == 1  # the fixture's


def test_async_methods_do_what_those_of_an_llm_do(async_llm, params):
    async def run():
        before = (await async_llm.get_metrics())["num_finished"]
        await async_llm.reset_prefix_cache()
        await async_llm.update_weights(params)
        [output] = [o async for o in async_llm.generate("x", SamplingParams(max_tokens=1))]
        await async_llm.check_integrity()
        assert (await async_llm.get_metrics())["num_finished"] == before + 1
        return output

    assert asyncio.run(run()).finished


# ---------------------------------------------------------------------- many at once


@pytest.mark.parametrize("num_each", [12, pytest.param(100, marks=pytest.mark.thorough)])
def test_requests_from_threads_and_asyncio_all_end_while_others_abort(make_llm, num_each):
    """From 8 threads and an event loop: 1,000 in the thorough case, of which a third is aborted."""
    llm = make_llm(max_num_seqs=32, max_num_batched_tokens=64, num_gpu_blocks_override=200)
    llm.generate([PROMPT], GREEDY, use_tqdm=False)
    ends, num_tasks = [], 2 * num_each

    def draw(rng):
        prompt = [rng.randrange(10, VOCAB) for _ in range(rng.randint(1, 12))]
        return prompt, SamplingParams(max_tokens=rng.randint(1, 8), ignore_eos=True, seed=1)

    def ask(seed):
        rng = random.Random(seed)
        for i in range(num_each):
            handle = llm.submit(*draw(rng), request_id=f"{seed}/{i}")
            if rng.random() < 1 / 3:
                llm.abort(f"{rng.randrange(8)}/{rng.randrange(num_each)}")
                llm.abort(handle.request_id)
            *_, last = handle
            ends.append(last.outputs[0].finish_reason)

    async def ask_async(i):
        rng = random.Random(1000 + i)
        handle = llm.submit(*draw(rng))
        if i % 3 == 0:
            llm.abort(handle.request_id)
        outputs = [output async for output in handle]
        ends.append(outputs[-1].outputs[0].finish_reason)

    async def run():
        await asyncio.gather(*(ask_async(i) for i in range(num_tasks)))

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(8)]
    threads.append(threading.Thread(target=lambda: asyncio.run(run()), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads)
    assert len(ends) == 10 * num_each and set(ends) == {"length", "abort"}
    llm.check_integrity()
    metrics = llm.get_metrics()
    assert metrics["num_finished"] == 10 * num_each + 1
    assert not metrics["num_running"] and not metrics["num_waiting"]


# ---------------------------------------------------------------------- the thread's life


def test_an_engine_that_nobody_refers_to_is_freed_and_its_thread_ends(make_llm):
    llm = make_llm()
    stream = llm.stream(PROMPT, LONG)
    next(stream)
    llm.add_request("left", PROMPT, GREEDY)
    engine, thread = weakref.ref(llm.loop.engine), llm.loop.thread
    pool = weakref.ref(llm.loop.engine.runner.pool.kv.k)
    llm.step()
    gc.collect()
    gc.disable()
    try:
        del stream
        llm.get_metrics()
        del llm
        assert engine() is None and pool() is None
    finally:
        gc.enable()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


@pytest.fixture
def run_script():
    """Runs Python that has `make_llm`, perhaps an `llm`, and PROMPT."""

    def run(body, *, makes_llm=True, stdin="", timeout=120):
        code = f"""
            import os, signal, sys, threading, time
            sys.path.insert(0, {str(HELPERS)!r})
            signal.signal(signal.SIGINT, signal.default_int_handler)
            import jinfer
            PROMPT, LIMITS = {PROMPT}, {LIMITS}

            def make_llm():
                import jax
                from tiny_models import make_model
                model = make_model({VOCAB})
                return jinfer.LLM(model, params=model.init(jax.random.key(0)),
                                  skip_tokenizer_init=True, **LIMITS)
        """
        code = textwrap.dedent(code) + ("llm = make_llm()\n" if makes_llm else "")
        code += textwrap.dedent(body)
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


def complaints(done):
    """Returns the lines of a script's stderr, but for a note of transformers without PyTorch."""
    return [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]


def test_an_interpreter_that_exits_with_requests_open_exits_promptly(run_script):
    done = run_script(
        """
        from jinfer import SamplingParams
        long = SamplingParams(max_tokens=90, ignore_eos=True)
        stream, handle = llm.stream(PROMPT, long), llm.submit(PROMPT, long)
        next(stream), next(handle)
        llm.add_request("stepped", PROMPT, long)
        print("ready", flush=True)
        """
    )
    assert (done.returncode, done.stdout, complaints(done)) == (0, "ready\n", [])


def test_a_child_forked_after_the_import_serves(run_script):
    done = run_script(
        """
        assert threading.active_count() == 1
        child = os.fork()
        if not child:
            out = make_llm().generate([PROMPT], jinfer.SamplingParams(max_tokens=2), use_tqdm=False)
            print(len(out), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
        makes_llm=False,
    )
    assert (done.returncode, done.stdout, complaints(done)) == (0, "1\n", [])


@pytest.mark.thorough
def test_an_engine_of_the_parent_is_refused_in_a_forked_child(run_script):
    done = run_script(
        """
        import warnings
        warnings.simplefilter("ignore")
        handle = llm.submit(PROMPT, jinfer.SamplingParams(max_tokens=90, ignore_eos=True))
        child = os.fork()
        if not child:
            import asyncio
            asks = [lambda: llm.submit(PROMPT), lambda: list(handle)]
            asks.append(lambda: asyncio.run(handle.__anext__()))
            for ask in asks:
                try:
                    ask()
                except RuntimeError as error:
                    print(error, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        llm.generate([PROMPT], jinfer.SamplingParams(max_tokens=2), use_tqdm=False)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("make the engine after the fork") == 3


@pytest.mark.thorough
def test_who_steps_goes_on_after_ctrl_c_and_each_request_ends(run_script):
    done = run_script(
        """
        import random
        from jinfer import SamplingParams
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        expected = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids
        main, rng, num_interrupted = threading.get_ident(), random.Random(0), 0
        for i in range(40):
            llm.add_request(f"{i}", PROMPT, params)
            timer = threading.Timer(rng.random() * 0.03, signal.pthread_kill, (main, signal.SIGINT))
            try:
                timer.start()
                for _ in range(10_000):
                    llm.step()
            except KeyboardInterrupt:
                num_interrupted += 1
            timer.join()
            deadline = time.monotonic() + 30
            while llm.has_unfinished_requests() and time.monotonic() < deadline:
                for output in llm.step():
                    found = output.outputs[0].token_ids
                    assert found == expected[: len(found)]
            assert not llm.has_unfinished_requests()
        assert num_interrupted == 40
        assert llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids == expected
        llm.check_integrity()
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # on a busy machine a longer form of it failed in 2 of 6 runs, with SIGABRT
def test_an_interpreter_that_exits_in_the_middle_of_a_step_lets_it_end(run_script):
    """Else Python would stop its threads inside of XLA, which ends the process with SIGABRT."""
    done = run_script(
        """
        import asyncio, jax
        from jinfer.models.model import Model
        from tiny_models import make_config

        class SlowModel(Model):
            def unembed(self, params, hidden):
                logits = super().unembed(params, hidden)
                shape = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
                return jax.pure_callback(lambda x: (time.sleep(0.5), x)[1], shape, logits)

        model = SlowModel(make_config(300))
        engine = jinfer.AsyncLLM(model, params=model.init(jax.random.key(0)),
                                 skip_tokenizer_init=True, **LIMITS)
        long = jinfer.SamplingParams(max_tokens=90, ignore_eos=True)

        async def run():
            iterators = [engine.generate(PROMPT, long) for _ in range(6)]
            await anext(iterators[0])
            return iterators

        iterators = asyncio.run(run())
        time.sleep(0.2)
        print("ready", flush=True)
        """,
        makes_llm=False,
    )
    assert (done.returncode, done.stdout, complaints(done)) == (0, "ready\n", [])


@pytest.mark.thorough
def test_ctrl_c_at_any_moment_leaves_an_engine_that_serves(run_script):
    done = run_script(
        """
        import itertools, random
        from jinfer import SamplingParams
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        ask = {
            "generate": lambda: llm.generate([PROMPT] * 6, params, use_tqdm=False),
            "stream": lambda: list(llm.stream([PROMPT] * 2, params)),
            "handle": lambda: list(llm.submit(PROMPT, params)),
        }
        expected = ask["generate"]()[0].outputs[0].token_ids
        main, rng, num_interrupted = threading.get_ident(), random.Random(0), 0
        names = itertools.cycle(ask)
        for i in range(60):
            timer = threading.Timer(rng.random() * 0.05, signal.pthread_kill, (main, signal.SIGINT))
            try:
                timer.start()
                ask[next(names)]()
                time.sleep(1)
            except KeyboardInterrupt:
                num_interrupted += 1
            timer.join()
        assert num_interrupted == 60
        assert ask["generate"]()[0].outputs[0].token_ids == expected
        llm.check_integrity()
        metrics = llm.get_metrics()
        assert not metrics["num_running"] and not metrics["num_waiting"], metrics
        """
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- contexts, debuggers

REQUEST_NUMBER = contextvars.ContextVar("REQUEST_NUMBER", default=0)


@contextlib.contextmanager
def context_variable():
    token = REQUEST_NUMBER.set(7)
    yield
    REQUEST_NUMBER.reset(token)


CONTEXTS = {
    "default_device": (
        lambda: jax.default_device(jax.devices()[0]),
        lambda: jax.config.jax_default_device,
    ),
    "enable_x64": (lambda: jax.enable_x64(True), lambda: jax.config.jax_enable_x64),
    "default_matmul_precision": (
        lambda: jax.default_matmul_precision("highest"),
        lambda: jax.config.jax_default_matmul_precision,
    ),
    "set_mesh": (
        lambda: jax.set_mesh(jax.make_mesh((1,), ("x",))),
        lambda: jax.sharding.get_abstract_mesh().axis_names,
    ),
    "numpy_dtype_promotion": (
        lambda: jax.numpy_dtype_promotion("standard"),
        lambda: jax.config.jax_numpy_dtype_promotion,
    ),
    "numpy_rank_promotion": (
        lambda: jax.numpy_rank_promotion("allow"),
        lambda: jax.config.jax_numpy_rank_promotion,
    ),
    "debug_nans": (lambda: jax.debug_nans(True), lambda: jax.config.jax_debug_nans),
    "transfer_guard": (
        lambda: jax.transfer_guard_device_to_device("log"),
        lambda: jax.config.jax_transfer_guard_device_to_device,
    ),
    "interpret": (compat.interpret, compat.is_interpreting),
    "target": (lambda: target.state("v6e"), lambda: target.current().name),
    "use_impl": (
        lambda: dispatch.use_impl(quant_matmul="xla"),
        lambda: dict(dispatch._forced.value),
    ),
    "context variables": (context_variable, REQUEST_NUMBER.get),
    "numpy errors": (lambda: np.errstate(over="raise"), lambda: np.geterr()["over"]),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_of_the_maker_hold_in_the_thread_and_the_callers_do_not(make_llm, name):
    make_context, read = CONTEXTS[name]
    outside = read()
    plain = make_llm()
    with make_context():
        inside = read()
        made_inside = make_llm()
        assert plain.loop.call(read) == outside
    assert inside != outside
    assert made_inside.loop.call(read) == inside
    assert read() == outside


def test_an_engine_made_under_a_mesh_serves_outside_of_it(make_llm, expected):
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        llm = make_llm()
    assert tokens_of(llm.generate([PROMPT], GREEDY, use_tqdm=False)[0]) == expected


def test_pdb_stops_in_the_engines_thread(llm, expected, monkeypatch):
    commands, shown = io.StringIO("p plan.num_tokens\nc\n"), io.StringIO()
    step = Engine._step
    debugger = pdb.Pdb(stdin=commands, stdout=shown, nosigint=True)

    def stop_once(engine):
        plan = engine.scheduler
        if commands.tell() == 0:
            plan = type("Seen", (), {"num_tokens": 12345})
            debugger.set_trace()
        del plan
        return step(engine)

    monkeypatch.setattr(Engine, "_step", stop_once)
    [output] = llm.generate([PROMPT], GREEDY, use_tqdm=False)
    assert tokens_of(output) == expected
    assert "12345" in shown.getvalue()


@pytest.mark.thorough
def test_breakpoints_of_a_debugger_hold_in_the_engines_thread(run_script):
    """As with `python -m pdb script.py`."""
    done = run_script(
        """
        import jinfer.engine.engine as engine
        seen = []

        def trace(frame, event, arg):
            if frame.f_code is engine.Engine._step.__code__:
                seen.append(threading.current_thread().name)
            return None

        sys.settrace(trace)
        llm = make_llm()
        sys.settrace(None)
        llm.generate([PROMPT], jinfer.SamplingParams(max_tokens=2), use_tqdm=False)
        print(set(seen))
        """,
        makes_llm=False,
    )
    assert done.stdout == "{'jinfer-engine'}\n", done.stderr


class TalkingModel(Model):
    seen: ClassVar = []

    def unembed(self, params, hidden):
        jax.debug.print("width {}", hidden.shape[-1])
        jax.debug.callback(lambda x: self.seen.append(float(x)), hidden[0, 0])
        return super().unembed(params, hidden)


def test_jax_debug_print_and_callback_run_once_a_step(make_llm, capfd):
    llm = make_llm(TalkingModel(make_config(VOCAB)))
    TalkingModel.seen.clear()
    llm.generate([PROMPT], GREEDY, use_tqdm=False)
    assert len(TalkingModel.seen) == 9
    assert capfd.readouterr().out == "width 32\n" * 9


def test_a_profile_holds_the_engines_thread(llm, tmp_path):
    with jax.profiler.trace(tmp_path, create_perfetto_trace=True):
        llm.generate([PROMPT], GREEDY, use_tqdm=False)
    [file] = tmp_path.rglob("perfetto_trace.json.gz")
    assert file.stat().st_size > 0
