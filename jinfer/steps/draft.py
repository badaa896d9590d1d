"""The jitted step in which a drafting model writes several tokens and the target verifies them.

The drafter is another model with a pool of its own, whose pages are numbered like the target's; or
the target's own weights in fewer bits, which read the target's pool and go on in it: the
verification writes the target's K and V over all that they leave there. A pool of its own must be
fed what the target computes: where every step does, whatever page the target has computed the
drafter has as well, and cached prefixes and preempted requests need no care. `engine.fed_pages`
knows of steps that did not.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from jinfer.config.typing import Params
from jinfer.kv.cache import KVCache
from jinfer.models.model import Model
from jinfer.sampling.args import SampleArgs
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import SamplerState, observe
from jinfer.speculation import accept_chain as accept
from jinfer.steps import blocks, verify
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import StepOutput


@functools.partial(
    jax.jit,
    static_argnames=("model", "drafter", "max_drafts", "impl"),
    donate_argnames=("kv", "draft_kv", "state"),
)
def draft_step(
    model: Model,
    params: Params,
    kv: KVCache,
    drafter: Model,
    draft_params: Params,
    draft_kv: KVCache | None,
    state: SamplerState,
    batch: StepBatch,
    args: SampleArgs,
    sampled: Bool[Array, "S"],
    num_drafts: Int[Array, "S"],
    token_mask: UInt32[Array, "K1 S W"] | None = None,
    *,
    max_drafts: int,
    impl: str = "auto",
) -> tuple[StepOutput, KVCache, KVCache | None, SamplerState]:
    """Drafts num_drafts[s] tokens of each sequence, one after the other, and verifies them all.

    Each draft is drawn from the distribution that the drafter has after the same processing as the
    target's: penalties count the drafts before it.

    Args:
      model, params, kv, state, args, sampled, token_mask, impl: as in `steps.verify_step`.
      drafter, draft_params: the model that drafts, of the same vocabulary; static and its weights.
      draft_kv: its pool, donated; None: it goes on in `kv`.
      batch: the last num_drafts[s] tokens of each sequence are places for drafts, whatever ids are
        there.
      num_drafts: [S].
      max_drafts: static K, most drafts.

    Returns:
      As `steps.verify_step`, and the drafter's pool.
    """
    pool = kv if draft_kv is None else draft_kv
    with jax.named_scope("drafts"):
        drafts, draft_logits, pool = _draft(
            drafter,
            draft_params,
            pool,
            state,
            batch,
            args,
            num_drafts,
            token_mask,
            max_drafts=max_drafts,
            impl=impl,
        )
    ends = batch.q_starts[None, 1:]
    places = ends - num_drafts[None] + jnp.arange(max_drafts, dtype=jnp.int32)[:, None]  # [K, S]
    places = jnp.where(places < ends, places, batch.tokens.shape[0])
    batch = dataclasses.replace(batch, tokens=batch.tokens.at[places].set(drafts, mode="drop"))
    if draft_kv is None:
        kv = pool
    else:  # prompts, and the last draft
        _, draft_kv = blocks.run_blocks(drafter, draft_params, pool, state, batch, impl)
    out, kv, state = verify.verify_step(
        model,
        params,
        kv,
        state,
        batch,
        args,
        sampled,
        num_drafts,
        token_mask,
        draft_logits,
        max_drafts=max_drafts,
        impl=impl,
    )
    return out, kv, draft_kv, state


def _draft(
    drafter: Model,
    params: Params,
    kv: KVCache,
    state: SamplerState,
    batch: StepBatch,
    args: SampleArgs,
    num_drafts: Array,
    token_mask: Array | None,
    *,
    max_drafts: int,
    impl: str,
) -> tuple[Array, Array, KVCache]:
    """Returns drafts [K, S], the processed logits that they were drawn from [K, S, V], the pool."""
    begin = batch.kv_lens - num_drafts - 1  # [S] place of the newest token

    def step(carry, inputs):
        tokens, kv, state = carry
        i, mask = inputs
        active = i < num_drafts
        here = blocks.one_token_each(batch, tokens, begin + i, active, kv)
        hidden, kv = blocks.run_blocks(drafter, params, kv, state, here, impl)
        logits = drafter.unembed(params, hidden)
        positions = begin + i + 1
        processed = process_logits(logits, args, state, batch.rows, positions, mask)
        drafts = accept.draw_draft(processed, args, positions)
        state = observe(state, batch.rows, drafts, active)
        return (drafts, kv, state), (drafts, processed)

    newest = batch.tokens[jnp.maximum(batch.q_starts[1:] - 1 - num_drafts, 0)]
    numbers = jnp.arange(max_drafts, dtype=jnp.int32)
    masks = None if token_mask is None else token_mask[:max_drafts]
    (_, kv, _), (drafts, processed) = jax.lax.scan(step, (newest, kv, state), (numbers, masks))
    return drafts, processed, kv


@functools.partial(jax.jit, static_argnames=("drafter", "impl"), donate_argnames=("draft_kv",))
def feed_step(
    drafter: Model,
    draft_params: Params,
    draft_kv: KVCache,
    state: SamplerState,
    batch: StepBatch,
    *,
    impl: str = "auto",
) -> KVCache:
    """Computes K and V of a step's tokens in the drafter's own pool, which is donated.

    `state`, of before that step, says what tokens with negative ids are.
    """
    return blocks.run_blocks(drafter, draft_params, draft_kv, state, batch, impl)[1]
