"""The waiting line: who is admitted next. Knows requests and how much of them is cached; no pages.

Among equals of priority the request whose prefix is cached longest goes first (served so, requests
with one beginning follow each other while it is there: depth-first in the tree of their texts, the
order with most hits), and among equals of that the one that came first. Two kinds go before all
other equals, in order of arrival, so that nobody starves: requests that were preempted, and those
that equals have overtaken `MAX_OVERTAKEN` times.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from jinfer.engine.request import Request, RequestStatus

MAX_OVERTAKEN = 32
WINDOW = 64  # requests at the head of the line that are compared; the rest wait behind them


class WaitingQueue:
    """Requests that wait, by priority and arrival; `ranked` says in which order to admit them."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._ranked: list[Request] = []
        self._version: int | None = None  # of the cache, when `_ranked` was made

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Puts a request in its place."""
        bisect.insort(self._requests, request, key=arrival_key)
        self._version = None

    def remove(self, request: Request) -> None:
        """Takes a request out that has ended."""
        self._requests.remove(request)
        self._version = None

    def admit(self, request: Request) -> None:
        """Takes a request out that runs now; equals that came before it have been overtaken."""
        idx = self._requests.index(request)
        for other in self._requests[:idx]:
            other.num_overtaken += other.priority == request.priority
        del self._requests[idx]
        self._version = None

    def ranked(self, num_cached_pages: Callable[[Request], int], version: int) -> list[Request]:
        """Returns the head of the line in the order in which to admit.

        Args:
          num_cached_pages: pages of a request's beginning that are in the cache now.
          version: changes when these numbers may.
        """
        if self._version != version:
            head = self._requests[:WINDOW]
            if len(head) > 1:
                keys = {request: _rank(request, num_cached_pages) for request in head}
                head.sort(key=keys.__getitem__)
            self._ranked, self._version = head, version
        return list(self._ranked)


def arrival_key(request: Request) -> tuple[int, int]:
    """The order of urgency among running requests, and where nothing is cached: smallest first."""
    return request.priority, request.arrival


def may_join(request: Request, running: list[Request]) -> bool:
    """Whether a request may run beside those that do: of suspects only one."""
    return not request.is_suspect or not any(other.is_suspect for other in running)


def _rank(request: Request, num_cached_pages: Callable[[Request], int]) -> tuple[int, ...]:
    is_due = request.status is RequestStatus.PREEMPTED or request.num_overtaken >= MAX_OVERTAKEN
    num_cached = 0 if is_due else num_cached_pages(request)
    return request.priority, not is_due, -num_cached, request.arrival
