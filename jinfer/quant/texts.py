"""Reads calibration and evaluation text from files and packs it into token sequences."""

from __future__ import annotations

import gzip
import json
import pathlib
import random
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from jinfer.config.fields import require

_WHOLE = ("text", "content")
_PARTS = (
    "system",
    "instruction",
    "prompt",
    "input",
    "question",
    "completion",
    "output",
    "response",
)

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens."""


def read_texts(path: str | pathlib.Path) -> list[str]:
    """Returns the documents of a text or JSONL file, plain or .gz; a text file is one document.

    A JSONL row is its "text" or "content", else its other known strings ("prompt", "completion",
    "instruction", ...) one below the other.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, not UTF-8, or a row has no known field.
    """
    path = pathlib.Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not a text file in UTF-8, or is cut short ({error})"
        ) from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"{path} is not a text file: {error.strerror}") from error
    is_jsonl = ".jsonl" in path.suffixes
    documents = [text] if not is_jsonl else _rows(path, text)
    documents = [d for d in documents if d.strip()]
    require(bool(documents), f"{path} holds no text")
    return documents


def _rows(path: pathlib.Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 too
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if isinstance(row, str):
            row = {"text": row}
        require(isinstance(row, dict), f"{path}, line {number}: expected an object or a string")
        found = [row[k] for k in _WHOLE if isinstance(row.get(k), str)][:1]
        found = found or [row[k] for k in _PARTS if isinstance(row.get(k), str)]
        require(
            bool(found),
            f"{path}, line {number}: no text in fields {sorted(row)}; known are "
            f"{', '.join((*_WHOLE, *_PARTS))}",
        )
        documents.append("\n".join(found))
    return documents


def pack(
    documents: Sequence[str], encode: Encode, *, num_sequences: int, length: int, seed: int = 0
) -> np.ndarray:
    """Returns i32 [num_sequences, length]: documents in random order, end to end, then cut.

    Raises:
      ValueError: there are too few tokens.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    wanted = num_sequences * length
    tokens: list[int] = []
    for i in order:
        tokens += encode(documents[i] + "\n\n")
        if len(tokens) >= wanted:
            break
    require(
        len(tokens) >= wanted,
        f"calibration wants {num_sequences} sequences of {length} tokens, the text has "
        f"{len(tokens)} tokens: give more text or ask for fewer",
    )
    return np.asarray(tokens[:wanted], np.int32).reshape(num_sequences, length)


def windows(
    text: str, encode: Encode, *, length: int, num_windows: int | None = None
) -> np.ndarray:
    """Returns i32 [n, length]: consecutive windows of a text's tokens; the rest is dropped.

    Raises:
      ValueError: there is not one whole window, or fewer than asked for.
    """
    tokens = np.asarray(encode(text), np.int32)
    available = len(tokens) // length
    wanted = available if num_windows is None else num_windows
    require(
        0 < wanted <= available,
        f"the text has {available} windows of {length} tokens ({len(tokens)} tokens), "
        f"wanted {wanted or 'at least 1'}",
    )
    return tokens[: wanted * length].reshape(wanted, length)
