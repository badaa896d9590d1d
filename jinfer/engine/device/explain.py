"""Which backend runs each op of the engine's steps, and why not the others; nothing is computed."""

from __future__ import annotations

from jinfer.engine.device.runner import Runner
from jinfer.steps import decode, forward
from pallas_kernels import dispatch


def explain(runner: Runner) -> dispatch.Decisions:
    """Returns the decisions of the largest decode step and of the largest ragged step."""
    config, sizes, packer = runner.config, runner.buckets, runner.packer
    decisions = dispatch.explain(
        decode.decode_loop,
        *(runner.model, runner.params, runner.pool, packer.decode(sizes.decode[-1])),
        max_steps=config.num_decode_steps,
        impl=config.attention_impl,
    )
    ragged = dispatch.explain(
        forward.forward_step,
        *(runner.model, runner.params, runner.pool),
        packer.ragged(sizes.tokens[-1], sizes.seqs[-1]),
        impl=config.attention_impl,
    )
    return dispatch.Decisions(dict.fromkeys((*decisions, *ragged)))


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
