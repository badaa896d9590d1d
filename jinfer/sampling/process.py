"""From logits to tokens: the processed distribution, the draw from it, and log probabilities.

Knows nothing of models, caches or requests. Pure functions over pytrees, all in f32; a sequence's
result depends on its own row alone, never on its batch mates or on the padded size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from jinfer.config.sampling_params import NO_TOKEN
from jinfer.sampling.state import (
    ALLOWED,
    BAD_WORDS,
    BIAS,
    MIN_TOKENS,
    PENALTIES,
    STATE,
    SampleArgs,
    SamplerState,
)
from jinfer.sampling.state import ArgRow as ArgRow
from jinfer.sampling.state import RowSetup as RowSetup
from jinfer.sampling.state import SamplerLimits as SamplerLimits
from jinfer.sampling.state import arg_row as arg_row
from jinfer.sampling.state import check_request as check_request
from jinfer.sampling.state import init_state as init_state
from jinfer.sampling.state import observe as observe
from jinfer.sampling.state import pack_args as pack_args
from jinfer.sampling.state import pack_bits as pack_bits
from jinfer.sampling.state import pack_row as pack_row
from jinfer.sampling.state import reset_row as reset_row
from jinfer.sampling.state import state_bytes as state_bytes
from jinfer.sampling.state import state_flags as state_flags

_NEG_INF = float("-inf")
_BLOCK = 64  # neighbours whose maximum stands for them in `_largest`
_NUM_BLOCKS = 128  # blocks that it keeps

Test: TypeAlias = Callable[[Array], Array]  # thresholds [S] -> bool [S]


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
    x = jnp.where(x == x, x, _NEG_INF)
    if token_mask is not None:
        x = jnp.where(_unpack_bits(token_mask, x.shape[1]), x, _NEG_INF)
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
        return jnp.where(banned, _NEG_INF, x)

    def allow(x: Array) -> Array:
        bits = _unpack_bits(state.allowed_bits[rows], vocab_size)
        return ban(x, args.has(ALLOWED)[:, None] & ~bits)

    def ban_words(x: Array) -> Array:
        prefixes = state.bad_prefixes[rows]  # [S, C, H]
        is_same = prefixes == state.history[rows][:, None, :]
        is_next = jnp.all(is_same | (prefixes == -2), axis=-1) & args.has(BAD_WORDS)[:, None]
        tokens = jnp.where(is_next, state.bad_tokens[rows], vocab_size)  # [S, C]
        return x.at[sequences, tokens].set(_NEG_INF, mode="drop")

    is_early = args.has(MIN_TOKENS) & (positions < args.min_position)

    def ban_stops(x: Array) -> Array:
        return ban(x, is_early[:, None] & _unpack_bits(state.stop_bits[rows], vocab_size))

    def bias(x: Array) -> Array:
        ids = jnp.where(args.has(BIAS)[:, None], state.bias_ids[rows], vocab_size)
        return x.at[sequences, ids].add(state.bias_values[rows], mode="drop")

    def penalise(x: Array) -> Array:
        # Rows without penalties have 0, 0 and 1 here, which leave x as it is.
        counts = state.output_counts[rows].astype(jnp.float32)
        is_out = counts > 0.0
        is_seen = is_out | _unpack_bits(state.prompt_bits[rows], vocab_size)
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


def filter_logits(x: Float[Array, "S V"], args: SampleArgs) -> Float[Array, "S V"]:
    """Steps 6 to 9 of `process_logits`; greedy rows pass unchanged."""
    x = x / jnp.where(args.is_greedy, 1.0, args.temperature)[:, None]
    top = jnp.max(x, axis=-1)  # [S]
    threshold = top + jnp.log(args.min_p)  # -inf without min_p, and for a row without tokens
    needs_k = (args.top_k > 0) & (args.top_k < x.shape[1])
    needs_p = args.top_p < 1.0
    threshold = lax.cond(
        jnp.any(needs_k | needs_p),
        lambda t: _raise_threshold(x, args, top, t, needs_k, needs_p),
        lambda t: t,
        threshold,
    )
    # The most likely token stays, even where top_p is 0 in f32 or rounding lifts the threshold.
    return jnp.where(x >= jnp.minimum(threshold, top)[:, None], x, _NEG_INF)


def _raise_threshold(
    x: Array, args: SampleArgs, top: Array, threshold: Array, needs_k: Array, needs_p: Array
) -> Array:
    """Returns the [S] thresholds raised to the edge of top-k, then to that of top-p."""
    few, floor = _largest(x)
    bottom = jnp.full_like(floor, _NEG_INF)

    def search(make_test: Callable[[Array], Test], needed: Array) -> tuple[Array, Array]:
        """Bisects over the few largest values, and over all in the rows where those fall short.

        Which rows do is decided row by row, so that none depends on its company.
        """
        test = make_test(few)
        found = _bisect(test, floor, top)
        is_found = test(floor)
        in_all = lax.cond(
            jnp.any(needed & ~is_found),
            lambda: _bisect(make_test(x), bottom, top),
            lambda: found,
        )
        return jnp.where(is_found, found[0], in_all[0]), jnp.where(is_found, found[1], in_all[1])

    def raise_to_k(threshold: Array) -> Array:
        # f32 sums count exactly up to 2^24 and are several times faster on CPUs than integer ones.
        k = args.top_k.astype(jnp.float32)

        def holds_k(values: Array) -> Test:
            return lambda t: jnp.sum(values >= t[:, None], axis=-1, dtype=jnp.float32) >= k

        edge, _ = search(holds_k, needs_k)
        return jnp.where(needs_k, jnp.maximum(threshold, edge), threshold)

    def raise_to_p(threshold: Array) -> Array:
        shift = jnp.where(top > _NEG_INF, top, 0.0)[:, None]

        def mass_of(values: Array) -> Array:
            return jnp.where(values >= threshold[:, None], jnp.exp(values - shift), 0.0)

        goal = args.top_p * jnp.sum(mass_of(x), axis=-1)

        def holds_p(values: Array) -> Test:
            mass = mass_of(values)
            return lambda t: jnp.sum(jnp.where(values > t[:, None], mass, 0.0), axis=-1) >= goal

        _, edge = search(holds_p, needs_p)
        return jnp.where(needs_p, jnp.maximum(threshold, edge), threshold)

    threshold = lax.cond(jnp.any(needs_k), raise_to_k, lambda t: t, threshold)
    return lax.cond(jnp.any(needs_p), raise_to_p, lambda t: t, threshold)


def _largest(x: Array) -> tuple[Array, Array]:
    """Returns some of each row's values and a floor, such that all values above it are among them.

    They are the blocks of 64 neighbours with the 128 greatest maxima; the least of those maxima is
    the floor. So the 128 largest values are always there, and no sort sees the whole vocabulary:

        x  | 3 1 | 0 9 | 4 8 | 2 2 |     with 2 blocks of 2:   few 0 9 4 8   floor 8

    Returns:
      [S, 8192] (all of a smaller vocabulary) and [S].
    """
    num_rows, vocab_size = x.shape
    if vocab_size <= _NUM_BLOCKS * _BLOCK:
        return x, jnp.full((num_rows,), _NEG_INF, jnp.float32)
    padding = -vocab_size % _BLOCK
    blocks = jnp.pad(x, ((0, 0), (0, padding)), constant_values=_NEG_INF)
    blocks = blocks.reshape(num_rows, -1, _BLOCK)
    peaks, which = lax.top_k(jnp.max(blocks, axis=-1), _NUM_BLOCKS)
    few = jnp.take_along_axis(blocks, which[:, :, None], axis=1)
    # Not peaks[:, -1]: XLA would fold that slice into its top_k and sort every block's maximum.
    return few.reshape(num_rows, -1), jnp.min(peaks, axis=-1)


def _bisect(holds: Test, low: Array, top: Array) -> tuple[Array, Array]:
    """Finds, in each row, the two neighbouring f32 between which `holds` turns from true to false.

    `holds` must be decreasing in the threshold and true at `low` (elsewhere the row's result means
    nothing); it is never asked above `top`. Walks the order-preserving map of f32 to u32 (flip the
    sign bit of positive numbers, all bits of negative ones), so that 32 halvings end at
    neighbouring floats whatever the range.

    Returns:
      The largest threshold at which it holds, and the next float above it; where it holds at
      `top` itself, `top` and the float after it.
    """
    ends = _to_key(low), _to_key(top) + jnp.uint32(1)

    def halve(_, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // jnp.uint32(2)
        is_true = holds(_from_key(middle))
        return jnp.where(is_true, middle, low), jnp.where(is_true, high, middle)

    low, high = lax.fori_loop(0, 32, halve, ends)
    return _from_key(low), _from_key(high)


def _to_key(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _from_key(key: Array) -> Array:
    sign = jnp.uint32(0x80000000)
    return lax.bitcast_convert_type(jnp.where(key >= sign, key & ~sign, ~key), jnp.float32)


def sample(
    processed: Float[Array, "S V"], args: SampleArgs, positions: Int[Array, "S"]
) -> Int[Array, "S"]:
    """Draws one token a sequence from `process_logits`' result.

    Greedy rows take the most likely token, the lowest id among equals. Others take the argmax of
    the logits plus Gumbel noise, whose key is fold_in(key(seed), position): a token is a function
    of the distribution, the seed and the position alone.

    Returns:
      [S] i32. A row without any token left (all -inf) gives NO_TOKEN.
    """

    def draw(x: Array) -> Array:
        def noise(seed: Array, position: Array) -> Array:
            key = jax.random.wrap_key_data(seed, impl="threefry2x32")
            return jax.random.gumbel(jax.random.fold_in(key, position), (x.shape[1],), jnp.float32)

        gumbel = jax.vmap(noise)(args.seed, positions.astype(jnp.uint32))
        return _argmax(jnp.where(args.is_greedy[:, None], x, x + gumbel))

    return lax.cond(jnp.any(~args.is_greedy), draw, _argmax, processed)


def _argmax(x: Array) -> Array:
    """Returns the first index of each row's maximum, [S] i32; NO_TOKEN where that is -inf.

    Two reductions instead of `jnp.argmax`, whose pair reduction XLA does not vectorise on CPUs
    (ten times slower there). f32 holds indices up to 2^24 exactly.
    """
    top = jnp.max(x, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.float32, x.shape, 1)
    first = jnp.min(jnp.where(x == top, index, float(x.shape[1] - 1)), axis=-1).astype(jnp.int32)
    return jnp.where(top[:, 0] > _NEG_INF, first, NO_TOKEN)


def top_logprobs(
    logits: Float[Array, "S V"], tokens: Int[Array, "S"], k: int
) -> tuple[Int[Array, "S k"], Float[Array, "S k"], Float[Array, "S"], Int[Array, "S"]]:
    """Returns log probabilities under the raw logits: of the k likeliest tokens, and of `tokens`.

    Args:
      logits: [S, V], before any processing; cast to f32.
      tokens: [S] the sampled (or prompt) tokens.
      k: static, 0 .. V.

    Returns:
      ids [S, k] i32 and log probabilities [S, k] f32, likeliest first; log probability [S] f32 of
      each of `tokens`; its rank [S] i32: how many tokens are at least as likely, so 1 is the top.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    of_token = jnp.take_along_axis(logprobs, tokens[:, None].astype(jnp.int32), axis=-1)  # [S, 1]
    rank = jnp.sum(logprobs >= of_token, axis=-1, dtype=jnp.float32).astype(jnp.int32)
    top, ids = lax.top_k(logprobs, k)
    return ids.astype(jnp.int32), top, of_token[:, 0], rank


def best_continuations(
    logits: Float[Array, "S V"],
    totals: Float[Array, "S"],
    temperature: Float[Array, "S"],
    token_mask: UInt[Array, "S W"] | None,
    *,
    num_beams: int,
    k: int,
) -> tuple[Int[Array, "G k"], Float[Array, "G k"], Float[Array, "G k"]]:
    """Returns the k best continuations of each group of beams, best first.

    Args:
      logits: [S, V] of S = G * num_beams beams.
      totals: [S] each beam's sum of log probabilities; -inf: no beam.
      temperature: [S] positive; divides the logits.
      token_mask: as for `process_logits`; masked tokens count as -inf, the others are not
        renormalised.
      num_beams: beams in a group.
      k: at most num_beams * V.

    Returns:
      beam * V + token [G, k] i32 with beam in 0 .. num_beams - 1, the sum with the token [G, k]
      f32, -inf for none, and the token's own log probability [G, k] f32. NaN among the logits of a
      beam comes out as NaN sums.
    """
    vocab_size = logits.shape[1]
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature[:, None], axis=-1)
    if token_mask is not None:
        logprobs = jnp.where(_unpack_bits(token_mask, vocab_size), logprobs, _NEG_INF)
    totals = totals[:, None]
    sums = jnp.where(totals == _NEG_INF, _NEG_INF, logprobs + totals)  # whatever padding holds
    sums = sums.reshape(-1, num_beams * vocab_size)  # [G, beams * V]
    best, which = _top_k(sums, k)
    own = jnp.take_along_axis(logprobs.reshape(sums.shape), which, axis=1)
    return which, best, own


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` of long rows: of the k blocks of neighbours with the greatest maxima only.

    The k largest values lie in them, for each other block has k values above all of its own.
    """
    num_rows, size = x.shape
    if size <= k * _BLOCK:
        best, which = lax.top_k(x, k)
        return best, which.astype(jnp.int32)
    blocks = jnp.pad(x, ((0, 0), (0, -size % _BLOCK)), constant_values=_NEG_INF)
    blocks = blocks.reshape(num_rows, -1, _BLOCK)
    _, picked = lax.top_k(jnp.max(blocks, axis=-1), k)
    picked = jnp.sort(picked, axis=-1)  # so that the first of equals comes first
    few = jnp.take_along_axis(blocks, picked[:, :, None], axis=1).reshape(num_rows, -1)
    best, place = lax.top_k(few, k)
    block = jnp.take_along_axis(picked, place // _BLOCK, axis=1)
    return best, (block * _BLOCK + place % _BLOCK).astype(jnp.int32)


def _unpack_bits(words: Array, vocab_size: int) -> Array:
    """Returns [S, V] bool of [S, W] u32 bit rows."""
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    bits = (words[:, :, None] >> shifts) & jnp.uint32(1)
    return bits.reshape(words.shape[0], -1)[:, :vocab_size] != jnp.uint32(0)
