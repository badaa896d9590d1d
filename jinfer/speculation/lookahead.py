"""Lookahead drafting: the model's own parallel guesses, collected as n-grams.

Fu et al. 2024 (arXiv:2402.02057). Each step computes, besides the newest token, a window of W
columns and N - 1 levels of guesses. Level 0 is a line of tokens that may follow; each level below
holds the model's predictions after the level above, one step earlier. This is Jacobi iteration,
whose trajectories are n-grams that the model finds likely. Here W = 3, N = 4, r the newest token:

    level 0   r - a0 - a1 - a2       the predictions after the last level, c0 c1 c2, complete the
    level 1       b0   b1   b2       n-grams a0 b0 d0 c0, a1 b1 d1 c1, ..., and the next window has
    level 2       d0   d1   d2       the levels b, d, c

Node d1 attends to its ancestors r a0 a1 b1: the window is a tree, and so are the n-grams that begin
with the newest token, of which G are drafted. `accept_tree` accepts or rejects all of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from jinfer.speculation.trees import TreeBuilder


class Lookahead:
    """The window and the n-grams of one growing text.

    Args:
      window: W, columns.
      ngram_size: N, tokens of an n-gram: a step yields at most N tokens.
      num_guesses: G, most n-grams drafted in a step, and kept for each first token.
      seed: of the random choice of text tokens that fill columns without a guess.
    """

    def __init__(self, window: int, ngram_size: int, num_guesses: int, seed: int) -> None:
        self.window, self.ngram_size, self.num_guesses = window, ngram_size, num_guesses
        self._random = random.Random(seed)
        # First token -> what followed it, the newest last (a dict for its order).
        self._pool: dict[int, dict[tuple[int, ...], None]] = {}
        self._levels: list[list[int]] = []
        self._num_read = 0
        self._last: list[int] = []  # the nodes of the window's last level in the last tree

    def grow(self, text: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns drafts and parents, see `speculation.trees`; the newest n-grams first."""
        self._read(text)
        if not self._levels:
            self._levels = [[] for _ in range(self.ngram_size - 1)]
        for level in self._levels:
            level += self._random.choices(text, k=self.window - len(level))
        tree = TreeBuilder()
        for ngram in reversed(self._pool.get(text[-1], {})):
            tree.add_path(ngram)
        self._last, above = [], 0
        for column in zip(*self._levels):
            above = tree.add_path(column[:1], above)
            self._last.append(tree.add_path(column[1:], above))
        return tuple(tree.tokens), tuple(tree.parents)

    def learn(self, said: Sequence[int], num_tokens: int) -> None:
        """Updates window and n-grams after a step that verified the whole tree of the last `grow`.

        Args:
          said: the likeliest token after each node, the root first.
          num_tokens: tokens that the step yielded; the window moves by `num_tokens - 1` columns.
        """
        lowest = [said[node] for node in self._last]
        for column in zip(*self._levels, lowest):
            self._keep(column)
        self._levels = [level[num_tokens - 1 :] for level in (*self._levels[1:], lowest)]

    def _read(self, text: Sequence[int]) -> None:
        """Collects the new n-grams of the text itself."""
        for end in range(max(self.ngram_size, self._num_read + 1), len(text) + 1):
            self._keep(text[end - self.ngram_size : end])
        self._num_read = len(text)

    def _keep(self, ngram: Sequence[int]) -> None:
        kept = self._pool.setdefault(ngram[0], {})
        rest = tuple(ngram[1:])
        kept.pop(rest, None)
        kept[rest] = None
        if len(kept) > self.num_guesses:
            del kept[next(iter(kept))]
