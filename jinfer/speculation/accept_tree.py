"""Accepts a path in a tree of drafts, and samples the token after it.

At each node the target draws its token as plain decoding would, and the walk continues at the child
with this token, if there is one. So for each seed the tokens are those of plain decoding, whatever
the tree: an accepted draft only saves a step. (For given drafts this equals rejecting siblings one
by one, Miao et al. 2023, arXiv:2305.09781, without draft probabilities.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from jinfer.sampling.draw import sample
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import SamplerState, observe
from jinfer.speculation.accept_chain import Places


class Nodes(NamedTuple):
    """The trees of S sequences, N1 nodes at most: node 0 is the root, the newest known token.

    Attributes:
      tokens: [N1, S] their ids.
      parents: [N1, S] index of each node's parent, which comes before it; -1 for the root and for
        padding.
    """

    tokens: Int[Array, "N1 S"]
    parents: Int[Array, "N1 S"]


class Walk(NamedTuple):
    """Result of a verification, with D1 = 1 + the most levels of a tree.

    Attributes:
      tokens: [D1, S] the sampled tokens.
      counts: [S] how many of them are valid: 1 + the accepted drafts; 0 where not active.
      nodes: [D1, S] the node after which each was sampled; behind the last valid token, its node
        again.
      logits: [D1, S, V] the target's raw logits after those nodes.
    """

    tokens: Int[Array, "D1 S"]
    counts: Int[Array, "S"]
    nodes: Int[Array, "D1 S"]
    logits: Float[Array, "D1 S V"]


def verify_tree(
    logits: Float[Array, "N1 S V"],
    places: Places,
    state: SamplerState,
    nodes: Nodes,
    *,
    max_depth: int,
    typical: tuple[float, float] | None = None,
    token_mask: UInt[Array, "N1 S W"] | None = None,
) -> tuple[Walk, SamplerState]:
    """Samples along the trees of S sequences at once, from the root to the first undrafted token.

    Example with the drafts a and b after the root, and c after a:

        root - a - c     a, c drawn   tokens [a c x]  count 3, x drawn after c
             \\ b         b drawn      tokens [b y .]  count 2, y drawn after b

    Args:
      logits: the target's raw logits after each node.
      places: sequences, with the position of the first sampled token.
      state: sampler state at the root.
      nodes: the trees; of siblings with the same token the first is used.
      max_depth: static, most levels below the root.
      typical: (epsilon, alpha) of typical acceptance, which is lossy: rows that sample at random
        continue at their likeliest child of probability above min(epsilon, alpha exp(-entropy)),
        and draw a token only where there is none (Cai et al. 2024, arXiv:2401.10774, section 2.3.2,
        which takes the longest path instead). None: lossless.
      token_mask: one packed mask per node, as in `process_logits`, or None.
    """
    args, rows, positions, active = places
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
        is_accepted = is_child & (nodes.tokens == tokens[None])
        counts = counts + alive.astype(jnp.int32)
        alive = alive & jnp.any(is_accepted, axis=0)
        child = jnp.argmax(is_accepted, axis=0).astype(jnp.int32)
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
    is_found = jnp.take_along_axis(score, best, axis=0)[0] > 0.0
    return jnp.where(is_found, jnp.take_along_axis(nodes.tokens, best, axis=0)[0], tokens)
