"""Trees of drafts on the host: shapes, attention masks, and a builder.

Node 0 is the root, the newest known token; drafts follow, each after its parent. A shape lists the
parent of each draft: (0, 0, 1) has two children of the root and one child of the first of them. Any
beginning of a shape is a tree, too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np


@functools.lru_cache(maxsize=1024)
def depths(parents: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the depth of each draft: 1 for children of the root."""
    found = [0]
    for parent in parents:
        found.append(found[parent] + 1)
    return tuple(found[1:])


@functools.lru_cache(maxsize=1024)
def mask_rows(parents: tuple[int, ...], num_words: int) -> np.ndarray:
    """Returns [1 + drafts, num_words] u32: for each node the bits of its ancestors and itself."""
    rows = [1]
    for i, parent in enumerate(parents, 1):
        rows.append(rows[parent] | 1 << i)
    words = [[row >> 32 * w & 0xFFFFFFFF for w in range(num_words)] for row in rows]
    return np.array(words, np.uint32)


class TreeBuilder:
    """Grows a tree of tokens in which no node has two children with the same token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add_path(self, tokens: Sequence[int], start: int = 0) -> int:
        """Adds a path of tokens below node `start`; returns the node of the last token."""
        node = start
        for token in tokens:
            child = self._children.get((node, token))
            if child is None:
                self.tokens.append(token)
                self.parents.append(node)
                child = self._children[node, token] = len(self.tokens)
            node = child
        return node
