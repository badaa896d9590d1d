"""Decisions of single plans: budget, order, preemption, run-ahead, steps on the device."""

import pytest

from jinfer.config.engine import EngineConfig
from jinfer.config.sampling_params import SamplingParams
from jinfer.engine.request import Request, RequestStatus
from jinfer.engine.safety import integrity
from jinfer.engine.scheduler import Scheduler

EOS = 99


class Driver:
    """A scheduler with a counter of arrivals and shorthands for what tests look at."""

    def __init__(self, num_pages=64, page_size=4, **config):
        defaults = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16}
        # All prompts here are 0, 1, 2, ...: what they share is test_prefix.py's matter.
        defaults |= {"num_decode_steps": 1, "enable_prefix_caching": False}
        self.config = EngineConfig(**{**defaults, **config})
        self.clock = 0.0
        self.scheduler = Scheduler(self.config, num_pages, page_size, now=lambda: self.clock)
        self.num_added = 0

    def add(self, num_prompt_tokens, max_tokens=8, priority=0, name=None, **params):
        request = Request(
            request_id=name or "abcdefgh"[self.num_added],
            prompt_token_ids=list(range(num_prompt_tokens)),
            params=SamplingParams(max_tokens=max_tokens, **params),
            seed=0,
            arrival=self.num_added,
            max_model_len=self.config.max_model_len,
            priority=priority,
            eos_token_ids=(EOS,),
        )
        self.num_added += 1
        self.scheduler.add(request)
        return request

    def plan(self):
        plan = self.scheduler.plan()
        integrity.check(self.scheduler)
        return plan

    def commit(self, plan, token=7):
        progress = self.scheduler.commit(plan, [[token] * seq.num_samples for seq in plan.seqs])
        integrity.check(self.scheduler)
        return progress

    def step(self, token=7):
        """Plans, and commits what is in flight until then and now."""
        plan = self.plan()
        self.drain(token)
        return plan

    def is_undisturbed(self):
        """Whether nothing has been preempted yet; fails if that goes on too long."""
        assert self.scheduler.stats.num_plans < 100, "no preemption"
        return self.scheduler.stats.num_preemptions == 0

    def run(self):
        for _ in range(200):
            if self.scheduler.has_work():
                self.step()
        assert not self.scheduler.has_work(), "stuck"

    def drain(self, token=7):
        while self.scheduler.num_in_flight:
            self.commit(self.scheduler._in_flight[0], token)


def shape(plan):
    """(id, start, tokens, samples) of each sequence."""
    return [
        (seq.request.request_id, seq.start, seq.num_tokens, seq.num_samples) for seq in plan.seqs
    ]


# ---------------------------------------------------------------------- chunks, budget, order


def test_a_long_prompt_is_taken_in_chunks_and_sampled_after_the_last():
    driver = Driver()
    driver.add(35)
    plans = [driver.step() for _ in range(4)]
    assert [shape(plan) for plan in plans] == [
        [("a", 0, 16, 0)],
        [("a", 16, 16, 0)],
        [("a", 32, 3, 1)],
        [("a", 35, 1, 1)],
    ]
    assert [plan.seqs[0].is_new_row for plan in plans] == [True, False, False, False]
    assert [plan.seqs[0].is_prefill for plan in plans] == [True, True, True, False]
    assert [plan.is_decode for plan in plans] == [False, False, False, True]


def test_decodes_come_first_then_running_prefills_then_admissions():
    driver = Driver()
    driver.add(4)
    driver.step()
    driver.add(20)
    assert shape(driver.step()) == [("a", 4, 1, 1), ("b", 0, 15, 0)]
    driver.add(20)
    assert shape(driver.step()) == [("a", 5, 1, 1), ("b", 15, 5, 1), ("c", 0, 10, 0)]


def test_without_chunked_prefill_a_prompt_is_taken_whole_or_waits():
    driver = Driver(enable_chunked_prefill=False, max_model_len=16)
    driver.add(10)
    driver.add(7)
    driver.add(2)  # would fit, but nobody overtakes
    assert shape(driver.step()) == [("a", 0, 10, 1)]
    assert shape(driver.step()) == [("a", 10, 1, 1), ("b", 0, 7, 1), ("c", 0, 2, 1)]


def test_admission_is_by_priority_then_arrival():
    driver = Driver(max_num_seqs=2)
    for priority in (1, 0, 0, -1):
        driver.add(2, max_tokens=1, priority=priority)
    assert [seq[0] for seq in shape(driver.step())] == ["d", "b"]
    assert [seq[0] for seq in shape(driver.step())] == ["c", "a"]


def test_admission_waits_for_rows_and_for_pages():
    driver = Driver(max_num_seqs=1)
    first = driver.add(4, max_tokens=2)
    driver.add(4)
    driver.step()
    assert driver.scheduler.num_waiting == 1
    driver.step()
    assert first.is_finished
    assert shape(driver.step()) == [("b", 0, 4, 1)]

    driver = Driver(num_pages=4)
    driver.add(8)  # two pages; two are free
    driver.add(8)  # two pages would fit, but leave none for the running sequence
    driver.add(4)  # nobody overtakes
    assert [seq[0] for seq in shape(driver.step())] == ["a"]
    driver = Driver(num_pages=5)
    driver.add(8)
    driver.add(8)
    assert [seq[0] for seq in shape(driver.step())] == ["a", "b"]


def test_no_page_is_left_for_sequences_that_have_all_they_can_ever_use():
    driver = Driver(num_pages=8, max_num_batched_tokens=64)
    for _ in range(4):
        driver.add(7, max_tokens=2)  # 8 places: the last token needs none
    assert len(driver.plan().seqs) == 4
    driver.run()
    assert driver.scheduler.stats.num_preemptions == 0
    driver = Driver(num_pages=8, max_num_batched_tokens=64)
    for _ in range(4):
        driver.add(7, max_tokens=3)
    assert len(driver.plan().seqs) == 3  # each of which wants a page more


def test_requests_that_cannot_be_served_are_refused_at_the_door():
    driver = Driver(num_pages=4)
    driver.add(16, name="fits")
    with pytest.raises(
        ValueError, match="17 tokens does not fit into the KV cache of 4 pages of 4"
    ):
        driver.add(17)
    with pytest.raises(ValueError, match="request id 'fits' is in use"):
        driver.add(1, name="fits")
    assert driver.scheduler.num_waiting == 1


@pytest.mark.parametrize("num_prompt_tokens", [1, 15, 16])
def test_a_sequence_that_fills_the_whole_pool_ends_with_length(num_prompt_tokens):
    driver = Driver(num_pages=4, num_decode_steps=3)
    request = driver.add(num_prompt_tokens, max_tokens=None)
    other = driver.add(1, max_tokens=3)
    driver.run()
    # 16 places hold all but the last of 17 tokens.
    assert num_prompt_tokens + len(request.output_token_ids) == 17
    assert request.finish_reason == other.finish_reason == "length"
    assert len(other.output_token_ids) == 3


# ---------------------------------------------------------------------- run-ahead


def test_plans_run_ahead_of_commits_and_never_beyond_the_last_token():
    driver = Driver()
    request = driver.add(3, max_tokens=3)
    plans = [driver.plan() for _ in range(3)]
    assert [shape(plan)[0][1:] for plan in plans] == [(0, 3, 1), (3, 1, 1), (4, 1, 1)]
    assert request.num_in_flight == 3 and request.output_token_ids == []
    assert driver.plan() is None
    assert driver.scheduler.has_work()
    assert [driver.commit(plan)[0].finished for plan in plans] == [False, False, True]
    assert not driver.scheduler.has_work()


def test_tokens_beyond_the_end_are_dropped_and_its_pages_are_free_at_once():
    driver = Driver(max_num_seqs=1)
    request = driver.add(4)
    driver.add(5)
    first, second = driver.plan(), driver.plan()
    row = request.row
    [progress] = driver.commit(first, EOS)
    assert progress.finished and progress.new_token_ids == [EOS]
    assert (request.finish_reason, request.pages, request.row) == ("stop", [], None)
    third = driver.plan()  # while `second` still decodes the old request on the same row
    assert shape(third) == [("b", 0, 5, 1)]
    assert third.seqs[0].is_new_row and third.seqs[0].request.row == row
    assert driver.commit(second) == []
    assert request.output_token_ids == [EOS]
    assert driver.scheduler.stats.num_discarded_tokens == 1
    assert len(driver.commit(third)) == 1


def test_plans_are_committed_in_order_and_whole():
    driver = Driver()
    driver.add(3)
    first, second = driver.plan(), driver.plan()
    with pytest.raises(ValueError, match="committed in order: got 1, not 0"):
        driver.commit(second)
    with pytest.raises(ValueError, match=r"plan 0 samples \[1\] tokens, got \[2\]"):
        driver.scheduler.commit(first, [[1, 2]])
    driver.commit(first)
    with pytest.raises(ValueError, match="got 0, not 1"):
        driver.commit(first)


# ---------------------------------------------------------------------- preemption and abort


def crowded():
    """Two requests that fill a pool of four pages; the next decode needs a fifth."""
    driver = Driver(num_pages=4)
    first, second = driver.add(6, priority=0), driver.add(4, priority=0)
    driver.plan()
    return driver, first, second


def test_the_latest_request_is_preempted_and_keeps_its_tokens_in_flight():
    driver, first, second = crowded()
    plans = [driver.scheduler._in_flight[0]]
    while driver.is_undisturbed():
        plans.append(driver.plan())
    assert second.status is RequestStatus.PREEMPTED
    assert (second.pages, second.row, second.num_computed_tokens) == ([], None, 0)
    in_flight = second.num_in_flight
    assert in_flight == len(plans) - 1 > 1
    assert [seq[0] for seq in shape(plans[-1])] == ["a"]
    for n, plan in enumerate(plans[:-1], 1):
        # It is not admitted again while tokens are in flight, however many pages are free.
        driver.scheduler.abort("a")
        if n < in_flight:
            assert driver.plan() is None
        driver.commit(plan, token=50 + n)
    assert second.output_token_ids == [50 + n for n in range(1, in_flight + 1)]
    driver.commit(plans[-1])
    again = driver.plan()
    assert shape(again) == [("b", 0, 4 + in_flight, 1)]
    assert again.seqs[0].is_new_row and again.seqs[0].is_prefill
    assert first.finish_reason == "abort"


def test_the_victim_has_the_lowest_priority_before_the_latest_arrival():
    driver = Driver(num_pages=8, max_num_batched_tokens=32)
    low = driver.add(6, priority=1)
    driver.step()
    urgent = [driver.add(7), driver.add(7)]
    while driver.is_undisturbed():
        driver.step()
    assert low.status is RequestStatus.PREEMPTED
    assert [request.status for request in urgent] == [RequestStatus.RUNNING] * 2


def test_a_preempted_request_goes_before_those_that_never_ran():
    driver, _, second = crowded()
    waiting = driver.add(1)
    while driver.is_undisturbed():
        driver.step()
    assert list(driver.scheduler.waiting) == [second, waiting]


def test_a_preempted_request_that_stops_by_a_token_in_flight_never_comes_back():
    driver, _, second = crowded()
    plans = [driver.scheduler._in_flight[0]]
    while driver.is_undisturbed():
        plans.append(driver.plan())
    [_, progress] = driver.commit(plans[0], EOS)
    assert progress.request is second and progress.finished
    assert not driver.scheduler.has_work() or driver.scheduler.num_waiting == 0


@pytest.mark.parametrize("moment", ["waiting", "prefilling", "decoding", "preempted"])
def test_abort_frees_everything_at_any_moment(moment):
    driver, _, second = crowded()
    if moment == "waiting":
        second = driver.add(3)
    elif moment == "prefilling":
        driver.commit(driver.scheduler._in_flight[0])
        driver.scheduler.abort("a")
        driver.scheduler.abort("b")
        second = driver.add(16)
        driver.add(1)
        driver.plan()
    elif moment == "decoding":
        driver.plan()
    else:
        while driver.is_undisturbed():
            driver.plan()
    aborted = driver.scheduler.abort(second.request_id)
    integrity.check(driver.scheduler)
    assert aborted is second and second.is_finished and second.finish_reason == "abort"
    assert (second.pages, second.row) == ([], None)
    assert driver.scheduler.abort(second.request_id) is None
    num_outputs = len(second.output_token_ids)
    driver.drain()
    assert len(second.output_token_ids) == num_outputs
    driver.run()
    assert driver.scheduler.pool.num_free == 4
    assert second.metrics.finished_time is not None
    assert driver.scheduler.abort("nobody") is None


# ---------------------------------------------------------------------- several steps a plan


def test_pure_decodes_run_several_steps_within_each_ones_limit():
    driver = Driver(num_decode_steps=4)
    long, short = driver.add(3, max_tokens=20), driver.add(3, max_tokens=3)
    assert driver.step().num_steps == 1
    plan = driver.plan()
    assert plan.num_steps == 4 and plan.is_decode and plan.num_tokens == 6
    assert shape(plan) == [("a", 3, 1, 4), ("b", 3, 1, 2)]
    assert (len(long.pages), len(short.pages)) == (2, 2)  # 7 and 5 places
    driver.commit(plan)
    assert (len(long.output_token_ids), short.finish_reason) == (5, "length")
    driver.add(3)
    assert driver.plan().num_steps == 1  # a prefill rides along


def test_logprobs_tie_the_host_to_each_step():
    driver = Driver(num_decode_steps=4)
    driver.add(3)
    driver.add(3, logprobs=0)
    driver.step()
    assert driver.plan().num_steps == 1


def test_steps_shrink_to_the_free_pages():
    driver = Driver(num_pages=3, num_decode_steps=8, max_num_seqs=2)
    driver.add(3, max_tokens=30)
    driver.add(4, max_tokens=2)
    driver.step()
    plan = driver.step()
    # One free page went to b; a's first page has one place left.
    assert plan.num_steps == 1 and shape(plan) == [("a", 3, 1, 1), ("b", 4, 1, 1)]
    plan = driver.step()
    assert plan.num_steps == 8 and shape(plan) == [("a", 4, 1, 8)]  # b is done: 12 places


def test_a_stop_inside_several_steps_drops_the_rest():
    driver = Driver(num_decode_steps=4)
    request = driver.add(3, max_tokens=20)
    driver.step()
    plan = driver.plan()
    [progress] = driver.scheduler.commit(plan, [[5, EOS, 6, 7]], [["w", "x", "y", "z"]])
    assert progress.new_token_ids == [5, EOS] and progress.finished
    assert request.logprobs is None
    assert driver.scheduler.stats.num_discarded_tokens == 2


# ---------------------------------------------------------------------- logprobs, metrics


def test_chunks_say_whether_they_predict_wanted_prompt_tokens():
    driver = Driver(num_pages=6, max_num_batched_tokens=4)
    request = driver.add(9, prompt_logprobs=1, logprobs=1)
    wanted = []
    for _ in range(4):
        plan = driver.plan()
        [seq] = plan.seqs
        wanted.append(seq.wants_prompt_logprobs)
        for position in range(seq.start + 1, min(seq.start + seq.num_tokens, 8) + 1):
            request.set_prompt_logprob(position, position)
        driver.scheduler.commit(plan, [[7] * seq.num_samples], [["lp"] * seq.num_samples])
    # The last chunk is one token, which predicts no prompt token; the decode none either.
    assert wanted == [True, True, False, False]
    assert request.prompt_logprobs == [None, *range(1, 9)]
    assert request.logprobs == ["lp"] * 2
    # Running ahead, the entries of the chunks before are not there yet; the answers are the same.
    ahead = Driver(num_pages=6, max_num_batched_tokens=4)
    ahead.add(9, prompt_logprobs=1)
    assert [ahead.plan().seqs[0].wants_prompt_logprobs for _ in range(4)] == wanted
    driver.scheduler._preempt(request)
    assert not any(seq.wants_prompt_logprobs for seq in driver.plan().seqs)


def test_times_and_counts_are_those_of_the_clock():
    driver = Driver()
    request = driver.add(20, max_tokens=2)
    for now in (1.0, 2.0, 3.0):
        plan = driver.plan()
        driver.clock = now
        driver.commit(plan)
    metrics = request.metrics
    assert (metrics.arrival_time, metrics.first_scheduled_time) == (0.0, 0.0)
    assert (metrics.time_to_first_token, metrics.latency) == (2.0, 3.0)
    stats = driver.scheduler.stats
    assert (stats.num_plans, stats.num_scheduled_tokens, stats.num_output_tokens) == (3, 21, 2)
    assert stats.num_finished == 1


def test_the_check_names_what_is_wrong():
    driver, first, _ = crowded()
    first.pages.pop()
    with pytest.raises(RuntimeError, match=r"reference counts of pages \[1\] do not match"):
        integrity.check(driver.scheduler)
    driver, first, _ = crowded()
    first.num_computed_tokens = 9
    with pytest.raises(RuntimeError, match="request a has 9 computed tokens and pages for 8"):
        integrity.check(driver.scheduler)
    driver, first, second = crowded()
    first.row = second.row
    with pytest.raises(RuntimeError, match="must be all rows, each once"):
        integrity.check(driver.scheduler)
