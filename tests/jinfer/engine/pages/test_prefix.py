"""The prefix cache against a dict of all prefixes, and what the scheduler does with its hits."""

import collections
import contextlib
import dataclasses
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
from jinfer.engine.pages import prefix, radix
from jinfer.engine.pages.pool import OutOfPages, PageError, PagePool
from jinfer.engine.pages.prefix import PrefixCache
from jinfer.engine.pages.radix import Node, as_edge
from jinfer.engine.request import Request
from jinfer.engine.safety import integrity
from jinfer.engine.scheduler import Scheduler


def make_cache(num_pages=8, page_size=2):
    return PrefixCache(PagePool(num_pages), page_size)


def fill(cache, text, namespace=()):
    """Computes and leaves behind a text, as a request does; returns what it found."""
    found = cache.find(namespace, text, (len(text) - 1) // cache.page_size)
    assert cache.find_part(namespace, text[: len(found) * cache.page_size], found)[1] == 0
    missing = -(-len(text) // cache.page_size) - len(found)
    cache.release(namespace, text, cache.share(found) + cache.alloc(missing))
    cache.check()
    return found


# ---------------------------------------------------------------------- the tree


def test_texts_part_at_page_borders():
    cache = make_cache()
    assert fill(cache, [5, 6, 7, 8]) == []
    first, second = cache.find((), [5, 6, 7, 8], 9)
    assert fill(cache, [5, 6, 7, 9]) == [first]
    [_, other] = cache.find((), [5, 6, 7, 9, 2], 9)
    assert cache.num_cached == 3 and len({first, second, other}) == 3
    assert cache.find((), [5, 6, 7], 9) == [first]
    assert cache.find((), [5, 7, 7, 8], 9) == cache.find((), [5], 9) == cache.find((), [], 9) == []
    assert cache.find((), [5, 6, 7, 8], 1) == [first]
    assert cache.find((), [5, 6, 7, 8], 0) == []


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_page_filled_in_part_is_kept_to_be_copied(page_size):
    for n in range(3 * page_size + 1):
        cache = make_cache(4, page_size)
        text = list(range(n))
        fill(cache, text)
        assert cache.num_cached == -(-n // page_size) == 4 - cache.pool.num_free
        for m in range(n + 1):
            found = cache.find((), text[:m], 9)
            assert len(found) == m // page_size
            page, count = cache.find_part((), text[:m], found)
            assert count == m % page_size
            assert count == 0 or (cache.is_cached(page) and page not in found)


def test_the_page_that_begins_most_like_the_text_is_found_among_many():
    cache = make_cache(num_pages=64, page_size=4)
    fill(cache, [9, 9, 9, 9])
    for a in range(1, 8):
        for b in range(1, 8):
            fill(cache, [9, 9, 9, 9, a, 256 * a, b])  # bytes are not in the order of tokens
    found = cache.find((), [9, 9, 9, 9], 9)
    for a in (1, 4, 7):
        for tail, expected in (([a, 256 * a, 3, 5], 3), ([a, 256 * a, 300], 2), ([a, 5], 1)):
            page, count = cache.find_part((), [9, 9, 9, 9, *tail], found)
            assert count == expected and cache._nodes[page].edge.startswith(as_edge(tail[:count]))
    assert cache.find_part((), [9, 9, 9, 9, 8], found) == (-1, 0)
    assert cache.find_part((), [9, 9, 9, 9], found) == (-1, 0)
    assert cache.find_part((), [9, 9, 8], []) == (found[0], 2)
    assert cache.find_part("other", [9, 9, 8], []) == (-1, 0)


def test_a_part_grows_with_its_page_and_goes_when_another_has_its_tokens_and_more():
    cache = make_cache(page_size=4)
    mine, theirs = cache.alloc(1), cache.alloc(1)
    cache.insert((), [1, 2], mine)
    cache.insert((), [1, 2, 3], mine)
    assert cache.find_part((), [1, 2, 3, 4], []) == (mine[0], 3) and cache.num_cached == 1
    version = cache.version
    cache.insert((), [1, 2, 3, 4], theirs)
    assert cache.version > version and cache.find((), [1, 2, 3, 4], 9) == theirs
    assert not cache.is_cached(mine[0]) and cache.pool.count(mine[0]) == 1
    cache.insert((), [1, 2, 3], mine)  # nothing new
    assert cache.num_cached == 1
    cache.release((), [1, 2, 3, 5], mine)
    assert cache.find((), [1, 2, 3, 5], 9) == mine and cache.num_cached == 2
    with pytest.raises(PageError, match="in the prefix cache for another text"):
        cache.insert((), [1, 1], theirs)
    cache.free(theirs)
    cache.check()


def test_what_is_forgotten_ends_at_a_token():
    cache = make_cache(num_pages=9, page_size=4)
    fill(cache, [1, 2, 3, 4, 5, 6, 7])
    fill(cache, [1, 2, 3, 4, 5, 8, 9, 9, 7])
    fill(cache, [1, 2, 3, 3])
    [first] = cache.find((), [1, 2, 3, 4], 9)
    assert cache.forget((), [1, 2, 3, 4, 5, 6, 7], 7, ()) == []
    assert len(cache.forget((), [1, 2, 3, 4, 5, 6, 7], 5, ())) == 1  # not what parts before
    assert cache.find((), [1, 2, 3, 4, 5, 8, 9, 9], 9)[0] == first
    assert len(cache.forget((), [1, 2, 3, 4, 5, 6, 7], 4, ())) == 2
    assert cache.find((), [1, 2, 3, 4], 9) == [first]
    assert len(cache.forget((), [1, 2, 3, 4], 1, ())) == 2 and cache.num_cached == 0
    cache.check()


def test_the_same_tokens_in_another_namespace_or_place_are_another_page():
    cache = make_cache()
    fill(cache, [1, 2, 1, 2], ("salt",))
    assert cache.find((), [1, 2], 9) == []
    assert fill(cache, [1, 2, 1, 2]) == []
    assert cache.num_cached == 4
    pages = cache.find(("salt",), [1, 2, 1, 2], 9) + cache.find((), [1, 2, 1, 2], 9)
    assert len(set(pages)) == 4


def test_tokens_are_compared_and_not_hashed():
    cache = make_cache(page_size=1)
    for token in (0, 1, 256, 65536, 2**31 - 1):
        assert cache.find((), [token], 9) == []
        fill(cache, [token])
    assert cache.num_cached == 5


def test_the_leaf_used_longest_ago_goes_first_and_only_when_no_page_is_free():
    cache = make_cache(num_pages=5)
    fill(cache, [1, 1, 2, 2])
    fill(cache, [1, 1, 3, 3])
    fill(cache, [4, 4])
    [root, old] = cache.find((), [1, 1, 2, 2], 9)
    [_, new] = cache.find((), [1, 1, 3, 3], 9)
    cache.free(cache.alloc(1))
    assert cache.num_evicted == 0
    taken = cache.alloc(2)
    assert cache.num_evicted == 1 and old in taken
    cache.check()
    fill(cache, [1, 1, 3, 3])  # used again, so that [4, 4] is the oldest
    [other] = cache.find((), [4, 4], 9)
    assert cache.alloc(1) == [other]
    assert cache.alloc(2) == [new, root] or cache.pool.num_free == 0
    assert cache.num_cached == 0 and not cache._roots
    cache.check()


def test_held_pages_stay_and_running_out_changes_nothing():
    cache = make_cache(num_pages=3)
    fill(cache, [1, 1, 2, 2])
    held = cache.share(cache.find((), [1, 1], 9))
    assert (cache.num_available, cache.num_evictable) == (2, 1)
    assert cache.num_available_beside(cache.find((), [1, 1, 2, 2], 9)) == 1
    with pytest.raises(OutOfPages, match="3 pages wanted, 1 of 3 are free and 1 more"):
        cache.alloc(3)
    assert cache.num_cached == 2
    pages = cache.alloc(2)
    assert cache.find((), [1, 1, 2, 2], 9) == held
    cache.check()
    cache.free(held + pages)
    assert cache.num_available == 3
    with pytest.raises(PageError, match="freed twice"):
        cache.free(pages)
    with pytest.raises(PageError, match="not in the prefix cache"):
        cache.share(pages)


def test_a_page_computed_twice_is_kept_once():
    cache = make_cache()
    mine, theirs = cache.alloc(2), cache.alloc(2)
    cache.insert((), [1, 1], mine)
    cache.insert((), [1, 1, 2, 2], theirs)  # nothing below a page that it does not hold
    assert cache.num_cached == 1
    cache.release((), [1, 1, 2, 2], theirs)  # now pages that are not cached yet are kept
    assert cache.find((), [1, 1, 2, 2], 9) == [mine[0], theirs[1]]
    cache.check()
    cache.release((), [1, 1, 2, 2], mine)
    assert (cache.num_cached, cache.num_available) == (2, 8)
    cache.check()


def test_a_reset_forgets_and_leaves_holders_alone():
    cache = make_cache()
    fill(cache, [1, 1, 2, 2])
    held = cache.share(cache.find((), [1, 1], 9))
    cache.reset()
    assert cache.epoch == 1 and cache.find((), [1, 1], 9) == [] and cache.num_cached == 0
    assert cache.pool.num_free == 7
    cache.check()
    cache.free(held)
    assert cache.pool.num_free == 8


# ---------------------------------------------------------------------- against a naive model


class Naive:
    """Every prefix of whole pages in one dict; all answers by looking at all of it."""

    def __init__(self, page_size):
        self.page_size = page_size
        self.last_used = {}  # (namespace, prefix) -> when
        self.pages = {}  # likewise
        self.clock = 0

    def prefixes(self, namespace, text, with_part=False):
        size = self.page_size
        ends = [*range(size, len(text) + 1, size)]
        ends += [len(text)] if with_part and len(text) % size else []
        return [(namespace, text[:end]) for end in ends]

    def siblings(self, namespace, text, begin):
        """Keys of the pages that go on behind text[:begin]."""
        return [
            key
            for key in self.pages
            if key[0] == namespace
            and key[1][:begin] == text[:begin]
            and begin < len(key[1]) <= begin + self.page_size
        ]

    def find_part(self, namespace, text, num_found):
        begin = num_found * self.page_size
        keys = self.siblings(namespace, text, begin)
        return max((self.num_common(key[1], text) - begin for key in keys), default=0)

    @staticmethod
    def num_common(a, b):
        return next(
            (i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b))
        )

    def find(self, namespace, text):
        found = []
        for key in self.prefixes(namespace, text):
            if key not in self.pages:
                break
            found.append(self.pages[key])
        return found

    def touch(self, pages):
        self.clock += 1
        for key, page in self.pages.items():
            if page in pages:
                self.last_used[key] = self.clock

    def insert(self, namespace, text, pages, is_held):
        self.clock += 1
        for key, page in zip(self.prefixes(namespace, text, with_part=True), pages):
            begin = (len(key[1]) - 1) // self.page_size * self.page_size
            if key not in self.pages:
                others = self.siblings(namespace, text, begin)
                longer = [other for other in others if other[1][: len(key[1])] == key[1]]
                if longer:
                    self.last_used[min(longer)] = self.clock
                    break
                for other in others:
                    if key[1][: len(other[1])] == other[1]:
                        del self.pages[other]
            if self.pages.setdefault(key, page) != page and is_held:
                break
            self.last_used[key] = self.clock

    def evict(self, held):
        leaves = [
            key
            for key, page in self.pages.items()
            if not held[page] and not any(self.is_below(other, key) for other in self.pages)
        ]
        del self.pages[min(leaves, key=self.last_used.__getitem__)]

    @staticmethod
    def is_below(other, key):
        n = len(key[1])
        return other[0] == key[0] and len(other[1]) > n and other[1][:n] == key[1]


@dataclasses.dataclass
class Holder:
    namespace: int
    text: tuple
    pages: list
    epoch: int
    num_written: int


class CacheMachine(RuleBasedStateMachine):
    """Requests come, grow, write and go; the cache answers as the naive one does."""

    counts: ClassVar = collections.Counter()

    @initialize(num_pages=st.integers(3, 12), page_size=st.sampled_from([1, 2, 3]))
    def start(self, num_pages, page_size):
        self.cache = make_cache(num_pages, page_size)
        self.naive = Naive(page_size)
        self.holders = []
        self.sources = []

    @property
    def held(self):
        held = collections.Counter(page for holder in self.holders for page in holder.pages)
        return held + collections.Counter(self.sources)

    def alloc(self, n):
        for _ in range(max(0, n - self.cache.pool.num_free)):
            self.naive.evict(self.held)
            self.counts["evicted"] += 1
        return self.cache.alloc(n)

    @rule(
        namespace=st.integers(0, 1),
        text=st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple),
    )
    def take(self, namespace, text):
        self.enter(namespace, text)

    def enter(self, namespace, text):
        size = self.cache.page_size
        hit = self.cache.find(namespace, text, (len(text) - 1) // size)
        assert hit == self.naive.find(namespace, text)[: (len(text) - 1) // size]
        missing = -(-len(text) // size) - len(hit)
        num_idle = len(set(self.naive.pages.values()) - set(self.held) - set(hit))
        available = self.cache.pool.num_free + num_idle
        assert self.cache.num_available_beside(hit) == available
        if missing > available:
            return None
        self.counts["found"] += len(hit)
        source, count = self.cache.find_part(namespace, text[:-1], hit)
        assert count == self.naive.find_part(namespace, text[:-1], len(hit))
        if count and missing <= self.cache.num_available_beside([*hit, source]):
            [key] = [key for key, page in self.naive.pages.items() if page == source]
            assert self.naive.num_common(key[1], text[:-1]) == len(hit) * size + count
            self.sources = self.cache.share([source])
            self.counts["copied"] += 1
        else:
            count = 0
        pages = self.cache.share(hit)
        holder = Holder(namespace, text, pages, self.cache.epoch, len(pages) * size + count)
        self.holders.append(holder)
        holder.pages = pages + self.alloc(missing)
        if count:
            assert source not in holder.pages
            self.cache.free(self.sources)
            self.naive.touch(self.sources)
            self.sources = []
        return holder

    @rule(
        namespace=st.integers(0, 1),
        texts=st.lists(
            st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple), min_size=1, max_size=6
        ),
    )
    def pass_through(self, namespace, texts):
        for text in texts:
            if self.enter(namespace, text):
                self.write(-1, len(text))
                self.go(-1)

    @precondition(lambda self: self.holders)
    @rule(i=st.integers(0, 99), n=st.integers(1, 9))
    def write(self, i, n):
        holder = self.holders[i % len(self.holders)]
        holder.num_written = min(holder.num_written + n, len(holder.text))
        if holder.epoch == self.cache.epoch:
            self.keep(holder, self.cache.insert, is_held=True)

    @precondition(lambda self: self.holders)
    @rule(i=st.integers(0, 99))
    def go(self, i):
        holder = self.holders[i % len(self.holders)]
        if holder.epoch == self.cache.epoch:
            self.keep(holder, self.cache.release, is_held=False)
        else:
            self.cache.free(holder.pages)
        self.holders.remove(holder)
        self.naive.touch(holder.pages)

    def keep(self, holder, method, is_held):
        text = holder.text[: holder.num_written]
        method(holder.namespace, text, holder.pages)
        self.naive.insert(holder.namespace, text, holder.pages, is_held)

    @rule(n=st.integers(1, 3))
    def evict(self, n):
        pages = self.alloc(min(n, self.cache.num_available))
        self.cache.free(pages)

    @rule()
    def reset(self):
        self.cache.reset()
        self.naive.pages.clear()

    @invariant()
    def both_agree(self):
        if hasattr(self, "cache"):
            cache, naive = self.cache, self.naive
            cache.check()
            cache.pool.check()
            assert cache.num_cached == len(naive.pages)
            for (namespace, prefix), _ in naive.pages.items():
                found = cache.find(namespace, prefix, 99)
                assert found == naive.find(namespace, prefix)
                count = cache.find_part(namespace, prefix, found)[1]
                assert count == naive.find_part(namespace, prefix, len(found))
            in_use = set(self.held)
            idle = set(naive.pages.values()) - in_use
            assert cache.num_evictable == len(idle)
            assert cache.pool.num_free + len(idle) + len(in_use) == cache.pool.num_pages
            for page in in_use | idle:
                is_kept = page in naive.pages.values()
                assert cache.pool.count(page) == self.held[page] + is_kept


def run_machine(max_examples, **fields):
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            **fields,
        ),
    )


def test_the_cache_answers_as_a_dict_of_all_prefixes():
    CacheMachine.counts.clear()
    run_machine(max_examples=80)
    assert min(CacheMachine.counts[name] for name in ("found", "evicted", "copied")) > 100


def uses_forgotten(monkeypatch):
    free = PrefixCache.free

    def free_untouched(self, pages):
        clock, self._clock = self._clock, 0
        free(self, pages)
        self._clock = clock

    monkeypatch.setattr(PrefixCache, "free", free_untouched)


def parts_of_pages_found_whole(monkeypatch):
    edges = PrefixCache._edges
    monkeypatch.setattr(
        PrefixCache,
        "_edges",
        lambda self, *args, with_part=True: edges(self, *args, with_part=True),
    )


def only_what_is_behind_compared(monkeypatch):
    neighbours = Node.neighbours
    monkeypatch.setattr(Node, "neighbours", lambda self, edge: (b"", neighbours(self, edge)[1]))


def growing_pages_kept_twice(monkeypatch):
    monkeypatch.setattr(Node, "remove", lambda self, edge: self.children.pop(edge))


def common_tokens_counted_one_too_many(monkeypatch):
    monkeypatch.setattr(
        prefix, "num_common", lambda a, b: radix.num_common(a, b) + (a[:4] == b[:4])
    )


def parents_not_offered(monkeypatch):
    evict = PrefixCache._evict

    def evict_once(self):
        offer, self._offer = self._offer, lambda node: None
        evict(self)
        self._offer = offer

    monkeypatch.setattr(PrefixCache, "_evict", evict_once)


def children_put_below_others_pages(monkeypatch):
    insert = PrefixCache._insert
    monkeypatch.setattr(
        PrefixCache,
        "_insert",
        lambda self, *args, is_held: insert(self, *args, is_held=False),
    )


def namespaces_ignored(monkeypatch):
    find = PrefixCache.find
    monkeypatch.setattr(PrefixCache, "find", lambda self, _, text, n: find(self, 0, text, n))


def references_not_counted(monkeypatch):
    monkeypatch.setattr(PagePool, "fork", lambda self, pages: list(pages))


@pytest.mark.parametrize(
    "mutate",
    [
        uses_forgotten,
        parts_of_pages_found_whole,
        only_what_is_behind_compared,
        growing_pages_kept_twice,
        common_tokens_counted_one_too_many,
        parents_not_offered,
        namespaces_ignored,
        references_not_counted,
    ],
)
def test_a_seeded_bug_is_seen(mutate, monkeypatch):
    mutate(monkeypatch)
    bugs = (AssertionError, RuntimeError, IndexError, KeyError, TypeError)
    with pytest.raises(bugs), contextlib.redirect_stdout(None):
        run_machine(max_examples=400, phases=(Phase.generate,), report_multiple_bugs=False)


def test_no_page_is_put_below_one_that_its_holder_does_not_hold(monkeypatch):
    def two_with_one_beginning():
        cache = PrefixCache(PagePool(4), 1)
        first, second = cache.alloc(1), cache.alloc(2)
        cache.insert(0, [1], first)
        cache.insert(0, [1, 2], second)
        cache.release(0, [1], first)
        cache.check()

    two_with_one_beginning()
    children_put_below_others_pages(monkeypatch)  # too rare a bug for random operations
    with pytest.raises(PageError, match="is held without page"):
        two_with_one_beginning()


# ---------------------------------------------------------------------- in the scheduler


class Driver:
    """A scheduler whose device answers 7 to everything."""

    def __init__(self, num_pages=64, page_size=4, max_cached_tokens=None, **config):
        limits = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16}
        config = EngineConfig(**{**limits, "num_decode_steps": 1, **config})
        self.scheduler = Scheduler(
            config, num_pages, page_size, max_cached_tokens=max_cached_tokens
        )
        self.requests = []

    def add(self, prompt, max_tokens=1, salt=None, **params):
        request = Request(
            request_id=str(len(self.requests)),
            prompt_token_ids=list(prompt),
            params=SamplingParams(max_tokens=max_tokens, **params),
            seed=0,
            arrival=len(self.requests),
            max_model_len=64,
            cache_salt=salt,
        )
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def plan(self):
        plan = self.scheduler.plan()
        integrity.check(self.scheduler)
        return plan and [(seq.request.request_id, seq.start, seq.num_tokens) for seq in plan.seqs]

    def commit(self):
        plan = self.scheduler._in_flight[0]
        self.scheduler.commit(plan, [[7] * seq.num_samples for seq in plan.seqs])
        integrity.check(self.scheduler)

    def run(self, *args, **fields):
        """Runs one request alone to its end; returns it and what its first plan computed."""
        request = self.add(*args, **fields)
        first = self.plan()
        while self.scheduler.has_work():
            while self.scheduler.num_in_flight:
                self.commit()
            self.plan()
        return request, first[0][1]


@pytest.mark.parametrize("page_size", [1, 4, 8])
def test_a_hit_is_all_that_is_known_but_the_last_token(page_size):
    for n in range(1, 36):
        driver = Driver(page_size=page_size)
        assert driver.run(range(n))[1] == 0
        again, start = driver.run(range(n))
        assert start == again.num_cached_tokens == n - 1
        longer, start = driver.run([*range(n), 99])
        assert start == longer.num_cached_tokens == n
        stats = driver.scheduler.stats
        assert stats.num_looked_up_tokens == 3 * n + 1
        assert stats.num_cached_tokens == again.num_cached_tokens + longer.num_cached_tokens
        assert stats.num_copied_pages == ((n - 1) % page_size > 0) + (n % page_size > 0)


def test_less_than_an_eighth_of_a_page_is_not_copied():
    driver = Driver(page_size=16)
    driver.run(range(20))
    assert driver.run([0, *range(50, 60)])[1] == 0
    assert driver.run([0, 1, *range(60, 70)])[1] == 2
    assert driver.run([*range(17), 99])[1] == 16
    assert driver.run([*range(18), 98])[1] == 18


def test_a_page_is_copied_once_it_is_written_and_while_its_request_goes_on():
    driver = Driver(max_num_batched_tokens=20)
    first = driver.add(range(10), max_tokens=9)
    driver.add(range(10))
    assert driver.plan() == [("0", 0, 10), ("1", 8, 2)]
    driver.add(range(10))
    assert driver.plan() == [("0", 10, 1), ("2", 9, 1)]
    [(source, target, count)] = driver.scheduler._in_flight[-1].moves.copied
    assert (source, count) == (first.pages[2], 1) and target == driver.requests[2].pages[2]
    while driver.scheduler.num_in_flight:
        driver.commit()
    turn = [*range(10), 7, 7, 9]
    assert driver.run(turn)[0].num_cached_tokens == 10  # what is generated is found at its end
    assert driver.run(turn)[1] == 12


def test_a_page_that_the_request_needs_itself_is_not_copied_from():
    driver = Driver(num_pages=3)
    driver.run(range(10))
    request, start = driver.run([*range(9), *range(20, 23)])  # all pages: no place for a source
    assert start == request.num_cached_tokens == 8
    driver = Driver(num_pages=4)
    driver.run(range(10))
    assert driver.run([*range(9), *range(20, 23)])[1] == 9


def test_generated_tokens_are_found_by_the_next_turn():
    driver = Driver(page_size=2)
    driver.run([1, 2, 3], max_tokens=6)  # 1 2 | 3 7 | 7 7 | 7 7 | 7, the last one never written
    assert driver.run([1, 2, 3, 7, 7, 7, 7, 7, 7, 9])[1] == 8


def test_tokens_beyond_the_end_of_a_request_never_enter_the_cache():
    driver = Driver(page_size=2, num_decode_steps=4)
    request = driver.add([1, 2], max_tokens=12, stop_token_ids=[7])
    driver.plan()
    driver.plan()  # four more, on the device, while the first ends it
    driver.plan()
    driver.commit()
    assert request.is_finished and request.output_token_ids == [7]
    assert driver.scheduler.prefix.num_cached == 1
    assert driver.scheduler.prefix.find((None, None), [1, 2, 7, 7], 9) == [0]


def test_samples_of_one_prompt_share_it_within_one_plan():
    driver = Driver(max_num_batched_tokens=32)
    for _ in range(3):
        driver.add(range(10))
    assert driver.plan() == [("0", 0, 10), ("1", 8, 2), ("2", 8, 2)]
    pages = [request.pages for request in driver.requests]
    assert pages[0][:2] == pages[1][:2] == pages[2][:2]
    assert len({page for three in pages for page in three}) == 5


def test_a_chunk_shares_no_more_than_it_writes():
    driver = Driver(max_num_batched_tokens=14)
    driver.add(range(20))
    assert driver.plan() == [("0", 0, 14)]
    driver.add(range(20))
    assert driver.plan() == [("0", 14, 6), ("1", 16, 4)]
    driver = Driver(max_num_batched_tokens=14)
    driver.add(range(13))
    driver.add(range(13))
    assert driver.plan() == [("0", 0, 13), ("1", 12, 1)]


def test_salt_skipping_and_prompt_logprobs_do_not_read():
    driver = Driver()
    driver.run(range(10), salt="a")
    assert driver.run(range(10))[1] == 0
    assert driver.run(range(10), salt="a")[1] == 9
    assert driver.run(range(10), skip_reading_prefix_cache=True)[1] == 0
    before = driver.scheduler.stats.num_looked_up_tokens
    assert driver.run(range(12, 22), prompt_logprobs=1)[1] == 0
    assert driver.scheduler.stats.num_looked_up_tokens == before
    assert driver.run(range(12, 22))[1] == 9  # but they fill it


def test_without_prefix_caching_nothing_is_kept():
    driver = Driver(enable_prefix_caching=False)
    driver.run(range(10))
    assert driver.run(range(10))[1] == 0
    assert driver.scheduler.pool.num_free == 64


def test_a_preempted_request_finds_its_own_pages():
    driver = Driver(num_pages=6)
    driver.add(range(10), max_tokens=20)
    second = driver.add(range(20, 26), max_tokens=20)
    while not driver.scheduler.stats.num_preemptions:
        driver.plan()
        while driver.scheduler.num_in_flight:
            driver.commit()
    found = second.metrics.num_preemptions and second.num_tokens
    driver.scheduler.abort("0")
    assert driver.plan() == [("1", 8, found - 8)]  # one page was lost to the other request
    assert second.num_cached_tokens == 0 and driver.scheduler.stats.num_cached_tokens == 0


def test_cached_pages_are_evicted_before_anyone_is_preempted():
    driver = Driver(num_pages=6)
    driver.run(range(16))
    assert driver.scheduler.prefix.num_cached == 4
    driver.add(range(50, 58), max_tokens=9)
    assert driver.plan() == [("0" if not driver.requests[1:] else "1", 0, 8)]
    while driver.scheduler.has_work():
        while driver.scheduler.num_in_flight:
            driver.commit()
        driver.plan()
    assert driver.scheduler.stats.num_preemptions == 0
    assert driver.scheduler.prefix.num_evicted == 2
    assert driver.run(range(16))[1] == 8  # from the end on, its pages went


def test_after_a_reset_running_requests_bring_nothing_old_back():
    driver = Driver()
    request = driver.add(range(20), max_tokens=10)
    driver.plan()
    assert driver.scheduler.prefix.num_cached == 4
    driver.scheduler.prefix.reset()
    integrity.check(driver.scheduler)
    while driver.scheduler.has_work():
        driver.plan()
        driver.commit()
    assert request.is_finished and driver.scheduler.prefix.num_cached == 0
    assert driver.scheduler.pool.num_free == 64
    assert driver.run(range(20))[1] == 0


def test_kv_that_depends_on_the_length_is_shared_up_to_the_limit_only():
    driver = Driver(max_cached_tokens=10)
    driver.run(range(9), max_tokens=20)
    assert driver.scheduler.prefix.num_cached == 3
    assert driver.run([*range(9), 7])[1] == 9
    assert driver.run([*range(9), 7, 7])[1] == 0
    assert driver.scheduler.prefix.num_cached == 3


def test_a_part_of_a_page_goes_when_a_late_step_writes_nan_behind_it():
    driver = Driver()
    driver.add(range(6), max_tokens=9)
    driver.plan()
    driver.commit()
    driver.plan()
    [decode] = driver.scheduler._in_flight[0].seqs
    assert driver.scheduler.abort("0") and driver.scheduler.prefix.is_cached(decode.pages[0])
    driver.scheduler.commit(driver.scheduler._in_flight[0], [[7]], is_sound=[False])
    assert not driver.scheduler.prefix.is_cached(decode.pages[0])
    driver.add(range(6))
    assert driver.plan() == [("1", 4, 2)]
    assert driver.scheduler._in_flight[-1].moves.cleared == tuple(decode.pages)


def test_the_check_names_what_is_wrong_with_the_cache():
    driver = Driver()
    driver.run(range(8))
    cache = driver.scheduler.prefix
    page = cache.find((None, None), range(4), 1)[0]
    driver.scheduler.pool._counts[page] = 2
    with pytest.raises(PageError, match=r"counts 2 pages, 2 to be evicted, and has 2 and 1"):
        integrity.check(driver.scheduler)
    driver.scheduler.pool._counts[page] = 1
    cache._nodes[page].order.append(b"")
    with pytest.raises(PageError, match=f"below page {page} have invalid edges"):
        integrity.check(driver.scheduler)
    cache._nodes[page].order.pop()
    cache._nodes[page].edge = b"other"
    with pytest.raises(PageError, match=f"page {page} of the prefix cache is linked wrongly"):
        integrity.check(driver.scheduler)
