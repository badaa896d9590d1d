"""Which places of its own KV pool a drafter has been fed; knows pages and plans, no device.

Steps of a time without drafts need not be fed to it. Before it drafts again it is given what it
missed, in chunks. A mistake here would cost drafts that stand, and never a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinfer.engine.plan import PageMoves, Plan
from jinfer.engine.request import Request


class FedPages:
    """For each page, how many places from its beginning hold what the drafter computed.

    Args:
      num_pages: in the pool.
      page_size: tokens in a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._num_fed = [0] * num_pages
        self._not_full = set(range(num_pages))

    def note_moves(self, moves: PageMoves) -> None:
        """Follows what is done with whole pages before a step."""
        for page in moves.cleared:
            self._set(page, 0)
        for source, page, count in moves.copied:
            self._set(page, min(self._num_fed[source], count))

    def note_plan(self, plan: Plan, *, is_fed: bool) -> None:
        """Takes in a plan that is being launched: all it writes, or nothing, is fed."""
        for seq in plan.seqs:
            num_tokens = max(seq.num_tokens, seq.num_samples if plan.is_decode else 0)
            self.note(seq.request.pages, seq.start, num_tokens, is_fed=is_fed)

    def note(self, pages: Sequence[int], start: int, num_tokens: int, *, is_fed: bool) -> None:
        """Takes in that positions from `start` on are written anew."""
        size, end = self._page_size, start + num_tokens
        for i in range(start // size, -(-end // size)):
            first, last = max(0, start - i * size), min(size, end - i * size)
            page = pages[i]
            if not is_fed:
                self._set(page, min(self._num_fed[page], first))
            elif self._num_fed[page] >= first:
                self._set(page, last)

    def first_missing(self, pages: Sequence[int], num_tokens: int) -> int:
        """Returns the first of `num_tokens` positions that was not fed; `num_tokens`: all were."""
        size = self._page_size
        num_whole = num_tokens // size
        # Every step asks for all of a long text, and mostly nothing is missing.
        begin = num_whole if self._not_full.isdisjoint(pages[:num_whole]) else 0
        for i in range(begin, -(-num_tokens // size)):
            place = i * size + self._num_fed[pages[i]]
            if place < min((i + 1) * size, num_tokens):
                return place
        return num_tokens

    def take_missing(
        self, requests: Sequence[tuple[Request, int]], most_tokens: int, most_seqs: int
    ) -> list[list[tuple[Request, int, int]]]:
        """Returns what is to be fed, as if it were: batches of (request, start, tokens).

        Args:
          requests: each with the number of its positions that are wanted.
          most_tokens, most_seqs: in a batch.
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
