"""How far an engine trusts what a request computes: one state, changed by errors of its steps.

  TRUSTED   --STEP_FAILED-->  SUSPECT            --STEP_COMMITTED-->  TRUSTED
     |                           |
NAN_FROM_CACHE              NAN_FROM_CACHE
     v                           v
  ISOLATED  --STEP_FAILED-->  ISOLATED_SUSPECT   --STEP_COMMITTED-->  ISOLATED
"""

from __future__ import annotations

import enum


class Trust(enum.Enum):
    """State of a request.

    TRUSTED: none of its steps went wrong.
    SUSPECT: it was part of the last failed step and may be the cause; of suspects only one runs at
      a time.
    ISOLATED: it computed NaN from KV that it had found in the prefix cache, so it must not read
      that cache again.
    ISOLATED_SUSPECT: both.
    """

    TRUSTED = "trusted"
    SUSPECT = "suspect"
    ISOLATED = "isolated"
    ISOLATED_SUSPECT = "isolated and suspect"

    @property
    def is_suspect(self) -> bool:
        """Whether the request may be the cause of the last failed step."""
        return self in (Trust.SUSPECT, Trust.ISOLATED_SUSPECT)

    @property
    def is_isolated(self) -> bool:
        """Whether the request must not read the prefix cache."""
        return self in (Trust.ISOLATED, Trust.ISOLATED_SUSPECT)

    def after(self, event: TrustEvent) -> Trust:
        """Returns the state that follows `event`."""
        return TRANSITIONS.get((self, event), self)


class TrustEvent(enum.Enum):
    """What changes the state: a step of the request failed, was committed, or gave NaN."""

    STEP_FAILED = "step failed"
    STEP_COMMITTED = "step committed"
    NAN_FROM_CACHE = "NaN from cached KV"


# Pairs that are not listed leave the state as it is.
TRANSITIONS = {
    (Trust.TRUSTED, TrustEvent.STEP_FAILED): Trust.SUSPECT,
    (Trust.TRUSTED, TrustEvent.NAN_FROM_CACHE): Trust.ISOLATED,
    (Trust.SUSPECT, TrustEvent.STEP_COMMITTED): Trust.TRUSTED,
    (Trust.SUSPECT, TrustEvent.NAN_FROM_CACHE): Trust.ISOLATED_SUSPECT,
    (Trust.ISOLATED, TrustEvent.STEP_FAILED): Trust.ISOLATED_SUSPECT,
    (Trust.ISOLATED_SUSPECT, TrustEvent.STEP_COMMITTED): Trust.ISOLATED,
}
