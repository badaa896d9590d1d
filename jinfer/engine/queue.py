"""The queue of waiting requests, and the order in which they are admitted.

Order: by priority; then by cached prefix, longest first; then by arrival. Taking the longest cached
prefix first serves requests with a common beginning one after another while it is cached, which is
a depth-first walk through the tree of their texts: the order with most cache hits.

Two kinds of requests go before all others of their priority, in order of arrival, so that none
starves: preempted ones, and those that were overtaken `MAX_OVERTAKEN` times.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from jinfer.engine.request import Request, RequestStatus

MAX_OVERTAKEN = 32
WINDOW = 64  # requests at the head of the queue that are compared; the rest stay behind them


class WaitingQueue:
    """Waiting requests by priority and arrival; `ranked` gives the order of admission."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._ranked: list[Request] = []
        self._version: int | None = None  # of the cache, when `_ranked` was made

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Inserts a request by priority and arrival."""
        bisect.insort(self._requests, request, key=arrival_key)
        self._version = None

    def remove(self, request: Request) -> None:
        """Removes a request that has ended."""
        self._requests.remove(request)
        self._version = None

    def admit(self, request: Request) -> None:
        """Removes a request that runs now; earlier ones of its priority have been overtaken."""
        idx = self._requests.index(request)
        for other in self._requests[:idx]:
            other.num_overtaken += other.priority == request.priority
        del self._requests[idx]
        self._version = None

    def ranked(self, num_cached_pages: Callable[[Request], int], version: int) -> list[Request]:
        """Returns the head of the queue in the order of admission.

        Args:
          num_cached_pages: returns how many pages of a request's beginning are cached now.
          version: version of the cache; the order is computed again when it changes.
        """
        if self._version != version:
            head = self._requests[:WINDOW]
            if len(head) > 1:
                keys = {request: _rank(request, num_cached_pages) for request in head}
                head.sort(key=keys.__getitem__)
            self._ranked, self._version = head, version
        return list(self._ranked)


def arrival_key(request: Request) -> tuple[int, int]:
    """Sort key of running requests, and of waiting ones without cached pages: smallest first."""
    return request.priority, request.arrival


def may_join(request: Request, running: list[Request]) -> bool:
    """Whether a request may run beside the running ones: at most one suspect runs at a time."""
    return not request.trust.is_suspect or not any(other.trust.is_suspect for other in running)


def _rank(request: Request, num_cached_pages: Callable[[Request], int]) -> tuple[int, ...]:
    is_due = request.status is RequestStatus.PREEMPTED or request.num_overtaken >= MAX_OVERTAKEN
    num_cached = 0 if is_due else num_cached_pages(request)
    return request.priority, not is_due, -num_cached, request.arrival
