"""Order of admission: priority, then the longest cached prefix, then arrival; none starves."""

import pytest

from jinfer.config.engine import EngineConfig
from jinfer.config.sampling_params import SamplingParams
from jinfer.engine import queue
from jinfer.engine.queue import MAX_OVERTAKEN, WINDOW, WaitingQueue
from jinfer.engine.request import Request, RequestStatus
from jinfer.engine.safety import integrity
from jinfer.engine.scheduler import Scheduler

SHARED = list(range(100, 116))


def make_request(arrival, prompt=(1,), priority=0, max_tokens=1):
    return Request(
        request_id=str(arrival),
        prompt_token_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        arrival=arrival,
        max_model_len=64,
        priority=priority,
    )


def order(line, cached, version=0):
    ranked = line.ranked(lambda request: cached.get(request.arrival, 0), version)
    return [request.arrival for request in ranked]


def test_priority_then_longest_prefix_then_arrival():
    line = WaitingQueue()
    for arrival, priority in enumerate((1, 0, 0, 0, 1)):
        line.add(make_request(arrival, priority=priority))
    assert order(line, {}) == [1, 2, 3, 0, 4]
    assert order(line, {3: 2, 2: 1, 4: 9}, version=1) == [3, 2, 1, 4, 0]


def test_the_order_is_remembered_until_cache_or_line_change():
    line = WaitingQueue()
    for arrival in range(2):
        line.add(make_request(arrival))
    assert order(line, {}) == [0, 1]
    assert order(line, {1: 1}) == [0, 1]
    assert order(line, {1: 1}, version=1) == [1, 0]
    line.add(make_request(2))
    assert order(line, {2: 1}, version=1) == [2, 0, 1]


def test_preempted_requests_go_before_their_equals():
    line = WaitingQueue()
    requests = [make_request(arrival) for arrival in range(3)]
    requests[1].status = RequestStatus.PREEMPTED
    for request in requests:
        line.add(request)
    assert order(line, {2: 5}) == [1, 2, 0]


def test_only_the_head_of_a_long_line_is_compared():
    line = WaitingQueue()
    for arrival in range(WINDOW + 5):
        line.add(make_request(arrival))
    assert order(line, {WINDOW: 9}) == list(range(WINDOW))


class Driver:
    """One request at a time, on a device that answers 7."""

    def __init__(self):
        config = EngineConfig(max_model_len=64, max_num_seqs=1, max_num_batched_tokens=32)
        self.scheduler = Scheduler(config, 64, 4)
        self.num_added = 0
        self.finished = []

    def add(self, prompt, **fields):
        self.num_added += 1
        self.scheduler.add(make_request(self.num_added - 1, prompt, **fields))

    def step(self):
        plan = self.scheduler.plan()
        progress = self.scheduler.commit(plan, [[7] * seq.num_samples for seq in plan.seqs])
        self.finished += [p.request.arrival for p in progress if p.finished]
        integrity.check(self.scheduler)


def test_requests_with_a_cached_beginning_follow_each_other():
    driver = Driver()
    for i in range(6):
        driver.add([*(SHARED if i % 2 else range(16)), 50 + i])
    while driver.scheduler.has_work():
        driver.step()
    assert driver.finished == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("limit", [3, MAX_OVERTAKEN])
def test_no_request_is_overtaken_more_often_than_the_limit(limit, monkeypatch):
    monkeypatch.setattr(queue, "MAX_OVERTAKEN", limit)
    driver = Driver()
    driver.add(SHARED)
    driver.add([1, 2, 3])
    driver.step()
    for _ in range(limit + 2):
        driver.add([*SHARED, 9])
        driver.add([*SHARED, 8])
        driver.step()
    assert driver.finished.index(1) == limit + 1
