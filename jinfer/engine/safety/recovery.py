"""After a failed step: every request goes back into the queue or ends by name. No device here.

A step can fail for want of memory, for a device or for a defect of this program, and the pool that
was donated to it is gone. So the KV of all requests is: they are computed again from their tokens,
which are all on the host. An interrupt may come while the books are being changed, too; so nothing
is read from them but which requests are live.

Whose fault it was is found by trial. After a failure all requests of the failed step are suspects,
and of suspects only one runs at a time (beside others that are none), until a step with it has come
through. If a step with a suspect in it fails, the suspect is blamed and nobody else, so that a
request that breaks every step it is in does not take its company along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinfer.engine.plan import Plan, Progress
from jinfer.engine.queue import WaitingQueue

if TYPE_CHECKING:
    from jinfer.engine.scheduler import Scheduler

MAX_FAILED_STEPS = 3  # a request that is blamed for so many ends with an error


def lose_steps(scheduler: Scheduler, failed: Plan | None, reason: str) -> list[Progress]:
    """Forgets all steps in flight and all KV; afterwards nothing runs.

    Args:
      scheduler: its plans in flight will never be committed.
      failed: the plan that failed; None blames nobody.
      reason: what happened, for those that end now.

    Returns:
      One entry for each request that ended.
    """
    start_over(scheduler)
    live = [] if failed is None else [s.request for s in failed.seqs if not s.request.is_finished]
    suspects = [request for request in live if request.is_suspect]
    ended = []
    for request in suspects or live:
        request.is_suspect = True
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
    """Makes the books anew, whatever an exception in the middle of a change has left of them.

    All live requests wait. Those that had ended and were not taken off the lists yet are now.
    """
    scheduler.forget_plans()
    scheduler.holdings.clear()
    for request in scheduler.lent:
        request.start_over()
    scheduler.lent.clear()
    scheduler.stats.num_preemptions += len(scheduler.running)
    scheduler.running.clear()
    scheduler.free_rows[:] = range(scheduler.config.max_num_seqs - 1, -1, -1)
    scheduler.waiting = WaitingQueue()
    for request in tuple(scheduler.requests()):
        request.start_over()
        scheduler.waiting.add(request)
        if request.finish_reason is not None:
            scheduler.retire(request)
