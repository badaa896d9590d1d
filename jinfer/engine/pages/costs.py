"""Costs of moving a page between device and host, and of computing it again.

Moving is measured once, when the engine is made. Computing is measured while serving: the fastest
of the last few steps that prefill at least a page and move none. The fastest, since compiling and
other work on the machine only add to a step's time.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

from jinfer.engine.plan import Plan

NUM_STEPS = 8


class TransferCosts:
    """Decides between loading pages and computing their tokens.

    Args:
      page_size: tokens in a page.
      save_page_s, load_page_s: seconds per page.
      load_s: fixed seconds of a load.
      token_s: seconds to compute a token; None measures it, and prefers loading until then.
      now: a clock in seconds.
    """

    def __init__(
        self,
        page_size: int,
        *,
        save_page_s: float = 0.0,
        load_page_s: float = 0.0,
        load_s: float = 0.0,
        token_s: float | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.page_size = page_size
        self.save_page_s = save_page_s
        self.load_page_s = load_page_s
        self.load_s = load_s
        self._fixed_token_s = token_s
        self._now = now
        self._measured: collections.deque[float] = collections.deque(maxlen=NUM_STEPS)
        self._begun: dict[int, float] = {}
        self._ended = now()

    @property
    def token_s(self) -> float | None:
        """Seconds to compute a prompt token; None: not known yet."""
        if self._fixed_token_s is not None:
            return self._fixed_token_s
        return min(self._measured, default=None)

    def is_worth_saving(self) -> bool:
        """Whether saving and loading a page takes less time than computing its tokens."""
        page_s = self.save_page_s + self.load_page_s
        return self.token_s is None or page_s < self.page_size * self.token_s

    def is_worth_loading(self, num_pages: int) -> bool:
        """Whether loading `num_pages` pages takes less time than computing their tokens."""
        seconds = self.load_s + num_pages * self.load_page_s
        return self.token_s is None or seconds < num_pages * self.page_size * self.token_s

    def begin(self, plan: Plan) -> None:
        """Records when a step was dispatched."""
        self._begun[plan.step_id] = self._now()

    def end(self, plan: Plan) -> None:
        """Records when a step's results came, and its duration.

        It counts from its dispatch or from the end of the step before, whichever is later.
        """
        now = self._now()
        begun = max(self._begun.get(plan.step_id, now), self._ended)
        self._begun = {i: at for i, at in self._begun.items() if i > plan.step_id}
        self._ended = now
        num_prefilled = sum(seq.num_tokens for seq in plan.seqs if seq.is_prefill)
        if num_prefilled >= self.page_size and not plan.moves.is_transfer and now > begun:
            self._measured.append((now - begun) / plan.num_tokens)
