"""Reads and checks single values from users; errors name the field.

Messages are one line of limited length, even for arrays and long texts.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
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
    """Returns a bool; refuses everything else, since a text "False" would be true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
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
    """Raises ValueError for a value of a wrong kind; optional ones may be None.

    Only Python's own kinds, since values that are kept must be hashable and print as a number.
    """
    for kind, names in {"int": ints, "float": floats, "bool": flags, "str": texts}.items():
        for name in names:
            value = values[name]
            if not (value is None and name in optional) and not _is_kind(value, kind):
                raise ValueError(f"{name} must be {_KINDS[kind][1]}, got {shown(value)}")


_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "an integer"),
    "float": ((int, float), "a finite number"),
    "bool": (bool, "True or False"),
    "str": (str, "a string"),
}


def _is_kind(value: Any, kind: str) -> bool:
    """Whether a value is of one of `_KINDS`: bools are no numbers, floats are in range of f32."""
    is_right = isinstance(value, _KINDS[kind][0]) and (
        kind == "bool" or not isinstance(value, bool)
    )
    return is_right and (kind != "float" or abs(value) <= MAX_FLOAT32)


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
        what = _KINDS[kind][1]
        if is_tuple:
            is_right = isinstance(value, tuple) and all(_is_kind(one, kind) for one in value)
            what = f"a tuple, each {what}"
        else:
            is_right = _is_kind(value, kind)
        if not is_right:
            raise ValueError(f"{prefix}{field.name} must be {what}, got {shown(value)}")
        if kind == "float" and type(value) is int:  # traced as they are, large ones overflow
            object.__setattr__(config, field.name, float(value))


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless these fields are positive integers of 31 bits, or None."""
    for name in names:
        value = getattr(config, name)
        if value is None or (type(value) is int and 0 < value < 2**31):
            continue
        raise ValueError(f"{name} must be a positive integer below 2**31, got {shown(value)}")


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
        if not isinstance(text, str):
            raise ValueError(f"{name} must hold strings, got {shown(text)}")
        require(text != "", f"{name} holds an empty string, which would match everywhere")
        # Half of a surrogate pair: no text that is decoded holds one, no tokenizer takes it.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{name} holds {shown(text)}, which is no Unicode text (was it UTF-8?)"
            )
    return tuple(dict.fromkeys(strings))


def check_keywords(
    owner: type, args: Sequence[Any], kwargs: Iterable[str], table: Mapping[str, str], example: str
) -> None:
    """Checks the arguments of a dataclass, for which it would raise a bare TypeError.

    Raises:
      TypeError: positional arguments.
      ValueError: a name that is no field of `owner`, with what to write instead.
    """
    if args:
        raise TypeError(
            f"{owner.__name__} takes keywords only, got {shown(args[0])}; write {example}"
        )
    for name in kwargs:
        if name not in owner.__dataclass_fields__:
            raise ValueError(_explain_unknown(owner, name, table))


def _explain_unknown(owner: Any, name: str, table: Mapping[str, str]) -> str:
    """Returns why `name` is no field of a dataclass, with the nearest field."""
    start = f"{owner.__name__} has no field {name!r}"
    if name in table:
        return f"{start}: {table[name]}"
    known = [field.name for field in dataclasses.fields(owner)]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
    return f"{start}; {hint}"
