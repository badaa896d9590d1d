"""Which drafted tokens stand, and what comes after them; knows nothing of drafters and models.

The one place where speculation meets the sampler: at each position the target's distribution is
`sampling.process_logits` over a state that has observed the tokens before it, drafted ones too,
exactly as in plain decoding. What comes out is distributed as the target alone samples, whatever
the drafts are (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jinfer.config.sampling_params import NO_TOKEN
from jinfer.sampling.args import SEEDED, SampleArgs
from jinfer.sampling.draw import sample
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import SamplerState, observe

# Folded into a position's key: streams beside the plain draw's own. Beyond any token id, so that no
# block of the plain draw's noise is met again.
DRAFT, ACCEPT, RESIDUAL = 0x5EED0001, 0x5EED0002, 0x5EED0003


def verify(
    logits: Float[Array, "K1 S V"],
    args: SampleArgs,
    state: SamplerState,
    rows: Int[Array, "S"],
    positions: Int[Array, "S"],
    drafts: Int[Array, "K S"],
    num_drafts: Int[Array, "S"],
    active: Bool[Array, "S"],
    draft_logits: Float[Array, "K S V"] | None = None,
    token_mask: UInt[Array, "K1 S W"] | None = None,
) -> tuple[Int[Array, "K1 S"], Int[Array, "S"], SamplerState]:
    """Walks down the drafts of S sequences at once, K at most, up to the first that falls.

    A sequence without drafts is sampled as in any plain step. Example with K = 2, drafts [a b]:

        a and b stand      tokens [a b x]    count 3, x drawn after b
        a stands, b falls  tokens [a y .]    count 2, y drawn in b's place
        a falls            tokens [z . .]    count 1

    Without `draft_logits` the drafts are given tokens (a distribution that is all at one point):
    the token that plain sampling draws at that place is the result, and the draft stands if it is
    the same. This is rejection sampling for such drafts, and it gives, seed for seed, the tokens of
    plain decoding. So it is always for greedy rows, and for those with a seed of their own, whose
    tokens must not depend on how many drafts there were: their drafts are drawn with the noise that
    the plain draw has at that place, so that both mostly agree (Daliri et al. 2024,
    arXiv:2408.07978; a little less often than rejection sampling accepts).

    Args:
      logits: the target's raw logits after 0, 1, .., K drafts.
      args: sampling fields.
      state: sampler state as of before the drafts.
      rows: [S] row of each sequence; out of range for padding.
      positions: [S] place that the first sampled token takes.
      drafts: drafted ids; of sequence s the first num_drafts[s] count.
      num_drafts: [S].
      active: [S] sequences that sample at all; others leave no trace.
      draft_logits: the processed distributions that the drafts were drawn from, each by
        `draw_draft`; None for drafts that are given.
      token_mask: one packed mask a position, as in `process_logits`, or None.

    Returns:
      tokens; [S] how many of them count, 1 to num_drafts + 1 (0 where not active); the state after
      those.
    """
    num_places, num_seqs, _ = logits.shape
    padding = jnp.zeros((1, num_seqs), drafts.dtype)

    def place(carry, inputs):
        alive, count, state = carry
        i, x, draft, draft_x, mask = inputs
        has_draft = i < num_drafts
        target = process_logits(x, args, state, rows, positions + i, mask)
        tokens = draw(target, args, positions + i, draft, has_draft, draft_x)
        state = observe(state, rows, tokens, alive)
        count = count + alive.astype(jnp.int32)
        return (alive & has_draft & (tokens == draft), count, state), tokens

    if draft_logits is not None:
        draft_logits = jnp.concatenate(
            [draft_logits, draft_logits[:1]]
        )  # the last is not looked at
    inputs = (
        jnp.arange(num_places, dtype=jnp.int32),
        logits,
        jnp.concatenate([drafts, padding]),
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
    """Draws one token a sequence from `target`; equal to `draft` where the draft stands.

    With p of `target` and q of `draft_logits`: the draft stands with probability min(1, p / q) at
    its place; if it falls, the token is drawn from max(0, p - q), normed. Then it is another one:
    a draft falls only where q > p. Where `target` has no token left the result is NO_TOKEN.
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
        stands = chance(_keys(args, positions, ACCEPT)) <= ratio[:, 0]
        rest = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
        # All zero only where p and q are equal but for rounding.
        rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0.0, jnp.log(rest), log_p)
        other = _sample(rest, _keys(args, positions, RESIDUAL))
        is_there = plain != NO_TOKEN
        return jnp.where(is_random & is_there, jnp.where(stands, draft, other), plain)

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
