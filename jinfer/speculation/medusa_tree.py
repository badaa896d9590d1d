"""Trees of guesses: which combinations of the heads' ranked guesses are worth a look. No jax.

A node is the ranks (from 0) of the guesses that lead to it: (0,) is the first head's best guess,
(0, 2) the second head's third best after it. The root, the model's own next token, is not named.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from jinfer.config.fields import require
from jinfer.config.speculative import MAX_TREE_NODES

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


def fit_tree(ranks: Sequence[Sequence[int]], *, num_nodes: int, max_rank: int = 10) -> Tree:
    """Returns the `num_nodes` nodes that stand most often in given texts, most frequent first.

    A node stands at a place if all guesses on its path are right. Each node that stands is a token
    gained, so the best tree of a size is that of the nodes that stand most often; a parent does so
    at least as often as its child. Cai et al. 2024 (section 2.3.3) take the product of the heads'
    accuracies instead; but where one head is right the next one is more likely so, and a tree
    fitted to what they got right together is deeper.

    Args:
      ranks: [M][K], the rank (from 0) of what follows each place among the guesses of each head; a
        head that does not guess it, or has nothing to guess, has a rank below 0.
      num_nodes: most nodes; fewer where no more ever stand.
      max_rank: guesses of a head that are looked at.

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
    require(bool(counts), "no head ever guesses what follows: train them for longer")
    return tuple(sorted(counts, key=lambda n: (-counts[n], len(n), n))[:num_nodes])


def tokens_per_step(tree: Tree, ranks: Sequence[Sequence[int]]) -> float:
    """Returns how many tokens a step of greedy decoding yields on texts it would have written.

    Steps go from place to place as decoding does: after one with n guesses right comes the place
    n + 1 further on. (The mean over all places would count easy passages, which decoding leaves in
    few steps, as often as they have places.)

    Args:
      tree: see `fit_tree`.
      ranks: likewise; the places of the texts one after the other.
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
