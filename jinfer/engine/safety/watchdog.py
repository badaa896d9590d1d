"""Finds requests that make no progress, by looking at a scheduler from time to time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from jinfer.engine.request import Request, RequestStatus

if TYPE_CHECKING:
    from jinfer.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

STUCK_AFTER_S = 60.0
STUCK_AFTER_STEPS = 200  # seconds are not enough: a step that compiles takes long


class Watchdog:
    """Lists stuck requests.

    A running request is stuck when nothing about it has changed for `STUCK_AFTER_S` seconds and
    `STUCK_AFTER_STEPS` steps. A waiting one is stuck when, for as long, no request was admitted and
    none ended: waiting behind others is no fault.

    Args:
      scheduler: the scheduler to watch.
      now: the clock.

    Attributes:
      stuck: {request id: sentence} of the requests that are stuck.
    """

    def __init__(self, scheduler: Scheduler, now: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._now = now
        self._num_steps = 0
        self._next_look = now()
        self._seen: dict[Request, tuple[object, float, int]] = {}
        self._named: set[Request] = set()
        self.stuck: dict[str, str] = {}

    def observe(self) -> None:
        """Counts a step, updates `stuck` from time to time, and logs each stuck request once."""
        self._num_steps += 1
        now = self._now()
        if now < self._next_look:
            return
        self._next_look = now + STUCK_AFTER_S / 8
        seen: dict[Request, tuple[object, float, int]] = {}
        stuck: dict[str, str] = {}
        for request in self._scheduler.requests():
            state = self._state(request)
            before = self._seen.get(request)
            seen[request] = entry = (
                before
                if before is not None and before[0] == state
                else (state, now, self._num_steps)
            )
            seconds, num_steps = now - entry[1], self._num_steps - entry[2]
            if seconds >= STUCK_AFTER_S and num_steps >= STUCK_AFTER_STEPS:
                stuck[request.request_id] = self._sentence(request, seconds, num_steps)
                if request not in self._named:
                    self._named.add(request)
                    logger.warning("%s", stuck[request.request_id])
        self._seen, self.stuck = seen, stuck
        self._named &= seen.keys()

    def _state(self, request: Request) -> object:
        state = (request.status, len(request.output_token_ids), request.num_computed_tokens)
        if request.status is RequestStatus.RUNNING:
            return state
        return *state, self._scheduler.stats.num_finished, self._scheduler.stats.num_admissions

    def _sentence(self, request: Request, seconds: float, num_steps: int) -> str:
        scheduler = self._scheduler
        return (
            f"{request} has made no progress for {seconds:.0f} s and {num_steps} steps: it holds "
            f"{len(request.pages)} pages, {scheduler.prefix.num_available} of "
            f"{scheduler.pool.num_pages} are available, {scheduler.num_running} requests run, "
            f"{scheduler.num_waiting} wait, {scheduler.num_in_flight} steps are in flight"
        )
