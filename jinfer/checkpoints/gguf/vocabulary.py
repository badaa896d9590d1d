"""Writes a Hugging Face tokenizer as GGUF metadata; the inverse of `tokenizer_from_gguf`."""

from __future__ import annotations

import json
import logging
import pathlib
import types
from typing import TYPE_CHECKING, Any

import numpy as np

from jinfer.checkpoints.tokenizer import (
    BYTE_LEVEL_SPLITS,
    NFC,
    WHOLE_WORDS_FIRST,
    tokenizer_from_gguf,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# Words, numbers, signs, scripts and spaces that known pre-tokenizers split differently.
SAMPLES = (
    "Hello world, it's 12345 o'clock; WE'LL see: x_1=3.14e-10 (100%)!",
    "  two  spaces\ttab\n\nlines\r\n   end  ",
    "Ünïcödé ćafé 東京タワー привет мир مرحبا 🙂🚀 ²³ ½ №5",
    "camelCase HTTPServer snake_case //path/to/file.txt <b>a+b</b> $x^2~|y",
    "1 22 333 4444 55555 666666",
    "e\u0301a\u0308 \u212b \u1100\u1161 ﬁ Ｆ กำลัง हिन्दी 日本ab ꙁ`x`",  # letters to compose, marks
)


def tokenizer_metadata(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, architecture: str
) -> dict[str, Any]:
    """Returns "tokenizer.*" of a GGUF file.

    Args:
      tokenizer: a fast one: byte-level BPE, or BPE with byte fallback (sentencepiece).
      vocab_size: of the model; ids without a token get unused ones.
      architecture: general.architecture: Gemma's scores are read by token id.

    Raises:
      ValueError: another kind of tokenizer, one with a normalizer that no name in GGUF stands for,
        or one that would encode `SAMPLES` differently when read from the file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("GGUF takes fast tokenizers (tokenizer.json) only")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"GGUF export writes BPE tokenizers, this one is {model.get('type')}")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens, kinds = _tokens(data, vocab_size)
    composes = _composes(data)
    out: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    if model.get("byte_fallback"):
        out["tokenizer.ggml.model"] = "llama"
        out["tokenizer.ggml.scores"] = _scores(tokens, merges)
        kinds[[i for i, t in enumerate(tokens) if _is_byte(t)]] = _BYTE
        unknown = model.get("unk_token")
        if unknown in tokens:
            kinds[tokens.index(unknown)] = _UNKNOWN
        spelled = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
        has_prefix = '"Prepend"' in spelled or '"prepend_scheme": "first"' in spelled
        has_prefix |= '"prepend_scheme": "always"' in spelled
        out["tokenizer.ggml.add_space_prefix"] = has_prefix
    else:
        out["tokenizer.ggml.model"] = "gpt2"
        # Without merges every character stays alone, however a text is cut.
        ignores_merges = bool(model.get("ignore_merges"))
        if merges:
            out["tokenizer.ggml.pre"] = _pre_tokenizer(backend, ignores_merges, composes)
        else:
            out["tokenizer.ggml.pre"] = "olmo" if composes else "gpt-2"
        out["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    out["tokenizer.ggml.token_type"] = kinds
    for key, name in (
        *(("bos", "bos_token_id"), ("eos", "eos_token_id")),
        *(("unknown", "unk_token_id"), ("padding", "pad_token_id")),
    ):
        if getattr(tokenizer, name, None) is not None:
            out[f"tokenizer.ggml.{key}_token_id"] = int(getattr(tokenizer, name))
    marked = tokenizer.encode("a")
    for key in ("bos", "eos"):
        own, place = getattr(tokenizer, f"{key}_token_id"), 0 if key == "bos" else -1
        out[f"tokenizer.ggml.add_{key}_token"] = own is not None and marked[place] == own
    template = tokenizer.chat_template
    if isinstance(template, dict):
        named = {f"tokenizer.chat_template.{n}": t for n, t in template.items() if n != "default"}
        out |= named | (
            {"tokenizer.chat_template": template["default"]} if "default" in template else {}
        )
    elif template is not None:
        out["tokenizer.chat_template"] = template
    _check_same(tokenizer, out, architecture)
    if composes:
        logger.warning(
            "this tokenizer composes letters (NFC) before it cuts a text, as we do when we read "
            "the file; llama.cpp does not: a text with decomposed letters has other tokens there"
        )
    return out


def _tokens(data: dict[str, Any], vocab_size: int) -> tuple[list[str], np.ndarray]:
    """Tokens by id, and their types, of the vocabulary and what was added to it."""
    by_id = {i: token for token, i in data["model"]["vocab"].items()}
    added = data.get("added_tokens") or []
    by_id |= {row["id"]: row["content"] for row in added}
    if max(by_id) >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {max(by_id)}, the model only {vocab_size} tokens"
        )
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = np.array([_NORMAL if i in by_id else _UNUSED for i in range(vocab_size)], np.int32)
    for row in added:
        kinds[row["id"]] = _CONTROL if row["special"] else _USER_DEFINED
    return tokens, kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> np.ndarray:
    """Scores whose order is that of the merges: a token is as good as the first that makes it."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault("".join(merge), i)
    return np.array([-float(rank.get(token, len(merges))) for token in tokens], np.float32)


def _composes(data: dict[str, Any]) -> bool:
    """Whether a tokenizer composes texts (NFC); raises ValueError for what no file can say."""
    steps = _steps(data.get("normalizer"))
    if data["model"].get("byte_fallback"):
        steps = [step for step in steps if not _spells_space(step)]
    elif [step["type"] for step in steps] == ["NFC"]:
        return True
    if steps:
        raise ValueError(
            f"GGUF has no name for this tokenizer's normalizer {steps[0]['type']}; texts would "
            f"become other tokens"
        )
    return False


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer]
    return [step for part in normalizer["normalizers"] for step in _steps(part)]


def _spells_space(step: dict[str, Any]) -> bool:
    """Whether a normalizer is one of the two that every sentencepiece file implies."""
    if step["type"] == "Prepend":
        return step["prepend"] == "▁"
    is_space = step["type"] == "Replace" and step["pattern"] == {"String": " "}
    return is_space and step["content"] == "▁"


def _pre_tokenizer(backend: Any, ignores_merges: bool, composes: bool) -> str:
    """The name of the splits that cut `SAMPLES` as this tokenizer does, with its normalizer."""
    from tokenizers import Regex, pre_tokenizers

    def cut(pre: Any) -> list[list[str]]:
        return [[piece for piece, _ in pre.pre_tokenize_str(text)] for text in SAMPLES]

    own, alike = cut(backend.pre_tokenizer), []
    for name, splits in BYTE_LEVEL_SPLITS.items():
        steps: list[Any] = [
            pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        if (name in WHOLE_WORDS_FIRST) == ignores_merges and cut(
            pre_tokenizers.Sequence(steps)
        ) == own:
            alike.append(name)
    for name in alike:
        if (name in NFC) == composes:
            return name
    if alike:
        raise ValueError(
            f"GGUF cannot hold this tokenizer: it {'composes' if composes else 'does not compose'} "
            f"letters (NFC), other than those of the pre-tokenizers that cut text as it does: "
            f"{', '.join(alike)}"
        )
    raise ValueError(
        f"no pre-tokenizer that GGUF names cuts text as this tokenizer does; known: "
        f"{', '.join(BYTE_LEVEL_SPLITS)}"
    )


def _check_same(tokenizer: Any, metadata: dict[str, Any], architecture: str) -> None:
    file: Any = types.SimpleNamespace(
        path=pathlib.Path("the new file"),
        metadata=metadata | {"general.architecture": architecture},
    )
    again = tokenizer_from_gguf(file)
    for text in SAMPLES:
        for special in (False, True):
            meant = tokenizer.encode(text, add_special_tokens=special)
            found = again.encode(text, add_special_tokens=special)
            if meant != found:
                at = next((i for i, (a, b) in enumerate(zip(meant, found)) if a != b), len(meant))
                raise ValueError(
                    f"GGUF cannot hold this tokenizer: {text!r} would become {found[: at + 2]}..., "
                    f"not {meant[: at + 2]}..."
                )
