"""Trees of guesses: which combinations of the heads' ranked guesses are worth a look. No jax.

A node is the ranks (from 0) of the guesses that lead to it: (0,) is the first head's best guess,
(0, 2) the second head's third best after it. The root, the model's own next token, is not named.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from jinfer.config import require

Tree = tuple[tuple[int, ...], ...]


def check_tree(tree: Sequence[Sequence[int]], *, num_heads: int) -> None:
    """Raises ValueError if a node is too deep, stands twice, or has no parent before it."""
    seen: set[tuple[int, ...]] = {()}
    for ranks in tree:
        node = tuple(ranks)
        require(
            len(node) <= num_heads,
            f"the tree is {len(node)} levels deep at node {list(node)}, and there are {num_heads} "
            "heads: one level a head at most",
        )
        require(bool(node) and min(node) >= 0, f"node {list(node)} is not a list of ranks from 0")
        require(node not in seen, f"node {list(node)} stands twice in the tree")
        require(node[:-1] in seen, f"node {list(node)} comes without its parent before it")
        seen.add(node)


def fit_tree(rank_accuracies: Sequence[Sequence[float]], *, num_nodes: int) -> Tree:
    """Returns the `num_nodes` nodes that together expect most accepted tokens, likeliest first.

    A node is accepted if all guesses on its path are right, with probability about the product of
    their accuracies: each accepted node is a token gained, so that the best tree is that of the
    likeliest nodes (Cai et al. 2024, section 2.3.3). A parent is at least as likely as its child.

    Args:
      rank_accuracies: [K][R], how often the guess of rank r of head k is right.
      num_nodes: most nodes; fewer where no more have a chance.
    """
    require(num_nodes > 0, f"num_nodes must be positive, got {num_nodes}")
    tree: list[tuple[int, ...]] = []
    open_nodes: list[tuple[float, int, tuple[int, ...]]] = []

    def offer(parent: tuple[int, ...], likelihood: float) -> None:
        if len(parent) < len(rank_accuracies):
            for rank, accuracy in enumerate(rank_accuracies[len(parent)]):
                node = (*parent, rank)
                if accuracy > 0:
                    heapq.heappush(open_nodes, (-likelihood * accuracy, len(node), node))

    offer((), 1.0)
    while open_nodes and len(tree) < num_nodes:
        negative, _, node = heapq.heappop(open_nodes)
        tree.append(node)
        offer(node, -negative)
    return tuple(tree)


def expected_tokens(tree: Tree, rank_accuracies: Sequence[Sequence[float]]) -> float:
    """Returns how many tokens a step yields if guesses are right independently of each other."""
    return 1.0 + sum(
        math.prod(rank_accuracies[level][rank] for level, rank in enumerate(node)) for node in tree
    )
