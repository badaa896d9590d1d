"""The step that verifies chains of drafts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jinfer.config.typing import Params
from jinfer.models.model import Model
from jinfer.speculation import accept_chain as accept
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import NOT_FINITE, StepOutput, is_finite, is_sound, run_blocks
from jinfer.steps.inputs import Pool, StepInputs


@functools.partial(
    jax.jit, static_argnames=("model", "max_drafts", "impl"), donate_argnames=("pool",)
)
def verify_step(
    model: Model,
    params: Params,
    pool: Pool,
    inputs: StepInputs,
    *,
    max_drafts: int,
    impl: str = "auto",
) -> tuple[StepOutput, Pool]:
    """Runs one ragged step in which the last tokens of some sequences are drafts to be verified.

    The KV of rejected drafts is left behind for the next step to overwrite.

    Args:
      model, params, pool, impl: as in `forward_step`.
      inputs: as there, and `num_drafts`; a token mask has one for each verified place.
      max_drafts: static K, the height of the result less one.
    """
    return verify(model, params, pool, inputs, None, max_drafts=max_drafts, impl=impl)


def verify(
    model: Model,
    params: Params,
    pool: Pool,
    inputs: StepInputs,
    draft_logits: Float[Array, "K S V"] | None,
    *,
    max_drafts: int,
    impl: str,
) -> tuple[StepOutput, Pool]:
    """Does what `verify_step` says, inside a program.

    `draft_logits` is what the drafts were drawn from, see `accept_chain.verify`; None: given ones.
    """
    batch, num_drafts = inputs.batch, inputs.num_drafts
    assert isinstance(batch, StepBatch) and num_drafts is not None
    assert inputs.args is not None and inputs.sampled is not None
    hidden, kv = run_blocks(model, params, pool.kv, pool.state, batch, impl)
    last = jnp.maximum(batch.q_starts[1:] - 1, 0)  # [S]
    first = jnp.maximum(last - num_drafts, 0)
    places = jnp.arange(max_drafts + 1, dtype=jnp.int32)[:, None]  # [K + 1, 1]
    at = jnp.minimum(first[None] + places, last[None])  # [K + 1, S]
    logits = model.unembed(params, hidden[at])  # [K + 1, S, V]
    drafts = batch.tokens[jnp.minimum(at[:-1] + 1, last[None])]
    with jax.named_scope("sampler"):
        tokens, counts, state = accept.verify(
            logits,
            accept.Places(inputs.args, batch.rows, batch.kv_lens - num_drafts, inputs.sampled),
            pool.state,
            accept.Chains(drafts, num_drafts, draft_logits),
            inputs.token_mask,
        )
    is_good = is_sound(hidden, batch) & jnp.all(is_finite(logits), axis=0)
    tokens = jnp.where(is_good, tokens, NOT_FINITE)
    return StepOutput(tokens, logits, hidden, counts), Pool(kv, state, pool.draft_kv)
