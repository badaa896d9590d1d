"""Finds the token sequences of a bad word."""

from __future__ import annotations

from typing import Any

from jinfer.config.fields import require

# Texts before a word. With vocabularies like SentencePiece's the empty context adds a space to the
# word, and the others do not. Byte-level ones join a space to the word.
_BEFORE = ("", " ", "\n")
_BEFORE_LETTERS = ("\t", '"', "(")


def encode_bad_word(tokenizer: Any, word: str) -> list[list[int]]:
    """Returns the token sequences of a word: at the start of a text, after a space, and so on.

    A sequence that ends with another one is left out, since completing it completes the other.
    Examples, in a byte-level vocabulary and in one like SentencePiece's:

        "Tokyo"  after ""  [To kyo]   " "  [ĠTokyo]     "\\n"  Ċ [To kyo]
        "Tokyo"  after ""  [▁Tokyo]   " "  ▁ [▁Tokyo]   "\\n"  ▁ <0x0A> [To kyo]

    A model may spell a banned word in another way. The nearest one is banned, too: the sequence
    after one context with the first piece of another, [ĠTo kyo], [▁To kyo].

    Args:
      tokenizer: of transformers.
      word: text; leading spaces are dropped.

    Returns:
      No sequence if the vocabulary cannot spell the word.

    Raises:
      ValueError: the word ends with a space, which is part of the next word's token, or has no
        tokens.
    """
    bare = word.lstrip() or word
    require(
        not bare.endswith(" ") or bare.isspace(),
        f"bad_words holds {word!r}: a space at its end is part of the next word's token and would "
        "never match; leave it out",
    )
    before = _BEFORE + (_BEFORE_LETTERS if bare[0].isalnum() else ())
    found = dict.fromkeys(_after(tokenizer, context, bare) for context in before)
    for ids in tuple(found):
        piece = tokenizer.decode(list(ids[:1])).strip()
        if len(ids) > 1 and bare.startswith(piece or "\ufffd"):
            firsts = (_after(tokenizer, context, piece) for context in before)
            found |= dict.fromkeys(first + ids[1:] for first in firsts if len(first) == 1)
    require(() not in found, f"bad_words holds {word!r}, of which the tokenizer makes no token")
    # The unknown token represents many words, so it is not banned unless the word names it.
    unknown, name = (getattr(tokenizer, x, None) for x in ("unk_token_id", "unk_token"))
    spelled = [ids for ids in found if unknown not in ids or str(name) in word]
    return [
        list(ids)
        for ids in spelled
        if not any(len(end) < len(ids) and ids[-len(end) :] == end for end in spelled)
    ]


def _after(tokenizer: Any, context: str, word: str) -> tuple[int, ...]:
    """Returns the tokens of `word` after `context`, including those with parts of both."""
    ids = tuple(tokenizer.encode(context + word, add_special_tokens=False))
    own = tuple(tokenizer.encode(context, add_special_tokens=False)) if context else ()
    return ids[len(own) :] if len(own) < len(ids) and ids[: len(own)] == own else ids
