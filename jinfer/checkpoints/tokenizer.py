"""Loads a Hugging Face tokenizer for any model that `load` takes, without torch.

A GGUF file has vocabulary, merges or scores, token types and chat template in its metadata; they
are combined here as llama.cpp reads them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pathlib
import reprlib
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from jinfer.checkpoints.gguf.ends import END_OF_TURN
from jinfer.checkpoints.gguf.file import GGUFFile
from jinfer.checkpoints.locate import expanded, locate
from jinfer.config.fields import require, shown

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_HF_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "tekken.json",
)
_SPACE = "▁"  # how sentencepiece spells a space
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = (_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,)
_QWEN2 = (_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    + _SLASH_TAIL,
)
_QWEN35 = (
    _CONTRACTION
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    + r"|\s+(?!\S)|\s+",
)
# DeepSeek's letters: those with cases, of the Unicode version of its time.
_CASED = (
    "A-Za-z"
    "µÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛ"
    "Ꜣ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_LLM = (
    *("[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$"),
    *(_CJK, r"\p{N}+"),
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_THREE_DIGITS = "[0-9][0-9][0-9]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}" + _SLASH_TAIL,
)
BYTE_LEVEL_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "exaone4"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "hunyuan", "stablelm2", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "qwen35": _QWEN35,
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS),
}
"""tokenizer.ggml.pre -> expressions that split a text before merging, applied one after another."""

# These start with bos unless the file says otherwise.
_BOS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken")
WHOLE_WORDS_FIRST = (*_BOS_FIRST, "glm4")
"""Pre-tokenizers that look up a whole word before they merge."""
NFC = ("qwen2", "command-r", "mpt", "olmo")
"""Models that normalize a text (NFC) first. No file says so, and llama.cpp does not."""


def load_tokenizer(
    path_or_name: str | os.PathLike[str], *, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Args:
      path_or_name: as for `load`: a Hugging Face folder, a .gguf file, a folder with exactly one, a
        name on the hub, or "smollm2". A folder's tokenizer files go before its GGUF file.
      revision: branch, tag or commit of a hub name.

    Returns:
      A fast tokenizer of transformers, with chat template and special tokens.

    Raises:
      FileNotFoundError: nothing is there, or nothing by that name can be fetched.
      ValueError: there is no tokenizer in it, or one of an unknown kind.
    """
    tokenizer = _load(path_or_name, revision)
    longest = getattr(tokenizer, "model_max_length", 0)
    if isinstance(longest, bool) or not isinstance(longest, (int, float)):
        raise ValueError(
            f"the tokenizer of {path_or_name} must have a number as model_max_length, got "
            f"{shown(longest)}"
        )
    # The engine limits the length of a text; transformers would warn about its own limit.
    warned = getattr(tokenizer, "deprecation_warnings", {})
    warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _load(path_or_name: str | os.PathLike[str], revision: str | None) -> PreTrainedTokenizerBase:
    folder = expanded(path_or_name)
    if any((folder / name).is_file() for name in _HF_FILES) and revision is None:
        return _from_hf(folder, None)
    path = locate(path_or_name, revision)
    if path is None:
        return _from_hf(path_or_name, revision)
    if path.is_dir():
        raise ValueError(f"no tokenizer in {path}: expected one of {', '.join(_HF_FILES)}")
    return tokenizer_from_gguf(GGUFFile(path))


def tokenizer_files(
    path_or_name: str | os.PathLike[str], revision: str | None = None
) -> dict[str, bytes]:
    """Returns a model's tokenizer as the files of a Hugging Face folder, by name."""
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(path_or_name, revision=revision).save_pretrained(folder)
        return {f.name: f.read_bytes() for f in pathlib.Path(folder).iterdir() if f.is_file()}


def _from_hf(name: str | os.PathLike[str], revision: str | None) -> PreTrainedTokenizerBase:
    transformers = _import_transformers()
    _check_sentencepiece(pathlib.Path(name))
    try:
        return transformers.AutoTokenizer.from_pretrained(os.fspath(name), revision=revision)
    except Exception as error:  # tokenizers raises bare Exceptions, damaged files raise any kind
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        if not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
        raise ValueError(f"cannot load a tokenizer from {os.fspath(name)!r}: {reason}") from error


def _check_sentencepiece(folder: pathlib.Path) -> None:
    """Raises ValueError if a folder has only sentencepiece's file and that library is missing.

    transformers would ask for tiktoken, which cannot read the file.
    """
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return
    if importlib.util.find_spec("sentencepiece") is None:
        with file.open("rb") as opened:
            is_sentencepiece = opened.read(1) == b"\n"  # the tag of its first field, a piece
        require(
            not is_sentencepiece,
            f"{file} is a sentencepiece model, and without tokenizer.json beside it the package "
            "sentencepiece is needed: pip install sentencepiece",
        )


def _import_transformers() -> Any:
    """Imports transformers and suppresses its advice to install PyTorch."""
    source = logging.getLogger("transformers")

    def is_news(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    source.addFilter(is_news)
    try:
        import transformers
    finally:
        source.removeFilter(is_news)
    return transformers


def tokenizer_from_gguf(file: GGUFFile) -> PreTrainedTokenizerBase:
    """Builds the tokenizer that a GGUF file describes.

    Raises:
      ValueError: it has none, or one of an unknown kind or pre-tokenizer.
    """
    get = _Getter(file)
    kind = get("model")
    tokens = get("tokens")
    if kind not in ("gpt2", "llama", "gemma4") or not isinstance(tokens, list):
        raise ValueError(
            f"{file.path} has no tokenizer that can be read (tokenizer.ggml.model is "
            f"{reprlib.repr(kind)}); "
            f"supported: 'gpt2' (byte-level BPE), 'llama' (sentencepiece) and 'gemma4'"
        )
    types = get("token_type")
    types = np.ones(len(tokens), np.int32) if types is None else types
    backend, add_bos = (_byte_level if kind == "gpt2" else _sentencepiece)(get, tokens, types)
    _add_whole_tokens(backend, get, tokens, types)
    named = {
        name: tokens[token_id]
        for name, key in _NAMED_TOKENS.items()
        if (token_id := get(key)) is not None and token_id < len(tokens)
    }
    add_bos = bool(get("add_bos_token", add_bos)) and "bos_token" in named
    add_eos = bool(get("add_eos_token", False)) and "eos_token" in named
    tokenizer = _import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        model_max_length=int(file.metadata.get(f"{get.arch}.context_length", 1 << 30)),
        **named,
    )
    tokenizer.chat_template = _chat_template(file.metadata)
    return tokenizer


_NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class _Getter:
    """Lookups of tokenizer.ggml.* in a file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.arch = str(file.metadata.get("general.architecture"))

    def __call__(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}", default)


def _chat_template(metadata: dict[str, Any]) -> Any:
    """Returns the template, or {name: template} where the file has several."""
    prefix = "tokenizer.chat_template"
    default = metadata.get(prefix)
    named = {
        key.removeprefix(prefix + "."): value
        for key, value in metadata.items()
        if key.startswith(prefix + ".")
    }
    return default if not named else named if default is None else {"default": default, **named}


def _byte_level(
    get: _Getter, tokens: list[str], types: np.ndarray
) -> tuple[tokenizers.Tokenizer, bool]:
    """Returns a byte-level BPE tokenizer, and whether texts begin with bos by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = get("pre")
    if pre is None:
        logger.warning("%s names no pre-tokenizer, assuming llama.cpp's default", get.file.path)
        pre = "default"
    if pre not in BYTE_LEVEL_SPLITS:
        raise ValueError(
            f"{get.file.path} needs the pre-tokenizer {reprlib.repr(pre)}; supported: "
            f"{', '.join(BYTE_LEVEL_SPLITS)}"
        )
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=_merges(get, tokens),
        ignore_merges=pre in WHOLE_WORDS_FIRST,
    )
    backend = Tokenizer(model)
    if pre in NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated")
            for split in BYTE_LEVEL_SPLITS[pre]
        ]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre in _BOS_FIRST


def _merges(get: _Getter, tokens: list[str]) -> list[tuple[str, str]]:
    """Returns the merges of a file without those whose result is no token."""
    known = set(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges", [])]
    return [
        (merge[0], merge[1])
        for merge in merges
        if len(merge) == 2 and known.issuperset((*merge, merge[0] + merge[1]))
    ]


def _sentencepiece(
    get: _Getter, tokens: list[str], types: np.ndarray
) -> tuple[tokenizers.Tokenizer, bool]:
    """Returns a BPE tokenizer over characters, with unknown ones as bytes.

    Merges follow the scores; Gemma 4's files have a list of merges, and no space before a text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    has_bytes = bool((types == _BYTE).any())
    has_merges = get("model") == "gemma4"
    unknown = get("unknown_token_id", 0)
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=_merges(get, tokens) if has_merges else _merges_from_scores(get, tokens, types),
        unk_token=tokens[unknown] if unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    backend = Tokenizer(model)
    starts_with_space = bool(get("add_space_prefix", not has_merges))
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if starts_with_space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    after: list[Any] = [decoders.Strip(" ", 1, 0)] if starts_with_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend, True


def _merges_from_scores(
    get: _Getter, tokens: list[str], types: np.ndarray
) -> list[tuple[str, str]]:
    """Returns all merges of two tokens into another, best token first.

    Sentencepiece merges the pair whose result has the highest score. In Gemma's files the token ids
    give that order, not the scores.
    """
    scores = get("scores")
    if scores is None or get.arch.startswith("gemma"):
        scores = -np.arange(len(tokens), dtype=np.float64)
    mergeable = ~np.isin(types, (_UNKNOWN, _CONTROL, _BYTE))
    ids = {token: i for i, token in enumerate(tokens) if mergeable[i]}
    ranked = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-float(scores[i]), i, ids[left], ids[right]))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _add_whole_tokens(
    backend: tokenizers.Tokenizer, get: _Getter, tokens: list[str], types: np.ndarray
) -> None:
    """Marks the tokens that are matched as a whole: control tokens and user-defined ones."""
    from tokenizers import AddedToken

    is_control = types == _CONTROL
    for token in END_OF_TURN:  # some files mark these wrongly
        if token in tokens:
            is_control[tokens.index(token)] = True
    # Phi-3's templates put a line break after each role, which its special tokens strip.
    name = str(get.file.metadata.get("general.name", "")).lower()
    is_phi3 = get("model") == "llama" and ("phi-3" in name or "phi3" in name)
    keeps_space = ("<unk>", "<s>", "<|endoftext|>")
    backend.add_special_tokens(
        [
            AddedToken(
                tokens[i],
                normalized=False,
                special=True,
                rstrip=is_phi3 and tokens[i] not in keeps_space,
            )
            for i in np.flatnonzero(is_control | (types == _UNKNOWN))
        ]
    )
    backend.add_tokens(
        [
            AddedToken(tokens[i], normalized=False, special=False)
            for i in np.flatnonzero((types == _USER_DEFINED) & ~is_control)
        ]
    )
