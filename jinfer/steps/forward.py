"""The jitted steps of the engine: the only library file that says `jax.jit`.

Weights, KV pool and sampler state cross the boundary as plain pytrees; the pool and the state are
donated and come back updated. Nothing here waits for the device. One program serves every context
length and every mix of sampling fields; only the padded sizes named by `buckets` make new ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jinfer import functional
from jinfer.config.typing import Params
from jinfer.kv import cache as kv_cache
from jinfer.kv import codes as kv_quant
from jinfer.kv.cache import KVCache
from jinfer.kv.rotation import kv_rotation, rotate
from jinfer.models.model import Model
from jinfer.sampling import process as sampling
from jinfer.sampling.process import SampleArgs, SamplerState
from jinfer.speculation import accept_chain as accept
from jinfer.steps.batch import DecodeBatch, StepBatch
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
    """Runs the blocks over a ragged batch through the paged pool; returns hidden [T, D]."""
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
        params, tokens, batch.positions, attend, kv, context_lens=context_lens, trace_once=jax.jit
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


def _sample(
    logits: Array,
    args: SampleArgs,
    state: SamplerState,
    batch: StepBatch,
    active: Array,
    token_mask: Array | None,
) -> tuple[Array, SamplerState]:
    """Draws one token a sequence, at position kv_len, and notes it in the state."""
    with jax.named_scope("sampler"):
        positions = batch.kv_lens
        processed = sampling.process_logits(logits, args, state, batch.rows, positions, token_mask)
        tokens = sampling.sample(processed, args, positions)
        return tokens, sampling.observe(state, batch.rows, tokens, active)


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
    tokens, state = _sample(logits, args, state, batch, sampled, token_mask)
    tokens = jnp.where(is_sound(hidden, batch) & is_finite(logits), tokens, NOT_FINITE)
    return StepOutput(tokens[None], logits, hidden), kv, state


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


@functools.partial(
    jax.jit, static_argnames=("model", "max_steps", "impl"), donate_argnames=("kv", "state")
)
def decode_loop(
    model: Model,
    params: Params,
    kv: KVCache,
    state: SamplerState,
    batch: DecodeBatch,
    args: SampleArgs,
    num_steps: Int[Array, ""],
    *,
    max_steps: int,
    impl: str = "auto",
) -> tuple[StepOutput, KVCache, SamplerState]:
    """Runs `num_steps` decode steps without coming back to the host.

    Args:
      model: static.
      params: weights.
      kv: the pool, donated.
      state: sampler state, donated.
      batch: S sequences, padded to a bucket.
      args: sampling fields.
      num_steps: dynamic, 1 to `max_steps`.
      max_steps: static height of the returned tokens.
      impl: attention backend.

    Returns:
      tokens [max_steps, S], of which the first `num_steps` rows (and of sequence s the first
      `batch.limits[s]`) count; the pool; the state.
    """
    size = batch.rows.shape[0]

    def step(carry):
        i, kv, state, out_tokens, _ = carry
        active = i < batch.limits
        positions = batch.positions + i
        tokens = jnp.where((i > 0) | (batch.tokens < 0), -1, batch.tokens)
        here = one_token_each(batch, tokens, positions, active, kv)
        hidden, kv = run_blocks(model, params, kv, state, here, impl)
        logits = model.unembed(params, hidden)
        tokens, state = _sample(logits, args, state, here, active, None)
        tokens = jnp.where(is_finite(hidden) & is_finite(logits), tokens, NOT_FINITE)
        return i + 1, kv, state, out_tokens.at[i].set(tokens), logits

    first = jnp.zeros((), jnp.int32)
    out_tokens = jnp.zeros((max_steps, size), jnp.int32)
    if max_steps == 1:  # without a loop, whose carry costs, and which XLA on CPUs optimises less
        _, kv, state, out_tokens, logits = step((first, kv, state, out_tokens, None))
    else:
        logits = jnp.zeros((size, model.config.vocab_size), jnp.float32)
        carry = (first, kv, state, out_tokens, logits)
        carry = jax.lax.while_loop(lambda c: c[0] < num_steps, step, carry)
        _, kv, state, out_tokens, logits = carry
    return StepOutput(out_tokens, logits, None), kv, state


@functools.partial(
    jax.jit, static_argnames=("model", "num_beams", "k", "impl"), donate_argnames=("kv",)
)
def beam_step(
    model: Model,
    params: Params,
    kv: KVCache,
    state: SamplerState,
    batch: StepBatch,
    totals: Float[Array, "S"],
    temperature: Float[Array, "S"],
    token_mask: UInt32[Array, "S W"] | None = None,
    *,
    num_beams: int,
    k: int,
    impl: str = "auto",
) -> tuple[tuple[Array, Array, Array], KVCache]:
    """Computes the newest token of S beams and chooses the best continuations of each group.

    Args:
      model: static.
      params: weights.
      kv: the pool, donated.
      state: sampler state, only looked at.
      batch: S = G * num_beams sequences of one token, given by its id.
      totals, temperature, token_mask, num_beams, k: see `sampling.best_continuations`.
      impl: attention backend.
    """
    hidden, kv = run_blocks(model, params, kv, state, batch, impl)
    logits = model.unembed(params, hidden)
    with jax.named_scope("beams"):
        best = sampling.best_continuations(
            logits, totals, temperature, token_mask, num_beams=num_beams, k=k
        )
    return best, kv


@functools.partial(jax.jit, donate_argnames=("state",))
def reset_row(state: SamplerState, row: Int[Array, ""], setup: Any) -> SamplerState:
    """Prepares one sampler row for a request that is (re-)admitted; `state` is donated."""
    return sampling.reset_row(state, row, setup)


@functools.partial(jax.jit, donate_argnames=("kv",))
def copy_pages(
    kv: KVCache,
    src: Int[Array, "N"],
    dst: Int[Array, "N"],
    num_tokens: Int[Array, "N"] | None = None,
) -> KVCache:
    """Copies pages of the pool, which is donated; see `kv_cache.copy_pages`."""
    return kv_cache.copy_pages(kv, src, dst, num_tokens)


@functools.partial(jax.jit, donate_argnames=("kv",))
def clear_pages(kv: KVCache, pages: Int[Array, "N"]) -> KVCache:
    """Zeroes pages of the pool, which is donated; see `kv_cache.clear_pages`."""
    return kv_cache.clear_pages(kv, pages)


@jax.jit
def read_pages(kv: KVCache, pages: Int[Array, "N"]) -> tuple[Any, ...]:
    """Copies pages out of the pool, which stays; see `kv_cache.read_pages`."""
    return kv_cache.read_pages(kv, pages)


@functools.partial(jax.jit, donate_argnames=("kv",))
def write_pages(kv: KVCache, contents: Sequence[Any], pages: Int[Array, "N"]) -> KVCache:
    """Copies pages into the pool, which is donated; see `kv_cache.write_pages`."""
    return kv_cache.write_pages(kv, contents, pages)


@functools.partial(jax.jit, static_argnames=("k",))
def top_logprobs(logits: Float[Array, "*n S V"], tokens: Int[Array, "m S"], *, k: int):
    """Returns the k best of each row of logits, and logprob and rank of the token sampled there.

    The rows of `verify_step`'s logits come one place after the other, [n * S]; where a step has
    logits for one place only, the first row of tokens is meant.
    """
    logits = logits.reshape(-1, logits.shape[-1])
    return sampling.top_logprobs(logits, tokens.reshape(-1)[: logits.shape[0]], k)


@functools.partial(jax.jit, static_argnames=("model", "k"))
def prompt_logprobs(
    model: Model, params: Params, hidden: Float[Array, "T D"], targets: Int[Array, "T"], *, k: int
):
    """Logprobs of the token that follows each of T positions, 16 rows of logits at a time.

    Returns:
      As `top_logprobs`, for T rows: ids [T, k], logprobs [T, k], target logprob [T], rank [T].
    """
    rows = 16
    size = targets.shape[0]
    pad = -size % rows
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, rows, hidden.shape[-1])
    padded = jnp.pad(targets, (0, pad)).reshape(-1, rows)

    def block(carry):
        x, tokens = carry
        return sampling.top_logprobs(model.unembed(params, x), tokens, k)

    out = jax.lax.map(block, (hidden, padded))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], out)


@jax.jit
def log_softmax(logits: Float[Array, "*n S V"]) -> Float[Array, "*n S V"]:
    """The whole vocabulary's logprobs, for `logprobs=-1`."""
    return jax.nn.log_softmax(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("model",))
def prompt_log_softmax(
    model: Model, params: Params, hidden: Float[Array, "T D"]
) -> Float[Array, "T V"]:
    """The whole vocabulary's logprobs after each of T positions, for `prompt_logprobs=-1`."""
    return jax.nn.log_softmax(model.unembed(params, hidden), axis=-1)


@functools.partial(jax.jit, static_argnames=("model", "length"))
def sample_texts(
    model: Model, params: Params, first: Int[Array, "B 1"], key: Array, length: int
) -> Int[Array, "B length"]:
    """What the model itself writes after `first`: text to calibrate on where there is no other."""
    return functional.generate(
        model, params, first, max_new_tokens=length, temperature=1.0, top_p=0.95, key=key
    ).tokens
