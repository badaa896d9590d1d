"""The adaptive choice of drafts in the scheduler, on a simulated clock."""

import logging
import random

import pytest

from jinfer.config.engine import EngineConfig
from jinfer.config.sampling_params import SamplingParams
from jinfer.config.speculative import SpeculativeConfig
from jinfer.engine.drafting.chains import Drafting, DraftingEvent
from jinfer.engine.drafting.trees import TreeSpeculation
from jinfer.engine.request import Request
from jinfer.engine.safety import integrity
from jinfer.engine.scheduler import Scheduler
from jinfer.speculation.adaptive import FIRST_TRIAL_WITHIN

METHODS = {
    "ngram": {},
    "self": {},
    "draft": {"model": "small"},
    "medusa": {"heads": "heads", "tree": ((0,), (0, 0), (1,), (0, 0, 0))},
    "lookahead": {"window": 2, "ngram_size": 4, "num_guesses": 2},
}


class Engine:
    """A scheduler with a simulated device of given step times and acceptance rates.

    Args:
      method: of speculation.
      cost: seconds of a step of so many sequences with so many drafts each.
      rate: of acceptance.
      resume: seconds more for the first step that is no rest, after one that was.
    """

    def __init__(self, method, cost, rate, resume=0.0, num_decode_steps=1, **config):
        speculation = SpeculativeConfig.of({"method": method, **METHODS[method], **config})
        self.config = EngineConfig(
            max_model_len=4096,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            enable_prefix_caching=False,
            num_decode_steps=num_decode_steps,
            speculation=speculation,
        )
        self.cost, self.rate, self.resume = cost, rate, resume
        self.time = 0.0
        self.scheduler = Scheduler(self.config, 800, 16, now=lambda: self.time)
        self.rng = random.Random(0)
        self.num_tokens = self.num_steps = self.num_drafting = self.num_ahead = 0
        self._is_behind = False
        self._in_flight = []

    def add(self, count, max_tokens):
        for i in range(count):
            # Such a prompt always ends as it did before.
            request = Request(
                request_id=f"{count}-{i}",
                prompt_token_ids=[5, 6, 7] * 5,
                params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
                seed=i,
                arrival=i,
                max_model_len=self.config.max_model_len,
            )
            self.scheduler.add(request)

    def step(self):
        """As `Engine.step`: two plans under way where nothing is to be drafted."""
        most = 1 if self.scheduler.is_drafting else 2
        while len(self._in_flight) < most and (plan := self.scheduler.plan()) is not None:
            self._in_flight.append(plan)
        self.num_ahead += len(self._in_flight) == 2
        plan = self._in_flight.pop(0)
        self.time += self._seconds(plan) * plan.num_steps
        samples, depth = [], self.config.speculation.max_depth
        for seq in plan.seqs:
            count = seq.num_samples - seq.drafts.depth  # several where steps stay on the device
            for _ in range(min(seq.drafts.depth, depth)):
                if self.rng.random() >= self.rate:
                    break
                count += 1
            tokens = seq.request.num_tokens
            samples.append([5 + (tokens + i) % 3 for i in range(count)])
        speculation = self.scheduler.speculation
        if isinstance(speculation, TreeSpeculation) and not plan.is_speculation_paused:
            nodes = self.config.speculation.num_speculative_tokens + 1
            guesses = [[[1, 2]] * max(depth, nodes)] * len(plan.seqs)
            speculation.take_guesses(plan, samples, guesses)
        self.scheduler.commit(plan, samples)
        integrity.check(self.scheduler)
        if not any(seq.is_prefill for seq in plan.seqs):
            self.num_tokens += sum(map(len, samples))
            self.num_steps += 1
            self.num_drafting += plan.max_drafts > 0
        return plan

    def _seconds(self, plan):
        drafts = max(seq.drafts.depth for seq in plan.seqs)
        seconds = self.cost(len(plan.seqs), drafts)
        if plan.is_speculation_paused:
            self._is_behind = True
        elif self._is_behind:
            seconds += self.resume
            self._is_behind = False
        return seconds

    def run(self, num_steps):
        """Makes so many steps; returns decoded tokens a second."""
        begin, before = self.time, self.num_tokens
        for _ in range(num_steps):
            self.step()
        return (self.num_tokens - before) / (self.time - begin)


@pytest.mark.parametrize(
    ("method", "resume"),
    [*((method, 0.0) for method in METHODS), ("draft", 5.0), ("medusa", 5.0)],
)
def test_where_drafts_slow_the_batch_down_its_speed_is_that_of_plain_decoding(method, resume):
    engine = Engine(method, lambda _, drafts: 3.0 if drafts else 1.0, 0.5, resume)
    engine.add(8, 1500)
    engine.run(300)  # the first trials
    engine.num_ahead = engine.num_drafting = 0
    assert engine.run(400) > 0.98 * 8
    assert (engine.num_drafting > 0) == (resume == 0.0)
    # Nor does it wait for tokens then.
    assert engine.num_ahead > 350


@pytest.mark.parametrize("method", METHODS)
def test_where_drafts_pay_they_are_made(method):
    engine = Engine(method, lambda _, drafts: 1.2 if drafts else 1.0, 0.8)
    engine.add(8, 1000)
    engine.run(30)
    before = engine.num_drafting
    rate = engine.run(100)
    assert engine.num_drafting - before > 0.95 * 100
    assert rate > 1.5 * 8


@pytest.mark.parametrize("method", METHODS)
def test_drafts_come_back_when_they_pay(method):
    """Dear for eight, cheap for one; so it is when seven have ended."""
    cost = lambda num_seqs, drafts: 1.0 + drafts * (2.0 if num_seqs > 1 else 0.05)  # noqa: E731
    engine = Engine(method, cost, 0.8)
    engine.add(7, 200)
    engine.add(1, 2500)
    engine.run(100)
    assert engine.num_drafting < 20
    while engine.scheduler.num_running > 1:
        engine.step()
    engine.run(FIRST_TRIAL_WITHIN + 50)
    before = engine.num_drafting
    engine.run(100)
    assert engine.num_drafting - before > 0.9 * 100


@pytest.mark.parametrize("method", METHODS)
def test_without_adaptive_there_are_always_drafts(method):
    engine = Engine(method, lambda _, drafts: 6.0 if drafts else 1.0, 0.5, adaptive=False)
    engine.add(8, 300)
    engine.run(50)
    assert engine.num_drafting >= 48
    assert engine.num_ahead == 0


@pytest.mark.parametrize("method", METHODS)
def test_steps_that_prefill_too_are_neither_measured_nor_trials(method):
    engine = Engine(method, lambda _, drafts: 6.0 if drafts else 1.0, 0.9)
    engine.add(4, 600)
    engine.step()
    for i in range(100):
        # A prompt that takes several steps is under way all the time.
        if not any(request.is_prefilling for request in engine.scheduler.running):
            for request in engine.scheduler.running[4:]:
                engine.scheduler.abort(request.request_id)
            request = Request(
                request_id=f"long-{i}",
                prompt_token_ids=list(range(10, 1210)),
                params=SamplingParams(max_tokens=1),
                seed=0,
                arrival=100 + i,
                max_model_len=4096,
            )
            engine.scheduler.add(request)
        plan = engine.step()
        if any(seq.is_prefill for seq in plan.seqs) and plan.seqs[-1].start:
            assert not plan.max_drafts


@pytest.mark.parametrize("method", METHODS)
def test_steps_that_stay_on_the_device_while_resting_are_counted_one_by_one(method):
    engine = Engine(method, lambda _, n: 3.0 if n else 1.0, 0.5, num_decode_steps=4)
    engine.add(8, 1500)
    num_steps = [engine.step().num_steps for _ in range(150)]
    assert num_steps.count(4) > 100
    speculation = engine.scheduler.speculation
    assert speculation.metrics()["tokens_per_step"] < 1.1
    assert set(speculation.length._seconds[(8).bit_length(), 0]) == {1.0}
    assert engine.run(100) > 0.98 * 8


@pytest.mark.parametrize("num_decode_steps", [1, 4])
@pytest.mark.parametrize("adaptive", [False, True])  # steps with drafts, plain ones
def test_tokens_beyond_the_end_of_a_text_are_no_tokens_of_its_steps(adaptive, num_decode_steps):
    engine = Engine(
        *("self", lambda _, n: 300.0 if n else 1.0, 1.0),
        num_decode_steps=num_decode_steps,
        adaptive=adaptive,
    )
    if adaptive:
        engine.add(1, 200)  # finds out that drafts do not pay
        while engine.scheduler.has_work():
            engine.step()
    request = Request(
        request_id="ends",
        prompt_token_ids=[5, 6, 7] * 5,
        params=SamplingParams(
            max_tokens=50, stop_token_ids=[6 if adaptive else 7]
        ),  # not the first
        seed=0,
        arrival=1,
        max_model_len=4096,
    )
    engine.scheduler.add(request)
    while engine.scheduler.has_work():
        engine.step()
    metrics, num_tokens = request.metrics, len(request.output_token_ids)
    assert engine.scheduler.stats.num_discarded_tokens > 0
    assert metrics.num_decode_tokens == num_tokens - 1 > 0  # the first came with the prompt
    assert metrics.num_decode_steps == (num_tokens - 1 if adaptive else 1)
    assert (metrics.num_drafted_tokens > 0) == (not adaptive)
    if not adaptive:
        rate = engine.scheduler.speculation.metrics()["tokens_per_step"]
        assert rate == metrics.tokens_per_step < 5.0


def test_the_log_tells_tokens_a_step_and_acceptance_by_position(caplog):
    engine = Engine("ngram", lambda *_: 1.0, 1.0, adaptive=False, num_speculative_tokens=2)
    engine.add(1, 100)
    with caplog.at_level(logging.INFO, logger="jinfer"):
        engine.run(30)
    first = next(r.message for r in caplog.records if "tokens per step" in r.message)
    assert first.startswith("speculation (ngram): ")
    assert first.endswith("accepted (100 %; by position 100 %, 100 %)")


def test_drafting_after_a_pause_catches_up_until_a_step_has_done_so():
    paused, drafts, skipped, caught_up = DraftingEvent
    state = Drafting.ACTIVE
    seen = []
    for event in (caught_up, drafts, paused, skipped, caught_up, drafts, skipped, caught_up):
        state = state.after(event)
        seen.append(state.name)
    assert seen == [*["ACTIVE"] * 2, *["PAUSED"] * 3, *["CATCHING_UP"] * 2, "ACTIVE"]
    assert state.after(skipped) is Drafting.CATCHING_UP
