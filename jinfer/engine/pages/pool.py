"""Page allocator of the KV pool: page numbers with reference counts.

A page is free (count 0, in the free list) or in use (count >= 1, not in the list). Every operation
takes time linear in the pages that it is given, and misuse raises before the pool is corrupted.
"""

from __future__ import annotations

from collections.abc import Sequence


class OutOfPages(RuntimeError):
    """Fewer pages are free than were asked for; nothing was taken."""


class PageError(RuntimeError):
    """A page was freed or shared while free, or the bookkeeping is wrong: a bug in the caller."""


class PagePool:
    """Hands out the page numbers 0 .. num_pages - 1.

    Args:
      num_pages: pages in the pool.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages <= 0:
            raise ValueError(f"num_pages must be positive, got {num_pages}")
        self.num_pages = num_pages
        self.clear()

    def clear(self) -> None:
        """Frees all pages, whatever their counts."""
        # A stack: pages freed last are handed out first, while processor caches may hold them.
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._counts = [0] * self.num_pages

    @property
    def num_free(self) -> int:
        """Pages that `alloc` can still hand out."""
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Pages with a holder; a shared page counts once."""
        return self.num_pages - len(self._free)

    def count(self, page: int) -> int:
        """Returns how many holders `page` has."""
        return self._counts[page]

    def alloc(self, n: int) -> list[int]:
        """Takes `n` free pages, each with one holder.

        Raises:
          OutOfPages: fewer than `n` are free; the pool is unchanged.
        """
        if n < 0:
            raise ValueError(f"the number of pages must not be negative, got {n}")
        if n > len(self._free):
            raise OutOfPages(f"{n} pages wanted, {len(self._free)} of {self.num_pages} are free")
        if n == 0:
            return []
        pages = self._free[-n:][::-1]
        del self._free[-n:]
        for page in pages:
            self._counts[page] = 1
        return pages

    def fork(self, pages: Sequence[int]) -> list[int]:
        """Adds one holder to each of `pages`, which must be in use; returns them as a new list.

        Raises:
          PageError: a page is free.
        """
        for page in pages:
            if self._counts[page] == 0:
                raise PageError(f"page {page} is free and cannot be shared")
        for page in pages:
            self._counts[page] += 1
        return list(pages)

    def free(self, pages: Sequence[int]) -> None:
        """Removes one holder from each of `pages`; those left without any become free.

        Raises:
          PageError: a page is free already.
        """
        for page in pages:
            if self._counts[page] == 0:
                raise PageError(f"page {page} is freed twice")
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self._free.append(page)

    def check(self) -> None:
        """Verifies that free + in use = all and that no page is in the free list twice.

        Raises:
          PageError: they do not; the message names the pages.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            twice = sorted(page for page in free if self._free.count(page) > 1)
            raise PageError(f"pages {twice} are in the free list more than once")
        wrong = [page for page, n in enumerate(self._counts) if n < 0 or (n == 0) != (page in free)]
        if wrong or not free <= set(range(self.num_pages)):
            raise PageError(f"pages {wrong} are neither free nor in use, or both")
