"""How many drafts each sequence gets, what they are, and how many stood; knows no device.

The scheduler asks before every step and tells after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from jinfer.config import EngineConfig
from jinfer.engine.buckets import Buckets
from jinfer.engine.holdings import Holdings
from jinfer.engine.plan import Drafts, Plan
from jinfer.engine.proposers import make_proposer
from jinfer.engine.request import Request
from jinfer.spec.adaptive import DraftLength

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


class Speculation:
    """Drafts for the sequences of an engine, and the counts of what became of them.

    A tree counts as one draft a level, which stands if one of its drafts does.

    Args:
      config: limits, and the method in `config.speculation`.
      now: a clock in seconds.
    """

    is_tree = False

    def __init__(self, config: EngineConfig, now: Callable[[], float]) -> None:
        assert config.speculation is not None
        self.config = config.speculation
        sizes = Buckets.of(config).drafts
        self.length = DraftLength(sizes) if self.config.adaptive else None
        self._now = now
        self._planned_at = now()
        self._proposer = None if self.is_tree else make_proposer(self.config)
        self.num_steps = 0  # of single sequences, each of which brought one token or more
        self.num_tokens = 0  # that they brought
        # By position (of a tree: by level), the first draft first.
        self.drafted_at = [0] * self.config.max_depth
        self.accepted_at = [0] * self.config.max_depth
        self._last_log = now()

    def draft(self, decodes: list[Request], budget: int, holdings: Holdings) -> list[Drafts]:
        """Returns each decode's drafts, having taken the pages that they need.

        Only free or cached pages: nobody is preempted for a draft.

        Args:
          decodes: running requests, with a page for their next token each.
          budget: most drafts in all.
          holdings: gives the pages.
        """
        self._planned_at = self._now()
        proposed = [self._propose(r, r.num_unplanned_outputs - 1) for r in decodes]
        most = self.config.num_speculative_tokens
        if self.length is not None:
            most = self.length.choose([len(ids) for ids in proposed])
        drafts = []
        for request, ids in zip(decodes, proposed):
            ids = ids[: max(0, min(budget, most))]
            drafts.append(Drafts(ids[: make_room(request, len(ids), holdings)]))
            budget -= len(drafts[-1])
        return drafts

    def _propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns at most `limit` drafts of what follows the known tokens, all of them known."""
        limit = min(limit, self.config.num_speculative_tokens)
        if self._proposer is None or limit <= 0 or request.num_in_flight:
            return ()
        return self._proposer.propose(request, limit)

    def note(
        self, plan: Plan, samples: Sequence[Sequence[int]], is_sound: Sequence[bool] | None
    ) -> None:
        """Counts a step: the drafts of its sequences, and the tokens that came of them."""
        if self.length is not None and not any(seq.is_prefill for seq in plan.seqs):
            seconds = self._now() - self._planned_at
            self.length.note_step(len(plan.seqs), plan.max_drafts, seconds)
        for i, (seq, tokens) in enumerate(zip(plan.seqs, samples)):
            if not seq.is_prefill and (is_sound is None or is_sound[i]):
                num_drafts = min(seq.drafts.depth, self.config.max_depth)
                self._note_sequence(seq.request, num_drafts, len(tokens))
        self._log()

    def _note_sequence(self, request: Request, num_drafts: int, num_tokens: int) -> None:
        num_accepted = min(num_tokens - 1, num_drafts)
        self.num_steps += 1
        self.num_tokens += num_tokens
        for i in range(num_drafts):
            self.drafted_at[i] += 1
            self.accepted_at[i] += i < num_accepted
        if self.length is not None:
            self.length.note_drafts(num_drafts, num_accepted)
        metrics = request.metrics
        metrics.num_decode_steps += 1
        metrics.num_decode_tokens += num_tokens
        metrics.num_drafted_tokens += num_drafts
        metrics.num_accepted_tokens += num_accepted

    def metrics(self) -> dict[str, float]:
        """Returns counts since the engine was made.

        `acceptance_at_i` is the share of i-th drafts that stood, those included that were not
        reached because an earlier one fell.
        """
        drafted, accepted = sum(self.drafted_at), sum(self.accepted_at)
        return {
            "num_drafted_tokens": drafted,
            "num_accepted_tokens": accepted,
            "acceptance_rate": accepted / max(1, drafted),
            "tokens_per_step": self.num_tokens / max(1, self.num_steps),
            **{
                f"acceptance_at_{i + 1}": self.accepted_at[i] / max(1, self.drafted_at[i])
                for i in range(len(self.drafted_at))
            },
        }

    def _log(self) -> None:
        now = self._now()
        if now - self._last_log < LOG_INTERVAL_S:
            return
        self._last_log = now
        values = self.metrics()
        logger.info(
            "speculation (%s): %.2f tokens a step, %d of %d drafts accepted (%.0f %%)",
            self.config.method,
            values["tokens_per_step"],
            values["num_accepted_tokens"],
            values["num_drafted_tokens"],
            100 * values["acceptance_rate"],
        )


def make_room(request: Request, num_drafts: int, holdings: Holdings) -> int:
    """Takes free pages for drafts after the newest token; returns how many there is room for.

    Only free or cached pages: nobody is preempted for a draft.
    """
    missing = holdings.num_missing_pages(request, 1 + num_drafts)
    request.pages += holdings.prefix.alloc(min(missing, holdings.prefix.num_available))
    return len(request.pages) * holdings.page_size - request.num_computed_tokens - 1
