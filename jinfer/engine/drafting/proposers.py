"""Proposers of drafts on the host, one per method.

The n-gram proposer takes drafts from the text before the step. Draft models make them inside the
step, on the device: the host knows only how many there are.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from jinfer.config.speculative import SpeculativeConfig
from jinfer.engine.request import Request
from jinfer.speculation.ngram import NgramIndex

ON_DEVICE = -1  # placeholder of a draft that the step makes


class Proposer(Protocol):
    """Proposes drafts of what follows a request's known tokens."""

    def propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns at most `limit` drafts; ON_DEVICE for a draft whose id the host does not know.

        Called once for each decode of a plan, with `limit` at least 1. The host knows all tokens
        of the request.
        """
        ...


class NgramProposer:
    """Proposes the tokens that followed earlier occurrences of the text's last tokens."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._indices: weakref.WeakKeyDictionary[Request, NgramIndex] = weakref.WeakKeyDictionary()

    def propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns the most frequent continuation, see `NgramIndex.propose`."""
        index = self._indices.get(request)
        if index is None:
            config = self._config
            index = NgramIndex(config.prompt_lookup_min, config.prompt_lookup_max)
            self._indices[request] = index
        return tuple(index.propose(request.known_token_ids, limit))


class DeviceProposer:
    """Proposes drafts that a model makes inside the step."""

    def propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns `limit` unknown drafts: a model can always continue."""
        return (ON_DEVICE,) * limit


def make_proposer(config: SpeculativeConfig) -> Proposer:
    """Returns the proposer of `config.method`."""
    return NgramProposer(config) if config.method == "ngram" else DeviceProposer()
