"""Chooses how many drafts a step verifies: the number with most tokens per second, perhaps none.

It depends on two things that are measured while serving: how often drafts are accepted at each
position, and what steps cost with and without them. A step that verifies reads the weights once for
more tokens: nearly free where memory bandwidth is the limit, expensive where arithmetic is (CPUs,
large batches).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

# Measurements of a kind of step before it is judged: the first may include compiling.
NUM_TRIALS = 2
# Steps after the last trial, of any kind and batch size, until a kind that looked slower is tried
# again.
RETRY_AFTER = 64
# The wait is longer if needed to keep the time lost in trials below this share.
TRIAL_SHARE = 0.005
# A kind that is only estimated from other batch sizes is tried within so many steps, whatever its
# estimated cost.
FIRST_TRIAL_WITHIN = 512
# Drafts must look faster than none by this factor: the best of several measurements looks better
# than it is, and a small gain is not worth the risk of a loss.
LEAST_GAIN = 1.05
_MEMORY = 0.98  # weight of the past in the acceptance rates


class DraftLength:
    """Chooses the number of drafts per sequence, step by step.

    Args:
      sizes: numbers of drafts for which there are programs, ascending.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        most = self.sizes[-1]
        # Discounted counts per position of drafts that were reached and accepted. Initially half of
        # the drafts count as accepted.
        self._reached = [2.0] * most
        self._accepted = [1.0] * most
        # By (bit length of the batch size, number of drafts): seconds of the last steps, and how
        # many steps of other kinds have run since. By bit length alone: what catching up costs
        # after a pause. The kind that has not run for longest is tried first.
        self._seconds: dict[tuple[int, int], collections.deque[float]] = {}
        self._since: collections.Counter[tuple[int, int]] = collections.Counter()
        self._resumptions: dict[int, collections.deque[float]] = {}
        self._num_since_trial = 0
        self._trial: int | None = None  # the kind that is being tried

    def choose(self, lengths: Sequence[int], *, may_try: bool = True) -> int:
        """Returns the most drafts per sequence for a step.

        Args:
          lengths: number of proposed drafts of each sequence of the batch.
          may_try: whether a kind of step may be chosen to measure it. If not, only measured kinds
            and the one without drafts are chosen.
        """
        if not max(lengths, default=0):
            return 0
        batch, options = len(lengths).bit_length(), self._options(lengths)
        seconds = {size: self._estimate(batch, size) for size in options}
        if seconds[0] is None:
            return 0
        unknown = [size for size in options if seconds[size] is None]
        self._trial = None
        if may_try and unknown:
            self._trial = unknown[-1]
            return unknown[-1]
        known = [
            s for s in options if self._is_measured(batch, s) or (may_try and s not in unknown)
        ]
        best = max(known, key=lambda size: self._worth(lengths, batch, size))
        if may_try and self._steps_to_trial(lengths, batch, options, best) <= 0:
            self._trial = self._next_trial(batch, options, best)
            return self._trial
        return best

    def num_steps_without(self, lengths: Sequence[int]) -> int:
        """Returns for how many equal steps from now `choose` would return 0; 0 if it would not.

        Args:
          lengths: as for `choose`.
        """
        batch, options = len(lengths).bit_length(), self._options(lengths)
        if any(self._estimate(batch, size) is None for size in options):
            return 0
        plain = self._worth(lengths, batch, 0)
        if any(self._worth(lengths, batch, size) > plain for size in options):
            return 0
        return max(0, self._steps_to_trial(lengths, batch, options, 0))

    def note_step(self, num_seqs: int, num_drafts: int, seconds: float, num_steps: int = 1) -> None:
        """Records the cost of a step.

        Args:
          num_seqs: its sequences.
          num_drafts: most drafts of any of them.
          seconds: time of each step.
          num_steps: number of steps; more than 1 only without drafts.
        """
        batch = num_seqs.bit_length()
        self._num_since_trial += num_steps
        if self._trial is not None and bool(self._trial) == bool(num_drafts):
            self._num_since_trial, self._trial = 0, None
        for size in (0, *self.sizes):
            self._since[batch, size] += num_steps
        key = batch, self._fit(num_drafts) if num_drafts else 0
        self._since[key] = 0
        self._seconds.setdefault(key, collections.deque(maxlen=8)).append(seconds)

    def note_resumption(self, num_seqs: int, seconds: float) -> None:
        """Records the cost of a step that caught up after a pause; it does not count as a trial."""
        batch = num_seqs.bit_length()
        if plain := self._seconds.get((batch, 0)):
            found = self._resumptions.setdefault(batch, collections.deque(maxlen=NUM_TRIALS))
            found.append(max(0.0, seconds - min(plain)))

    def note_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """Records how many drafts of a sequence were accepted.

        Drafts after a rejected one count as not reached.
        """
        for i in range(min(num_drafts, num_accepted + 1)):
            self._reached[i] = 1.0 + _MEMORY * self._reached[i]
            self._accepted[i] = float(i < num_accepted) + _MEMORY * self._accepted[i]

    def _next_trial(self, batch: int, options: Sequence[int], best: int) -> int:
        """Returns the kind to try next: the one not run for longest, with most drafts in a tie."""
        others = [size for size in options if size != best]
        return max(others, key=lambda size: (self._since[batch, size], size))

    def _steps_to_trial(
        self, lengths: Sequence[int], batch: int, options: Sequence[int], best: int
    ) -> int:
        """Returns the number of steps of kind `best` until another kind is to be tried."""
        size, seconds = self._next_trial(batch, options, best), self._known(batch, best)
        lost = self._known(batch, size)
        lost -= self._expected_tokens(lengths, size) / self._rate(lengths, batch, best)
        resumptions = self._resumptions.get(batch, ())
        if size and not best and len(resumptions) >= NUM_TRIALS:
            lost += min(resumptions)
        wait = math.ceil(lost / (TRIAL_SHARE * seconds))
        if self._is_measured(batch, size):
            wait = max(wait, RETRY_AFTER)
        else:
            wait = min(wait, FIRST_TRIAL_WITHIN)
        return wait - self._num_since_trial

    def _rate(self, lengths: Sequence[int], batch: int, size: int) -> float:
        """Tokens per second."""
        return self._expected_tokens(lengths, size) / self._known(batch, size)

    def _worth(self, lengths: Sequence[int], batch: int, size: int) -> float:
        """Tokens per second; for no drafts `LEAST_GAIN` times as many."""
        return self._rate(lengths, batch, size) * (1.0 if size else LEAST_GAIN)

    def _options(self, lengths: Sequence[int]) -> list[int]:
        longest = max(lengths)
        return [0, *(size for size in self.sizes if size < longest), self._fit(longest)]

    def _is_measured(self, batch: int, size: int) -> bool:
        return len(self._seconds.get((batch, size), ())) >= NUM_TRIALS

    def _known(self, batch: int, size: int) -> float:
        seconds = self._estimate(batch, size)
        assert seconds is not None
        return seconds

    def _estimate(self, batch: int, size: int) -> float | None:
        """Seconds of a kind of step: measured, or estimated from other batch sizes; None: unknown.

        The estimate takes the ratio to steps without drafts from the nearest batch size.
        """
        if self._is_measured(batch, size):
            # The minimum, since other work on the machine only adds to a step's time.
            return min(self._seconds[batch, size])
        if not size or not self._is_measured(batch, 0):
            return None
        others = [
            other
            for other, of in self._seconds
            if of == size and self._is_measured(other, size) and self._is_measured(other, 0)
        ]
        if not others:
            return None
        nearest = min(others, key=lambda other: abs(other - batch))
        ratio = min(self._seconds[nearest, size]) / min(self._seconds[nearest, 0])
        # A single measurement counts if it is lower; a higher one may include compiling.
        return min([ratio * min(self._seconds[batch, 0]), *self._seconds.get((batch, size), ())])

    def _expected_tokens(self, lengths: Sequence[int], size: int) -> float:
        total = float(len(lengths))
        for length in lengths:
            chance = 1.0
            for i in range(min(length, size)):
                chance *= self._accepted[i] / self._reached[i]
                total += chance
        return total

    def _fit(self, num_drafts: int) -> int:
        return next(size for size in self.sizes if size >= num_drafts)
