"""The step over a ragged batch: prefill chunks, decodes, or both."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jinfer.config.typing import Params
from jinfer.models.model import Model
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import NOT_FINITE, StepOutput, is_finite, is_sound, run_blocks, sample_rows
from jinfer.steps.inputs import Pool, StepInputs


@functools.partial(jax.jit, static_argnames=("model", "impl"), donate_argnames=("pool",))
def forward_step(
    model: Model, params: Params, pool: Pool, inputs: StepInputs, *, impl: str = "auto"
) -> tuple[StepOutput, Pool]:
    """Runs one ragged step: prefill chunks, decodes, or both.

    Args:
      model: static.
      params: weights.
      pool: donated.
      inputs: a `StepBatch` of S sequences in T tokens, `args`, `sampled`, and a token mask or none.
      impl: attention backend.
    """
    batch = inputs.batch
    assert isinstance(batch, StepBatch)
    hidden, kv = run_blocks(model, params, pool.kv, pool.state, batch, impl)
    logits = model.unembed(params, hidden[jnp.maximum(batch.q_starts[1:] - 1, 0)])  # [S, V]
    tokens, state = sample_rows(logits, inputs, pool.state, batch, inputs.sampled)
    tokens = jnp.where(is_sound(hidden, batch) & is_finite(logits), tokens, NOT_FINITE)
    return StepOutput(tokens[None], logits, hidden), Pool(kv, state, pool.draft_kv)
