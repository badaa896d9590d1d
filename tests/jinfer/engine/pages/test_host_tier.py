"""The bookkeeping of the host tier against a simulated host; costs; no device."""

import collections
import itertools
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from jinfer.config.engine import EngineConfig
from jinfer.config.sampling_params import SamplingParams
from jinfer.engine.pages.costs import TransferCosts
from jinfer.engine.pages.host_tier import HostTier
from jinfer.engine.pages.pool import PageError
from jinfer.engine.pages.radix import PageKey
from jinfer.engine.plan import PageMoves, Plan, ScheduledSeq
from jinfer.engine.request import Request
from jinfer.engine.safety import integrity
from jinfer.engine.scheduler import Scheduler

NO_MOVES = PageMoves()
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple)


def key_of(text, namespace="n"):
    key = PageKey.root(namespace)
    for token in text:
        key = key.below(bytes([token]))
    return key


class TierMachine(RuleBasedStateMachine):
    """Pages hold texts; what is loaded must be the text that was asked for."""

    counts: ClassVar = collections.Counter()

    @initialize(num_slots=st.integers(1, 6))
    def start(self, num_slots):
        self.tier = HostTier(num_slots, page_size=1)
        self.slots = {}
        self.pages = {}  # page -> text
        self.wanted = {}  # likewise, after the next moves
        self.order = []  # texts on the host, the one to go first in front
        self.ids = {}  # text -> number of the copy that is there
        self.pinned = set()  # such numbers
        self.numbers = itertools.count()

    @rule(whole=TEXTS)
    def save(self, whole):
        for text in [whole[:n] for n in range(len(whole), 0, -1)]:  # leaves go first
            page = next(self.numbers)
            self.pages[page] = text
            self.tier.save(key_of(text), page)
            if text in self.order:
                self.order.remove(text)
            else:
                gone = self.pinned - {self.ids[t] for t in self.order}
                if len(self.order) + len(gone) == self.tier.num_slots:
                    free = [t for t in self.order if self.ids[t] not in self.pinned]
                    if not free:
                        continue
                    self.order.remove(free[0])
                self.ids[text] = page
            self.order.append(text)

    @rule(text=TEXTS)
    def load(self, text):
        keys = self.tier.find(PageKey.root("n"), [bytes([token]) for token in text])
        found = [text[: n + 1] for n in range(len(keys))]
        assert all(t in self.order for t in found)
        assert len(found) == len(text) or text[: len(found) + 1] not in self.order
        pages = [next(self.numbers) for _ in found]
        self.wanted.update(zip(pages, found))
        self.tier.load(self.tier.pin(keys), pages)
        self.order = [t for t in self.order if t not in found] + found[::-1]
        self.pinned.update(self.ids[t] for t in found)
        self.counts["loaded"] += len(found)

    @rule()
    def take(self):
        moves = self.tier.take(NO_MOVES)
        for page, slot in moves.saved:
            self.slots[slot] = self.pages[page]
        self.pages.clear()  # whatever was saved is written anew from here on
        for slot, page in moves.loaded:
            assert self.slots[slot] == self.wanted.pop(page)
        assert not self.wanted
        self.pinned.clear()
        assert self.tier.take(NO_MOVES) == NO_MOVES

    @rule(text=TEXTS)
    def forget(self, text):
        self.tier.forget(key_of(text))
        is_kept = {t: t[0] != text[0] or len(t) < len(text) for t in self.order}
        self.order = [t for t in self.order if is_kept[t] and len(text) > 1]

    @rule(is_sure=st.sampled_from([False, False, True]))
    def reset(self, is_sure):
        if is_sure:
            self.tier.reset()
            self.order.clear()

    @invariant()
    def books_are_whole(self):
        if hasattr(self, "tier"):
            self.tier.check()
            assert self.tier.num_cached == len(self.order) <= self.tier.num_slots


def run_machine(max_examples=60):
    run_state_machine_as_test(
        TierMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )


def test_what_is_loaded_is_what_was_saved():
    TierMachine.counts.clear()
    run_machine()
    assert TierMachine.counts["loaded"] > 60


def test_the_check_names_slots_that_are_lost_or_counted_twice():
    tier = HostTier(3, page_size=1)
    tier.save(key_of((0,)), 7)
    tier._free.append(0)
    with pytest.raises(PageError, match=r"host slots \[0\] are neither free nor in use"):
        tier.check()
    tier._free.pop()
    tier.check()
    tier._saves[2] = 5
    with pytest.raises(PageError, match=r"host slots \[2\] are to be saved or loaded"):
        tier.check()


def test_namespaces_and_places_are_other_pages():
    tier = HostTier(4, page_size=1)
    tier.save(key_of((1, 1)), 0)
    assert tier.find(PageKey.root("n"), [b"\1", b"\1"]) == []  # the page before is missing
    assert len(tier.find(key_of((1,)), [b"\1"])) == 1
    assert tier.find(key_of((1,), "other"), [b"\1"]) == []
    assert tier.find(key_of((0,)), [b"\1"]) == []


# ---------------------------------------------------------------------- costs


def make_plan(num_tokens, step_id=0, moves=NO_MOVES):
    params = SamplingParams(max_tokens=1)
    request = Request(
        request_id="r",
        prompt_token_ids=[1] * num_tokens,
        params=params,
        seed=0,
        arrival=0,
        max_model_len=99,
    )
    seq = ScheduledSeq(request, 0, num_tokens, 1, True, True)
    return Plan((seq,), 1, False, step_id, moves)


def test_a_token_costs_what_the_fastest_step_took_a_token():
    clock = iter([0, 1, 2, 11, 17, 20, 21, 30, 31])
    costs = TransferCosts(4, load_page_s=5, load_s=1, now=lambda: float(next(clock)))
    assert costs.token_s is None and costs.is_worth_loading(1) and costs.is_worth_saving()
    first, second = make_plan(5, 0), make_plan(6, 1)
    costs.begin(first)  # at 1
    costs.begin(second)  # at 2, behind the first
    costs.end(first)  # at 11
    assert costs.token_s == 2
    costs.end(second)  # at 17, having begun at 11
    assert costs.token_s == 1
    for plan in (make_plan(3, 2), make_plan(4, 3, PageMoves(saved=((0, 0),)))):
        costs.begin(plan)  # neither less than a page nor a step that moves pages counts
        costs.end(plan)
    assert costs.token_s == 1


def test_pages_are_loaded_where_that_takes_less_time():
    costs = TransferCosts(4, save_page_s=2, load_page_s=1, load_s=5, token_s=0.5)
    assert [costs.is_worth_loading(n) for n in (1, 5, 6)] == [False, False, True]
    assert not costs.is_worth_saving()  # three seconds there and back for two of computing
    assert TransferCosts(4, save_page_s=0.9, load_page_s=1, token_s=0.5).is_worth_saving()


# ---------------------------------------------------------------------- in the scheduler


def serve(prompts, costs=None, max_tokens=1, num_pages=6):
    """Serves prompts of a tiny pool one after the other; returns the first step's starts."""
    config = EngineConfig(max_model_len=64, max_num_batched_tokens=64, num_host_pages=8)
    scheduler = Scheduler(config, num_pages, page_size=4)
    scheduler.prefix.tier.costs = costs or TransferCosts(4, token_s=1.0)
    starts = []
    for i, group in enumerate(prompts):
        for j, prompt in enumerate(group):
            request = Request(
                request_id=f"{i}/{j}",
                prompt_token_ids=list(prompt),
                params=SamplingParams(max_tokens=max_tokens),
                seed=0,
                arrival=10 * i + j,
                max_model_len=64,
            )
            scheduler.add(request)
        first = True
        while scheduler.has_work():
            plan = scheduler.plan()
            integrity.check(scheduler)
            if first:
                starts += [seq.start for seq in plan.seqs]
            first = False
            scheduler.commit(plan, [[7] * seq.num_samples for seq in plan.seqs])
    return starts, scheduler.prefix.tier


def test_a_host_hit_prolongs_a_hit_on_the_device():
    a, b = range(16), range(100, 120)
    starts, tier = serve([[a], [b], [a], [a]])
    assert starts == [0, 0, 12, 15]  # the last token's page is computed, or copied once known
    # Of a, one page stayed on the device and two came back; what was on the host stays there.
    assert (tier.num_host_hits, tier.num_loaded_pages) == (1, 2)


def test_what_costs_less_to_compute_is_computed():
    a, b = range(16), range(100, 120)
    costs = TransferCosts(4, load_page_s=1, load_s=7, token_s=1.0)
    starts, tier = serve([[a], [b], [a]], costs)
    assert starts == [0, 0, 4]  # two pages would take 9 seconds, their 8 tokens less: 8
    assert (tier.num_host_declined, tier.num_loaded_pages) == (1, 0)


@pytest.mark.parametrize(("load_s", "counts"), [(0, (1, 0)), (99, (0, 1))])
def test_preempted_requests_swap_or_are_computed_again(load_s, counts):
    a, b = range(10), range(20, 26)
    costs = TransferCosts(4, load_s=load_s, token_s=1.0)
    _, tier = serve([[a, b]], costs, max_tokens=14)
    assert (tier.num_swaps, tier.num_recomputes) == counts
