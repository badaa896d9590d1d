"""The nodes of the prefix cache's tree, their edges (tokens as bytes) and keys; no holders."""

from __future__ import annotations

import array
import bisect
import hashlib
import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

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


class PageKey(NamedTuple):
    """What a page holds.

    Attributes:
      digest: of the namespace and all tokens up to the page's end, 256 bits of BLAKE2b.
      first: that of the first page of the text; empty for the root.
      depth: how many pages the text has; 0 for the root.
    """

    digest: bytes
    first: bytes
    depth: int

    @classmethod
    def root(cls, namespace: Hashable) -> PageKey:
        """Returns the key above all texts of a namespace, which is told apart by its `repr`."""
        return cls(_digest(repr(namespace).encode()), b"", 0)

    def below(self, edge: bytes) -> PageKey:
        """Returns the key of the page that comes next and holds `edge`."""
        digest = _digest(self.digest + edge)
        return PageKey(digest, self.first or digest, self.depth + 1)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


class Node:
    """A page of the tree, or a root (page -1, whose edge is its namespace).

    No edge below a node is the beginning of another: the shorter one would have nothing to give.

    Attributes:
      last_used: when a request last filled or left the page; it never goes back.
      is_queued: whether the node is in the heap of those that may be evicted, once.
      key: what `find_key` found; None before.
      order: the edges of `children`, sorted: those that begin alike lie side by side.
    """

    __slots__ = ("children", "edge", "is_queued", "key", "last_used", "order", "page", "parent")

    def __init__(self, parent: Node | None, edge: Any, page: int, last_used: int) -> None:
        self.parent = parent
        self.edge = edge
        self.page = page
        self.last_used = last_used
        self.is_queued = False
        self.key: PageKey | None = None
        self.children: dict[bytes, Node] = {}
        self.order: list[bytes] = []

    def add(self, child: Node, edge: bytes) -> None:
        """Puts a node below this one."""
        child.edge, child.key = edge, None
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

    def find_key(self) -> PageKey:
        """Returns the key of the text down to here, which each node on the way then keeps."""
        path: list[Node] = []
        node: Node | None = self
        while node is not None and node.key is None:
            path.append(node)
            node = node.parent
        key = None if node is None else node.key
        for below in reversed(path):
            key = PageKey.root(below.edge) if key is None else key.below(below.edge)
            below.key = key
        assert key is not None
        return key

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
