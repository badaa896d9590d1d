"""Chooses the drafts of each sequence, pauses drafting where it does not pay, and keeps counts.

The scheduler calls `draft` before every step and `note` after it.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence

from jinfer.config.engine import EngineConfig
from jinfer.config.outputs import RequestMetrics
from jinfer.engine.device.buckets import Buckets
from jinfer.engine.drafting.proposers import make_proposer
from jinfer.engine.pages.holdings import Holdings
from jinfer.engine.plan import Drafts, Plan, Progress
from jinfer.engine.request import Request
from jinfer.speculation.adaptive import DraftLength

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


class Drafting(enum.Enum):
    """Whether steps carry drafts.

    ACTIVE: they may.
    PAUSED: the last plan had no drafts and computed nothing for later ones.
    CATCHING_UP: steps may carry drafts again; the first that does may take longer, because it makes
      up for what was skipped (the drafter's KV, or the guesses of Medusa heads).
    """

    ACTIVE = "active"
    PAUSED = "paused"
    CATCHING_UP = "catching up"

    def after(self, event: DraftingEvent) -> Drafting:
        """Returns the state that follows `event`."""
        return _TRANSITIONS.get((self, event), self)


class DraftingEvent(enum.Enum):
    """What changes the state: a plan without or with drafting, or a finished step."""

    PLAN_PAUSED = "plan paused"
    PLAN_DRAFTS = "plan drafts"
    STEP_SKIPPED = "step computed nothing for drafts"
    STEP_CAUGHT_UP = "step computed what drafts need"


# Pairs that are not listed leave the state as it is.
_TRANSITIONS = {
    (Drafting.ACTIVE, DraftingEvent.PLAN_PAUSED): Drafting.PAUSED,
    (Drafting.CATCHING_UP, DraftingEvent.PLAN_PAUSED): Drafting.PAUSED,
    (Drafting.PAUSED, DraftingEvent.PLAN_DRAFTS): Drafting.CATCHING_UP,
    (Drafting.ACTIVE, DraftingEvent.STEP_SKIPPED): Drafting.CATCHING_UP,
    (Drafting.CATCHING_UP, DraftingEvent.STEP_CAUGHT_UP): Drafting.ACTIVE,
}


class Speculation:
    """Drafts for the sequences of an engine, and counts of their acceptance.

    A tree counts as one draft per level, accepted if one of the level's drafts is.

    Args:
      config: limits, and the method in `config.speculation`.
      now: a clock in seconds.
    """

    is_tree = False

    def __init__(self, config: EngineConfig, now: Callable[[], float]) -> None:
        assert config.speculation is not None
        self.config = config.speculation
        sizes = (self.config.max_depth,) if self.is_tree else Buckets.of(config).drafts
        self.length = DraftLength(sizes) if self.config.adaptive else None
        self._now = now
        self._noted_at = now()
        self.proposer = None if self.is_tree else make_proposer(self.config)
        # N-gram drafting needs the known tokens of each step, and its steps compute nothing for
        # later drafts. The other methods can draft after any step, at some cost in every step.
        self._is_lookup = self.config.method == "ngram"
        self.state = Drafting.ACTIVE
        self._num_paused_steps = 0  # steps to come without drafts
        self._paused_batch = 0  # for batches of this size (its bit length)
        self._steps_per_plan = config.num_decode_steps
        # Of all requests, by position; of a tree by level.
        depth = self.config.max_depth
        self._totals = RequestMetrics(num_drafted_at=[0] * depth, num_accepted_at=[0] * depth)
        self._last_log = now()

    @property
    def is_paused(self) -> bool:
        """Whether the last plan had no drafts and computes nothing for later ones."""
        return self.state is Drafting.PAUSED

    @property
    def is_next_paused(self) -> bool:
        """Whether the next plan is known to have no drafts, so that it need not wait for tokens."""
        return self._num_paused_steps > 0

    def draft(
        self, decodes: list[Request], budget: int, holdings: Holdings, *, is_mixed: bool
    ) -> list[Drafts]:
        """Returns the drafts of each decode, and takes the pages that they need.

        It takes free or cached pages only: no request is preempted for a draft.

        Args:
          decodes: running requests, each with a page for its next token.
          budget: most drafts in all.
          holdings: allocates the pages.
          is_mixed: the step is expected to prefill as well, so that its time is not measured.
        """
        if not decodes or self._stays_paused(decodes):
            return [Drafts()] * len(decodes)
        proposed = [self._propose(r, r.num_unplanned_outputs - 1) for r in decodes]
        most = self.config.num_speculative_tokens
        if self.length is not None:
            lengths = [len(ids) for ids in proposed]
            most = self.length.choose(lengths, may_try=not is_mixed)
            if not most:
                self._pause(len(lengths))
        drafts = []
        for request, ids in zip(decodes, proposed):
            ids = ids[: max(0, min(budget, most))]
            drafts.append(Drafts(ids[: make_room(request, len(ids), holdings)]))
            budget -= len(drafts[-1])
        return drafts

    def _stays_paused(self, decodes: list[Request]) -> bool:
        """Whether the plan being made has no drafts because of a pause decided before."""

        if len(decodes).bit_length() != self._paused_batch:
            self._num_paused_steps = 0
        # With steps in flight the token to draft after is not known yet.
        is_paused = self._num_paused_steps > 0 or (
            self.length is not None and any(request.num_in_flight for request in decodes)
        )
        self._num_paused_steps = max(0, self._num_paused_steps - self._steps_per_plan)
        event = DraftingEvent.PLAN_PAUSED if is_paused else DraftingEvent.PLAN_DRAFTS
        self.state = self.state.after(event)
        return is_paused

    def _pause(self, num_seqs: int) -> None:
        """Pauses drafting for the plan being made, and for later ones if drafts will not pay."""
        assert self.length is not None
        num_steps = self.length.num_steps_without([self.config.max_depth] * num_seqs)
        if num_steps or not self._is_lookup:
            self.state = self.state.after(DraftingEvent.PLAN_PAUSED)
            self._paused_batch = num_seqs.bit_length()
            self._num_paused_steps = max(0, num_steps - self._steps_per_plan)

    def _propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns at most `limit` drafts after the known tokens; none if tokens are in flight.

        None either if a request has token masks and drafts are made in the step: the mask after a
        draft that the host does not know cannot be made.
        """
        limit = min(limit, self.config.num_speculative_tokens)
        if self.proposer is None or limit <= 0 or request.num_in_flight:
            return ()
        if request.token_masks is not None and not self._is_lookup:
            return ()
        return self.proposer.propose(request, limit)

    def note(
        self,
        plan: Plan,
        samples: Sequence[Sequence[int]],
        is_sound: Sequence[bool] | None,
        progress: Sequence[Progress],
    ) -> None:
        """Counts a step's drafts and the tokens that it yielded.

        Args:
          plan, samples, is_sound: as of `Scheduler.commit`.
          progress: its result, which has no tokens beyond the end of a text.
        """
        now = self._now()
        if self.length is not None and not any(seq.is_prefill for seq in plan.seqs):
            # A plan made while another was in flight took the time since the end of the other.
            seconds = (now - max(plan.planned_at, self._noted_at)) / plan.num_steps
            self._note_seconds(plan, seconds, self.length)
        self._noted_at = now
        num_new = {gained.request: len(gained.new_token_ids) for gained in progress}
        for i, (seq, tokens) in enumerate(zip(plan.seqs, samples)):
            if not seq.is_prefill and (is_sound is None or is_sound[i]):
                num_drafts = min(seq.drafts.depth, self.config.max_depth)
                num_kept = num_new.get(seq.request, 0)
                self._note_sequence(seq.request, num_drafts, len(tokens) - 1, num_kept)
        self._log()

    def _note_seconds(self, plan: Plan, seconds: float, length: DraftLength) -> None:
        num_seqs, depth = len(plan.seqs), max(seq.drafts.depth for seq in plan.seqs)
        depth = min(depth, self.config.max_depth)
        # A step without drafts does not feed a draft model, so it is a plain one.
        is_plain = plan.is_speculation_paused or (not depth and self.config.method == "draft")
        is_catching_up = self.state is not Drafting.ACTIVE
        event = DraftingEvent.STEP_SKIPPED if is_plain else DraftingEvent.STEP_CAUGHT_UP
        self.state = self.state.after(event)
        if self._is_lookup or is_plain:
            length.note_step(num_seqs, depth, seconds, plan.num_steps)
        elif is_catching_up and self.config.method in ("draft", "medusa"):
            length.note_resumption(num_seqs, seconds)
        elif depth:
            length.note_step(num_seqs, depth, seconds)

    def _note_sequence(
        self, request: Request, num_drafts: int, num_accepted: int, num_tokens: int
    ) -> None:
        num_accepted = min(num_accepted, num_drafts)
        num_steps = 1 if num_drafts else num_tokens  # without drafts, a plan may have several steps
        if self.length is not None:
            self.length.note_drafts(num_drafts, num_accepted)
        for metrics in (request.metrics, self._totals):
            metrics.num_decode_steps += num_steps
            metrics.num_decode_tokens += num_tokens
            metrics.note_drafts(num_drafts, num_accepted)

    def metrics(self) -> dict[str, float]:
        """Returns counts since the engine was made.

        `acceptance_at_i` is the share of i-th drafts that were accepted. Drafts after a rejected
        one count as rejected.
        """
        drafted, accepted = self._totals.num_drafted_tokens, self._totals.num_accepted_tokens
        return {
            "num_drafted_tokens": drafted,
            "num_accepted_tokens": accepted,
            "acceptance_rate": accepted / max(1, drafted),
            "tokens_per_step": self._totals.tokens_per_step or 0.0,
            **{f"acceptance_at_{i}": x for i, x in enumerate(self._totals.acceptance_at, 1)},
        }

    def _log(self) -> None:
        now = self._now()
        if now - self._last_log < LOG_INTERVAL_S:
            return
        self._last_log = now
        values = self.metrics()
        logger.info(
            "speculation (%s): %.2f tokens per step, %d of %d drafts accepted "
            "(%.0f %%; by position %s)",
            self.config.method,
            values["tokens_per_step"],
            values["num_accepted_tokens"],
            values["num_drafted_tokens"],
            100 * values["acceptance_rate"],
            ", ".join(f"{100 * share:.0f} %" for share in self._totals.acceptance_at),
        )


def make_room(request: Request, num_drafts: int, holdings: Holdings) -> int:
    """Takes pages for drafts after the newest token; returns how many drafts fit.

    It takes free or cached pages only: no request is preempted for a draft.
    """
    missing = holdings.num_missing_pages(request, 1 + num_drafts)
    request.pages += holdings.prefix.alloc(min(missing, holdings.prefix.num_available))
    return len(request.pages) * holdings.page_size - request.num_computed_tokens - 1
