"""Trees of guesses: which combinations of the heads' ranked guesses are worth a look. No jax.

A node is the ranks (from 0) of the guesses that lead to it: (0,) is the first head's best guess,
(0, 2) the second head's third best after it. The root, the model's own next token, is not named.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

from jinfer.config import MAX_TREE_NODES, require

Tree = tuple[tuple[int, ...], ...]


def check_tree(tree: Sequence[Sequence[int]], *, num_heads: int) -> None:
    """Raises ValueError if a node is too deep, stands twice, or has no parent before it.

    A tree without nodes, or with more than MAX_TREE_NODES, is refused likewise.
    """
    require(
        0 < len(tree) <= MAX_TREE_NODES,
        f"a tree must have 1 to {MAX_TREE_NODES} nodes, got {len(tree)}",
    )
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


def read_tree(value: Any) -> Tree:
    """Returns a tree given as lists of ranks, say [[0], [1], [0, 0]], which `check_tree` is to see.

    Raises:
      ValueError: it is of another form.
    """
    is_tree = isinstance(value, Sequence) and all(
        isinstance(node, Sequence) and all(type(rank) is int for rank in node) for node in value
    )
    if not is_tree:
        raise ValueError(f"a tree must be a list of lists of ranks like [[0], [0, 0]], got {value}")
    return tuple(tuple(node) for node in value)


def parents_of(tree: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Returns each node's parent, see `spec.draft_tree`."""
    numbers: dict[tuple[int, ...], int] = {(): 0}
    for number, node in enumerate(tree, 1):
        numbers[tuple(node)] = number
    return tuple(numbers[tuple(node[:-1])] for node in tree)


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
