"""The page pool: free + in use = all, nothing freed twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinfer.engine.pages.pool import OutOfPages, PageError, PagePool


def test_pages_are_distinct_until_freed():
    pool = PagePool(5)
    first, second = pool.alloc(2), pool.alloc(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_in_use) == (0, 5)
    pool.free(first)
    assert sorted(pool.alloc(2)) == sorted(first)
    pool.check()


def test_too_few_pages_take_nothing():
    pool = PagePool(3)
    pool.alloc(1)
    with pytest.raises(OutOfPages, match="3 pages wanted, 2 of 3 are free"):
        pool.alloc(3)
    assert pool.num_free == 2
    assert pool.alloc(0) == []


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    pool = PagePool(2)
    pages = pool.alloc(1)
    assert pool.fork(pages) == pages
    assert pool.count(pages[0]) == 2
    pool.free(pages)
    assert pool.num_free == 1
    pool.free(pages)
    assert pool.num_free == 2
    pool.check()


def test_misuse_raises_at_once():
    pool = PagePool(2)
    pages = pool.alloc(2)
    pool.free(pages[:1])
    with pytest.raises(PageError, match=f"page {pages[0]} is freed twice"):
        pool.free(pages[:1])
    with pytest.raises(PageError, match="cannot be shared"):
        pool.fork(pages)
    assert pool.count(pages[1]) == 1  # a refused fork counts nothing
    with pytest.raises(ValueError, match="must not be negative"):
        pool.alloc(-1)
    with pytest.raises(ValueError, match="must be positive"):
        PagePool(0)


def test_the_check_sees_a_corrupt_free_list():
    pool = PagePool(3)
    pages = pool.alloc(2)
    pool._free.append(pages[0])
    with pytest.raises(PageError, match="neither free nor in use, or both"):
        pool.check()
    pool = PagePool(3)
    pool._free.append(1)
    with pytest.raises(PageError, match=r"\[1\] are in the free list more than once"):
        pool.check()


@given(st.lists(st.tuples(st.sampled_from(["alloc", "fork", "free"]), st.integers(0, 6))))
def test_counts_equal_a_plain_model(operations):
    pool, holders = PagePool(6), []
    for operation, n in operations:
        if operation == "alloc":
            if n > pool.num_free:
                with pytest.raises(OutOfPages):
                    pool.alloc(n)
            else:
                holders.append(pool.alloc(n))
        elif holders and operation == "fork":
            holders.append(pool.fork(holders[n % len(holders)]))
        elif holders:
            pool.free(holders.pop(n % len(holders)))
        pool.check()
        for page in range(6):
            assert pool.count(page) == sum(page in pages for pages in holders)
        assert pool.num_in_use == len({page for pages in holders for page in pages})
