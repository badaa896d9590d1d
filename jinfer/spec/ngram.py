"""Drafts by prompt lookup: what followed the last time that the text ended like this. No model.

Saxena 2023 (prompt lookup decoding); knows nothing of requests, and no jax.
"""

from __future__ import annotations

from collections.abc import Sequence


class NgramIndex:
    """Remembers where each n-gram of one growing text last ended.

    Args:
      shortest, longest: lengths of n-grams to look for, the longest first.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self._num_seen = 0
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> place of what followed

    def propose(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """Returns up to `num_tokens` likely next tokens; none if nothing like the end came before.

        A copy that reaches the end of the text goes on with what it has copied, so that a text in
        a loop is drafted as a loop:

            a b c a b c a     ends like "a b c a" did at the 4th place: drafts  b c a b c ...

        Args:
          tokens: the whole text; that of the last call, continued.
          num_tokens: most drafts.
        """
        self._read(tokens)
        end = len(tokens)
        for n in range(min(self.longest, end), self.shortest - 1, -1):
            begin = self._next.get(tuple(tokens[end - n :]))
            if begin is not None:
                period = end - begin
                return [tokens[begin + i % period] for i in range(num_tokens)]
        return []

    def _read(self, tokens: Sequence[int]) -> None:
        """Notes every n-gram that something follows."""
        for end in range(max(1, self._num_seen), len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._next[tuple(tokens[end - n : end])] = end
        self._num_seen = len(tokens)
