"""The step over a ragged batch: prefill chunks, decodes, or both."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

from jinfer.config.typing import Params
from jinfer.kv.cache import KVCache
from jinfer.models.model import Model
from jinfer.sampling.args import SampleArgs
from jinfer.sampling.state import SamplerState
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import NOT_FINITE, StepOutput, is_finite, is_sound, run_blocks, sample_rows


@functools.partial(jax.jit, static_argnames=("model", "impl"), donate_argnames=("kv", "state"))
def forward_step(
    model: Model,
    params: Params,
    kv: KVCache,
    state: SamplerState,
    batch: StepBatch,
    args: SampleArgs,
    sampled: Bool[Array, "S"],
    token_mask: UInt32[Array, "S W"] | None = None,
    *,
    impl: str = "auto",
) -> tuple[StepOutput, KVCache, SamplerState]:
    """Runs one ragged step: prefill chunks, decodes, or both.

    Args:
      model: static.
      params: weights.
      kv: the pool, donated.
      state: sampler state of R rows, donated.
      batch: S sequences in T tokens, padded to a bucket.
      args: sampling fields, one row a sequence.
      sampled: [S] whether the sequence's last token ends its known tokens, so that the token
        sampled after it counts. Others leave no trace in `state`.
      token_mask: [S, ceil(V / 32)] packed mask of allowed tokens, or None.
      impl: attention backend.
    """
    hidden, kv = run_blocks(model, params, kv, state, batch, impl)
    logits = model.unembed(params, hidden[jnp.maximum(batch.q_starts[1:] - 1, 0)])  # [S, V]
    tokens, state = sample_rows(logits, args, state, batch, sampled, token_mask)
    tokens = jnp.where(is_sound(hidden, batch) & is_finite(logits), tokens, NOT_FINITE)
    return StepOutput(tokens[None], logits, hidden), kv, state
