"""The jitted step in which a drafting model writes several tokens and the target verifies them.

The drafter is either another model with a KV cache of its own, whose pages are numbered like the
target's; or the target's own weights in fewer bits, which read the target's cache and write to it:
the verification then overwrites their K and V with the target's. A cache of its own must be fed
what the target computes. Where every step is fed, a page that the target has computed is complete
for the drafter, too, so that cached prefixes and preempted requests need no care.
`engine.drafting.fed_pages` knows of steps that were not fed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jinfer.config.typing import Params
from jinfer.kv.cache import KVCache
from jinfer.models.model import Model
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import SamplerState, observe
from jinfer.speculation import accept_chain as accept
from jinfer.steps import blocks, verify
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import StepOutput
from jinfer.steps.inputs import Pool, StepInputs, Weights


@functools.partial(
    jax.jit, static_argnames=("model", "drafter", "max_drafts", "impl"), donate_argnames=("pool",)
)
def draft_step(
    model: Model,
    params: Weights,
    pool: Pool,
    inputs: StepInputs,
    *,
    drafter: Model,
    max_drafts: int,
    impl: str = "auto",
) -> tuple[StepOutput, Pool]:
    """Drafts num_drafts[s] tokens of each sequence, one after the other, and verifies them all.

    Each draft is drawn from the distribution that the drafter has after the same processing as the
    target's: penalties count the drafts before it.

    Args:
      model, impl: as in `verify.verify_step`.
      params: weights of the target and of the drafter.
      pool: donated; with `draft_kv` None the drafter works in `kv`.
      inputs: as in `verify.verify_step`. The last num_drafts[s] tokens of each sequence are places
        for drafts, whatever ids are there.
      drafter: static, the model that drafts, of the same vocabulary.
      max_drafts: static K, most drafts.
    """
    batch, num_drafts = inputs.batch, inputs.num_drafts
    assert isinstance(batch, StepBatch) and num_drafts is not None
    own_kv = pool.kv if pool.draft_kv is None else pool.draft_kv
    with jax.named_scope("drafts"):
        drafts, draft_logits, own_kv = _draft(
            *(drafter, params.drafter, own_kv, pool.state, inputs), max_drafts=max_drafts, impl=impl
        )
    ends = batch.q_starts[None, 1:]
    places = ends - num_drafts[None] + jnp.arange(max_drafts, dtype=jnp.int32)[:, None]  # [K, S]
    places = jnp.where(places < ends, places, batch.tokens.shape[0])
    batch = dataclasses.replace(batch, tokens=batch.tokens.at[places].set(drafts, mode="drop"))
    if pool.draft_kv is None:
        pool = dataclasses.replace(pool, kv=own_kv)
    else:  # prompts, and the last draft
        _, own_kv = blocks.run_blocks(drafter, params.drafter, own_kv, pool.state, batch, impl)
        pool = dataclasses.replace(pool, draft_kv=own_kv)
    inputs = dataclasses.replace(inputs, batch=batch)
    return verify.verify(
        model, params.target, pool, inputs, draft_logits, max_drafts=max_drafts, impl=impl
    )


def _draft(
    drafter: Model,
    params: Params,
    kv: KVCache,
    state: SamplerState,
    inputs: StepInputs,
    *,
    max_drafts: int,
    impl: str,
) -> tuple[Array, Array, KVCache]:
    """Returns drafts [K, S], the processed logits [K, S, V] that they are drawn from, the cache."""
    batch, num_drafts, args = inputs.batch, inputs.num_drafts, inputs.args
    assert isinstance(batch, StepBatch) and num_drafts is not None and args is not None
    begin = batch.kv_lens - num_drafts - 1  # [S] place of the newest token

    def step(carry, numbered):
        tokens, kv, state = carry
        i, mask = numbered
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
    masks = None if inputs.token_mask is None else inputs.token_mask[:max_drafts]
    (_, kv, _), (drafts, processed) = jax.lax.scan(step, (newest, kv, state), (numbers, masks))
    return drafts, processed, kv


@functools.partial(jax.jit, static_argnames=("model", "impl"), donate_argnames=("pool",))
def feed_step(
    model: Model, params: Params, pool: Pool, inputs: StepInputs, *, impl: str = "auto"
) -> tuple[None, Pool]:
    """Computes K and V of a step's tokens in the KV cache of a drafting model.

    Args:
      model: static, the drafting model.
      params: its weights.
      pool: donated; the sampler's state of before that step says what tokens with negative ids are.
      inputs: a `StepBatch`.
      impl: attention backend.
    """
    assert isinstance(inputs.batch, StepBatch) and pool.draft_kv is not None
    _, kv = blocks.run_blocks(model, params, pool.draft_kv, pool.state, inputs.batch, impl)
    return None, dataclasses.replace(pool, draft_kv=kv)
