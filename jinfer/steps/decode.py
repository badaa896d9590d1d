"""Several decode steps in one program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jinfer.config.typing import Params
from jinfer.models.model import Model
from jinfer.steps.batch import DecodeBatch
from jinfer.steps.blocks import (
    NOT_FINITE,
    StepOutput,
    is_finite,
    one_token_each,
    run_blocks,
    sample_rows,
)
from jinfer.steps.inputs import Pool, StepInputs


@functools.partial(
    jax.jit, static_argnames=("model", "max_steps", "impl"), donate_argnames=("pool",)
)
def decode_loop(
    model: Model,
    params: Params,
    pool: Pool,
    inputs: StepInputs,
    *,
    max_steps: int,
    impl: str = "auto",
) -> tuple[StepOutput, Pool]:
    """Runs `inputs.num_steps` decode steps without coming back to the host.

    Args:
      model: static.
      params: weights.
      pool: donated.
      inputs: a `DecodeBatch` of S sequences, `args`, and `num_steps`, which is dynamic. A token
        mask holds for one step: the sequences that it restricts have a limit of 1.
      max_steps: static, the most steps and the height of the returned tokens.
      impl: attention backend.

    Returns:
      tokens [max_steps, S], of which the first `num_steps` rows (and of sequence s the first
      `batch.limits[s]`) count; the pool.
    """
    batch, num_steps = inputs.batch, inputs.num_steps
    assert isinstance(batch, DecodeBatch) and num_steps is not None
    size = batch.rows.shape[0]

    def step(carry):
        i, kv, state, out_tokens, _ = carry
        active = i < batch.limits
        positions = batch.positions + i
        tokens = jnp.where((i > 0) | (batch.tokens < 0), -1, batch.tokens)
        here = one_token_each(batch, tokens, positions, active, kv)
        hidden, kv = run_blocks(model, params, kv, state, here, impl)
        logits = model.unembed(params, hidden)
        tokens, state = sample_rows(logits, inputs, state, here, active)
        tokens = jnp.where(is_finite(hidden) & is_finite(logits), tokens, NOT_FINITE)
        return i + 1, kv, state, out_tokens.at[i].set(tokens), logits

    first = jnp.zeros((), jnp.int32)
    out_tokens = jnp.zeros((max_steps, size), jnp.int32)
    if max_steps == 1:  # without a loop, whose carry costs, and which XLA on CPUs optimises less
        _, kv, state, out_tokens, logits = step((first, pool.kv, pool.state, out_tokens, None))
    else:
        logits = jnp.zeros((size, model.config.vocab_size), jnp.float32)
        carry = (first, pool.kv, pool.state, out_tokens, logits)
        carry = jax.lax.while_loop(lambda c: c[0] < num_steps, step, carry)
        _, kv, state, out_tokens, logits = carry
    return StepOutput(out_tokens, logits, None), Pool(kv, state, pool.draft_kv)
