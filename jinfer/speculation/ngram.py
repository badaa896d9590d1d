"""N-gram drafting (prompt lookup, Saxena 2023): proposes what followed earlier in the same text."""

from __future__ import annotations

import collections
from collections.abc import Sequence

MAX_PLACES = 8  # most recent occurrences of each n-gram, which vote


class NgramIndex:
    """Index of the recent occurrences of each n-gram in one growing text.

    Args:
      shortest, longest: lengths of n-grams to look for; longer ones are tried first.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self._num_seen = 0
        # n-gram -> positions behind its occurrences, the newest last.
        self._next: dict[tuple[int, ...], collections.deque[int]] = {}

    def propose(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """Returns up to `num_tokens` likely next tokens; none if the text's end is new.

        A copy that reaches the end of the text continues with the copied tokens, so that a loop is
        drafted as a loop:

            a b c a b c a     "a b c a" occurred at the 4th place: drafts  b c a b c ...

        Where the continuations differ, the majority decides token by token; the newest in a tie.

        Args:
          tokens: the whole text, which must continue that of the last call.
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
        """Returns the majority token at `places`, then the next of those that agree, and so on."""
        end, drafts = len(tokens), []
        for i in range(num_tokens):
            said = [tokens[p + i] if p + i < end else drafts[p + i - end] for p in places]
            votes = collections.Counter(reversed(said))  # in a tie, max returns the newest
            drafts.append(max(votes, key=votes.__getitem__))
            places = [p for p, token in zip(places, said) if token == drafts[-1]]
        return drafts

    def _read(self, tokens: Sequence[int]) -> None:
        """Adds every new n-gram that is followed by a token."""
        for end in range(max(1, self._num_seen), len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                places = self._next.setdefault(
                    tuple(tokens[end - n : end]), collections.deque(maxlen=MAX_PLACES)
                )
                places.append(end)
        self._num_seen = len(tokens)
