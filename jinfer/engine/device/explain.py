"""Which backend runs each op of the engine's steps, and why not the others; nothing is computed."""

from __future__ import annotations

import numpy as np

from jinfer.engine.device.runner import Runner
from jinfer.sampling.args import pack_args
from jinfer.steps import decode as steps_decode
from jinfer.steps import forward as steps
from pallas_kernels import dispatch


def explain(runner: Runner) -> dispatch.Decisions:
    """Returns the decisions of the largest decode step and of the largest ragged step."""
    config, buckets = runner.config, runner.buckets
    size, num_tokens, num_seqs = buckets.decode[-1], buckets.tokens[-1], buckets.seqs[-1]
    decode = dispatch.explain(
        steps_decode.decode_loop,
        runner.model,
        runner.params,
        runner.kv,
        runner.state,
        runner.decode_padding(size),
        pack_args([], size),
        np.int32(1),
        max_steps=config.num_decode_steps,
        impl=config.attention_impl,
    )
    ragged = dispatch.explain(
        steps.forward_step,
        runner.model,
        runner.params,
        runner.kv,
        runner.state,
        runner.ragged_padding(num_tokens, num_seqs),
        pack_args([], num_seqs),
        np.zeros(num_seqs, np.bool_),
        impl=config.attention_impl,
    )
    return dispatch.Decisions(dict.fromkeys((*decode, *ragged)))


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
