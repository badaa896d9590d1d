"""Shapes the distribution: penalties, biases, masks, temperature, in the order of the code.

Pure functions over pytrees, in f32; a sequence's result depends on its own row alone.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from jinfer.sampling.args import ALLOWED, BAD_WORDS, BIAS, MIN_TOKENS, PENALTIES, STATE, SampleArgs
from jinfer.sampling.args import ArgRow as ArgRow
from jinfer.sampling.args import arg_row as arg_row
from jinfer.sampling.args import pack_args as pack_args
from jinfer.sampling.args import state_flags as state_flags
from jinfer.sampling.check import check_request as check_request
from jinfer.sampling.state import RowSetup as RowSetup
from jinfer.sampling.state import SamplerLimits as SamplerLimits
from jinfer.sampling.state import SamplerState
from jinfer.sampling.state import init_state as init_state
from jinfer.sampling.state import observe as observe
from jinfer.sampling.state import pack_bits as pack_bits
from jinfer.sampling.state import pack_row as pack_row
from jinfer.sampling.state import reset_row as reset_row
from jinfer.sampling.state import state_bytes as state_bytes
from jinfer.sampling.threshold import NEG_INF, filter_logits


def process_logits(
    logits: Float[Array, "S V"],
    args: SampleArgs,
    state: SamplerState,
    rows: Int[Array, "S"],
    positions: Int[Array, "S"],
    token_mask: UInt[Array, "S W"] | None = None,
) -> Float[Array, "S V"]:
    """Returns the final distribution of each sequence's next token, as logits.

    In this order, which is vLLM's (the first five also change greedy results):

      1. token_mask and allowed_token_ids (with bad words of one token): others become -inf;
      2. bad words of several tokens whose beginning is the end of the output: -inf;
      3. end and stop tokens below min_position: -inf;
      4. logit_bias is added;
      5. penalties: x / r if x > 0 else x * r for tokens seen in prompt or output, then
         x - frequency * count - presence * (count > 0), counting output tokens;
      6. x / temperature;
      7. min_p: keep p >= min_p * max p;
      8. top_k: keep what is not below the k-th largest (so ties at the edge all stay);
      9. top_p, over the mass that 7 and 8 leave: keep the tokens above which less than top_p of
         that mass lies (ties at the edge all stay, the most likely always does).

    6 to 9 leave greedy rows as they are. 7 to 9 amount to one threshold a row, found without
    sorting: by bisection over the bit patterns of f32, exact but for the rounding of the mass.
    Each part runs only if a sequence of the batch needs it.

    Args:
      logits: [S, V], any float dtype, cast to f32 once; NaN counts as -inf, +inf as the largest
        finite number.
      args: the sequences' parameters.
      state: the rows' memory.
      rows: [S] row of each sequence; rows out of range are padding, whose result means nothing.
      positions: [S] place that the token to be sampled takes in its sequence: the context length.
      token_mask: [S, ceil(V / 32)] u32, bit v % 32 of word v // 32 is 1 where token v may come.

    Returns:
      [S, V] f32, unnormalised log probabilities, -inf where cut; never NaN. All -inf if the
      constraints leave no token.
    """
    x = logits.astype(jnp.float32)
    # min() of a NaN is NaN, which fails every comparison.
    x = jnp.minimum(x, jnp.finfo(jnp.float32).max)
    x = jnp.where(x == x, x, NEG_INF)
    if token_mask is not None:
        x = jnp.where(unpack_bits(token_mask, x.shape[1]), x, NEG_INF)
    rows = jnp.clip(rows, 0, state.num_rows - 1)
    needs_state = jnp.any(args.has(STATE))
    x = lax.cond(
        needs_state,
        lambda x: _apply_state(x, args, state, rows, positions),
        lambda x: x,
        x,
    )
    return lax.cond(jnp.any(~args.is_greedy), lambda x: filter_logits(x, args), lambda x: x, x)


def _apply_state(
    x: Array, args: SampleArgs, state: SamplerState, rows: Array, positions: Array
) -> Array:
    """Steps 1 to 5 of `process_logits`: what depends on the rows' memory."""
    vocab_size = x.shape[1]
    sequences = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]  # [S, 1]

    def ban(x: Array, banned: Array) -> Array:
        return jnp.where(banned, NEG_INF, x)

    def allow(x: Array) -> Array:
        bits = unpack_bits(state.allowed_bits[rows], vocab_size)
        return ban(x, args.has(ALLOWED)[:, None] & ~bits)

    def ban_words(x: Array) -> Array:
        prefixes = state.bad_prefixes[rows]  # [S, C, H]
        is_same = prefixes == state.history[rows][:, None, :]
        is_next = jnp.all(is_same | (prefixes == -2), axis=-1) & args.has(BAD_WORDS)[:, None]
        tokens = jnp.where(is_next, state.bad_tokens[rows], vocab_size)  # [S, C]
        return x.at[sequences, tokens].set(NEG_INF, mode="drop")

    is_early = args.has(MIN_TOKENS) & (positions < args.min_position)

    def ban_stops(x: Array) -> Array:
        return ban(x, is_early[:, None] & unpack_bits(state.stop_bits[rows], vocab_size))

    def bias(x: Array) -> Array:
        ids = jnp.where(args.has(BIAS)[:, None], state.bias_ids[rows], vocab_size)
        return x.at[sequences, ids].add(state.bias_values[rows], mode="drop")

    def penalise(x: Array) -> Array:
        # Rows without penalties have 0, 0 and 1 here, which leave x as it is.
        counts = state.output_counts[rows].astype(jnp.float32)
        is_out = counts > 0.0
        is_seen = is_out | unpack_bits(state.prompt_bits[rows], vocab_size)
        repetition = args.repetition[:, None]
        repeated = jnp.where(x > 0.0, x / repetition, x * repetition)
        x = jnp.where(is_seen, repeated, x)
        x = x - args.frequency[:, None] * counts
        return x - jnp.where(is_out, args.presence[:, None], 0.0)

    for needed, apply in (
        (jnp.any(args.has(ALLOWED)), allow),
        (jnp.any(args.has(BAD_WORDS)), ban_words),
        (jnp.any(is_early), ban_stops),
        (jnp.any(args.has(BIAS)), bias),
        (jnp.any(args.has(PENALTIES)), penalise),
    ):
        x = lax.cond(needed, apply, lambda x: x, x)
    return x


def unpack_bits(words: Array, vocab_size: int) -> Array:
    """Returns [S, V] bool of [S, W] u32 bit rows."""
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    bits = (words[:, :, None] >> shifts) & jnp.uint32(1)
    return bits.reshape(words.shape[0], -1)[:, :vocab_size] != jnp.uint32(0)
