"""Sessions and handles under interrupts, and with other threads that add, abort and step."""

import contextlib
import threading
import time

import jax
import pytest
from tiny_models import byte_tokenizer, make_model

from jinfer import LLM, QueueFullError, RequestOutputKind, SamplingParams
from jinfer.requests.groups import RequestGroup, SampleReader
from jinfer.text.detokenizer import Detokenizer

VOCAB = 300
MODEL = make_model(VOCAB)
LIMITS = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "num_gpu_blocks_override": 40,
}
PROMPT = [5, 17, 3]
TIMEOUT_S = 15


def make_params(kind=RequestOutputKind.CUMULATIVE, **fields):
    fields = {"temperature": 0, "max_tokens": 9, "ignore_eos": True, "logprobs": 1, **fields}
    return SamplingParams(output_kind=kind, **fields)


GREEDY = make_params()


@pytest.fixture(scope="module")
def shared():
    params = MODEL.init(jax.random.key(0))
    return LLM(MODEL, params=params, tokenizer=byte_tokenizer(VOCAB), **LIMITS)


@pytest.fixture
def llm(shared):
    yield shared
    shared.check_integrity()
    metrics = shared.get_metrics()
    assert not metrics["num_running"] and not metrics["num_waiting"]
    assert not shared.client.num_open and not shared.has_unfinished_requests()


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


class Interrupter:
    """Raises KeyboardInterrupt in one call of a function, before or after its work."""

    def __init__(self, function, call, *, is_after):
        self._function, self._left, self._is_after = function, call, is_after
        self.has_raised = False

    def __get__(self, owner, _):
        return lambda *args, **fields: self(owner, *args, **fields)

    def __call__(self, *args, **fields):
        self._left -= 1
        if self._left or threading.current_thread() is not threading.main_thread():
            return self._function(*args, **fields)
        self.has_raised = True
        if self._is_after:
            self._function(*args, **fields)
        raise KeyboardInterrupt


PLACES = [(Detokenizer, "push"), (Detokenizer, "finish"), (SampleReader, "completion")]


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("owner, name", PLACES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=lambda kind: kind.name)
def test_an_interrupted_reader_goes_on_and_gets_all(llm, monkeypatch, kind, owner, name, is_after):
    params = make_params(kind, n=2, seed=1, temperature=1)

    def text_of(outputs):
        texts = ["", ""]
        for output in outputs:
            for sample in output.outputs:
                is_delta = kind is RequestOutputKind.DELTA
                before = texts[sample.index] if is_delta else ""
                texts[sample.index] = before + sample.text
        assert outputs[-1].finished
        return texts

    expected = text_of(list(llm.submit(PROMPT, params)))
    for call in (1, 2, 9, 18):
        interrupter = Interrupter(getattr(owner, name), call, is_after=is_after)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupter)
            llm.add_request("mine", PROMPT, params)
            outputs = []
            for _ in range(30):
                with contextlib.suppress(KeyboardInterrupt):
                    outputs += llm.step()
        assert not llm.has_unfinished_requests()
        assert text_of(outputs) == expected
        if call == 1:
            assert interrupter.has_raised


def test_an_output_that_cannot_be_made_ends_its_request_alone(llm, monkeypatch):
    output = RequestGroup.output

    def fail_for_one(group, *args):
        if group.request_id == "bad":
            raise ZeroDivisionError("a defect")
        return output(group, *args)

    monkeypatch.setattr(RequestGroup, "output", fail_for_one)
    with llm.session() as session:
        for name in ("good", "bad", "fine"):
            session.add(name, PROMPT, make_params(RequestOutputKind.FINAL_ONLY))
        names, num_errors = [], 0
        while session and num_errors < 9:
            try:
                names += [output.request_id for output in session.read()]
            except ZeroDivisionError:
                num_errors += 1
    assert sorted(names) == ["fine", "good"] and num_errors == 1


def test_threads_may_step_at_the_same_time(llm, monkeypatch):
    """Each output is brought to one of them, and none is lost."""
    make_output = RequestGroup.output

    def yield_and_make_output(*args):
        time.sleep(2e-3)  # longer than a step
        return make_output(*args)

    monkeypatch.setattr(RequestGroup, "output", yield_and_make_output)
    for i in range(20):
        llm.add_request(f"{i}", PROMPT, make_params(RequestOutputKind.DELTA))
    outputs, errors, deadline = [], [], time.monotonic() + TIMEOUT_S

    def step():
        try:
            while llm.has_unfinished_requests() and time.monotonic() < deadline:
                outputs.extend(llm.step())
        except BaseException as error:
            errors.append(error)

    threads = [in_thread(step) for _ in range(4)]
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    assert not errors and not llm.has_unfinished_requests()
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 20 * 9
    assert sum(output.finished for output in outputs) == 20


def test_a_handle_may_be_aborted_from_another_thread_while_it_is_read(llm):
    errors = []

    def read(handle):
        try:
            list(handle)
        except BaseException as error:
            errors.append(error)

    for i in range(30):
        handle = llm.submit(PROMPT, make_params(max_tokens=60, logprobs=None))
        if i % 3:
            next(handle)
        reader = in_thread(lambda handle=handle: read(handle))
        handle.abort()
        reader.join(TIMEOUT_S)
        assert not reader.is_alive()
    assert not errors


def test_a_reader_is_told_that_what_another_thread_added_was_refused(llm, monkeypatch):
    """It had begun to wait for that request, which never came to the engine."""
    session, found = llm.session(), []

    def refuse(submissions):
        reader = in_thread(lambda: found.append(session.read()))
        threads.append(reader)
        reader.join(0.2)
        assert reader.is_alive()  # it waits for the request
        raise QueueFullError

    threads = []
    monkeypatch.setattr(llm.loop, "submit", refuse)
    with pytest.raises(QueueFullError):
        session.add("late", PROMPT, GREEDY)
    threads[0].join(TIMEOUT_S)
    assert found == [[]] and not session
