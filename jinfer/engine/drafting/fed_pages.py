"""Tracks which places of a drafter's own KV pool have been computed.

While drafting is paused, the drafter computes nothing. Before it drafts again, it computes the
places that it missed, in chunks. A mistake here can only lower the acceptance rate, since every
draft is verified.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinfer.engine.plan import PageMoves, Plan
from jinfer.engine.request import Request


class FedPages:
    """For each page, the number of places from its beginning that the drafter has computed.

    Args:
      num_pages: in the pool.
      page_size: tokens in a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._num_fed = [0] * num_pages
        self._not_full = set(range(num_pages))

    def note_moves(self, moves: PageMoves) -> None:
        """Applies a step's operations on whole pages."""
        for page in moves.cleared:
            self._set(page, 0)
        for source, page, count in moves.copied:
            self._set(page, min(self._num_fed[source], count))

    def note_plan(self, plan: Plan, *, is_fed: bool) -> None:
        """Records a launched plan; `is_fed`: whether the drafter computes what it writes."""
        for seq in plan.seqs:
            num_tokens = max(seq.num_tokens, seq.num_samples if plan.is_decode else 0)
            self.note(seq.request.pages, seq.start, num_tokens, is_fed=is_fed)

    def note(self, pages: Sequence[int], start: int, num_tokens: int, *, is_fed: bool) -> None:
        """Records that `num_tokens` positions from `start` on are overwritten."""
        size, end = self._page_size, start + num_tokens
        for i in range(start // size, -(-end // size)):
            first, last = max(0, start - i * size), min(size, end - i * size)
            page = pages[i]
            if not is_fed:
                self._set(page, min(self._num_fed[page], first))
            elif self._num_fed[page] >= first:
                self._set(page, last)

    def first_missing(self, pages: Sequence[int], num_tokens: int) -> int:
        """Returns the first of `num_tokens` positions not computed; `num_tokens` if all are."""
        size = self._page_size
        num_whole = num_tokens // size
        # A shortcut, since every step asks for the whole text and mostly nothing is missing.
        begin = num_whole if self._not_full.isdisjoint(pages[:num_whole]) else 0
        for i in range(begin, -(-num_tokens // size)):
            place = i * size + self._num_fed[pages[i]]
            if place < min((i + 1) * size, num_tokens):
                return place
        return num_tokens

    def take_missing(
        self, requests: Sequence[tuple[Request, int]], most_tokens: int, most_seqs: int
    ) -> list[list[tuple[Request, int, int]]]:
        """Returns the missing positions as batches of (request, start, tokens), and marks them fed.

        Args:
          requests: (request, number of its positions that are needed).
          most_tokens, most_seqs: limits of a batch.
        """
        batches: list[list[tuple[Request, int, int]]] = []
        room = 0
        for request, num_tokens in requests:
            start = self.first_missing(request.pages, num_tokens)
            self.note(request.pages, start, num_tokens - start, is_fed=True)
            while start < num_tokens:
                if not room or len(batches[-1]) == most_seqs:
                    batches.append([])
                    room = most_tokens
                count = min(room, num_tokens - start)
                batches[-1].append((request, start, count))
                start += count
                room -= count
        return batches

    def _set(self, page: int, num_fed: int) -> None:
        self._num_fed[page] = num_fed
        if num_fed == self._page_size:
            self._not_full.discard(page)
        else:
            self._not_full.add(page)
