"""What the steps share: the blocks over the paged pool, sampling, checks for NaN.

Nothing here waits for the device. One program serves every context length and every mix of sampling
fields; only the padded sizes named by `buckets` make new ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jinfer.config.typing import Params
from jinfer.kv import cache as kv_cache
from jinfer.kv import codes as kv_quant
from jinfer.kv.cache import KVCache
from jinfer.kv.rotation import kv_rotation, rotate
from jinfer.linear.weight import bind
from jinfer.models.model import Model
from jinfer.sampling.draw import sample
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import SamplerState, observe
from jinfer.steps.batch import DecodeBatch, StepBatch
from jinfer.steps.inputs import StepInputs
from pallas_kernels.paged_attention import ragged_paged_attention

NOT_FINITE = -1  # stands for a token whose logits, or the hidden states behind them, are not finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step leaves on the device for the host to fetch, or not.

    Attributes:
      tokens: [n, S] sampled ids, one row a decode step or verified place (n = 1 for
        `forward_step`); NOT_FINITE where a sequence's logits, or a hidden state of its tokens, are
        NaN or infinite, else NO_TOKEN where its constraints leave no token.
      logits: [S, V] f32 raw logits behind the last row of `tokens`; [n, S, V] of `verify_step`.
      hidden: [T, D] hidden states after the final norm; None of `decode_loop`.
      counts: [S] how many of a sequence's tokens count (`verify_step` only).
      guesses: [S, K, R] what may come next (`tree_steps.tree_step` only).
    """

    tokens: Int[Array, "n S"]
    logits: Float[Array, "*n S V"]
    hidden: Float[Array, "T D"] | None
    counts: Int[Array, "S"] | None = None
    guesses: Int[Array, "S K R"] | None = None


def run_blocks(
    model: Model, params: Params, kv: KVCache, state: SamplerState, batch: StepBatch, impl: str
) -> tuple[Array, KVCache]:
    """Runs the blocks over a ragged batch through the paged pool; returns hidden [T, D].

    Weights that depend on the tokens of a step, such as adapters, are bound to `batch` first.
    """
    config = model.config
    # In 4 bits a few large channels of K would take all levels; q . k and the sum over v stay as
    # they are when q, k and v are rotated and the result is rotated back.
    rotation = kv_rotation(config.head_dim) if kv.dtype == "int4" else None
    static = kv_quant.static_scales(config, kv.dtype)

    def attend(
        layer: Any, q: Array, k: Array, v: Array, kv: KVCache, *, window: int | None
    ) -> tuple[Array, KVCache]:
        if rotation is not None:
            q, k, v = (rotate(x, rotation) for x in (q, k, v))
        scales = None if static is None else (static[0][layer], static[1][layer])
        kv = kv_cache.write(kv, layer, k, v, batch.slots, scales)
        out = ragged_paged_attention(
            q,
            kv_cache.paged(kv),
            batch.kv_lens,
            kv_cache.layer_pages(kv, layer, batch.page_table),
            batch.q_starts,
            sm_scale=config.sm_scale,
            soft_cap=config.attention_soft_cap,
            sliding_window=window,
            max_q_len=batch.max_q_len,
            tree_mask=batch.tree_mask,
            impl=impl,
        )
        assert isinstance(out, Array)
        return (out if rotation is None else rotate(out, rotation.T)), kv

    last_tokens = state.last_tokens.at[batch.rows].get(mode="fill", fill_value=0)  # [S]
    tokens = jnp.where(batch.tokens < 0, last_tokens[batch.seq_ids], batch.tokens)
    context_lens = jnp.maximum(batch.prompt_lens[batch.seq_ids], batch.positions + 1)
    return model.apply(
        bind(params, batch),
        tokens,
        batch.positions,
        attend,
        kv,
        context_lens=context_lens,
        trace_once=jax.jit,
    )


def is_finite(x: Array) -> Array:
    """Returns whether all of each row [..., N] is finite; a sum, which CPUs vectorise."""
    return jnp.sum(x.astype(jnp.float32) * 0.0, axis=-1) == 0.0


def is_sound(hidden: Array, batch: StepBatch) -> Array:
    """Returns whether the hidden states of all tokens of each sequence [S] are finite.

    Every token counts: K and V of all of them stay.
    """
    bad = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), ~is_finite(hidden)]), dtype=jnp.int32)
    return bad[batch.q_starts[1:]] == bad[batch.q_starts[:-1]]


def sample_rows(
    logits: Array, inputs: StepInputs, state: SamplerState, batch: StepBatch, active: Array | None
) -> tuple[Array, SamplerState]:
    """Draws one token a sequence, at position kv_len, and notes it in the state where active."""
    args = inputs.args
    assert args is not None and active is not None
    with jax.named_scope("sampler"):
        positions = batch.kv_lens
        mask = inputs.token_mask
        processed = process_logits(logits, args, state, batch.rows, positions, mask)
        tokens = sample(processed, args, positions)
        return tokens, observe(state, batch.rows, tokens, active)


def one_token_each(
    batch: StepBatch | DecodeBatch, tokens: Array, positions: Array, active: Array, kv: KVCache
) -> StepBatch:
    """Returns the batch in which each of the S sequences that are active [S] computes one token."""
    seq_ids = jnp.arange(batch.rows.shape[0], dtype=jnp.int32)
    pages = batch.page_table[seq_ids, jnp.where(active, positions // kv.page_size, 0)]
    return StepBatch(
        tokens=tokens,
        positions=positions,
        seq_ids=seq_ids,
        slots=jnp.where(active, pages * kv.page_size + positions % kv.page_size, kv.num_slots),
        q_starts=jnp.arange(batch.rows.shape[0] + 1, dtype=jnp.int32),
        kv_lens=jnp.where(active, positions + 1, 0),
        prompt_lens=batch.prompt_lens,
        page_table=batch.page_table,
        rows=batch.rows,
        max_q_len=1,
    )
