"""The states of trust in a request, and what each allows."""

import pytest

from jinfer.engine.safety.trust import TRANSITIONS, Trust, TrustEvent

FAILED, COMMITTED, NAN = TrustEvent


def after(*events):
    state = Trust.TRUSTED
    for event in events:
        state = state.after(event)
    return state


@pytest.mark.parametrize(
    ("events", "is_suspect", "is_isolated"),
    [
        ((), False, False),
        ((COMMITTED,), False, False),
        ((FAILED,), True, False),
        ((FAILED, FAILED), True, False),
        ((FAILED, COMMITTED), False, False),
        ((NAN,), False, True),
        ((NAN, COMMITTED), False, True),
        ((NAN, FAILED), True, True),
        ((FAILED, NAN), True, True),
        ((FAILED, NAN, COMMITTED), False, True),
        ((FAILED, NAN, COMMITTED, FAILED, COMMITTED), False, True),
    ],
    ids=lambda value: "-".join(e.name for e in value) if isinstance(value, tuple) else None,
)
def test_a_committed_step_clears_suspicion_and_nothing_ends_isolation(
    events, is_suspect, is_isolated
):
    state = after(*events)
    assert (state.is_suspect, state.is_isolated) == (is_suspect, is_isolated)


def test_every_transition_leads_to_another_state():
    assert all(state is not target for (state, _), target in TRANSITIONS.items())
