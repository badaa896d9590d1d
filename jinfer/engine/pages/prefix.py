"""Prefix cache: a radix tree of KV pages by their tokens, which finds the longest cached prefix.

An edge holds the tokens of one page, so edges are never split; a page filled in part is a leaf:

    page size 2        root --5 6--> page 3 --7 8--> page 0 --1--> page 7
                                       \\----7 9--> page 4

    find 5 6 7 9 2 -> pages 3, 4; find 5 6 7 -> page 3, and find_part: page 0 or 4 begins with 7

Whole pages are shared. Where a text differs from all others inside a page, `find_part` returns the
page with the longest common beginning, to be copied. Only the tokens of its edge are valid in a
page filled in part: the request that holds it goes on writing behind them.

The tree holds one reference to each of its pages and requests hold others (`PagePool` counts them).
A request that holds a page of the tree holds all pages above it: a hit is taken from the root on,
and a running request adds pages only below those that it holds. So below a page that only the tree
holds there are only such pages. All of them can be evicted, leaves first, and counting them is
enough.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Hashable, Iterator, Sequence

from jinfer.engine.pages.host_tier import HostTier
from jinfer.engine.pages.pool import OutOfPages, PageError, PagePool
from jinfer.engine.pages.radix import Node, PageKey, as_edge, num_common


class PrefixCache:
    """Finds, shares, keeps and evicts pages of a pool by the tokens written to them.

    All pages of the pool must be taken and given back through the cache. A lookup costs O(pages of
    the text), an eviction O(log cached pages).

    Args:
      pool: the pages.
      page_size: tokens in a page.
      num_host_pages: evicted pages that host memory can hold; 0 for no host tier.

    Attributes:
      tier: the host tier, or None; it forgets what is forgotten here.
      epoch: counts the resets. Pages filled before the last one must not be inserted after it.
      version: changes whenever `find` may answer differently than before.
      num_evicted: pages evicted since the cache was made.
    """

    def __init__(self, pool: PagePool, page_size: int, num_host_pages: int = 0) -> None:
        self.pool = pool
        self.tier = HostTier(num_host_pages, page_size) if num_host_pages else None
        self.page_size = page_size
        self.epoch = 0
        self.version = 0
        self.num_evicted = 0
        self._roots: dict[Hashable, Node] = {}
        self._nodes: list[Node | None] = [None] * pool.num_pages  # by page
        self._num_cached = 0
        self._num_evictable = 0
        # (last_used, page, node), at most one entry per node. An entry is stale if its node was
        # used since, is held, or has children. `_evict` puts the first kind back and drops the
        # others, which `_offer` adds again once they are leaves that only the tree holds.
        self._heap: list[tuple[int, int, Node]] = []
        self._clock = 0

    @property
    def num_cached(self) -> int:
        """Pages in the tree, whether or not requests hold them."""
        return self._num_cached

    @property
    def num_evictable(self) -> int:
        """Pages that only the tree holds."""
        return self._num_evictable

    @property
    def num_available(self) -> int:
        """Pages that `alloc` can hand out."""
        return self.pool.num_free + self._num_evictable

    def is_cached(self, page: int) -> bool:
        """Whether `page` is in the tree."""
        return self._nodes[page] is not None

    # ------------------------------------------------------------------ taking pages

    def find(self, namespace: Hashable, tokens: Sequence[int], max_pages: int) -> list[int]:
        """Returns the pages of the longest cached prefix of `tokens`; changes nothing.

        Args:
          namespace: what texts must have in common, besides tokens, to share pages.
          tokens: the text.
          max_pages: most pages to return.
        """
        pages: list[int] = []
        node = self._roots.get(namespace)
        for edge in self._edges(tokens, max_pages):
            node = None if node is None else node.children.get(edge)
            if node is None:
                break
            pages.append(node.page)
        return pages

    def find_part(
        self, namespace: Hashable, tokens: Sequence[int], pages: Sequence[int]
    ) -> tuple[int, int]:
        """Returns the page whose beginning continues `tokens` behind `pages` furthest, and how far.

        That is, the number of tokens in common; (-1, 0) if there are none.

        Args:
          namespace: as for `find`.
          tokens: the text, as far as it may be found.
          pages: what `find` returned for it just now.
        """
        node = self._nodes[pages[-1]] if pages else self._roots.get(namespace)
        begin = len(pages) * self.page_size
        edge = as_edge(tokens[begin : begin + self.page_size])
        if node is None or not edge:
            return -1, 0
        count, best = max((num_common(edge, other), other) for other in node.neighbours(edge))
        return (node.children[best].page, count) if count else (-1, 0)

    def find_saved(
        self, namespace: Hashable, tokens: Sequence[int], pages: Sequence[int], max_pages: int
    ) -> list[PageKey]:
        """Returns the keys of the whole pages of `tokens` behind `pages` that the host has saved.

        Args:
          namespace, tokens, max_pages: as for `find`.
          pages: what it returned just now.
        """
        if self.tier is None:
            return []
        node = self._nodes[pages[-1]] if pages else None
        above = PageKey.root(namespace) if node is None else node.find_key()
        edges = itertools.islice(self._edges(tokens, max_pages), len(pages), None)
        return self.tier.find(above, edges)

    def num_available_beside(self, pages: Sequence[int]) -> int:
        """Returns how many pages `alloc` can hand out after `pages`, just found, are shared."""
        return self.num_available - sum(self.pool.count(page) == 1 for page in pages)

    def share(self, pages: Sequence[int]) -> list[int]:
        """Adds a holder to `pages`, which `find` returned just now; returns them as a new list."""
        for page in pages:
            if self._nodes[page] is None:
                raise PageError(f"page {page} is not in the prefix cache and cannot be shared")
            self._num_evictable -= self.pool.count(page) == 1
        return self.pool.fork(pages)

    def alloc(self, n: int) -> list[int]:
        """Takes `n` pages with undefined content; evicts cached pages if too few are free.

        Raises:
          OutOfPages: fewer than `n` are available; nothing has changed.
        """
        missing = n - self.pool.num_free
        if missing > self._num_evictable:
            raise OutOfPages(
                f"{n} pages wanted, {self.pool.num_free} of {self.pool.num_pages} are free and "
                f"{self._num_evictable} more can be evicted"
            )
        for _ in range(missing):
            self._evict()
        return self.pool.alloc(n)

    # ------------------------------------------------------------------ filling, giving back

    def insert(self, namespace: Hashable, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Inserts pages of a request that keeps holding them.

        Stops at the first page that the tree has from another request: a page inserted below it
        would be held without the page above it, and could not be evicted.

        Args:
          namespace: as for `find`.
          tokens: the text that the pages hold, or will before they are read.
          pages: at least as many pages as `tokens` need.
        """
        self._insert(namespace, tokens, pages, is_held=True)

    def release(self, namespace: Hashable, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Gives back all pages of a request; keeps those with `tokens` that are not cached yet."""
        self._insert(namespace, tokens, pages, is_held=False)
        self.free(pages)

    def free(self, pages: Sequence[int]) -> None:
        """Removes a holder from each of `pages`, all different; those in the tree stay there.

        Raises:
          PageError: a page is free already.
        """
        self.pool.free(pages)
        self._clock += 1
        for page in pages:
            node = self._nodes[page]
            if node is not None:
                node.last_used = self._clock
                if self.pool.count(page) == 1:
                    self._num_evictable += 1
                    self._offer(node)

    def _insert(
        self, namespace: Hashable, tokens: Sequence[int], pages: Sequence[int], *, is_held: bool
    ) -> None:
        self._clock += 1
        node = self._roots.get(namespace)
        for page, edge in zip(pages, self._edges(tokens, len(pages), with_part=True)):
            if node is None:
                node = self._roots[namespace] = Node(None, namespace, -1, 0)
            child = node.children.get(edge)
            if child is None:
                before, behind = node.neighbours(edge)
                if behind.startswith(edge):  # another page has these tokens and more
                    node.children[behind].last_used = self._clock
                    break
                child = self._add(node, edge, page, before)
            elif child.page != page and is_held:
                break
            child.last_used = self._clock
            node = child

    def _add(self, parent: Node, edge: bytes, page: int, before: bytes) -> Node:
        """Inserts a page below `parent`, or extends it; drops a page that has only part of it."""
        child = self._nodes[page]
        part = parent.children[before] if before and edge.startswith(before) else None
        if child is None:
            self.pool.fork([page])
            child = self._nodes[page] = Node(parent, edge, page, self._clock)
            self._num_cached += 1
        elif child is part:
            parent.remove(before)
        else:
            raise PageError(f"page {page} is in the prefix cache for another text")
        parent.add(child, edge)
        if part is not None and part is not child:
            self._cut(part)
        self.version += child.is_whole(self.page_size)
        return child

    def reset(self) -> None:
        """Forgets everything. Requests keep the pages they hold, and other requests find none."""
        self.pool.free([page for page, node in enumerate(self._nodes) if node is not None])
        if self.tier is not None:
            self.tier.reset()
        self._forget_everything()

    def clear(self) -> None:
        """Forgets everything and frees all pages, whatever their counts."""
        self.pool.clear()
        if self.tier is not None:
            self.tier.clear()
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.epoch += 1
        self.version += 1
        self._roots.clear()
        self._nodes = [None] * self.pool.num_pages
        self._num_cached = self._num_evictable = 0
        self._heap.clear()

    def forget(
        self, namespace: Hashable, tokens: Sequence[int], num_kept: int, discarded: Collection[int]
    ) -> list[int]:
        """Forgets the pages of a text from token number `num_kept` on, and all that follow them.

        Args:
          namespace: as for `find`.
          tokens: the text.
          num_kept: tokens of the text that stay cached, except in the page where they end.
          discarded: pages to forget wherever they are in the tree.

        Returns:
          The pages forgotten; their holders still hold them.
        """
        node = self._roots.get(namespace)
        begin = num_kept - num_kept % self.page_size
        first_edge = as_edge(tokens[: self.page_size])
        for edge in self._edges(tokens, begin // self.page_size):
            node = None if node is None else node.children.get(edge)
        rest = as_edge(tokens[begin : begin + self.page_size])
        pages: list[int] = []
        for edge, child in () if node is None else tuple(node.children.items()):
            if num_common(edge, rest) > num_kept - begin:
                pages += self._cut(child)
        if self.tier is not None:
            self.tier.forget_text(namespace, first_edge, begin // self.page_size)
        for page in discarded:
            other = self._nodes[page]
            if other is not None:
                if self.tier is not None:
                    self.tier.forget(other.find_key())
                pages += self._cut(other)
        return pages

    # ------------------------------------------------------------------ inside

    def _cut(self, top: Node) -> list[int]:
        """Removes a node and everything below it from the tree; returns the pages."""
        pages, stack = [], [top]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            node.children, node.order = {}, []
            pages.append(node.page)
            self._num_evictable -= self.pool.count(node.page) == 1
            self._nodes[node.page] = None
        self._num_cached -= len(pages)
        self.version += 1
        self.pool.free(pages)
        self._unlink(top)
        return pages

    def _unlink(self, node: Node) -> None:
        """Removes a leaf from its parent, which may now be evicted; drops an empty root."""
        parent = node.parent
        assert parent is not None
        parent.remove(node.edge)
        if parent.page < 0:
            if not parent.children:
                del self._roots[parent.edge]
        elif self.pool.count(parent.page) == 1:
            self._offer(parent)

    def _edges(
        self, tokens: Sequence[int], max_pages: int, *, with_part: bool = False
    ) -> Iterator[bytes]:
        """Yields the edges of whole pages of `tokens`; `with_part`: also of a last part."""
        size = self.page_size
        num_tokens = min(len(tokens), max_pages * size)
        for end in range(size, num_tokens + 1, size):
            yield as_edge(tokens[end - size : end])
        if with_part and num_tokens % size:
            yield as_edge(tokens[num_tokens - num_tokens % size : num_tokens])

    def _offer(self, node: Node) -> None:
        """Adds a leaf that only the tree holds to the heap, unless it is there."""
        if not node.children and not node.is_queued:
            node.is_queued = True
            heapq.heappush(self._heap, (node.last_used, node.page, node))

    def _evict(self) -> None:
        """Frees the least recently used page among the leaves that only the tree holds."""
        while True:
            last_used, page, node = heapq.heappop(self._heap)
            node.is_queued = False
            if node.children or self._nodes[page] is not node or self.pool.count(page) != 1:
                continue
            if last_used == node.last_used:
                break
            self._offer(node)
        if self.tier is not None and node.is_whole(self.page_size):
            self.tier.save(node.find_key(), page)
        self._nodes[page] = None
        self._num_cached -= 1
        self._num_evictable -= 1
        self.num_evicted += 1
        self.version += 1
        self.pool.free([page])
        self._unlink(node)

    # ------------------------------------------------------------------ invariants

    def check(self) -> None:
        """Verifies the tree against itself and the pool.

        Raises:
          PageError: they do not agree; the message names the page.
        """
        num_cached = num_evictable = 0
        stack = list(self._roots.values())
        if any(not root.children for root in stack):
            raise PageError("the prefix cache keeps a namespace without pages")
        while stack:
            node = stack.pop()
            if not node.has_sound_order(self.page_size):
                raise PageError(f"the pages below page {node.page} have invalid edges")
            for edge, child in node.children.items():
                stack.append(child)
                page, num_cached = child.page, num_cached + 1
                if child.parent is not node or child.edge != edge or self._nodes[page] is not child:
                    raise PageError(f"page {page} of the prefix cache is linked wrongly")
                if self.pool.count(page) == 0:
                    raise PageError(f"page {page} is free and in the prefix cache")
                if self.pool.count(page) > 1:
                    if node.page >= 0 and self.pool.count(node.page) == 1:
                        raise PageError(f"page {page} is held without page {node.page} above it")
                    continue
                num_evictable += 1
                if not child.children and not child.is_queued:
                    raise PageError(f"page {page} can be evicted and is not in the queue")
        if num_cached != self._num_cached or num_evictable != self._num_evictable:
            raise PageError(
                f"the prefix cache counts {self._num_cached} pages, {self._num_evictable} to be "
                f"evicted, and has {num_cached} and {num_evictable}"
            )
        if sum(node is not None for node in self._nodes) != num_cached:
            raise PageError("the prefix cache lists pages that are not in its tree")
