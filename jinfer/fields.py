"""Reads single values that users give: of the kind that a field wants, or refused by its name.

Messages are one line of limited length, whatever was given: an array, a whole text.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

MAX_MESSAGE = 1000
MAX_FLOAT32 = 3.4028234e38


def one_line(message: str) -> str:
    """Returns a message as one line of at most about `MAX_MESSAGE` characters."""
    text = " ".join(message.split())
    if len(text) <= MAX_MESSAGE:
        return text
    half = MAX_MESSAGE // 2
    return f"{text[:half]} ... {text[-half:]}"  # the end says what to do


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message`, in one line, unless `condition` holds."""
    if not condition:
        raise ValueError(one_line(message))


def shown(value: Any, limit: int = 200) -> str:
    """Prints a value in one short line, with its type."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of an integer with thousands of digits, or of a foreign class
        return f"a value that cannot be shown ({type(value).__name__})"
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return f"{text} ({type(value).__name__})"


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"


def read_int(name: str, value: Any) -> int:
    """Returns an integer of any kind as an int of at most 65 bits.

    Bools, floats, strings, lists and larger ones are refused.
    """
    # numpy's bool_ has no __index__; Python's has, and True would quietly mean 1.
    if not _is_bool(value) and not getattr(value, "ndim", 0):
        try:
            number = operator.index(value)
        except (TypeError, ValueError):
            pass
        else:
            size = number.bit_length()
            require(size <= 65, f"{name} must be below 2**64 in size, got one of {size} bits")
            return number
    raise ValueError(f"{name} must be an integer, got {shown(value)}")


def read_float(name: str, value: Any) -> float:
    """Returns a number of any kind as a float; bools, strings, lists and NaN are refused."""
    kind = str(getattr(value, "dtype", ""))
    is_number = hasattr(value, "__float__") and not isinstance(value, (str, bytes))
    if is_number and not (_is_bool(value) or getattr(value, "ndim", 0) or "complex" in kind):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name} is beyond all floats: {shown(value)}") from None
        except (TypeError, ValueError):
            pass
        else:
            require(number == number, f"{name} must be a number, got NaN")
            return number
    raise ValueError(f"{name} must be a number, got {shown(value)}")


def read_bool(name: str, value: Any) -> bool:
    """Returns a bool; everything else is refused, for a text "False" would be true."""
    require(isinstance(value, bool), f"{name} must be True or False, got {shown(value)}")
    return value


def check_kinds(
    values: Mapping[str, Any],
    *,
    ints: Iterable[str] = (),
    floats: Iterable[str] = (),
    flags: Iterable[str] = (),
    texts: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> None:
    """Raises ValueError for a value of another kind than its name says; optional ones may be None.

    Python's own kinds alone: what is kept as it is must be hashable, and print as a number.
    """
    kinds: list[tuple[Iterable[str], Any, str]] = [
        (ints, int, "an integer"),
        (floats, (int, float), "a number"),
        (flags, bool, "True or False"),
        (texts, str, "a text"),
    ]
    for names, kind, what in kinds:
        for name in names:
            value = values[name]
            if value is None and name in optional:
                continue
            is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            is_nan = isinstance(value, float) and value != value
            require(is_right and not is_nan, f"{name} must be {what}, got {shown(value)}")


_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "an integer"),
    "float": ((int, float), "a finite number"),
    "bool": (bool, "True or False"),
    "str": (str, "a text"),
}
_ANNOTATION = re.compile(r"(?:(tuple)\[)?(int|float|bool|str)(?:, \.\.\.\])?( \| None)?")


def check_fields(config: Any, prefix: str = "") -> None:
    """Checks the fields of a dataclass that are plain values, tuples of them or None.

    Integers in the place of floats become floats.

    Raises:
      ValueError: with the name of the first that is not what its annotation says.
    """
    for field in dataclasses.fields(config):
        found = _ANNOTATION.fullmatch(str(field.type))
        if found is None:
            continue
        is_tuple, kind, is_optional = found.groups()
        value = getattr(config, field.name)
        if is_optional and value is None:
            continue
        kinds, what = _KINDS[kind]
        values = value if is_tuple and isinstance(value, tuple) else (value,)
        is_right = isinstance(value, tuple) or not is_tuple
        for one in values:
            is_right &= isinstance(one, kinds) and (kind == "bool" or not isinstance(one, bool))
            is_right = is_right and (kind != "float" or abs(one) <= MAX_FLOAT32)
        what = f"a tuple, each {what}" if is_tuple else what
        require(is_right, f"{prefix}{field.name} must be {what}, got {shown(value)}")
        if kind == "float" and type(value) is int:  # traced as they are, large ones overflow
            object.__setattr__(config, field.name, float(value))


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless these fields are positive integers, or None."""
    for name in names:
        value = getattr(config, name)
        is_positive = value is None or (type(value) is int and value > 0)
        require(is_positive, f"{name} must be a positive integer, got {value!r}")


def _items(name: str, value: Any, what: str) -> list[Any]:
    if not isinstance(value, (str, bytes, bytearray, Mapping)):
        try:
            return list(value)
        except TypeError:
            pass
    raise ValueError(f"{name} must be {what}, got {shown(value)}")


def read_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Returns `value` as distinct token ids in their first order."""
    items = _items(name, value, "a list of token ids")
    ids = tuple(dict.fromkeys(read_int(f"{name}[{i}]", x) for i, x in enumerate(items)))
    for token_id in ids:
        require(token_id >= 0, f"{name} holds the negative token id {token_id}")
    return ids


def read_strings(name: str, value: Any) -> tuple[str, ...]:
    """Returns `value` (None, a string or several) as distinct non-empty strings."""
    if value is None:
        return ()
    is_one = isinstance(value, str)
    strings = [value] if is_one else _items(name, value, "a string or a list of strings")
    for text in strings:
        require(isinstance(text, str), f"{name} must hold strings, got {shown(text)}")
        require(text != "", f"{name} holds an empty string, which would match everywhere")
        # Half of a surrogate pair: no text that is decoded holds one, no tokenizer takes it.
        is_text = not any("\ud800" <= character <= "\udfff" for character in text)
        require(is_text, f"{name} holds {shown(text)}, which is no Unicode text (was it UTF-8?)")
    return tuple(dict.fromkeys(strings))
