"""Drafts by prompt lookup: what followed the last times that the text ended like this. No model.

Saxena 2023 (prompt lookup decoding); knows nothing of requests, and no jax.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

MAX_PLACES = 8  # the last ones of each n-gram, which vote


class NgramIndex:
    """Remembers where each n-gram of one growing text ended the last times.

    Args:
      shortest, longest: lengths of n-grams to look for, the longest first.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self._num_seen = 0
        # n-gram -> places of what followed, the newest last.
        self._next: dict[tuple[int, ...], collections.deque[int]] = {}

    def propose(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """Returns up to `num_tokens` likely next tokens; none if nothing like the end came before.

        A copy that reaches the end of the text goes on with what it has copied, so that a text in
        a loop is drafted as a loop:

            a b c a b c a     ends like "a b c a" did at the 4th place: drafts  b c a b c ...

        Where the last places do not agree, most of them decide, token by token; among as many the
        newest.

        Args:
          tokens: the whole text; that of the last call, continued.
          num_tokens: most drafts.
        """
        self._read(tokens)
        end = len(tokens)
        for n in range(min(self.longest, end), self.shortest - 1, -1):
            places = self._next.get(tuple(tokens[end - n :]))
            if places is not None:
                return self._follow(tokens, list(places), num_tokens)
        return []

    @staticmethod
    def _follow(tokens: Sequence[int], places: list[int], num_tokens: int) -> list[int]:
        """Returns what most of `places` say, and of these most say next, and so on."""
        end, drafts = len(tokens), []
        for i in range(num_tokens):
            said = [tokens[p + i] if p + i < end else drafts[p + i - end] for p in places]
            votes = collections.Counter(reversed(said))  # of as many, max keeps the newest
            drafts.append(max(votes, key=votes.__getitem__))
            places = [p for p, token in zip(places, said) if token == drafts[-1]]
        return drafts

    def _read(self, tokens: Sequence[int]) -> None:
        """Notes every n-gram that something follows."""
        for end in range(max(1, self._num_seen), len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                places = self._next.setdefault(
                    tuple(tokens[end - n : end]), collections.deque(maxlen=MAX_PLACES)
                )
                places.append(end)
        self._num_seen = len(tokens)
