"""How many drafts a step should carry: as many as bring most tokens a second, perhaps none.

Two things decide, and both are measured while serving: how often drafts stand at each place, and
what steps cost with and without them. A step that verifies reads the weights once for more tokens:
nearly free where memory is the limit, dear where arithmetic is (CPUs, large batches). No jax.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

# Fewest measurements of a kind of step before it is judged: the first may have compiled.
NUM_TRIALS = 2
# A kind of step that looked slower is tried again after so many of the others.
RETRY_AFTER = 64
_MEMORY = 0.98  # weight of the past in the rates of acceptance


class DraftLength:
    """Chooses most drafts a sequence, step by step.

    Args:
      sizes: numbers of drafts that there are programs for, ascending.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        most = self.sizes[-1]
        # One draft of two is taken to stand until more is known.
        self._reached = [2.0] * most
        self._stood = [1.0] * most
        # Seconds of the last steps, by the size of the batch (a power of two) and of the drafts.
        self._seconds: dict[tuple[int, int], collections.deque[float]] = {}
        self._since: dict[tuple[int, int], int] = {}

    def choose(self, lengths: Sequence[int]) -> int:
        """Returns most drafts a sequence for a step.

        Args:
          lengths: drafts at hand for each sequence of the batch.
        """
        longest = max(lengths, default=0)
        if not longest:
            return 0
        batch = len(lengths).bit_length()
        options = [0, *(size for size in self.sizes if size < longest), self._fit(longest)]
        for size in options:
            key = batch, size
            self._since[key] = self._since.get(key, 0) + 1
        due = [
            size
            for size in options
            if len(self._seconds.get((batch, size), ())) < NUM_TRIALS
            or self._since[batch, size] > RETRY_AFTER
        ]
        if due:
            return due[-1]

        def tokens_per_second(size: int) -> float:
            # The least of the last few: what else the machine did is not the step's cost.
            return self._expected_tokens(lengths, size) / min(self._seconds[batch, size])

        return max(options, key=tokens_per_second)

    def note_step(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        """Takes in what a step cost: `num_drafts` is the most of any of its sequences."""
        key = num_seqs.bit_length(), self._fit(num_drafts) if num_drafts else 0
        self._since[key] = 0
        self._seconds.setdefault(key, collections.deque(maxlen=8)).append(seconds)

    def note_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """Takes in how many of a sequence's drafts stood; the first that falls is the last seen."""
        for i in range(min(num_drafts, num_accepted + 1)):
            self._reached[i] = 1.0 + _MEMORY * self._reached[i]
            self._stood[i] = float(i < num_accepted) + _MEMORY * self._stood[i]

    def _expected_tokens(self, lengths: Sequence[int], size: int) -> float:
        total = float(len(lengths))
        for length in lengths:
            chance = 1.0
            for i in range(min(length, size)):
                chance *= self._stood[i] / self._reached[i]
                total += chance
        return total

    def _fit(self, num_drafts: int) -> int:
        return next(size for size in self.sizes if size >= num_drafts)
