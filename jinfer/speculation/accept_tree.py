"""Acceptance along a tree of drafts; knows nothing of who drew the tree, nor of models.

At each node the target draws its token as plain decoding would, and the walk goes on to the child
that has this token, if there is one. So the tokens are, seed for seed, those of plain decoding,
whatever the tree: a draft only spares a step. (With given drafts this is what the rejection of
siblings one by one comes to, Miao et al. 2023, arXiv:2305.09781, with no draft probabilities.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jinfer.sampling.args import SampleArgs
from jinfer.sampling.draw import sample
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import SamplerState, observe


class Nodes(NamedTuple):
    """The trees of S sequences, N1 nodes at most: node 0 is the root, the newest known token.

    Attributes:
      tokens: [N1, S] their ids.
      parents: [N1, S] index of each node's parent, which comes before it; -1 for the root, and for
        places without a node.
    """

    tokens: Int[Array, "N1 S"]
    parents: Int[Array, "N1 S"]


class Walk(NamedTuple):
    """What a verification found, D1 = 1 + the most levels of a tree.

    Attributes:
      tokens: [D1, S] the sampled tokens.
      counts: [S] how many of them count: 1 + the drafts that stand; 0 where not active.
      nodes: [D1, S] the node after which each was sampled, that of the last one that counts from
        there on.
      logits: [D1, S, V] the target's raw logits there.
    """

    tokens: Int[Array, "D1 S"]
    counts: Int[Array, "S"]
    nodes: Int[Array, "D1 S"]
    logits: Float[Array, "D1 S V"]


def verify_tree(
    logits: Float[Array, "N1 S V"],
    args: SampleArgs,
    state: SamplerState,
    rows: Int[Array, "S"],
    positions: Int[Array, "S"],
    nodes: Nodes,
    active: Bool[Array, "S"],
    *,
    max_depth: int,
    typical: tuple[float, float] | None = None,
    token_mask: UInt[Array, "N1 S W"] | None = None,
) -> tuple[Walk, SamplerState]:
    """Walks down the trees of S sequences at once, from the root to the first token not drafted.

    Example with the drafts a and b after the root, and c after a:

        root - a - c     a, c drawn   tokens [a c x]  count 3, x drawn after c
             \\ b         b drawn      tokens [b y .]  count 2, y drawn after b

    Args:
      logits: the target's raw logits after each node.
      args: sampling fields.
      state: sampler state as of the root.
      rows: [S] row of each sequence; out of range for padding.
      positions: [S] place that the first sampled token takes.
      nodes: the trees; of children with one token the first counts.
      active: [S] sequences that sample at all; others leave no trace.
      max_depth: static, most levels below the root.
      typical: (epsilon, alpha) of typical acceptance, which is lossy: rows that sample at random
        go on to their likeliest child of probability above min(epsilon, alpha exp(-entropy)), and
        draw a token only where there is none (Cai et al. 2024, arXiv:2401.10774, section 2.3.2;
        there the longest path is taken). None: lossless.
      token_mask: a packed mask a node, as in `process_logits`, or None.
    """
    at_seq = jnp.arange(logits.shape[1], dtype=jnp.int32)

    def place(carry, depth):
        node, alive, counts, state = carry
        x = logits[node, at_seq]
        mask = None if token_mask is None else token_mask[node, at_seq]
        target = process_logits(x, args, state, rows, positions + depth, mask)
        tokens = sample(target, args, positions + depth)
        is_child = nodes.parents == node[None]
        if typical is not None:
            tokens = jnp.where(
                args.is_greedy, tokens, _likely_child(target, tokens, nodes, is_child, typical)
            )
        state = observe(state, rows, tokens, alive)
        stands = is_child & (nodes.tokens == tokens[None])
        counts = counts + alive.astype(jnp.int32)
        alive = alive & jnp.any(stands, axis=0)
        child = jnp.argmax(stands, axis=0).astype(jnp.int32)
        return (jnp.where(alive, child, node), alive, counts, state), (tokens, node, x)

    zeros = jnp.zeros_like(at_seq)
    depths = jnp.arange(max_depth + 1, dtype=jnp.int32)
    (_, _, counts, state), found = lax.scan(place, (zeros, active, zeros, state), depths)
    tokens, path, path_logits = found
    return Walk(tokens, counts, path, path_logits), state


def _likely_child(
    target: Array, tokens: Array, nodes: Nodes, is_child: Array, typical: tuple[float, float]
) -> Array:
    """Returns the token of the likeliest child that is typical enough, else `tokens`, [S]."""
    epsilon, alpha = typical
    p = jax.nn.softmax(target, axis=-1)
    entropy = -jnp.sum(jnp.where(p > 0.0, p * jnp.log(jnp.where(p > 0.0, p, 1.0)), 0.0), axis=-1)
    threshold = jnp.minimum(epsilon, alpha * jnp.exp(-entropy))
    of_nodes = jnp.take_along_axis(p.T, nodes.tokens, axis=0)  # [N1, S]
    score = jnp.where(is_child & (of_nodes > threshold[None]), of_nodes, -1.0)
    best = jnp.argmax(score, axis=0).astype(jnp.int32)[None]
    is_there = jnp.take_along_axis(score, best, axis=0)[0] > 0.0
    return jnp.where(is_there, jnp.take_along_axis(nodes.tokens, best, axis=0)[0], tokens)
