"""Log probabilities of the likeliest tokens, and the best continuations of beams."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from jinfer.sampling.process import apply_mask, restricts
from jinfer.sampling.threshold import _BLOCK, NEG_INF


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
      each of `tokens`; its rank [S] i32: number of tokens that are at least as likely, 1 for the
      likeliest.
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
      token_mask: as for `process_logits`; masked tokens get -inf, the others are not
        renormalized.
      num_beams: beams in a group.
      k: at most num_beams * V.

    Returns:
      beam * V + token [G, k] i32 with beam in 0 .. num_beams - 1, the sum including the token
      [G, k] f32, -inf for none, and the token's own log probability [G, k] f32. NaN among a beam's
      logits gives NaN sums.
    """
    vocab_size = logits.shape[1]
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature[:, None], axis=-1)
    if token_mask is not None:
        logprobs = lax.cond(
            restricts(token_mask), lambda x: apply_mask(x, token_mask), lambda x: x, logprobs
        )
    totals = totals[:, None]
    # Padding beams may have any logits, NaN included.
    sums = jnp.where(totals == NEG_INF, NEG_INF, logprobs + totals)
    sums = sums.reshape(-1, num_beams * vocab_size)  # [G, beams * V]
    best, which = _top_k(sums, k)
    own = jnp.take_along_axis(logprobs.reshape(sums.shape), which, axis=1)
    return which, best, own


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Like `lax.top_k`, faster for long rows: it sorts only the k blocks with the largest maxima.

    The k largest values lie in them: for any other block, k maxima are at least as large as all of
    its values.
    """
    num_rows, size = x.shape
    if size <= k * _BLOCK:
        best, which = lax.top_k(x, k)
        return best, which.astype(jnp.int32)
    blocks = jnp.pad(x, ((0, 0), (0, -size % _BLOCK)), constant_values=NEG_INF)
    blocks = blocks.reshape(num_rows, -1, _BLOCK)
    _, picked = lax.top_k(jnp.max(blocks, axis=-1), k)
    picked = jnp.sort(picked, axis=-1)  # so that of equal values the first one is returned first
    few = jnp.take_along_axis(blocks, picked[:, :, None], axis=1).reshape(num_rows, -1)
    best, place = lax.top_k(few, k)
    block = jnp.take_along_axis(picked, place // _BLOCK, axis=1)
    return best, (block * _BLOCK + place % _BLOCK).astype(jnp.int32)
