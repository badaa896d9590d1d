"""Finds the tokens that end a text in a GGUF file's metadata."""

from __future__ import annotations

from typing import Any

import numpy as np

from jinfer.checkpoints.gguf.file import GGUFFile

END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""End-of-turn tokens, which are control tokens whatever type a file gives them."""
# Tokens that end a text if the file marks them as control tokens: no key lists all of them.
_END_OF_TEXT = (
    *("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|return|>", "<|call|>", "<|calls|>"),
    *("<|flush|>", "<turn|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "[e~["),
    "<｜end▁of▁sentence｜>",
)
_KNOWN_ENDS = (*END_OF_TURN, *_END_OF_TEXT)
# Vocabularies in which <|end|> closes a message and the text goes on: harmony, Solar Open.
_MESSAGE_MARKS = (("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>"))
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_CONTROL = 3  # tokenizer.ggml.token_type


def eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """Returns the tokens that end a text or a turn, the file's eos token first.

    If there is a list `tokenizer.ggml.eos_token_ids`, it is complete. Otherwise the tokens of the
    keys eos, eot and eom, and every control token that is known to end a text.
    """
    get = file.metadata.get
    tokens = get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    stated = get("tokenizer.ggml.eos_token_ids")
    if stated is not None:
        return tuple(dict.fromkeys(np.asarray(stated, int).reshape(-1).tolist()))
    known = _known_ends(tokens, get("tokenizer.ggml.token_type"))
    ids = [get(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    ids += [known[token] for token in _KNOWN_ENDS if token in known]
    closes_message = any(known.keys() >= {*marks} for marks in _MESSAGE_MARKS)
    no_end = known.get("<|end|>") if closes_message else None
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None and i != no_end))


def _known_ends(tokens: list[str], types: Any) -> dict[str, int]:
    """Returns {token: id} of known end tokens: ends of a turn, and others marked as control."""
    is_control = np.zeros(len(tokens), bool)
    if isinstance(types, np.ndarray) and types.shape == is_control.shape:
        is_control = types == _CONTROL
    ids = {token: i for i, token in enumerate(tokens) if token in _KNOWN_ENDS}
    return {token: i for token, i in ids.items() if is_control[i] or token in END_OF_TURN}
