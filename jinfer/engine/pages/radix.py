"""The nodes of the prefix cache's tree, their edges (tokens as bytes) and keys."""

from __future__ import annotations

import array
import bisect
import hashlib
import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

TOKEN_BYTES = array.array("i").itemsize


def as_edge(tokens: Sequence[int]) -> bytes:
    """Returns tokens as bytes, which are equal if and only if the tokens are.

    Bytes are small and quick to hash; tuples would keep an object alive for every token.
    """
    return array.array("i", tokens).tobytes()


def num_common(a: bytes, b: bytes) -> int:
    """Returns how many tokens two edges have in common at their beginning."""
    n = min(len(a), len(b))
    differing = int.from_bytes(a[:n], "big") ^ int.from_bytes(b[:n], "big")
    return (n - (differing.bit_length() + 7) // 8) // TOKEN_BYTES


class PageKey(NamedTuple):
    """Identifies the text that ends with a page.

    Attributes:
      digest: 256 bits of BLAKE2b of the namespace and all tokens up to the page's end.
      first: digest of the text's first page; empty for the root.
      depth: pages of the text; 0 for the root.
    """

    digest: bytes
    first: bytes
    depth: int

    @classmethod
    def root(cls, namespace: Hashable) -> PageKey:
        """Returns the key above all texts of a namespace, made of its `repr`."""
        return cls(_digest(repr(namespace).encode()), b"", 0)

    def below(self, edge: bytes) -> PageKey:
        """Returns the key of the page that comes next and holds `edge`."""
        digest = _digest(self.digest + edge)
        return PageKey(digest, self.first or digest, self.depth + 1)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


class Node:
    """A page of the tree, or a root (page -1, whose edge is its namespace).

    No edge below a node is the beginning of another: the shorter page would be redundant.

    Attributes:
      last_used: when a request last filled or left the page; it never decreases.
      is_queued: whether the node is in the heap of eviction candidates, where it is at most once.
      key: result of `find_key`; None before.
      order: the edges of `children`, sorted, so that edges with a common beginning are adjacent.
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
        """Adds a child."""
        child.edge, child.key = edge, None
        self.children[edge] = child
        bisect.insort(self.order, edge)

    def remove(self, edge: bytes) -> None:
        """Removes a child."""
        del self.children[edge]
        del self.order[bisect.bisect_left(self.order, edge)]

    def neighbours(self, edge: bytes) -> tuple[bytes, bytes]:
        """Returns the edges before and behind the sorted place of `edge`, empty at the ends.

        One of them has the longest beginning in common with it. If `edge` is the beginning of
        another edge, that is the one behind; if another edge is its beginning, that is the one
        before.
        """
        idx = bisect.bisect_left(self.order, edge)
        behind = self.order[idx] if idx < len(self.order) else b""
        return self.order[idx - 1] if idx else b"", behind

    def find_key(self) -> PageKey:
        """Returns the key of the text that ends here, and stores the keys along the path."""
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
        """Whether this is a root or a full page."""
        return self.page < 0 or len(self.edge) == page_size * TOKEN_BYTES

    def has_sound_order(self, page_size: int) -> bool:
        """Whether `order` matches the children, and the edges keep the rules above."""
        order = self.order
        return (
            order == sorted(self.children)
            and all(0 < len(edge) <= page_size * TOKEN_BYTES for edge in order)
            and not any(b.startswith(a) for a, b in itertools.pairwise(order))
            and (not order or self.is_whole(page_size))
        )
