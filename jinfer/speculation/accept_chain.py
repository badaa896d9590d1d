"""Accepts or rejects chains of drafts, and samples the token after the accepted ones.

At each position the target's distribution is `process_logits` over a sampler state that has
observed all tokens before it, drafts included, exactly as in plain decoding. So the result has the
distribution of the target's own samples, whatever the drafts are (Leviathan et al. 2023,
arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jinfer.config.sampling_params import NO_TOKEN
from jinfer.sampling.args import SEEDED, SampleArgs
from jinfer.sampling.draw import sample
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import SamplerState, observe

# Folded into a position's key: random streams beside that of the plain draw. They lie beyond any
# token id, so that they share no block of noise with the plain draw.
DRAFT, ACCEPT, RESIDUAL = 0x5EED0001, 0x5EED0002, 0x5EED0003


class Places(NamedTuple):
    """Where S sequences sample.

    Attributes:
      args: sampling fields.
      rows: [S] row of each sequence in the sampler's state; out of range for padding.
      positions: [S] position of the first sampled token.
      active: [S] whether the sequence samples; others leave the state unchanged.
    """

    args: SampleArgs
    rows: Int[Array, "S"]
    positions: Int[Array, "S"]
    active: Bool[Array, "S"]


class Chains(NamedTuple):
    """Drafts of S sequences, K at most.

    Attributes:
      tokens: [K, S] drafted ids; of sequence s the first counts[s] are valid.
      counts: [S].
      logits: [K, S, V] processed distributions from which `draw_draft` drew the drafts; None for
        given drafts.
    """

    tokens: Int[Array, "K S"]
    counts: Int[Array, "S"]
    logits: Float[Array, "K S V"] | None = None


def verify(
    logits: Float[Array, "K1 S V"],
    places: Places,
    state: SamplerState,
    drafts: Chains,
    token_mask: UInt[Array, "K1 S W"] | None = None,
) -> tuple[Int[Array, "K1 S"], Int[Array, "S"], SamplerState]:
    """Samples along the drafts of S sequences at once, up to the first rejected draft of each.

    A sequence without drafts is sampled as in a plain step. Example with K = 2, drafts [a b]:

        a and b accepted       tokens [a b x]    count 3, x drawn after b
        a accepted, b rejected tokens [a y .]    count 2, y drawn in b's place
        a rejected             tokens [z . .]    count 1

    Given drafts (no `drafts.logits`) have all their probability at one token. The result is the
    token that plain sampling draws at that position, and the draft is accepted if it is the same.
    This is rejection sampling for such drafts, and for each seed it gives the tokens of plain
    decoding.

    Greedy rows and rows with a seed of their own are always verified this way, since their tokens
    must not depend on the number of drafts. Their drafts are drawn with the noise of the plain draw
    at that position, so that both mostly agree (Daliri et al. 2024, arXiv:2408.07978; slightly less
    often than rejection sampling accepts).

    Args:
      logits: the target's raw logits after 0, 1, .., K drafts.
      places: sequences, with the position of the first sampled token.
      state: sampler state before the drafts.
      drafts: the drafts.
      token_mask: one packed mask per position, as in `process_logits`, or None.

    Returns:
      tokens; [S] how many of them are valid, 1 to drafts.counts + 1 (0 where not active); the state
      after those.
    """
    args, rows, positions, active = places
    num_places, num_seqs, _ = logits.shape
    padding = jnp.zeros((1, num_seqs), drafts.tokens.dtype)

    def place(carry, inputs):
        alive, count, state = carry
        i, x, draft, draft_x, mask = inputs
        has_draft = i < drafts.counts
        target = process_logits(x, args, state, rows, positions + i, mask)
        tokens = draw(target, args, positions + i, draft, has_draft, draft_x)
        state = observe(state, rows, tokens, alive)
        count = count + alive.astype(jnp.int32)
        return (alive & has_draft & (tokens == draft), count, state), tokens

    draft_logits = drafts.logits
    if draft_logits is not None:
        # Padded to K + 1 places; the last one has no draft and is not read.
        draft_logits = jnp.concatenate([draft_logits, draft_logits[:1]])
    inputs = (
        jnp.arange(num_places, dtype=jnp.int32),
        logits,
        jnp.concatenate([drafts.tokens, padding]),
        draft_logits,
        token_mask,
    )
    carry = (active, jnp.zeros(num_seqs, jnp.int32), state)
    (_, count, state), tokens = lax.scan(place, carry, inputs)
    return tokens, count, state


def draw(
    target: Float[Array, "S V"],
    args: SampleArgs,
    positions: Int[Array, "S"],
    draft: Int[Array, "S"],
    has_draft: Bool[Array, "S"],
    draft_logits: Float[Array, "S V"] | None,
) -> Int[Array, "S"]:
    """Draws one token per sequence from `target`; equal to `draft` where the draft is accepted.

    With p of `target` and q of `draft_logits`: a draft is accepted with probability min(1, p / q).
    If it is rejected, the token is drawn from max(0, p - q), normalized. It differs from the draft,
    since q > p there. Where `target` has no token left the result is NO_TOKEN.
    """
    plain = sample(target, args, positions)
    if draft_logits is None:
        return plain

    def reject(plain: Array) -> Array:
        log_p = jax.nn.log_softmax(target, axis=-1)
        log_q = jax.nn.log_softmax(draft_logits, axis=-1)
        ids = draft[:, None]
        ratio = jnp.take_along_axis(log_p, ids, axis=-1) - jnp.take_along_axis(log_q, ids, axis=-1)
        chance = jax.vmap(lambda key: -jax.random.exponential(key, (), jnp.float32))
        is_accepted = chance(_keys(args, positions, ACCEPT)) <= ratio[:, 0]
        rest = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
        # All zero only where p and q are equal up to rounding.
        rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0.0, jnp.log(rest), log_p)
        other = _sample(rest, _keys(args, positions, RESIDUAL))
        has_token = plain != NO_TOKEN
        return jnp.where(is_random & has_token, jnp.where(is_accepted, draft, other), plain)

    is_random = has_draft & ~args.is_greedy & ~args.has(SEEDED)
    return lax.cond(jnp.any(is_random), reject, lambda plain: plain, plain)


def draw_draft(
    draft_logits: Float[Array, "S V"], args: SampleArgs, positions: Int[Array, "S"]
) -> Int[Array, "S"]:
    """Draws each draft from the drafter's processed distribution; id 0 where it is empty."""
    plain = jnp.maximum(sample(draft_logits, args, positions), 0)

    def redraw(plain: Array) -> Array:
        tokens = _sample(draft_logits, _keys(args, positions, DRAFT))
        return jnp.where(is_random, tokens, plain)

    is_random = ~args.is_greedy & ~args.has(SEEDED)
    return lax.cond(jnp.any(is_random), redraw, lambda plain: plain, plain)


def _keys(args: SampleArgs, positions: Array, tag: int) -> Array:
    def key(seed: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, position), jnp.uint32(tag))

    return jax.vmap(key)(args.seed, positions.astype(jnp.uint32))


def _sample(log_weights: Array, keys: Array) -> Array:
    noise = jax.vmap(lambda key: jax.random.gumbel(key, log_weights.shape[1:], jnp.float32))(keys)
    return jnp.argmax(log_weights + noise, axis=-1).astype(jnp.int32)
