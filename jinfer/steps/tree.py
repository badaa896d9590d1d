"""The step that verifies trees of drafts and guesses what comes next."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jinfer.kv import cache as kv_cache
from jinfer.kv.cache import KVCache
from jinfer.models.model import Model
from jinfer.speculation import medusa
from jinfer.speculation.accept_chain import Places
from jinfer.speculation.accept_tree import Nodes, Walk, verify_tree
from jinfer.steps import blocks
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import StepOutput
from jinfer.steps.inputs import Pool, StepInputs, Weights


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_depth", "num_ranks", "typical", "impl"),
    donate_argnames=("pool",),
)
def tree_step(
    model: Model,
    params: Weights,
    pool: Pool,
    inputs: StepInputs,
    *,
    max_depth: int,
    num_ranks: int = 1,
    typical: tuple[float, float] | None = None,
    impl: str = "auto",
) -> tuple[StepOutput, Pool]:
    """Runs one ragged step in which the last tokens of some sequences are trees of drafts.

    The KV of accepted drafts is moved to where plain decoding would have written it; that of the
    others is left behind for the next step to overwrite. Example, drafts a b c (c after b), of
    which b and c are accepted, in the places behind the root:

        written  root a b c     moved  root b c .     tokens [b c x]

    Args:
      model, pool, impl: as in `forward.forward_step`.
      params: weights, and Medusa heads that guess from the hidden state of the last accepted draft;
        None for these: the likeliest token after each node is the guess.
      inputs: as in `verify.verify_step`, and `parents` [N1, S]; a token mask has one for each node.
      max_depth: static, most levels of a sequence's tree.
      num_ranks: static, R, guesses of a head.
      typical: static, see `verify_tree`.

    Returns:
      As `verify.verify_step`, with `logits` of the places walked, and `guesses` [S, K, R] of the
      heads, or [S, N1, 1] without.
    """
    batch, num_drafts, parents = inputs.batch, inputs.num_drafts, inputs.parents
    assert isinstance(batch, StepBatch) and num_drafts is not None and parents is not None
    assert inputs.args is not None and inputs.sampled is not None
    hidden, kv = blocks.run_blocks(model, params.target, pool.kv, pool.state, batch, impl)
    last = jnp.maximum(batch.q_starts[1:] - 1, 0)  # [S]
    first = jnp.maximum(last - num_drafts, 0)  # the root's place among the step's tokens
    places = jnp.arange(parents.shape[0], dtype=jnp.int32)[:, None]
    at = jnp.minimum(first[None] + places, last[None])  # [N1, S]
    logits = model.unembed(params.target, hidden[at])  # [N1, S, V]
    with jax.named_scope("sampler"):
        walk, state = verify_tree(
            logits,
            Places(inputs.args, batch.rows, batch.kv_lens - num_drafts, inputs.sampled),
            pool.state,
            Nodes(batch.tokens[at], parents),
            max_depth=max_depth,
            typical=typical,
            token_mask=inputs.token_mask,
        )
    kv = _keep_path(kv, batch, at, walk)
    if params.drafter is None:
        guesses = jnp.argmax(logits, axis=-1).astype(jnp.int32).T[:, :, None]
    else:
        guesses = _guess(model, params, hidden, at, walk, num_ranks)
    is_sound = blocks.is_sound(hidden, batch) & jnp.all(blocks.is_finite(walk.logits), axis=0)
    tokens = jnp.where(is_sound, walk.tokens, blocks.NOT_FINITE)
    output = StepOutput(tokens, walk.logits, hidden, walk.counts, guesses)
    return output, Pool(kv, state, pool.draft_kv)


def _guess(
    model: Model, params: Weights, hidden: Array, at: Array, walk: Walk, num_ranks: int
) -> Array:
    """Returns what Medusa heads guess after the last accepted draft and the token after it."""
    from_here = hidden[jnp.take_along_axis(at, walk.nodes[-1:], axis=0)[0]]  # [S, D]
    newest = jnp.maximum(walk.counts - 1, 0)[None]  # the next step's root
    roots = jnp.take_along_axis(walk.tokens, newest, axis=0)[0]  # [S]
    return medusa.guess(model, params.target, params.drafter, from_here, roots, num_ranks=num_ranks)


def _keep_path(kv: KVCache, batch: StepBatch, at: Array, walk: Walk) -> KVCache:
    """Moves the KV of accepted drafts to the places right behind the root."""
    num_places = walk.nodes.shape[0]
    if num_places == 1:
        return kv
    depths = jnp.arange(num_places, dtype=jnp.int32)[:, None]  # [D1, 1]
    src = batch.slots[jnp.take_along_axis(at, walk.nodes, axis=0)]  # [D1, S]
    dst = batch.slots[at[:num_places]]
    is_moved = (depths < walk.counts[None]) & (walk.nodes != depths)
    dst = jnp.where(is_moved, dst, kv.num_slots)
    return kv_cache.move_slots(kv, src[1:].reshape(-1), dst[1:].reshape(-1))
