"""The jitted step that verifies trees of drafts and guesses the next ones; see `steps`."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jinfer.config.typing import Params
from jinfer.kv import cache as kv_cache
from jinfer.kv.cache import KVCache
from jinfer.models.model import Model
from jinfer.sampling.args import SampleArgs
from jinfer.sampling.state import SamplerState
from jinfer.speculation import medusa
from jinfer.speculation.accept_tree import Nodes, Walk, verify_tree
from jinfer.steps import blocks
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import StepOutput


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_drafts", "max_depth", "num_ranks", "typical", "impl"),
    donate_argnames=("kv", "state"),
)
def tree_step(
    model: Model,
    params: Params,
    kv: KVCache,
    state: SamplerState,
    batch: StepBatch,
    args: SampleArgs,
    sampled: Bool[Array, "S"],
    num_drafts: Int[Array, "S"],
    parents: Int[Array, "N1 S"],
    heads: Mapping[str, Array] | None,
    *,
    max_drafts: int,
    max_depth: int,
    num_ranks: int = 1,
    typical: tuple[float, float] | None = None,
    impl: str = "auto",
) -> tuple[StepOutput, KVCache, SamplerState]:
    """Runs one ragged step in which the last tokens of some sequences are trees of drafts.

    The KV of the drafts that stand is moved to where plain decoding would have written it; that of
    the others is left behind for the next step to overwrite. Example, drafts a b c (c after b), of
    which b and c stand, in the places behind the root:

        written  root a b c     moved  root b c .     tokens [b c x]

    Args:
      model, params, kv, state, batch, args, sampled, impl: as in `steps.forward_step`.
      num_drafts: [S] drafts at the end of each sequence's tokens.
      parents: see `tree_accept.Nodes`; N1 = max_drafts + 1.
      heads: Medusa heads that guess from the hidden state of the last draft that stands; None: the
        likeliest token after each node is the guess.
      max_drafts, max_depth: static, most drafts and levels of a sequence.
      num_ranks: static, R, guesses of a head.
      typical: static, see `verify_tree`.

    Returns:
      As `steps.verify_step`, with `logits` of the places walked, and `guesses` [S, K, R] of the
      heads, or [S, N1, 1] without.
    """
    hidden, kv = blocks.run_blocks(model, params, kv, state, batch, impl)
    last = jnp.maximum(batch.q_starts[1:] - 1, 0)  # [S]
    first = jnp.maximum(last - num_drafts, 0)  # the root's place among the step's tokens
    places = jnp.arange(max_drafts + 1, dtype=jnp.int32)[:, None]
    at = jnp.minimum(first[None] + places, last[None])  # [N1, S]
    logits = model.unembed(params, hidden[at])  # [N1, S, V]
    with jax.named_scope("sampler"):
        walk, state = verify_tree(
            logits,
            args,
            state,
            batch.rows,
            batch.kv_lens - num_drafts,
            Nodes(batch.tokens[at], parents),
            sampled,
            max_depth=max_depth,
            typical=typical,
        )
    kv = _keep_path(kv, batch, at, walk)
    if heads is None:
        guesses = jnp.argmax(logits, axis=-1).astype(jnp.int32).T[:, :, None]
    else:
        from_here = hidden[jnp.take_along_axis(at, walk.nodes[-1:], axis=0)[0]]  # [S, D]
        newest = jnp.maximum(walk.counts - 1, 0)[None]  # the next step's root
        roots = jnp.take_along_axis(walk.tokens, newest, axis=0)[0]  # [S]
        guesses = medusa.guess(model, params, heads, from_here, roots, num_ranks=num_ranks)
    is_sound = blocks.is_sound(hidden, batch) & jnp.all(blocks.is_finite(walk.logits), axis=0)
    tokens = jnp.where(is_sound, walk.tokens, blocks.NOT_FINITE)
    return StepOutput(tokens, walk.logits, hidden, walk.counts, guesses), kv, state


def _keep_path(kv: KVCache, batch: StepBatch, at: Array, walk: Walk) -> KVCache:
    """Moves the KV of the drafts that stand to the places right behind the root."""
    num_places = walk.nodes.shape[0]
    if num_places == 1:
        return kv
    depths = jnp.arange(num_places, dtype=jnp.int32)[:, None]  # [D1, 1]
    src = batch.slots[jnp.take_along_axis(at, walk.nodes, axis=0)]  # [D1, S]
    dst = batch.slots[at[:num_places]]
    is_moved = (depths < walk.counts[None]) & (walk.nodes != depths)
    dst = jnp.where(is_moved, dst, kv.num_slots)
    return kv_cache.move_slots(kv, src[1:].reshape(-1), dst[1:].reshape(-1))
