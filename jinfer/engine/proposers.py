"""Who proposes drafts, as the host sees it: one proposer a method; knows no scheduler, no device.

Some know their drafts before the step, from the text. Others make them inside the step, on the
device: of these the host knows only how many there are.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from jinfer.config import SpeculativeConfig
from jinfer.engine.request import Request
from jinfer.spec.ngram import NgramIndex


class Proposer(Protocol):
    """Proposes drafts of what follows a request's known tokens."""

    def propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns at most `limit` drafts, `limit` being 1 or more.

        Asked once for each decode of a plan; all tokens of the request are known to the host.
        """
        ...


class NgramProposer:
    """Looks up in the request's own text what came next before."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._indices: weakref.WeakKeyDictionary[Request, NgramIndex] = weakref.WeakKeyDictionary()

    def propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns what followed the last time that the text ended alike."""
        index = self._indices.get(request)
        if index is None:
            config = self._config
            index = NgramIndex(config.prompt_lookup_min, config.prompt_lookup_max)
            self._indices[request] = index
        return tuple(index.propose(request.known_token_ids, limit))


def make_proposer(config: SpeculativeConfig) -> Proposer:
    """Returns the proposer of `config.method`."""
    return NgramProposer(config)
