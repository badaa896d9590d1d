"""Who proposes drafts, as the host sees it: one proposer a method; knows no scheduler, no device.

Some know their drafts before the step, from the text. Others make them inside the step, on the
device: of these the host knows only how many there are.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from jinfer.config.speculative import SpeculativeConfig
from jinfer.engine.request import Request
from jinfer.speculation.ngram import NgramIndex

ON_DEVICE = -1  # stands for a draft that the step makes


class Proposer(Protocol):
    """Proposes drafts of what follows a request's known tokens."""

    def propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns at most `limit` drafts, `limit` being 1 or more; ON_DEVICE for ids not known.

        Asked once for each decode of a plan; all tokens of the request are known to the host.
        """
        ...


class NgramProposer:
    """Looks up in the request's own text what came next before."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._indices: weakref.WeakKeyDictionary[Request, NgramIndex] = weakref.WeakKeyDictionary()

    def propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns what mostly followed when the text ended alike."""
        index = self._indices.get(request)
        if index is None:
            config = self._config
            index = NgramIndex(config.prompt_lookup_min, config.prompt_lookup_max)
            self._indices[request] = index
        return tuple(index.propose(request.known_token_ids, limit))


class DeviceProposer:
    """Leaves the drafts to a model that writes them inside the step."""

    def propose(self, request: Request, limit: int) -> tuple[int, ...]:
        """Returns as many as there may be: a model can always go on."""
        return (ON_DEVICE,) * limit


def make_proposer(config: SpeculativeConfig) -> Proposer:
    """Returns the proposer of `config.method`."""
    return NgramProposer(config) if config.method == "ngram" else DeviceProposer()
