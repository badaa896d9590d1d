"""Data that the scheduler hands out: plans, progress and counts."""

from __future__ import annotations

import dataclasses

from jinfer.engine.request import Request
from jinfer.speculation import trees as draft_tree


@dataclasses.dataclass(frozen=True)
class Drafts:
    """Drafted tokens after a sequence's newest token: a chain or a tree.

    Attributes:
      token_ids: drafts; in a tree, each comes after its parent.
      parents: the shape of a tree, see `speculation.trees`; None: a chain.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def depth(self) -> int:
        """Most drafts that can be accepted."""
        if self.parents is None:
            return len(self.token_ids)
        return max(draft_tree.depths(self.parents), default=0)


@dataclasses.dataclass(frozen=True)
class ScheduledSeq:
    """What one step does for one request.

    Attributes:
      request: the request; its `pages` and `row` are valid when the plan is made, not later.
      start: first position whose KV the step computes.
      num_tokens: input positions of the step: 1, 1 + num_drafts, or the length of a prefill chunk.
      num_samples: tokens that it samples: 0 when a chunk does not reach the end of the known
        tokens, else 1, or up to `Plan.num_steps` in a decode plan of several steps. With drafts:
        between 1 and 1 + drafts.depth.
      is_new_row: the sampler row must be initialized before the step, from the request's prompt
        and output tokens, all of which are known.
      is_prefill: the host knows all input tokens. Otherwise the input is the newest sampled token,
        which the device has and the host may not know yet.
      pages: pages that the step writes to; at its commit they may belong to another request.
      uses_cached_kv: part of the KV that it reads was found in the prefix cache.
      drafts: drafts after the newest token, for the step to verify.
      is_masked: what it samples is restricted by the request's token masks, which need all tokens
        before it: none is in flight.
    """

    request: Request
    start: int
    num_tokens: int
    num_samples: int
    is_new_row: bool
    is_prefill: bool
    pages: tuple[int, ...] = ()
    uses_cached_kv: bool = False
    drafts: Drafts = Drafts()
    is_masked: bool = False

    @property
    def num_drafts(self) -> int:
        """Drafts that the step verifies."""
        return len(self.drafts)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether this chunk predicts prompt tokens whose logprobs are wanted and not yet known."""
        request = self.request
        if request.prompt_logprobs is None:
            return False
        last_target = min(self.start + self.num_tokens, request.num_prompt_tokens - 1)
        return last_target > self.start and last_target >= len(request.prompt_logprobs)


@dataclasses.dataclass(frozen=True)
class PageMoves:
    """Operations on whole pages before a step, in this order.

    Attributes:
      saved: (page, slot) pairs to copy to host memory, before the page is overwritten.
      cleared: pages to fill with zeros: they may hold NaN of a request that failed.
      copied: (from, to, tokens): the first `tokens` places of a page to copy. Earlier plans have
        written them.
      loaded: (slot, page) pairs to copy from host memory.
    """

    saved: tuple[tuple[int, int], ...] = ()
    cleared: tuple[int, ...] = ()
    copied: tuple[tuple[int, int, int], ...] = ()
    loaded: tuple[tuple[int, int], ...] = ()

    @property
    def is_transfer(self) -> bool:
        """Whether pages are copied to the host or from it."""
        return bool(self.saved or self.loaded)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step.

    Attributes:
      seqs: decodes first, then prefill chunks.
      num_steps: decode steps to run on the device: 1, or more when all of `seqs` are decodes; the
        pages for each sequence's `num_samples` tokens are then in its `pages`.
      is_decode: every sequence has one input token.
      step_id: number of the plan, counted from 0.
      moves: operations on whole pages before the step.
      is_speculation_paused: the step has no drafts and computes nothing for later ones.
      planned_at: time at which planning began, in seconds.
    """

    seqs: tuple[ScheduledSeq, ...]
    num_steps: int
    is_decode: bool
    step_id: int
    moves: PageMoves = PageMoves()
    is_speculation_paused: bool = False
    planned_at: float = 0.0

    @property
    def max_drafts(self) -> int:
        """Most drafts that any of its sequences verifies."""
        return max(seq.num_drafts for seq in self.seqs)

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV the step computes."""
        return sum(max(seq.num_tokens, seq.num_samples) for seq in self.seqs)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Result of a commit for one request: new tokens, new text, and whether it has ended."""

    request: Request
    new_token_ids: list[int]
    new_text: str
    finished: bool


@dataclasses.dataclass
class SchedulerStats:
    """Counts since the scheduler was made."""

    num_plans: int = 0
    num_admissions: int = 0
    num_preemptions: int = 0
    num_scheduled_tokens: int = 0  # computed by all plans; recomputed tokens count again
    num_output_tokens: int = 0  # accepted by commit
    num_discarded_tokens: int = 0  # sampled beyond the end of a request
    num_finished: int = 0  # for any reason
    num_errors: int = 0  # of those, with an error
    num_looked_up_tokens: int = 0  # prompt tokens, at first admission, that may be cached
    num_cached_tokens: int = 0  # of those, found in the prefix cache
    num_copied_pages: int = 0  # pages copied in part from the prefix cache
