"""A queue of items that can be read from a thread or from asyncio; it knows nothing of requests.

A reader registers as a waiter, looks again, and only then sleeps; the writer appends first and
takes the waiters afterwards. So no item is missed, and neither side holds a lock for long.
All operations are appends to and pops from deques, which are atomic: a reader
may be interrupted (Ctrl-C, a cancelled task) between any two of them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import Iterable
from typing import Any


class Mailbox:
    """A queue that one thread or task reads at a time; any thread may put items into it."""

    def __init__(self) -> None:
        self._items: collections.deque[Any] = collections.deque()
        self._waiters: collections.deque[Any] = collections.deque()

    def put(self, item: Any) -> None:
        """Appends an item without waking the readers; see `wake`."""
        self._items.append(item)

    def take(self) -> Any:
        """Returns the oldest item, or None if there is none."""
        try:
            return self._items.popleft()
        except IndexError:
            return None

    def first(self) -> Any:
        """Returns the oldest item and leaves it there, or None if there is none."""
        return self._items[0] if self._items else None

    def wait(self) -> None:
        """Waits until there is an item, or until a signal handler raises."""
        while not self._items:
            waiter = threading.Lock()
            waiter.acquire()
            self._waiters.append(waiter)
            if self._items:
                self._forget(waiter)
            else:
                waiter.acquire()

    async def wait_async(self) -> None:
        """As `wait`, for asyncio."""
        while not self._items:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            if self._items:
                self._forget(waiter)
            else:
                try:
                    await waiter
                except asyncio.CancelledError:
                    self._forget(waiter)
                    raise

    def take_waiters(self) -> list[Any]:
        """Removes and returns the registered waiters, for `wake` to wake."""
        waiters = []
        with contextlib.suppress(IndexError):  # no more; a reader may leave at any moment
            while True:
                waiters.append(self._waiters.popleft())
        return waiters

    def _forget(self, waiter: Any) -> None:
        with contextlib.suppress(ValueError):  # the writer has taken it just now
            self._waiters.remove(waiter)


def wake(mailboxes: Iterable[Mailbox]) -> None:
    """Wakes the readers of all these mailboxes; each event loop among them is called once."""
    futures: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for mailbox in mailboxes:
        for waiter in mailbox.take_waiters():
            if isinstance(waiter, asyncio.Future):
                futures.setdefault(waiter.get_loop(), []).append(waiter)
            else:
                waiter.release()
    for event_loop, waiting in futures.items():
        with contextlib.suppress(RuntimeError):  # of a closed one: its tasks read nothing more
            event_loop.call_soon_threadsafe(_resolve, waiting)


def _resolve(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # else cancelled
            future.set_result(None)
