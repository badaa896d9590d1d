"""The step that verifies chains of drafts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jinfer.config.typing import Params
from jinfer.kv.cache import KVCache
from jinfer.models.model import Model
from jinfer.sampling.args import SampleArgs
from jinfer.sampling.state import SamplerState
from jinfer.speculation import accept_chain as accept
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import NOT_FINITE, StepOutput, is_finite, is_sound, run_blocks


@functools.partial(
    jax.jit, static_argnames=("model", "max_drafts", "impl"), donate_argnames=("kv", "state")
)
def verify_step(
    model: Model,
    params: Params,
    kv: KVCache,
    state: SamplerState,
    batch: StepBatch,
    args: SampleArgs,
    sampled: Bool[Array, "S"],
    num_drafts: Int[Array, "S"],
    token_mask: UInt32[Array, "K1 S W"] | None = None,
    draft_logits: Float[Array, "K S V"] | None = None,
    *,
    max_drafts: int,
    impl: str = "auto",
) -> tuple[StepOutput, KVCache, SamplerState]:
    """Runs one ragged step in which the last tokens of some sequences are drafts to be verified.

    The KV of drafts that fall is left behind for the next step to overwrite.

    Args:
      model, params, kv, state, batch, args, sampled, impl: as in `forward_step`.
      num_drafts: [S] drafts at the end of each sequence's tokens.
      token_mask: one packed mask a verified place, or None.
      draft_logits: what the drafts were drawn from, see `accept.verify`; None for given ones.
      max_drafts: static K, the height of the result less one.
    """
    hidden, kv = run_blocks(model, params, kv, state, batch, impl)
    last = jnp.maximum(batch.q_starts[1:] - 1, 0)  # [S]
    first = jnp.maximum(last - num_drafts, 0)
    places = jnp.arange(max_drafts + 1, dtype=jnp.int32)[:, None]  # [K + 1, 1]
    at = jnp.minimum(first[None] + places, last[None])  # [K + 1, S]
    logits = model.unembed(params, hidden[at])  # [K + 1, S, V]
    drafts = batch.tokens[jnp.minimum(at[:-1] + 1, last[None])]
    with jax.named_scope("sampler"):
        tokens, counts, state = accept.verify(
            logits,
            args,
            state,
            batch.rows,
            batch.kv_lens - num_drafts,
            drafts,
            num_drafts,
            sampled,
            draft_logits,
            token_mask,
        )
    is_good = is_sound(hidden, batch) & jnp.all(is_finite(logits), axis=0)
    tokens = jnp.where(is_good, tokens, NOT_FINITE)
    return StepOutput(tokens, logits, hidden, counts), kv, state
