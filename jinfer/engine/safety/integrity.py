"""Checks a scheduler's bookkeeping as a whole: free + cached + in use = all pages."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from jinfer.engine.pages.pool import PageError

if TYPE_CHECKING:
    from jinfer.engine.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """Verifies that pages, rows and lists agree; for tests and `check_integrity`.

    Each page is free, held by the cache alone, or in use by requests.

    Raises:
      PageError: they do not agree; the message names the request or the pages.
    """
    pool, prefix = scheduler.pool, scheduler.prefix
    running, waiting = scheduler.running, scheduler.waiting
    pool.check()
    prefix.check()
    if prefix.tier is not None:
        prefix.tier.check()
    held = collections.Counter(page for r in [*running, *scheduler.reserved] for page in r.pages)
    counts = {page: pool.count(page) for page in range(pool.num_pages)}
    wrong = [p for p, n in counts.items() if n != held[p] + prefix.is_cached(p)]
    if wrong:
        raise PageError(f"the reference counts of pages {wrong} do not match their holders")
    if pool.num_free + prefix.num_evictable + len(held) != pool.num_pages:
        raise PageError(
            f"{pool.num_free} free pages, {prefix.num_evictable} cached and "
            f"{len(held)} in use do not add up to {pool.num_pages}"
        )
    rows = sorted([r.row for r in running if r.row is not None] + scheduler.free_rows)
    if rows != list(range(scheduler.config.max_num_seqs)):
        raise PageError(f"rows in use and free rows must be all rows, each once; got {rows}")
    for request in running:
        covered = len(request.pages) * scheduler.page_size
        if not request.num_computed_tokens <= covered:
            raise PageError(
                f"request {request.request_id} has {request.num_computed_tokens} computed "
                f"tokens and pages for {covered}"
            )
    for request in waiting:
        if request.pages or request.row is not None or request.num_computed_tokens:
            raise PageError(f"request {request.request_id} waits and holds pages or a row")
    live = [*running, *waiting]
    if sorted(map(id, live)) != sorted(map(id, scheduler.requests())):
        raise PageError("the live requests are not those running and waiting")
