"""Values that a field may be given: of every kind, valid for some and strange for most."""

from __future__ import annotations

import collections
import decimal
import fractions
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

LONE = "\ud800"


def _deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def _scalars() -> list[Any]:
    huge = [2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**30, -(10**30)]
    floats = [0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e-7, 1e308, -1e308]
    ends = [float("nan"), float("inf"), -float("inf")]
    return [None, True, False, 0, 1, 2, 7, -1, -2, *huge, *floats, *ends]


def _texts() -> list[Any]:
    plain = ["", " ", "\n", "a", "7", "-1", "1e3", "nan", "true", "None", "auto", "xla", "ngram"]
    return [*plain, "é", "🙂", "a\u0301", LONE, f"a{LONE}b", "\x00", "a\nb", "x" * 5000, b"ab"]


def _numpy() -> list[Any]:
    scalars = [np.int8(-3), np.int32(3), np.int64(5), np.uint64(2**64 - 1), np.float16(0.5)]
    scalars += [np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("a")]
    arrays = [np.array(3), np.array(0.5), np.array([3]), np.array([0.5]), np.array([1, 2])]
    arrays += [np.array([[1, 2], [3, 4]]), np.array([]), np.array(["a"]), np.array([True])]
    arrays += [np.array([1, None], object), np.zeros((0, 3)), np.zeros(1000), np.array([1.0])]
    return [*scalars, *arrays, np.datetime64("2020-01-01")]


def _jax() -> list[Any]:
    scalars = [jnp.int32(3), jnp.float32(0.5), jnp.float32("nan"), jnp.bool_(True)]
    return [*scalars, jnp.array([1, 2]), jnp.zeros((2, 2)), jnp.zeros((0,)), jnp.ones(200)]


def _containers() -> list[Any]:
    lists = [[], [1], [1, 2], [[1], [2]], [None], [True], ["a"], [LONE], [1.5], [float("nan")]]
    lists += [[-1], [10**30], (1,), (), range(3), [np.int32(1)], [jnp.int32(1)], [b"a"], _deep(50)]
    dicts = [{}, {"a": 1}, {1: 2}, {1: float("nan")}, {None: 1}, {"7": 1}, {True: 1}, {1: [1]}]
    others = [{1, 2}, frozenset(), collections.OrderedDict(a=1), bytearray(b"a"), [1] * 3000]
    return [*lists, *dicts, *others, _deep(900)]


def _objects() -> list[Any]:
    numbers = [1 + 2j, decimal.Decimal("0.5"), fractions.Fraction(1, 3)]
    return [*numbers, object(), ..., print, int, pathlib.Path("x"), NotImplemented, slice(1)]


_KINDS: list[tuple[int, Callable[[], list[Any]]]] = [
    (8, _scalars),
    (4, _texts),
    (4, _numpy),
    (2, _jax),
    (4, _containers),
    (1, _objects),
]
_MADE: list[tuple[int, list[Any]]] = []


def strange(rng: random.Random) -> Any:
    """Returns any value of any kind; scalars come more often."""
    if not _MADE:
        _MADE.extend((weight, make()) for weight, make in _KINDS)
    values = rng.choices([v for _, v in _MADE], [w for w, _ in _MADE])[0]
    return rng.choice(values)


def json_strange(rng: random.Random) -> Any:
    """Returns a value that JSON can hold, by `json.dumps` with its NaN and infinities."""
    scalars = [None, True, False, 0, 1, -1, 2, 7, 10**30, -(10**30), 2**31, 2**63, 0.5, 1e308]
    ends = [float("nan"), float("inf"), -0.0, "", "a", "7", "é🙂", LONE, "x" * 3000, "\x00"]
    others = [[], [1], [None], [[1]], ["a"], {}, {"a": 1}, [1.5], [True], _deep(50), [1] * 200]
    return rng.choice([*scalars, *ends, *others])


def pick(rng: random.Random, valid: Callable[[random.Random], Any], share: float = 0.75) -> Any:
    """Returns a valid value with this probability, else a strange one."""
    return valid(rng) if rng.random() < share else strange(rng)


def some(rng: random.Random, names: Sequence[str], most: int) -> list[str]:
    """Returns 1 to `most` distinct names."""
    return rng.sample(list(names), min(len(names), rng.randint(1, most)))


def one_of(*values: Any) -> Callable[[random.Random], Any]:
    """Returns a chooser among values."""
    return lambda rng: rng.choice(values)
