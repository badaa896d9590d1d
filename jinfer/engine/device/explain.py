"""Which backend runs each op of the engine's steps, and why not the others; nothing is computed."""

from __future__ import annotations

from jinfer.engine.device import programs
from jinfer.engine.device.runner import Runner
from pallas_kernels import dispatch


def explain(runner: Runner) -> dispatch.Decisions:
    """Returns the decisions of the largest step of each kind."""
    found: dict[dispatch.Decision, None] = {}
    for step in programs.largest_steps(runner.spec):
        found |= dict.fromkeys(dispatch.explain(step.fn, *step.args, **step.static))
    return dispatch.Decisions(found)


def check_named(runner: Runner) -> None:
    """Raises ValueError, with the backend's own reason, if a named one cannot run the steps."""
    if {runner.config.attention_impl, runner.config.linear_impl} <= {"auto", "xla"}:
        return
    for decision in explain(runner):
        if decision.chosen is None:
            reason = dict(decision.reasons)[decision.choice]
            raise ValueError(
                f"{decision.op}: impl {decision.choice!r} cannot run here: {reason}; "
                '"auto" takes what can'
            )
