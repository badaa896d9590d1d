"""How many drafts a step should carry: as many as bring most tokens a second, perhaps none.

Two things decide, and both are measured while serving: how often drafts stand at each place, and
what steps cost with and without them. A step that verifies reads the weights once for more tokens:
nearly free where memory is the limit, dear where arithmetic is (CPUs, large batches). No jax.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

# Fewest measurements of a kind of step before it is judged: the first may have compiled.
NUM_TRIALS = 2
# A kind of step that looked slower is tried again so many steps after the last trial, of whatever
# kind and in batches of whatever size,
RETRY_AFTER = 64
# or after more, so that all that trials lose is at most this share of the time.
TRIAL_SHARE = 0.005
# One that was dear in batches of another size is tried after so many, dear as it may be here.
FIRST_TRIAL_WITHIN = 512
# Drafts must look so much faster than none: of several numbers that were measured the best looks
# better than it is, and where little is to be won nothing should be lost.
LEAST_GAIN = 1.05
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
        # By the size of the batch (a power of two) and of the drafts: seconds of the last steps,
        # how many steps of other kinds have been since, and what a trial costs beside its step.
        # Kinds are tried in turn, the one first that has not been for longest.
        self._seconds: dict[tuple[int, int], collections.deque[float]] = {}
        self._since: collections.Counter[tuple[int, int]] = collections.Counter()
        self._resumptions: dict[int, collections.deque[float]] = {}
        self._num_since_trial = 0
        self._trial: int | None = None  # the kind that is being tried

    def choose(self, lengths: Sequence[int], *, may_try: bool = True) -> int:
        """Returns most drafts a sequence for a step.

        Args:
          lengths: drafts at hand for each sequence of the batch.
          may_try: whether a kind of step may be chosen to measure it. Where this is false, one that
            has not been measured is not chosen, but for that without drafts.
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
        """Returns for how many steps to come, all alike, `choose` would find 0 the best; 0 if not.

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
        """Takes in what a step cost: `num_drafts` is the most of any of its sequences.

        `num_steps` steps without drafts may be noted as one; `seconds` is what each took.
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
        """Takes in what a step cost that made drafting possible again, which is no trial itself."""
        batch = num_seqs.bit_length()
        if plain := self._seconds.get((batch, 0)):
            found = self._resumptions.setdefault(batch, collections.deque(maxlen=NUM_TRIALS))
            found.append(max(0.0, seconds - min(plain)))

    def note_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """Takes in how many of a sequence's drafts stood; the first that falls is the last seen."""
        for i in range(min(num_drafts, num_accepted + 1)):
            self._reached[i] = 1.0 + _MEMORY * self._reached[i]
            self._stood[i] = float(i < num_accepted) + _MEMORY * self._stood[i]

    def _next_trial(self, batch: int, options: Sequence[int], best: int) -> int:
        """Returns the kind that is tried next: of as many steps ago, that with most drafts."""
        others = [size for size in options if size != best]
        return max(others, key=lambda size: (self._since[batch, size], size))

    def _steps_to_trial(
        self, lengths: Sequence[int], batch: int, options: Sequence[int], best: int
    ) -> int:
        """Returns after how many more steps of kind `best` another is due to be tried."""
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
        """Tokens a second."""
        return self._expected_tokens(lengths, size) / self._known(batch, size)

    def _worth(self, lengths: Sequence[int], batch: int, size: int) -> float:
        """Tokens a second, for no drafts `LEAST_GAIN` times as many."""
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
        """Seconds of a kind of step: measured, or as dear beside plain ones as in other batches."""
        if self._is_measured(batch, size):
            # The least of the last few: what else the machine did is not the step's cost.
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
        # Better than that, a single step of this kind; worse, it may have compiled.
        return min([ratio * min(self._seconds[batch, 0]), *self._seconds.get((batch, size), ())])

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
