"""Trees of Medusa guesses: the combinations of the heads' ranked guesses that a step verifies.

A node is named by the ranks (from 0) of the guesses that lead to it: (0,) is the first head's best
guess, (0, 2) the second head's third best after it. The root, the model's own next token, is left
out.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from jinfer.config.fields import require
from jinfer.config.speculative import MAX_TREE_NODES

Tree = tuple[tuple[int, ...], ...]


def check_tree(tree: Sequence[Sequence[int]], *, num_heads: int) -> None:
    """Raises ValueError if a node is too deep, occurs twice, or has no parent before it.

    A tree without nodes, or with more than MAX_TREE_NODES, is refused, too.
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
            "heads: a tree has at most one level per head",
        )
        require(bool(node) and min(node) >= 0, f"node {list(node)} is not a list of ranks from 0")
        require(node not in seen, f"node {list(node)} occurs twice in the tree")
        require(node[:-1] in seen, f"node {list(node)} comes without its parent before it")
        seen.add(node)


def read_tree(value: Any) -> Tree:
    """Returns a tree given as lists of ranks, such as [[0], [1], [0, 0]]; `check_tree` checks it.

    Raises:
      ValueError: `value` is not a list of lists of integers.
    """
    is_tree = isinstance(value, Sequence) and all(
        isinstance(node, Sequence) and all(type(rank) is int for rank in node) for node in value
    )
    if not is_tree:
        raise ValueError(f"a tree must be a list of lists of ranks like [[0], [0, 0]], got {value}")
    return tuple(tuple(node) for node in value)


def parents_of(tree: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Returns each node's parent, see `speculation.trees`."""
    numbers: dict[tuple[int, ...], int] = {(): 0}
    for number, node in enumerate(tree, 1):
        numbers[tuple(node)] = number
    return tuple(numbers[tuple(node[:-1])] for node in tree)


def fit_tree(ranks: Sequence[Sequence[int]], *, num_nodes: int, max_rank: int = 10) -> Tree:
    """Returns the `num_nodes` nodes that are accepted most often in given texts, best first.

    A node is accepted at a place of the text if all guesses on its path are right. Each accepted
    node is a token gained, so the best tree of a size has the nodes accepted most often; a parent
    is accepted at least as often as its child. Cai et al. 2024 (section 2.3.3) multiply the heads'
    accuracies instead. But a head is right more often where the one before it is right, so that a
    tree fitted to joint counts is deeper.

    Args:
      ranks: [M][K], for each place and head the rank (from 0) of the true token among the head's
        guesses; below 0 if it is not among them or there is nothing to guess.
      num_nodes: most nodes; fewer if no more are ever accepted.
      max_rank: number of guesses per head to consider.

    Raises:
      ValueError: num_nodes is not positive, or no guess is ever right.
    """
    require(num_nodes > 0, f"num_nodes must be positive, got {num_nodes}")
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    for row in ranks:
        node: tuple[int, ...] = ()
        for rank in row:
            if not 0 <= rank < max_rank:
                break
            node = (*node, rank)
            counts[node] += 1
    require(bool(counts), "no head ever guesses the next token: train the heads for longer")
    return tuple(sorted(counts, key=lambda n: (-counts[n], len(n), n))[:num_nodes])


def tokens_per_step(tree: Tree, ranks: Sequence[Sequence[int]]) -> float:
    """Returns how many tokens a step of greedy decoding yields on texts that it would write.

    It follows the steps of decoding: a step with n right guesses is followed by one n + 1 places
    further on. (A mean over all places would give too much weight to easy passages, where decoding
    takes few steps.)

    Args:
      tree, ranks: see `fit_tree`; the places of the texts are in order.
    """
    nodes = frozenset(tree)
    place = num_steps = 0
    while place < len(ranks):
        node: tuple[int, ...] = ()
        for rank in ranks[place]:
            if (*node, rank) not in nodes:
                break
            node = (*node, rank)
        place += 1 + len(node)
        num_steps += 1
    return place / max(1, num_steps)
