"""How many drafts each sequence gets, what they are, and how many stood; knows no device.

The scheduler asks before every step and tells after it.
"""

from __future__ import annotations

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
        sizes = (self.config.max_depth,) if self.is_tree else Buckets.of(config).drafts
        self.length = DraftLength(sizes) if self.config.adaptive else None
        self._now = now
        self._noted_at = now()
        self._proposer = None if self.is_tree else make_proposer(self.config)
        # What a text repeats, only the text tells; others can draft at any time, at some upkeep.
        self._is_lookup = self.config.method == "ngram"
        self.is_resting = False  # whether the plan being made does without drafts, and all for them
        self._has_rested = False  # any since the last one with drafts
        self._num_rest = 0  # steps to come that need not look for drafts
        self._rest_batch = 0  # of batches of this size
        self._steps_a_plan = config.num_decode_steps
        # Of all requests; by position, or of a tree by level.
        depth = self.config.max_depth
        self._totals = RequestMetrics(num_drafted_at=[0] * depth, num_accepted_at=[0] * depth)
        self._last_log = now()

    @property
    def will_rest(self) -> bool:
        """Whether the next plan needs no tokens of the last one to draft after."""
        return self._num_rest > 0

    def draft(
        self, decodes: list[Request], budget: int, holdings: Holdings, *, is_mixed: bool
    ) -> list[Drafts]:
        """Returns each decode's drafts, having taken the pages that they need.

        Only free or cached pages: nobody is preempted for a draft.

        Args:
          decodes: running requests, with a page for their next token each.
          budget: most drafts in all.
          holdings: gives the pages.
          is_mixed: the step is expected to prefill as well, so its time tells nothing.
        """
        if not decodes or self._is_at_rest(decodes):
            return [Drafts()] * len(decodes)
        proposed = [self._propose(r, r.num_unplanned_outputs - 1) for r in decodes]
        most = self.config.num_speculative_tokens
        if self.length is not None:
            lengths = [len(ids) for ids in proposed]
            most = self.length.choose(lengths, may_try=not is_mixed)
            if not most:
                self._rest(len(lengths))
        drafts = []
        for request, ids in zip(decodes, proposed):
            ids = ids[: max(0, min(budget, most))]
            drafts.append(Drafts(ids[: make_room(request, len(ids), holdings)]))
            budget -= len(drafts[-1])
        return drafts

    def _is_at_rest(self, decodes: list[Request]) -> bool:
        """Whether a plan for these does without drafts because it was decided before."""
        if len(decodes).bit_length() != self._rest_batch:
            self._num_rest = 0
        # Where steps are under way, nobody knows yet after what to draft.
        self.is_resting = self._num_rest > 0 or (
            self.length is not None and any(request.num_in_flight for request in decodes)
        )
        self._num_rest = max(0, self._num_rest - self._steps_a_plan)
        self._has_rested |= self.is_resting
        return self.is_resting

    def _rest(self, num_seqs: int) -> None:
        """Lets the plan being made do without drafts, and those to come that are known to."""
        assert self.length is not None
        num_steps = self.length.num_steps_without([self.config.max_depth] * num_seqs)
        if num_steps or not self._is_lookup:
            self.is_resting = self._has_rested = True
            self._rest_batch = num_seqs.bit_length()
            self._num_rest = max(0, num_steps - self._steps_a_plan)

    def _propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns at most `limit` drafts of what follows the known tokens, all of them known."""
        limit = min(limit, self.config.num_speculative_tokens)
        if self._proposer is None or limit <= 0 or request.num_in_flight:
            return ()
        return self._proposer.propose(request, limit)

    def note(
        self,
        plan: Plan,
        samples: Sequence[Sequence[int]],
        is_sound: Sequence[bool] | None,
        progress: Sequence[Progress],
    ) -> None:
        """Counts a step: the drafts of its sequences, and the tokens that came of them.

        `progress` is what the step brought to requests: no tokens beyond the end of a text.
        """
        now = self._now()
        if self.length is not None and not any(seq.is_prefill for seq in plan.seqs):
            # A plan made while another was under way has cost what came after the other's end.
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
        # A draft model is not fed by steps without drafts, which are plain ones.
        is_plain = plan.is_resting or (not depth and self.config.method == "draft")
        self._has_rested |= is_plain
        if self._is_lookup or is_plain:
            length.note_step(num_seqs, depth, seconds, plan.num_steps)
            return
        # The first step after a rest may have to make up for what was left out: the drafter's KV,
        # or (with Medusa heads, in a step without drafts) the guesses.
        has_rested, self._has_rested = self._has_rested, False
        if has_rested and self.config.method in ("draft", "medusa"):
            length.note_resumption(num_seqs, seconds)
        elif depth:
            length.note_step(num_seqs, depth, seconds)

    def _note_sequence(
        self, request: Request, num_drafts: int, num_accepted: int, num_tokens: int
    ) -> None:
        num_accepted = min(num_accepted, num_drafts)
        num_steps = 1 if num_drafts else num_tokens  # several may stay on the device
        if self.length is not None:
            self.length.note_drafts(num_drafts, num_accepted)
        for metrics in (request.metrics, self._totals):
            metrics.num_decode_steps += num_steps
            metrics.num_decode_tokens += num_tokens
            metrics.note_drafts(num_drafts, num_accepted)

    def metrics(self) -> dict[str, float]:
        """Returns counts since the engine was made.

        `acceptance_at_i` is the share of i-th drafts that stood, those included that were not
        reached because an earlier one fell.
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
            "speculation (%s): %.2f tokens a step, %d of %d drafts accepted "
            "(%.0f %%; by position %s)",
            self.config.method,
            values["tokens_per_step"],
            values["num_accepted_tokens"],
            values["num_drafted_tokens"],
            100 * values["acceptance_rate"],
            ", ".join(f"{100 * share:.0f} %" for share in self._totals.acceptance_at),
        )


def make_room(request: Request, num_drafts: int, holdings: Holdings) -> int:
    """Takes free pages for drafts after the newest token; returns how many there is room for.

    Only free or cached pages: nobody is preempted for a draft.
    """
    missing = holdings.num_missing_pages(request, 1 + num_drafts)
    request.pages += holdings.prefix.alloc(min(missing, holdings.prefix.num_available))
    return len(request.pages) * holdings.page_size - request.num_computed_tokens - 1
