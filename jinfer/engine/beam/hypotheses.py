"""The beams of one prompt, with their pages: who goes on, who is finished, when to stop.

Knows nothing of devices. Beams share the pages of what they have in common; the page that each
writes to is its own, copied when beams part in the middle of it:

    pages of 4, after "a b c d e"      beam 0  [0 1]
    it goes on with f and with g       beam 0  [0 1]   beam 1  [0 2]   copy 1 -> 2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jinfer.config.beam_params import BeamSearchParams
from jinfer.engine.pages.pool import PagePool


class Candidate(NamedTuple):
    """A continuation: which beam, which token, its log probability, and the sum with it."""

    beam: int
    token: int
    logprob: float
    total: float


class Token(NamedTuple):
    """A token found, linked to the one before it, so that beams share what they have in common."""

    before: Token | None
    token: int
    logprob: float

    def path(self) -> list[Token]:
        """Returns the tokens from the first one to this."""
        tokens: list[Token] = []
        node: Token | None = self
        while node is not None:
            tokens.append(node)
            node = node.before
        return tokens[::-1]


@dataclasses.dataclass
class Beam:
    """A text that goes on.

    Attributes:
      last: its newest token; None for the bare prompt.
      total: sum of log probabilities.
      pages: numbers in the search's own pool.
    """

    last: Token | None
    total: float
    pages: list[int]


class Finished(NamedTuple):
    """A text that has ended: its score, its last token, the sum, and whether at an end token."""

    score: float
    last: Token
    total: float
    is_stopped: bool


class Search:
    """Beam search over one prompt, step by step.

    Args:
      params: of the search.
      num_prompt_tokens: at least 1.
      max_tokens: output tokens at most, the context considered.
      end_token_ids: what ends a text.
      page_size: tokens in a page.

    Attributes:
      beams: texts that go on, best first; none once the search is over.
      finished: the best finished texts, best first; at most `beam_width`.
      num_computed: places whose KV each beam has.
    """

    def __init__(
        self,
        params: BeamSearchParams,
        *,
        num_prompt_tokens: int,
        max_tokens: int,
        end_token_ids: Sequence[int],
        page_size: int,
    ) -> None:
        self.params = params
        self.max_tokens = max_tokens
        self.end_token_ids = frozenset(end_token_ids)
        self.page_size = page_size
        self.num_prompt_tokens = num_prompt_tokens
        self.num_computed = num_prompt_tokens - 1
        self.pool = PagePool(
            num_pages(params, num_prompt_tokens, max_tokens=max_tokens, page_size=page_size)
        )
        self.beams = [Beam(None, 0.0, self.pool.alloc(-(-num_prompt_tokens // page_size)))]
        self.finished: list[Finished] = []

    @property
    def is_over(self) -> bool:
        """Whether nothing goes on."""
        return not self.beams

    def advance(self, candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
        """Takes in the best continuations of all beams, best first.

        Returns:
          (from, to) for each page to be copied before the next step.
        """
        width = self.params.beam_width
        self.num_computed += 1
        length = self.num_computed + 1 - self.num_prompt_tokens  # tokens found, this one included
        is_last = length == self.max_tokens
        going_on: list[Candidate] = []
        for place, candidate in enumerate(candidates):
            is_stopped = candidate.token in self.end_token_ids
            if not is_stopped and not is_last:
                going_on.append(candidate)
            elif place < width:
                score = candidate.total / length**self.params.length_penalty
                last = self._extend(candidate)
                self.finished.append(Finished(score, last, candidate.total, is_stopped))
        self.finished.sort(key=lambda text: text.score, reverse=True)
        del self.finished[width:]
        return self._go_on(going_on[:width], length)

    def _extend(self, candidate: Candidate) -> Token:
        return Token(self.beams[candidate.beam].last, candidate.token, candidate.logprob)

    def _go_on(self, candidates: list[Candidate], length: int) -> list[tuple[int, int]]:
        """Replaces the beams by their continuations, or by nothing where the search is over."""
        if not candidates or not self._can_improve(candidates[0].total, length):
            candidates = []
        beams = [
            Beam(self._extend(c), c.total, self.pool.fork(self.beams[c.beam].pages))
            for c in candidates
        ]
        for beam in self.beams:
            self.pool.free(beam.pages)
        copies = []
        for beam in beams:
            if self.num_computed % self.page_size == 0:
                beam.pages += self.pool.alloc(1)
            elif self.pool.count(beam.pages[-1]) > 1:
                (own,) = self.pool.alloc(1)
                copies.append((beam.pages[-1], own))
                self.pool.free(beam.pages[-1:])
                beam.pages[-1] = own
        self.beams = beams
        return copies

    def _can_improve(self, best_total: float, length: int) -> bool:
        """Whether what goes on may yet replace what is finished; see `early_stopping`."""
        early, penalty = self.params.early_stopping, self.params.length_penalty
        if len(self.finished) < self.params.beam_width:
            return True
        if early is True:
            return False
        if early == "never" and penalty > 0:
            length = self.max_tokens
        return best_total / length**penalty > self.finished[-1].score


def num_pages(
    params: BeamSearchParams, num_prompt_tokens: int, *, max_tokens: int, page_size: int
) -> int:
    """Returns the most pages that a search holds: when all beams part right after the prompt.

    The last token found needs no place: nothing comes after it.
    """
    shared = num_prompt_tokens // page_size
    longest = -(-(num_prompt_tokens + max_tokens - 1) // page_size)
    return shared + params.beam_width * max(longest - shared, 0)
