"""Which cases of a parametrized test the default run takes."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thorough_but(cases: Iterable[str], *, default: Collection[str]) -> list[Any]:
    """Returns the cases, all but those of `default` marked `thorough`.

    Raises:
      ValueError: `default` names a case that is none.
    """
    cases = list(cases)
    unknown = set(default) - set(cases)
    if unknown:
        raise ValueError(f"no such cases: {sorted(unknown)}")
    return [
        case if case in default else pytest.param(case, marks=pytest.mark.thorough)
        for case in cases
    ]
