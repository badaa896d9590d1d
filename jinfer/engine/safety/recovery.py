"""Recovery from a failed step: every request is queued again, or ends with an error of its own.

A step can fail for lack of memory, for a device error or for a defect of this program. The KV pool
was donated to it and is lost, so all requests are computed again from their tokens, which are all
on the host. An interrupt may also leave the scheduler's bookkeeping half changed; recovery
therefore reads nothing from it but the live requests.

The request at fault is found by trial. After a failure all requests of the failed step are
suspects, and only one suspect runs at a time (beside requests that are none), until a step with it
has been committed. If a step with a suspect fails, only the suspect is blamed, so that a request
that breaks all its steps does not end its batch mates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinfer.engine.plan import Plan, Progress
from jinfer.engine.queue import WaitingQueue
from jinfer.engine.safety.trust import TrustEvent

if TYPE_CHECKING:
    from jinfer.engine.scheduler import Scheduler

MAX_FAILED_STEPS = 3  # a request blamed for so many failed steps ends with an error


def lose_steps(scheduler: Scheduler, failed: Plan | None, reason: str) -> list[Progress]:
    """Drops all steps in flight and all KV; afterwards no request runs.

    Args:
      scheduler: its plans in flight will never be committed.
      failed: the plan that failed; None blames no request.
      reason: what happened, for the requests that end now.

    Returns:
      One entry for each request that ended.
    """
    start_over(scheduler)
    live = [] if failed is None else [s.request for s in failed.seqs if not s.request.is_finished]
    suspects = [request for request in live if request.trust.is_suspect]
    ended = []
    for request in suspects or live:
        request.trust = request.trust.after(TrustEvent.STEP_FAILED)
        request.num_failed_steps += 1
        if request.num_failed_steps >= MAX_FAILED_STEPS:
            ended.append(
                scheduler.fail(
                    request,
                    f"request {request.request_id} was part of {request.num_failed_steps} steps "
                    f"that failed, the last with {reason}",
                )
            )
    return ended


def start_over(scheduler: Scheduler) -> None:
    """Rebuilds the scheduler's bookkeeping from its live requests, all of which then wait.

    It works from any state that an interrupted change may leave. Requests that had ended and were
    still listed as live are removed.
    """
    scheduler.forget_plans()
    scheduler.holdings.clear()
    for request in scheduler.reserved:
        request.start_over()
    scheduler.reserved.clear()
    scheduler.stats.num_preemptions += len(scheduler.running)
    scheduler.running.clear()
    scheduler.free_rows[:] = range(scheduler.config.max_num_seqs - 1, -1, -1)
    scheduler.waiting = WaitingQueue()
    for request in tuple(scheduler.requests()):
        request.start_over()
        scheduler.waiting.add(request)
        if request.finish_reason is not None:
            scheduler.retire(request)
