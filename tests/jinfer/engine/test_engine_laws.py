"""Scheduler and pages on a simulated device: a request's tokens do not depend on batch mates.

The device executes plans in the order of their dispatch, with the pages and rows that the requests
have at that moment, and its results are committed 0, 1 or 2 plans later. Where a real one keeps K
and V it keeps token ids, each with a fingerprint of the tokens before it. Its model draws the next
token from a hash of everything that a real one looks at: the context as read back through the
pages, the seed, and the sampler row's own record of output tokens. A wrong page, row, position or
order gives other tokens than the request run alone.
"""

import array
import collections
import contextlib
import dataclasses
import random
import zlib
from typing import ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jinfer.config.engine import EngineConfig
from jinfer.config.sampling_params import SamplingParams
from jinfer.config.speculative import SpeculativeConfig
from jinfer.engine.pages import prefix
from jinfer.engine.pages.holdings import Holdings
from jinfer.engine.pages.host_tier import HostTier
from jinfer.engine.pages.pool import PagePool
from jinfer.engine.pages.prefix import PrefixCache
from jinfer.engine.pages.radix import TOKEN_BYTES, PageKey, num_common
from jinfer.engine.plan import ScheduledSeq
from jinfer.engine.request import Request
from jinfer.engine.safety import integrity, recovery
from jinfer.engine.scheduler import Scheduler
from jinfer.speculation.adaptive import DraftLength

EOS = 0
VOCAB_SIZE = 23  # an end of sequence every 23 tokens or so
NAN_TOKEN = 5000  # whatever follows it in a text is NaN
NAN = "nan"


def next_token(context, seed, num_prompt_tokens, row_outputs):
    """The model: any change of the context, the seed or the row's record changes the token."""
    record = repr((list(context), seed, num_prompt_tokens, list(row_outputs)))
    return zlib.crc32(record.encode()) % VOCAB_SIZE


def write_place(before, token, num_prompt_tokens, position, max_cached_tokens):
    """What a place holds: KV depends on all tokens before, and with some ropes on the length."""
    if token == NAN_TOKEN or before == NAN:
        return NAN
    length = max(num_prompt_tokens, position + 1)
    regime = length if max_cached_tokens is not None and length > max_cached_tokens else 0
    return token, zlib.crc32(repr((before, token, regime)).encode())


def run_alone(request, limit, max_cached_tokens=None):
    """Tokens of a request with the device to itself."""
    outputs, context = [], []
    while len(outputs) < limit:
        known = request.prompt_token_ids + outputs
        for position in range(len(context), len(known)):
            before = context[-1] if context else None
            context.append(
                write_place(
                    before, known[position], request.num_prompt_tokens, position, max_cached_tokens
                )
            )
        token = next_token(context, request.seed, request.num_prompt_tokens, outputs)
        outputs.append(token)
        if token == EOS and not request.params.ignore_eos:
            break
    return outputs


class SimulatedDevice:
    """Executes plans; places that were never written, or whose KV is stale, hold None."""

    def __init__(self, num_pages, page_size, num_rows, max_cached_tokens):
        self.max_cached_tokens = max_cached_tokens
        self.page_size = page_size
        self.places = [None] * (num_pages * page_size)
        self.slots = {}  # of host memory
        self.rows = [None] * num_rows
        self.last_tokens = [None] * num_rows

    def launch(self, plan):
        """Returns samples and soundness of each sequence; the host is not shown them yet."""
        size = self.page_size
        for page, slot in plan.moves.saved:
            self.slots[slot] = self.places[self._page(page)]
        for page in plan.moves.cleared:
            self.places[self._page(page)] = [None] * size
        for source, page, count in plan.moves.copied:
            copied = self.places[source * size :][:count]
            assert None not in copied, "what is copied was written before"
            self.places[self._page(page)] = copied + [None] * (size - count)
        for slot, page in plan.moves.loaded:
            self.places[self._page(page)] = self.slots[slot]
        for seq in plan.seqs:
            if seq.is_new_row:
                assert seq.request.num_in_flight == seq.num_samples, "outputs must be known"
                self.rows[seq.request.row] = list(seq.request.output_token_ids)
                self.last_tokens[seq.request.row] = None
        samples = [self._run(seq) for seq in plan.seqs]
        return samples, [self._is_sound(seq) for seq in plan.seqs]

    def lose_everything(self):
        self.places = [None] * len(self.places)
        self.slots.clear()
        self.rows = [None] * len(self.rows)

    def _is_sound(self, seq):
        last = seq.start + max(seq.num_tokens, seq.num_samples) - 1
        return self.places[self._place(seq.request.pages, last)] != NAN

    def _run(self, seq):
        request, row = seq.request, seq.request.row
        if seq.is_prefill:
            known = request.prompt_token_ids + request.output_token_ids
            inputs = known[seq.start : seq.start + seq.num_tokens]
        else:
            inputs = [self.last_tokens[row], *seq.drafts.token_ids]
        assert len(inputs) == seq.num_tokens
        self._write(request, seq.start, inputs)
        if seq.num_drafts:  # behind each, up to the first rejected one
            samples = [self._draw(request, seq.start + 1)]
            for i, draft in enumerate(seq.drafts.token_ids):
                if draft != samples[-1]:
                    break
                samples.append(self._draw(request, seq.start + 2 + i))
            return samples
        position, samples = seq.start + len(inputs), []
        for step in range(seq.num_samples):
            if step:
                assert seq.num_tokens == 1
                self._write(request, position, samples[-1:])
                position += 1
            samples.append(self._draw(request, position))
        return samples

    def _write(self, request, position, tokens):
        for token in tokens:
            before = self.places[self._place(request.pages, position - 1)] if position else None
            self.places[self._place(request.pages, position)] = write_place(
                before, token, request.num_prompt_tokens, position, self.max_cached_tokens
            )
            position += 1

    def _draw(self, request, num_tokens):
        """Samples behind the first `num_tokens` tokens."""
        row = self.rows[request.row]
        context = [self.places[self._place(request.pages, p)] for p in range(num_tokens)]
        token = next_token(context, request.seed, request.num_prompt_tokens, row)
        row.append(token)
        self.last_tokens[request.row] = token
        return token

    def _page(self, page):
        return slice(page * self.page_size, (page + 1) * self.page_size)

    def _place(self, pages, position):
        return pages[position // self.page_size] * self.page_size + position % self.page_size


class Foresight:
    """Proposes what a request will say, with wrong tokens here and there."""

    def __init__(self, max_cached_tokens):
        self.rng = random.Random(0)
        self.max_cached_tokens = max_cached_tokens

    def propose(self, request, limit):
        num_known, limit = len(request.output_token_ids), self.rng.randint(0, limit)
        text = run_alone(request, num_known + limit, self.max_cached_tokens)[num_known:]
        return tuple(VOCAB_SIZE if self.rng.random() < 0.2 else token for token in text)


class Harness:
    """Scheduler, device and what is in flight between them, with every invariant."""

    def __init__(self, num_pages, page_size, lag, max_cached_tokens=None, **config):
        self.config = EngineConfig(**{"max_model_len": 64, **config})
        self.scheduler = Scheduler(
            self.config, num_pages, page_size, max_cached_tokens=max_cached_tokens
        )
        self.device = SimulatedDevice(
            num_pages, page_size, self.config.max_num_seqs, max_cached_tokens
        )
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.proposer = Foresight(max_cached_tokens)
        self.lag = lag
        self.in_flight = collections.deque()
        self.requests = []
        self.deltas = collections.defaultdict(list)
        self.widest = 0

    def add(
        self,
        num_prompt_tokens,
        max_tokens,
        seed,
        priority=0,
        like=None,
        salt=None,
        nan_at=None,
        prompt=None,
        **params,
    ):
        """Queues a request whose prompt begins with as much as fits of the text of number `like`.

        That is its prompt and the output that it has so far. What it computes from position
        `nan_at` on is NaN.
        """
        rng = random.Random(seed)
        prompt = prompt or [rng.randrange(1000) for _ in range(num_prompt_tokens)]
        if like is not None and self.requests:
            before = self.requests[like % len(self.requests)]
            shared = before.known_token_ids[: rng.randint(0, num_prompt_tokens)]
            prompt[: len(shared)] = shared
        if nan_at is not None:
            prompt[nan_at % num_prompt_tokens] = NAN_TOKEN
        request = Request(
            request_id=f"r{len(self.requests)}",
            prompt_token_ids=prompt,
            cache_salt=salt,
            params=SamplingParams(max_tokens=max_tokens, **params),
            seed=seed,
            arrival=len(self.requests),
            max_model_len=self.config.max_model_len,
            priority=priority,
            eos_token_ids=(EOS,),
        )
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def fork(self, i, count, num_dropped):
        """Queues `count` requests with the text of number `i` but for its last tokens."""
        before = self.requests[i % len(self.requests)]
        text = before.known_token_ids[: max(1, len(before.known_token_ids) - num_dropped)]
        capacity = self.scheduler.pool.num_pages * self.scheduler.page_size
        if len(text) < min(self.config.max_model_len, capacity):
            for _ in range(count):
                self.add(1, before.params.max_tokens, seed=len(self.requests), prompt=text)

    def launch(self):
        plan = self.scheduler.plan()
        if plan is None:
            return False
        self.check_plan(plan)
        self.check_writes(plan)
        self.in_flight.append((plan, *self.device.launch(plan)))
        return True

    def commit(self):
        plan, samples, is_sound = self.in_flight.popleft()
        for progress in self.scheduler.commit(plan, samples, is_sound=is_sound):
            is_error = progress.request.finish_reason == "error"
            assert progress.finished == progress.request.is_finished
            assert bool(progress.new_token_ids) != is_error
            self.deltas[progress.request].extend(progress.new_token_ids)

    def lose_steps(self, is_blamed):
        """The oldest step in flight fails, and takes all that the device holds along."""
        failed = self.in_flight[0][0] if is_blamed and self.in_flight else None
        self.in_flight.clear()
        recovery.lose_steps(self.scheduler, failed, "a test")
        self.device.lose_everything()
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages

    def step(self):
        while self.scheduler.is_drafting and self.in_flight:  # as `Engine.step` waits
            self.commit()
        launched = self.launch()
        if self.in_flight and (not launched or len(self.in_flight) > self.lag):
            self.commit()
        self.check()

    def drain(self):
        for _ in range(3000):
            if not self.scheduler.has_work():
                break
            self.step()
        assert not self.scheduler.has_work(), f"stuck: {list(self.scheduler.waiting)}"
        assert not self.in_flight
        assert self.scheduler.prefix.num_available == self.scheduler.pool.num_pages
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        size = self.scheduler.page_size
        for place, value in enumerate(self.device.places):
            node = self.scheduler.prefix._nodes[place // size]
            is_known = node is not None and place % size < len(node.edge) // TOKEN_BYTES
            assert value != NAN or not is_known
        tier = self.scheduler.prefix.tier
        for slot in [] if tier is None else tier.filled_slots():
            assert NAN not in self.device.slots[slot]

    def check_plan(self, plan):
        config = self.config
        assert 0 < sum(seq.num_tokens for seq in plan.seqs) <= config.max_num_batched_tokens
        assert 1 <= plan.num_steps <= config.num_decode_steps
        kinds = [seq.is_prefill for seq in plan.seqs]
        assert kinds == sorted(kinds), "decodes come first"
        assert plan.is_decode == all(seq.num_tokens == 1 for seq in plan.seqs)
        assert plan.num_steps == 1 or not any(kinds)
        num_samples = max([1, *(seq.num_samples - seq.num_drafts for seq in plan.seqs)])
        assert plan.num_steps == num_samples
        assert len({seq.request.row for seq in plan.seqs}) == len(plan.seqs)
        self.widest = max(self.widest, plan.num_steps)
        for seq in plan.seqs:
            request = seq.request
            assert request.row is not None and not request.is_finished
            outputs = len(request.output_token_ids) + request.num_in_flight
            assert outputs <= request.max_output_tokens
            end = seq.start + max(seq.num_tokens, seq.num_samples)
            assert end <= len(request.pages) * self.scheduler.page_size
            if not config.enable_chunked_prefill and seq.is_prefill:
                assert seq.num_samples == 1
                assert seq.start == 0 or config.enable_prefix_caching

    def check_writes(self, plan):
        """No place is written twice in a step, and no other request can read what decodes write."""
        places = set()
        for seq in plan.seqs:
            first, last = seq.start, seq.start + max(seq.num_tokens, seq.num_samples)
            for position in range(first, last):
                page = seq.request.pages[position // self.scheduler.page_size]
                place = (page, position % self.scheduler.page_size)
                assert place not in places
                places.add(place)
                node = self.scheduler.prefix._nodes[page]
                if not seq.is_prefill:
                    assert self.scheduler.pool.count(page) == 1 + (node is not None)
                    assert node is None or place[1] >= len(node.edge) // TOKEN_BYTES
                assert page in seq.pages
        sources = {source for source, _, _ in plan.moves.copied}
        targets = {page for _, page, _ in plan.moves.copied}
        assert len(targets) == len(plan.moves.copied)
        for seq in plan.seqs:  # only a decode may go on in a page whose beginning is copied
            assert not seq.is_prefill or sources.isdisjoint(seq.pages)

    def check(self):
        """Checks invariants from the requests' own fields rather than by `integrity.check`."""
        scheduler = self.scheduler
        integrity.check(scheduler)
        prefix = scheduler.prefix
        held = [page for request in self.requests for page in request.pages]
        shared = {page for page, n in collections.Counter(held).items() if n > 1}
        idle = sum(prefix.is_cached(p) for p in range(scheduler.pool.num_pages) if p not in held)
        assert scheduler.pool.num_free + len(set(held)) + idle == scheduler.pool.num_pages
        if not self.config.enable_prefix_caching:
            assert not shared and not idle, "a page is held twice"
        for request in self.requests:
            assert len(request.pages) == len(set(request.pages))
        self.check_cached_pages()
        rows = [request.row for request in self.requests if request.row is not None]
        assert len(rows) == len(set(rows)) == scheduler.num_running <= self.config.max_num_seqs
        for request in self.requests:
            assert request.num_computed_tokens <= len(request.pages) * scheduler.page_size
            assert request.num_computed_tokens <= request.num_tokens
            if request.is_finished:
                assert not request.pages and request.row is None
            assert request.num_in_flight >= 0
            assert self.deltas[request] == request.output_token_ids

    def check_cached_pages(self):
        """Every cached page has been written, for the text by which it is found."""
        size = self.scheduler.page_size
        stack = [(root, []) for root in self.scheduler.prefix._roots.values()]
        while stack:
            node, text = stack.pop()
            places = self.device.places[node.page * size : (node.page + 1) * size]
            if node.page >= 0:
                tokens = array.array("i", node.edge)
                for token in tokens:
                    before = text[-1] if text else None
                    text = [*text, write_place(before, token, 0, 0, None)]
                assert places[: len(tokens)] == text[-len(tokens) :]
            stack += [(child, text) for child in node.children.values()]

    def check_tokens(self):
        """Every request has the tokens that it has alone; aborted ones a beginning of them."""
        capacity = self.scheduler.pool.num_pages * self.scheduler.page_size
        for request in self.requests:
            room = min(self.config.max_model_len, capacity + 1) - request.num_prompt_tokens
            limit = min(room, request.params.max_tokens or room)
            alone = run_alone(request, limit, self.device.max_cached_tokens)
            if NAN_TOKEN in request.prompt_token_ids:
                assert request.finish_reason in ("abort", "error") and not request.output_token_ids
            elif request.num_failed_steps >= recovery.MAX_FAILED_STEPS:
                assert request.finish_reason == "error"
                assert alone[: len(request.output_token_ids)] == request.output_token_ids
            elif request.finish_reason == "abort":
                assert alone[: len(request.output_token_ids)] == request.output_token_ids
            else:
                assert request.output_token_ids == alone
                ended = alone[-1] == EOS and not request.params.ignore_eos
                assert request.finish_reason == ("stop" if ended else "length")


# ---------------------------------------------------------------------- laws on random loads


def random_load(seed, lag, **config):
    """Runs random arrivals and aborts to the end; returns the harness for its counters."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4, 8])
    capacity = rng.choice([24, 32, 48, 64])
    budget = rng.choice([8, 12, 16, 33])
    defaults = {
        "max_num_seqs": rng.choice([2, 3, 5, 8]),
        "max_num_batched_tokens": budget,
        "num_decode_steps": rng.randint(1, 8),
        "max_model_len": rng.choice([24, 40, 64]),
        "max_cached_tokens": rng.choice([None, None, None, 3 * page_size + 1]),
    }
    harness = Harness(capacity // page_size, page_size, lag, **{**defaults, **config})
    longest = min(capacity, harness.config.max_model_len - 1)
    edges = [n + d for n in (page_size, 2 * page_size, budget, 2 * budget) for d in (-1, 0, 1)]
    for i in range(12):
        n = rng.choice(edges) if rng.random() < 0.5 else rng.randint(1, 20)
        harness.add(
            min(max(1, n), longest),
            max_tokens=rng.choice([1, 2, 5, 12, 30, None]),
            seed=1000 * seed + i,
            priority=rng.choice([0, 0, 0, 1]),
            ignore_eos=rng.random() < 0.7,
            logprobs=rng.choice([None, None, None, 1]),
            like=rng.choice([None, *[rng.randrange(12)] * 3]),
            salt=rng.choice([None, None, None, "x"]),
            skip_reading_prefix_cache=rng.random() < 0.1,
            nan_at=rng.randrange(20) if rng.random() < 0.07 else None,
        )
        if rng.random() < 0.03:
            harness.lose_steps(is_blamed=True)
        if rng.random() < 0.05:
            harness.scheduler.prefix.reset()
        for _ in range(rng.randrange(6)):
            harness.step()
        if rng.random() < 0.15:
            harness.scheduler.abort(rng.choice(harness.requests).request_id)
            harness.check()
    harness.drain()
    harness.check_tokens()
    return harness


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_tokens_with_any_batch_mates_are_those_of_the_request_alone(lag):
    runs = [random_load(seed, lag) for seed in range(60)]
    stats = [run.scheduler.stats for run in runs]
    # Not vacuous: pages ran out often, plans overshot, and the device kept several steps.
    assert sum(s.num_preemptions for s in stats) > 40
    assert sum(s.num_discarded_tokens for s in stats) > (0 if lag == 0 else 20)
    assert max(run.widest for run in runs) == 8
    assert any(request.finish_reason == "abort" for run in runs for request in run.requests)
    # Prompts and generated tokens were found again, and pages went when they were needed.
    assert sum(s.num_cached_tokens for s in stats) > 100
    assert sum(run.scheduler.prefix.num_evicted for run in runs) > 500


def host_load(seed):
    """A random load with few pages on the device and a few more on the host."""
    num_host_pages = (2, 5, 20)[seed // 3 % 3]
    return random_load(seed, lag=seed % 3, num_host_pages=num_host_pages)


def test_pages_come_back_from_the_host_as_they_went():
    tiers = [host_load(seed).scheduler.prefix.tier for seed in range(45)]
    for name in ("num_loaded_pages", "num_swaps", "num_host_dropped_pages", "num_host_hits"):
        assert sum(getattr(tier, name) for tier in tiers) > 10, name


def test_tokens_without_the_cache_are_the_same():
    for seed in range(20):
        run = random_load(seed, 1, enable_prefix_caching=False)
        assert run.scheduler.prefix.num_cached == run.scheduler.stats.num_cached_tokens == 0


def test_the_same_with_drafts():
    drafts = SpeculativeConfig(method="self", num_speculative_tokens=4, adaptive=False)
    runs = [random_load(seed, 0, speculation=drafts) for seed in range(30)]
    metrics = [run.scheduler.speculation.metrics() for run in runs]
    drafted = sum(m["num_drafted_tokens"] for m in metrics)
    assert 300 < sum(m["num_accepted_tokens"] for m in metrics) < drafted - 300
    assert sum(run.scheduler.stats.num_preemptions for run in runs) > 10
    assert sum(run.scheduler.stats.num_cached_tokens for run in runs) > 50


@pytest.mark.parametrize("lag", [0, 2])
def test_the_same_where_drafts_come_and_go(lag, monkeypatch):
    """Steps without drafts run ahead; those that draft wait for the tokens of the last one."""
    rng = random.Random(0)
    choose = lambda _, lengths, may_try: rng.choice((0, max(lengths, default=0)))  # noqa: E731
    monkeypatch.setattr(DraftLength, "choose", choose)
    monkeypatch.setattr(DraftLength, "num_steps_without", lambda *_: rng.randint(0, 6))
    drafts = SpeculativeConfig(method="self", num_speculative_tokens=4)
    runs = [random_load(seed, lag, speculation=drafts) for seed in range(20)]
    metrics = [run.scheduler.speculation.metrics() for run in runs]
    assert sum(m["num_accepted_tokens"] for m in metrics) > 100
    assert sum(run.scheduler.stats.num_preemptions for run in runs) > 10


@pytest.mark.parametrize("lag", [0, 2])
def test_the_same_without_chunked_prefill(lag):
    limits = {"max_model_len": 33, "max_num_batched_tokens": 33, "enable_chunked_prefill": False}
    runs = [random_load(seed, lag, **limits) for seed in range(20)]
    assert sum(run.scheduler.stats.num_preemptions for run in runs) > 10


@pytest.mark.parametrize("num_decode_steps", range(1, 9))
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_lengths_around_pages_and_chunks(num_decode_steps, lag):
    page_size, budget = 4, 8
    for num_prompt_tokens in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17):
        harness = Harness(
            9,
            page_size,
            lag,
            max_num_seqs=3,
            max_num_batched_tokens=budget,
            num_decode_steps=num_decode_steps,
        )
        for i, max_tokens in enumerate((4, 5, 9)):
            harness.add(num_prompt_tokens + i, max_tokens, seed=i, ignore_eos=True)
        harness.drain()
        harness.check_tokens()


def test_no_request_starves_under_constant_preemption():
    harness = Harness(8, 2, 2, max_num_seqs=4, max_num_batched_tokens=4, max_model_len=17)
    for i in range(8):
        harness.add(2, None, seed=i, ignore_eos=True)  # each fills the pool alone
    harness.drain()
    harness.check_tokens()
    assert harness.scheduler.stats.num_preemptions > 8
    finished = [request.metrics.finished_time for request in harness.requests]
    assert finished == sorted(finished)  # first come, first served


# ---------------------------------------------------------------------- the state machine


class EngineMachine(RuleBasedStateMachine):
    """Any order of arrivals, launches, commits and aborts keeps the bookkeeping consistent."""

    counts: ClassVar = collections.Counter()

    @initialize(
        num_pages=st.integers(3, 9),
        page_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(2, 4),
        budget=st.integers(4, 9),
        num_decode_steps=st.integers(1, 8),
        lag=st.integers(0, 2),
        max_cached_tokens=st.sampled_from([None, None, 7]),
        num_host_pages=st.sampled_from([0, 0, 2, 6]),
    )
    def start(self, num_pages, page_size, budget, lag, max_cached_tokens, **config):
        self.capacity = num_pages * page_size
        self.harness = Harness(
            num_pages,
            page_size,
            lag,
            max_cached_tokens=max_cached_tokens,
            max_num_batched_tokens=budget,
            max_model_len=40,
            **config,
        )

    @rule(
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
        max_tokens=st.sampled_from([1, 2, 7, 20, None, None]),
        priority=st.integers(0, 1),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, None, 1]),
        like=st.sampled_from([None, *range(8)]),
        salt=st.sampled_from([None, None, "x"]),
        nan_at=st.sampled_from([*[None] * 6, 0, 3, 8]),
    )
    def add(self, sizes, **fields):
        for num_prompt_tokens in sizes:
            seed = len(self.harness.requests)
            if num_prompt_tokens > self.capacity:
                with pytest.raises(ValueError, match="does not fit"):
                    self.harness.add(num_prompt_tokens, seed=seed, **fields)
            else:
                self.harness.add(num_prompt_tokens, seed=seed, **fields)

    @precondition(lambda self: self.harness.requests)
    @rule(i=st.integers(0, 100), n=st.integers(1, 3), dropped=st.integers(0, 3))
    def fork(self, i, n, dropped):
        """More samples of a request, which go on from its text, or from some tokens before."""
        self.harness.fork(i, n, dropped)

    @rule(n=st.integers(1, 6))
    def steps(self, n):
        for _ in range(n):
            self.harness.step()
            self.harness.check()

    @precondition(lambda self: len(self.harness.in_flight) < 3)
    @rule()
    def launch(self):
        self.harness.launch()

    @precondition(lambda self: self.harness.in_flight)
    @rule()
    def commit(self):
        self.harness.commit()

    @precondition(lambda self: self.harness.requests)
    @rule(i=st.integers(0, 100))
    def abort(self, i):
        request = self.harness.requests[i % len(self.harness.requests)]
        was_finished = request.is_finished
        assert self.harness.scheduler.abort(request.request_id) is (
            None if was_finished else request
        )

    @precondition(lambda self: self.harness.scheduler.num_running)
    @rule()
    def preempt(self):
        self.harness.scheduler._preempt(self.harness.scheduler.running[-1])

    @rule(n=st.integers(1, 4))
    def evict(self, n):
        prefix = self.harness.scheduler.prefix
        prefix.free(prefix.alloc(min(n, prefix.num_available)))

    @rule()
    def reset(self):
        self.harness.scheduler.prefix.reset()

    @rule(is_blamed=st.booleans())
    def lose_steps(self, is_blamed):
        self.harness.lose_steps(is_blamed)

    @invariant()
    def books_are_whole(self):
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self):
        if hasattr(self, "harness"):
            self.harness.drain()
            self.harness.check_tokens()
            for name, value in dataclasses.asdict(self.harness.scheduler.stats).items():
                self.counts[name] += value
            self.counts["num_evicted"] += self.harness.scheduler.prefix.num_evicted
            tier = self.harness.scheduler.prefix.tier
            self.counts["num_loaded_pages"] += 0 if tier is None else tier.num_loaded_pages


def run_machine(max_examples, **fields):
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            **fields,
        ),
    )


@pytest.mark.parametrize("max_examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_order_of_events_keeps_the_books_whole(max_examples):
    EngineMachine.counts.clear()
    run_machine(max_examples)
    assert EngineMachine.counts["num_errors"] > 20
    assert EngineMachine.counts["num_preemptions"] > 50
    assert EngineMachine.counts["num_discarded_tokens"] > 50
    assert EngineMachine.counts["num_cached_tokens"] > 50
    assert EngineMachine.counts["num_evicted"] > 50
    assert EngineMachine.counts["num_copied_pages"] > 50
    assert EngineMachine.counts["num_loaded_pages"] > 20


# ---------------------------------------------------------------------- seeded bugs must be seen


def pages_freed_but_one(monkeypatch):
    free = PagePool.free
    monkeypatch.setattr(PagePool, "free", lambda self, pages: free(self, pages[1:]))


def pages_freed_twice(monkeypatch):
    free = PagePool.free
    monkeypatch.setattr(PagePool, "free", lambda self, p: (free(self, p), free(self, p[:1])))


def pages_handed_out_twice(monkeypatch):
    alloc = PagePool.alloc

    def alloc_twice(self, n):
        pages = alloc(self, n)
        if pages:
            self._free.append(pages[-1])
        return pages

    monkeypatch.setattr(PagePool, "alloc", alloc_twice)


def one_place_too_few_at_a_page_border(monkeypatch):
    monkeypatch.setattr(Holdings, "num_pages", lambda self, n: -(-(n - 1) // self.page_size))


def rows_not_initialised(monkeypatch):
    schedule = Scheduler._schedule_chunk

    def without_new_row(self, request, n):
        seq = schedule(self, request, n)
        return ScheduledSeq(seq.request, seq.start, n, seq.num_samples, False, True)

    monkeypatch.setattr(Scheduler, "_schedule_chunk", without_new_row)


def tokens_in_flight_not_waited_for(monkeypatch):
    admit = Scheduler._admit

    def admit_at_once(self, request):
        in_flight, request.num_in_flight = request.num_in_flight, 0
        admitted = admit(self, request)
        request.num_in_flight = in_flight
        return admitted

    monkeypatch.setattr(Scheduler, "_admit", admit_at_once)


def tokens_beyond_the_end_kept(monkeypatch):
    monkeypatch.setattr(Request, "is_finished", property(lambda self: False))


def limits_ignored_by_plans(monkeypatch):
    monkeypatch.setattr(
        Request,
        "num_unplanned_outputs",
        property(lambda self: self.max_output_tokens - len(self.output_token_ids)),
    )


def computed_tokens_kept_by_preemption(monkeypatch):
    give_back = Holdings.give_back

    def give_back_pages_only(self, request):
        computed = request.num_computed_tokens
        give_back(self, request)
        request.num_computed_tokens = min(computed, request.num_tokens - 1)

    monkeypatch.setattr(Holdings, "give_back", give_back_pages_only)


def cached_pages_freed_twice(monkeypatch):
    free = PrefixCache.free
    monkeypatch.setattr(PrefixCache, "free", lambda self, p: (free(self, p), free(self, p[-1:])))


def hits_not_counted(monkeypatch):
    monkeypatch.setattr(PrefixCache, "share", lambda self, pages: list(pages))


def evicted_pages_still_found(monkeypatch):
    evict = PrefixCache._evict

    def evict_but_keep(self):
        roots = {key: dict(root.children) for key, root in self._roots.items()}
        evict(self)
        for key, children in roots.items():
            if key in self._roots:
                self._roots[key].children.update(children)

    monkeypatch.setattr(PrefixCache, "_evict", evict_but_keep)


def pages_inserted_one_token_too_early(monkeypatch):
    monkeypatch.setattr(
        Holdings, "_cacheable_tokens", lambda self, request, n, _: request.known_token_ids[: n + 1]
    )


def pages_found_one_token_too_early(monkeypatch):
    find = PrefixCache.find

    def find_more(self, namespace, tokens, max_pages):
        max_pages = -(-len(tokens) // self.page_size)
        return find(self, namespace, [*tokens, *tokens[-1:]], max_pages)

    monkeypatch.setattr(PrefixCache, "find", find_more)


def found_pages_counted_as_available(monkeypatch):
    monkeypatch.setattr(PrefixCache, "num_available_beside", lambda self, pages: self.num_available)


def lengths_that_change_the_kv_ignored(monkeypatch):
    monkeypatch.setattr(Holdings, "_can_share", lambda self, request: self.is_caching)
    monkeypatch.setattr(
        Holdings, "_cacheable_tokens", lambda self, request, n, _: request.known_token_ids[:n]
    )


def sources_of_copies_not_counted(monkeypatch):
    find_part, share = Holdings._find_part, PrefixCache.share
    sources = set()

    def find_and_note(self, request, hit):
        source, count = find_part(self, request, hit)
        sources.add((source,))
        return source, count

    def share_hits_only(self, pages):
        return list(pages) if tuple(pages) in sources else share(self, pages)

    monkeypatch.setattr(Holdings, "_find_part", find_and_note)
    monkeypatch.setattr(PrefixCache, "share", share_hits_only)


def copies_left_out(monkeypatch):
    take = Holdings.take_moves
    monkeypatch.setattr(
        Holdings, "take_moves", lambda self: dataclasses.replace(take(self), copied=())
    )


def pages_copied_while_they_are_filled(monkeypatch):
    fill = Holdings.fill
    monkeypatch.setattr(Holdings, "fill", lambda self, request, _: fill(self, request, ()))


def one_token_too_many_copied(monkeypatch):
    monkeypatch.setattr(prefix, "num_common", lambda a, b: num_common(a, b) + (a[:4] == b[:4]))


def nan_kept_in_the_cache(monkeypatch):
    monkeypatch.setattr(PrefixCache, "forget", lambda self, *args: [])


def requests_in_flight_not_told_of_lost_steps(monkeypatch):
    start_over = Request.start_over

    def wait_for_what_never_comes(self):
        num_in_flight = self.num_in_flight
        start_over(self)
        self.num_in_flight = num_in_flight

    monkeypatch.setattr(Request, "start_over", wait_for_what_never_comes)


MUTATIONS = [
    sources_of_copies_not_counted,
    copies_left_out,
    pages_copied_while_they_are_filled,
    one_token_too_many_copied,
    nan_kept_in_the_cache,
    requests_in_flight_not_told_of_lost_steps,
    cached_pages_freed_twice,
    hits_not_counted,
    evicted_pages_still_found,
    pages_inserted_one_token_too_early,
    pages_found_one_token_too_early,
    found_pages_counted_as_available,
    lengths_that_change_the_kv_ignored,
    pages_freed_but_one,
    pages_freed_twice,
    pages_handed_out_twice,
    one_place_too_few_at_a_page_border,
    rows_not_initialised,
    tokens_in_flight_not_waited_for,
    tokens_beyond_the_end_kept,
    limits_ignored_by_plans,
    computed_tokens_kept_by_preemption,
]


def slots_not_pinned(monkeypatch):
    pin = HostTier.pin

    def pin_nothing(self, keys):
        slots = pin(self, keys)
        self._pinned.clear()
        return slots

    monkeypatch.setattr(HostTier, "pin", pin_nothing)


def losses_kept_from_the_host(monkeypatch):
    monkeypatch.setattr(HostTier, "clear", lambda self: None)


def digests_of_single_pages(monkeypatch):
    below = PageKey.below
    monkeypatch.setattr(PageKey, "below", lambda self, e: below(PageKey(b"", b"", self.depth), e))


def saves_of_another_page(monkeypatch):
    save = HostTier.save

    def save_the_last_page_everywhere(self, key, page):
        save(self, key, page)
        self._saves = dict.fromkeys(self._saves, page)

    monkeypatch.setattr(HostTier, "save", save_the_last_page_everywhere)


def loads_in_another_order(monkeypatch):
    load = HostTier.load
    monkeypatch.setattr(HostTier, "load", lambda self, slots, pages: load(self, slots, pages[::-1]))


HOST_MUTATIONS = [
    slots_not_pinned,
    losses_kept_from_the_host,
    digests_of_single_pages,
    saves_of_another_page,
    loads_in_another_order,
]

BUGS = (AssertionError, RuntimeError, ValueError, IndexError, TypeError)


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_seeded_bug_makes_the_state_machine_fail(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(BUGS), contextlib.redirect_stdout(None):
        run_machine(max_examples=400, phases=(Phase.generate,), report_multiple_bugs=False)


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_seeded_bug_makes_the_random_loads_fail(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(BUGS):
        for seed in range(40):
            random_load(seed, lag=2)


@pytest.mark.parametrize("mutate", HOST_MUTATIONS)
def test_a_seeded_bug_of_the_host_tier_is_seen(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises((*BUGS, KeyError)):
        for seed in range(200):
            host_load(seed)
