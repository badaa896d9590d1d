"""Applies masks, biases, penalties, temperature, top-k, top-p and min-p to logits.

Pure functions over pytrees, in f32; a sequence's result depends on its own row alone.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from jinfer.sampling.args import ALLOWED, BAD_WORDS, BIAS, MIN_TOKENS, PENALTIES, STATE, SampleArgs
from jinfer.sampling.state import SamplerState
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

    The steps are in vLLM's order (the first five also change greedy results):

      1. token_mask and allowed_token_ids (without bad words of one token): other tokens get -inf;
      2. tokens that would complete a bad word of several tokens get -inf;
      3. end and stop tokens at positions below min_position get -inf;
      4. logit_bias is added;
      5. penalties: x / r if x > 0 else x * r for tokens seen in prompt or output, then
         x - frequency * count - presence * (count > 0), counting output tokens;
      6. x / temperature;
      7. min_p: keep p >= min_p * max p;
      8. top_k: keep what is not below the k-th largest (all ties at the threshold are kept);
      9. top_p of the mass that 7 and 8 leave: keep a token if less than top_p of that mass lies
         above it (all ties are kept, and always the most likely token).

    6 to 9 do not change greedy rows. 7 to 9 are one threshold per row, found without sorting, by
    bisection over the bit patterns of f32; it is exact up to the rounding of the mass. Each step
    runs only if a sequence of the batch needs it.

    Args:
      logits: [S, V], any float dtype, cast to f32 once; NaN counts as -inf, +inf as the largest
        finite number.
      args: the sequences' parameters.
      state: the sampler's state.
      rows: [S] row of each sequence; rows out of range are padding, whose result is undefined.
      positions: [S] position of the token to be sampled, equal to the context length.
      token_mask: [S, ceil(V / 32)] u32, bit v % 32 of word v // 32 is 1 where token v is allowed;
        words of ones allow all, and cost next to nothing if all are.

    Returns:
      [S, V] f32, unnormalized log probabilities, -inf for excluded tokens; never NaN. All -inf if
      the constraints leave no token.
    """
    x = logits.astype(jnp.float32)
    # NaN passes min() and is replaced next, since it is not equal to itself.
    x = jnp.minimum(x, jnp.finfo(jnp.float32).max)
    x = jnp.where(x == x, x, NEG_INF)
    rows = jnp.clip(rows, 0, state.num_rows - 1)
    is_masked = jnp.zeros((), bool) if token_mask is None else restricts(token_mask)
    x = lax.cond(
        is_masked | jnp.any(args.has(STATE)),
        lambda x: _apply_state(apply_mask(x, token_mask), args, state, rows, positions),
        lambda x: x,
        x,
    )
    return lax.cond(jnp.any(~args.is_greedy), lambda x: filter_logits(x, args), lambda x: x, x)


def _apply_state(
    x: Array, args: SampleArgs, state: SamplerState, rows: Array, positions: Array
) -> Array:
    """Steps 1 to 5 of `process_logits`, which depend on the sampler's state."""
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
        # Rows without penalties have 0, 0 and 1 here, which do not change x.
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


def restricts(token_mask: Array) -> Array:
    """Returns [] bool, whether any word of a mask has a zero."""
    return jnp.any(token_mask != jnp.uint32(0xFFFFFFFF))


def apply_mask(x: Array, token_mask: Array | None) -> Array:
    """Returns x [S, V] with -inf where the mask [S, W] has a zero; x if it is None."""
    if token_mask is None:
        return x
    return jnp.where(unpack_bits(token_mask, x.shape[1]), x, NEG_INF)


def unpack_bits(words: Array, vocab_size: int) -> Array:
    """Returns [S, V] bool of [S, W] u32 bit rows."""
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    bits = (words[:, :, None] >> shifts) & jnp.uint32(1)
    return bits.reshape(words.shape[0], -1)[:, :vocab_size] != jnp.uint32(0)
