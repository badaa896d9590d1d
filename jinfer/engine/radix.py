"""The nodes of the prefix cache's tree and their edges, tokens as bytes; knows no holders."""

from __future__ import annotations

import array
import bisect
import itertools
from collections.abc import Sequence
from typing import Any

TOKEN_BYTES = array.array("i").itemsize


def as_edge(tokens: Sequence[int]) -> bytes:
    """Returns tokens as bytes: small, quick to hash and compare, equal if and only if they are.

    (Tuples would keep an object alive for every token.)
    """
    return array.array("i", tokens).tobytes()


def num_common(a: bytes, b: bytes) -> int:
    """Returns how many tokens two edges have in common at their beginning."""
    n = min(len(a), len(b))
    differing = int.from_bytes(a[:n], "big") ^ int.from_bytes(b[:n], "big")
    return (n - (differing.bit_length() + 7) // 8) // TOKEN_BYTES


class Node:
    """A page of the tree, or a root (page -1, whose edge is its namespace).

    No edge below a node is the beginning of another: the shorter one would have nothing to give.

    Attributes:
      last_used: when a request last filled or left the page; it never goes back.
      is_queued: whether the node is in the heap of those that may be evicted, once.
      order: the edges of `children`, sorted: those that begin alike lie side by side.
    """

    __slots__ = ("children", "edge", "is_queued", "last_used", "order", "page", "parent")

    def __init__(self, parent: Node | None, edge: Any, page: int, last_used: int) -> None:
        self.parent = parent
        self.edge = edge
        self.page = page
        self.last_used = last_used
        self.is_queued = False
        self.children: dict[bytes, Node] = {}
        self.order: list[bytes] = []

    def add(self, child: Node, edge: bytes) -> None:
        """Puts a node below this one."""
        child.edge = edge
        self.children[edge] = child
        bisect.insort(self.order, edge)

    def remove(self, edge: bytes) -> None:
        """Takes a child away."""
        del self.children[edge]
        del self.order[bisect.bisect_left(self.order, edge)]

    def neighbours(self, edge: bytes) -> tuple[bytes, bytes]:
        """Returns the edges before and behind the place of `edge`, empty at the ends.

        One of them begins most like it. If it begins another edge, it begins the one behind; if
        another begins it, that is the one before, for that one begins nothing else.
        """
        idx = bisect.bisect_left(self.order, edge)
        behind = self.order[idx] if idx < len(self.order) else b""
        return self.order[idx - 1] if idx else b"", behind

    def is_whole(self, page_size: int) -> bool:
        """Whether this is a root, or a page filled to its end."""
        return self.page < 0 or len(self.edge) == page_size * TOKEN_BYTES

    def has_sound_order(self, page_size: int) -> bool:
        """Whether `order` is what it must be, and the edges are as long as they may be."""
        order = self.order
        return (
            order == sorted(self.children)
            and all(0 < len(edge) <= page_size * TOKEN_BYTES for edge in order)
            and not any(b.startswith(a) for a, b in itertools.pairwise(order))
            and (not order or self.is_whole(page_size))
        )
