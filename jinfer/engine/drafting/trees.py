"""Speculation with trees of drafts, which grow from the guesses of each step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from jinfer.config.engine import EngineConfig
from jinfer.engine.drafting.chains import Speculation, make_room
from jinfer.engine.pages.holdings import Holdings
from jinfer.engine.plan import Drafts, Plan
from jinfer.engine.request import Request
from jinfer.speculation import trees as draft_tree
from jinfer.speculation.lookahead import Lookahead
from jinfer.speculation.medusa_tree import parents_of


def make_speculation(config: EngineConfig, now: Callable[[], float]) -> Speculation | None:
    """Returns the speculation that `config` asks for, or None."""
    if config.speculation is None:
        return None
    trees = {"medusa": MedusaSpeculation, "lookahead": LookaheadSpeculation}
    return trees.get(config.speculation.method, Speculation)(config, now)


def draft(
    speculation: Speculation | None,
    decodes: list[Request],
    budget: int,
    holdings: Holdings,
    *,
    is_tree: bool = False,
    is_mixed: bool = False,
) -> list[Drafts]:
    """Returns each decode's drafts, see `Speculation.draft`.

    None are drafted without speculation, or if it drafts chains where `is_tree` and vice versa.
    """
    if speculation is None or speculation.is_tree != is_tree:
        return [Drafts()] * len(decodes)
    return speculation.draft(decodes, budget, holdings, is_mixed=is_mixed)


class TreeSpeculation(Speculation):
    """Trees of drafts for the sequences of an engine; subclasses grow them."""

    is_tree = True

    def draft(
        self, decodes: list[Request], budget: int, holdings: Holdings, *, is_mixed: bool
    ) -> list[Drafts]:
        """Returns each decode's tree, as `Speculation.draft` does."""
        if self._stays_paused(decodes):
            return [Drafts()] * len(decodes)
        if self.length is not None:
            depth = self.config.max_depth
            depths = [min(depth, request.num_unplanned_outputs - 1) for request in decodes]
            if not self.length.choose(depths, may_try=not is_mixed):
                self._pause(len(decodes))
                return [Drafts()] * len(decodes)
        drafts = []
        for request in decodes:
            proposed = cut(self.grow(request), request.num_unplanned_outputs - 1)
            room = make_room(request, min(len(proposed), max(0, budget)), holdings)
            most = max(0, min(budget, room))
            assert proposed.parents is not None
            drafts.append(Drafts(proposed.token_ids[:most], proposed.parents[:most]))
            budget -= len(drafts[-1])
        return drafts

    def grow(self, request: Request) -> Drafts:
        """Returns the tree to verify after the known tokens, most likely drafts first."""
        raise NotImplementedError

    def take_guesses(
        self,
        plan: Plan,
        samples: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[Sequence[int]]],
    ) -> None:
        """Stores a step's guesses, before its samples are committed.

        Args:
          plan, samples: as of `Scheduler.commit`.
          guesses: [S][K][R], see `steps.tree.tree_step`.
        """
        raise NotImplementedError


class MedusaSpeculation(TreeSpeculation):
    """Trees of guesses by Medusa heads, which come with every step that samples.

    Args:
      config: limits; `config.speculation.tree` is the tree.
      now: a clock in seconds.
    """

    def __init__(self, config: EngineConfig, now: Callable[[], float]) -> None:
        super().__init__(config, now)
        assert self.config.tree is not None
        self._nodes = self.config.tree
        self._parents = parents_of(self.config.tree)
        # By request: the length of the text that the guesses follow, and the guesses.
        self._guesses: weakref.WeakKeyDictionary[Request, tuple[int, Sequence[Sequence[int]]]]
        self._guesses = weakref.WeakKeyDictionary()

    def grow(self, request: Request) -> Drafts:
        """Returns the heads' guesses; none if the text has changed since they were made."""
        length, guesses = self._guesses.get(request, (-1, ()))
        if length != _num_known(request):
            return Drafts((), ())
        tokens = tuple(guesses[len(node) - 1][node[-1]] for node in self._nodes)
        return Drafts(tokens, self._parents)

    def take_guesses(
        self,
        plan: Plan,
        samples: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[Sequence[int]]],
    ) -> None:
        """Stores the guesses of the sequences that sampled."""
        for seq, tokens, found in zip(plan.seqs, samples, guesses):
            if tokens:
                self._guesses[seq.request] = _num_known(seq.request) + len(tokens), found


class LookaheadSpeculation(TreeSpeculation):
    """Trees of n-grams and of the lookahead window that finds them, kept per request.

    Args:
      config: limits, and the sizes in `config.speculation`.
      now: a clock in seconds.
    """

    def __init__(self, config: EngineConfig, now: Callable[[], float]) -> None:
        super().__init__(config, now)
        # By request: its window and n-grams, and the size of the last tree.
        self._lookaheads: weakref.WeakKeyDictionary[Request, tuple[Lookahead, int]]
        self._lookaheads = weakref.WeakKeyDictionary()

    def grow(self, request: Request) -> Drafts:
        """Returns the n-grams that begin with the newest token, and the window."""
        lookahead, _ = self._lookaheads.get(request, (None, 0))
        if lookahead is None:
            config = self.config
            lookahead = Lookahead(
                config.window, config.ngram_size, config.num_guesses, seed=request.seed
            )
        drafts = Drafts(*lookahead.grow(request.known_token_ids))
        self._lookaheads[request] = lookahead, len(drafts)
        return drafts

    def take_guesses(
        self,
        plan: Plan,
        samples: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[Sequence[int]]],
    ) -> None:
        """Stores the model's guesses after the nodes of each tree that was verified whole."""
        for seq, tokens, said in zip(plan.seqs, samples, guesses):
            lookahead, size = self._lookaheads.get(seq.request, (None, 0))
            if lookahead is not None and tokens and seq.num_drafts == size > 0:
                lookahead.learn([ranks[0] for ranks in said], len(tokens))


def _num_known(request: Request) -> int:
    return request.num_prompt_tokens + len(request.output_token_ids)


def cut(drafts: Drafts, depth: int) -> Drafts:
    """Removes the nodes that are more than `depth` levels below the root."""
    assert drafts.parents is not None
    levels = draft_tree.depths(drafts.parents)
    if max(levels, default=0) <= depth:
        return drafts
    kept = [i for i, level in enumerate(levels) if level <= depth]
    numbers = {0: 0} | {i + 1: n for n, i in enumerate(kept, 1)}
    return Drafts(
        tuple(drafts.token_ids[i] for i in kept),
        tuple(numbers[drafts.parents[i]] for i in kept),
    )
