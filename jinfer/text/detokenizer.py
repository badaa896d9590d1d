"""Turns output token ids into text incrementally.

The concatenated pieces from `take` equal `tokenizer.decode(output_ids, skip_special_tokens=...)`,
cut at a stop string. Text is held back while it can still change (bytes of an incomplete character)
and while it could begin a stop string. Every token is decoded once, so that the time is linear in
the output.

Only output ids are decoded. A decoder that starts with a prompt ending inside a character can leak
the prompt (vLLM issue 48853), and decoding a growing window again for each token is quadratic on
runs of U+FFFD (SGLang issue 34852).
"""

from __future__ import annotations

import codecs
import json
import re
import weakref
from typing import Any, Protocol

from jinfer.config.sampling_params import SamplingParams

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """Incremental text of one output sequence.

    Args:
      tokenizer: a transformers fast tokenizer, or a `tokenizers.Tokenizer`.
      params: the fields `stop`, `include_stop_str_in_output`, `min_tokens`, `skip_special_tokens`
        and `spaces_between_special_tokens` are read. The last one means: True, the text is what
        the tokenizer's decoder makes; False, a space that the decoder itself puts between two
        neighbouring special tokens is left out. Decoders that put none (byte-level BPE,
        SentencePiece-like ones) make the same text for both.

    Raises:
      TypeError: the tokenizer is not a fast one.
      ValueError: its decoder cannot be applied token by token, or a stop string contains a special
        token and more while special tokens are skipped.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        vocabulary = _vocabulary(tokenizer)
        self._decoder = vocabulary.new_decoder(
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        self._stops = tuple(params.stop or ())
        self._special_stops = (
            vocabulary.special_stops(self._stops) if params.skip_special_tokens else {}
        )
        self._max_stop = max(map(len, self._stops), default=0)
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._pieces: list[str] = []  # text that may be returned
        self._num_taken = 0  # pieces that `take` has returned
        self._held = ""  # settled text that could begin a stop string
        self._num_settled = 0  # characters settled so far
        self._num_searched = 0  # characters already searched for stop strings
        self._is_finished = False

    @property
    def text(self) -> str:
        """The text that may be returned so far."""
        return "".join(self._pieces)

    @property
    def num_pieces(self) -> int:
        """Pieces of text that may be shown so far; a piece stays as it is."""
        return len(self._pieces)

    def text_between(self, begin: int, end: int) -> str:
        """Returns the text of some pieces; another thread may go on pushing."""
        return "".join(self._pieces[begin:end])

    def take(self) -> str:
        """Returns the new text since the last call."""
        new = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return new

    def push(self, token_id: int) -> str | None:
        """Adds one token; returns the stop string that it completes, or None.

        Of several stop strings the one that is completed first is used, then the one listed first.
        One that is completed before token number `min_tokens` is plain text. A skipped special
        token completes the stop string of its name. After a match the text is final, and no token
        may be pushed.
        """
        assert not self._is_finished, "push after the end of the sequence"
        settled = self._decoder.push(token_id)
        self._num_tokens += 1
        self._num_settled += len(settled)
        if not self._stops:
            self._show(settled)
            return None
        stop = self._special_stops.get(token_id)
        if stop is not None and self._num_tokens >= self._min_tokens:
            self.finish()
            self._show(stop if self._includes_stop else "")
            return stop
        text = self._held + settled
        match = self._find_stop(text)
        if match is not None:
            stop, from_end = match
            text += self._decoder.flush()
            cut = len(text) - from_end + (len(stop) if self._includes_stop else 0)
            self._show(text[:cut])
            self._held = ""
            self._is_finished = True
            return stop
        self._held = self._possible_stop(text)
        self._show(text[: len(text) - len(self._held)])
        return None

    def finish(self) -> None:
        """Releases the text that was held back, since no more tokens will come; idempotent."""
        self._is_finished = True
        self._show(self._held + self._decoder.flush())
        self._held = ""

    def _show(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def _find_stop(self, text: str) -> tuple[str, int] | None:
        """Searches for a stop string that ends in characters not searched before.

        Args:
          text: settled text, at least all that could be part of a match.

        Returns:
          The stop string and how many characters before the end of the present text it begins.
          The present text includes whole characters of a byte run that is not settled yet.
        """
        num_visible = self._num_settled + self._decoder.num_pending
        # Pending characters may vanish when their run turns out to be invalid.
        num_new = num_visible - min(self._num_searched, num_visible)
        self._num_searched = num_visible
        if num_new == 0 or self._num_tokens < self._min_tokens:
            return None
        reach = num_new + self._max_stop - 1
        tail = (text + self._decoder.pending_tail(reach))[-reach:]
        found: tuple[int, int, str] | None = None  # end, place in the list, stop string
        for place, stop in enumerate(self._stops):
            begin = tail.find(stop, max(0, len(tail) - num_new - len(stop) + 1))
            if begin >= 0:
                candidate = (begin + len(stop), place, stop)
                found = candidate if found is None else min(found, candidate)
        if found is None:
            return None
        end, _, stop = found
        return stop, len(tail) - end + len(stop)

    def _possible_stop(self, text: str) -> str:
        """Returns the longest end of `text` that begins a stop string without completing it."""
        for begin in range(max(0, len(text) - self._max_stop + 1), len(text)):
            end = text[begin:]
            if any(len(end) < len(stop) and stop.startswith(end) for stop in self._stops):
                return end
        return ""


class _TokenDecoder(Protocol):
    """Decodes the part of a token sequence that later tokens cannot change."""

    @property
    def num_pending(self) -> int:
        """Complete characters that later tokens could still change."""
        ...

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that it settles."""
        ...

    def flush(self) -> str:
        """Returns the rest of the text at the end of the tokens."""
        ...

    def pending_tail(self, n: int) -> str:
        """Returns the last `n` of the pending characters."""
        ...


class _Vocabulary:
    """Data shared by all sequences of a tokenizer: its decoder's kind and the texts of tokens."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        decoder = backend.decoder
        spec = None if decoder is None else json.loads(decoder.__getstate__())
        self.chain: list[dict[str, Any]] = _flatten(spec)
        self.special_tokens = frozenset(
            token.content for token in backend.get_added_tokens_decoder().values() if token.special
        )
        self.is_byte_level = [stage["type"] for stage in self.chain] == ["ByteLevel"]
        self.tokens: dict[int, str | None] = {}
        self.bytes_of: dict[int, bytes] = {}
        self.texts: dict[int, str] = {}
        if not self.is_byte_level:
            self.strip, self.num_strip = _check_chain(self.chain)
            kinds = {stage["type"] for stage in self.chain}
            self.has_byte_tokens = "ByteFallback" in kinds
            # The first token's text differs: no leading space.
            self.is_first_different = not self.chain or bool(kinds & {"Metaspace", "WordPiece"})
            self.anchor = self._find_anchor()
            self.num_anchor = len(backend.decode([self.anchor], skip_special_tokens=False))

    def special_stops(self, stops: tuple[str, ...]) -> dict[int, str]:
        """Returns the stop strings that are special tokens, by id.

        Raises:
          ValueError: one contains a special token and more, which cannot match if the token is
            skipped.
        """
        found = {}
        for stop in stops:
            token_id = self.backend.token_to_id(stop) if stop in self.special_tokens else None
            if token_id is not None:
                found[token_id] = stop
                continue
            token = next((token for token in self.special_tokens if token and token in stop), None)
            if token is not None:
                raise ValueError(
                    f"the stop string {stop!r} holds the special token {token!r}, whose text is "
                    "skipped: stop at that token alone, or set skip_special_tokens=False"
                )
        return found

    def new_decoder(
        self, *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> _TokenDecoder:
        """Returns a decoder at the start of a sequence."""
        if self.is_byte_level:
            return _ByteLevelDecoder(self, skip_special_tokens)
        return _ChainDecoder(self, skip_special_tokens, spaces_between_special_tokens)

    def token(self, token_id: int, skip_special_tokens: bool) -> str | None:
        """Returns a token as written in the vocabulary; None if it has no text."""
        if token_id not in self.tokens:
            self.tokens[token_id] = self.backend.id_to_token(token_id)
        token = self.tokens[token_id]
        return None if skip_special_tokens and token in self.special_tokens else token

    def token_bytes(self, token_id: int, token: str) -> bytes:
        """Bytes of a token in byte-level BPE."""
        if token_id not in self.bytes_of:
            self.bytes_of[token_id] = _byte_level_bytes(token)
        return self.bytes_of[token_id]

    def text_within(self, token_id: int) -> str:
        """Returns the text of a token that is neither the first nor a byte token."""
        if token_id not in self.texts:
            text = self.backend.decode([self.anchor, token_id], skip_special_tokens=False)
            self.texts[token_id] = text[self.num_anchor :]
        return self.texts[token_id]

    def text_at_start(self, token_id: int) -> str:
        """Returns the text of a token that is the first, if `is_first_different`."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def _find_anchor(self) -> int:
        """Returns a plain token; what follows it in `decode` is not at the start of the text."""
        for token_id in range(self.backend.get_vocab_size(with_added_tokens=True)):
            token = self.backend.id_to_token(token_id)
            if token is None or token in self.special_tokens or _BYTE_TOKEN.fullmatch(token):
                continue
            text = self.backend.decode([token_id], skip_special_tokens=False)
            if text and text == token and text[0] != self.strip:
                return token_id
        raise ValueError("the tokenizer has no token of plain text to start decoding from")


class _ByteLevelDecoder:
    """Byte-level BPE: tokens are bytes, and the text is their lossy UTF-8."""

    num_pending = 0

    def __init__(self, vocabulary: _Vocabulary, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skips_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._vocabulary.token(token_id, self._skips_special)
        if token is None:
            return ""
        return self._utf8.decode(self._vocabulary.token_bytes(token_id, token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def pending_tail(self, n: int) -> str:
        return ""


class _ChainDecoder:
    """Decoders that map single tokens, except runs of byte tokens and the start of the text.

    A run of byte tokens <0xE2><0x82>... is decoded as a whole: if any part of it is not UTF-8, each
    byte of the run becomes one U+FFFD. So the next other token settles it.
    """

    def __init__(
        self,
        vocabulary: _Vocabulary,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._vocabulary = vocabulary
        self._skips_special = skip_special_tokens
        self._spaces_between = spaces_between_special_tokens
        self._is_first = True
        self._follows_special = False
        self._num_to_strip = vocabulary.num_strip  # characters at the start of the text
        self._num_run_bytes = 0
        self._run: list[str] = []  # whole characters of the run
        self._is_run_valid = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")

    @property
    def num_pending(self) -> int:
        # While the start is still to be stripped, positions would shift, so none are returned yet.
        return len(self._run) if self._is_run_valid and not self._num_to_strip else 0

    def pending_tail(self, n: int) -> str:
        return "".join(self._run[-n:]) if self.num_pending else ""

    def push(self, token_id: int) -> str:
        vocabulary = self._vocabulary
        token = vocabulary.token(token_id, self._skips_special)
        if token is None:
            return ""
        is_special = token in vocabulary.special_tokens
        is_first, self._is_first = self._is_first, False
        follows_special, self._follows_special = self._follows_special, is_special
        byte = _BYTE_TOKEN.fullmatch(token) if vocabulary.has_byte_tokens else None
        if byte is not None:
            self._push_byte(int(byte[1], 16))
            return ""
        if is_first and vocabulary.is_first_different:
            text = vocabulary.text_at_start(token_id)
        else:
            text = vocabulary.text_within(token_id)
        if is_special and follows_special and not self._spaces_between:
            text = text if token.startswith(" ") else text.removeprefix(" ")
        return self._strip(self._end_run() + text)

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _push_byte(self, byte: int) -> None:
        self._num_run_bytes += 1
        if self._is_run_valid:
            try:
                self._run.extend(self._utf8.decode(bytes([byte])))
            except UnicodeDecodeError:
                self._is_run_valid = False

    def _end_run(self) -> str:
        if self._num_run_bytes == 0:
            return ""
        is_whole = self._is_run_valid and not self._utf8.getstate()[0]
        text = "".join(self._run) if is_whole else "\ufffd" * self._num_run_bytes
        self._num_run_bytes = 0
        self._run = []
        self._is_run_valid = True
        self._utf8.reset()
        return text

    def _strip(self, text: str) -> str:
        """Strips what the decoder strips from the start of the whole text."""
        while text and self._num_to_strip:
            if text[0] != self._vocabulary.strip:
                self._num_to_strip = 0
                break
            text = text[1:]
            self._num_to_strip -= 1
        return text


def _flatten(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the stages of a serialized decoder in order."""
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [stage for part in spec["decoders"] for stage in _flatten(part)]
    return [spec]


def _check_chain(chain: list[dict[str, Any]]) -> tuple[str, int]:
    """Returns the character and the count that a chain strips from the start of the text.

    Raises:
      ValueError: the chain's text cannot be made token by token.
    """
    kinds = [stage["type"] for stage in chain]
    fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    per_token, fused = set(kinds[:fuse]), chain[fuse + 1 :]
    unknown = per_token - {"Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip"}
    has_bytes = "ByteFallback" in per_token
    is_first_different = bool(per_token & {"Metaspace", "WordPiece"})
    supported = (
        not unknown
        and [stage["type"] for stage in fused] in ([], ["Strip"])
        and all(stage["stop"] == 0 for stage in fused)
        and not (fused and is_first_different)
        and not (has_bytes and (kinds[fuse - 1] != "ByteFallback" or "WordPiece" in per_token))
    )
    if not supported:
        raise ValueError(
            f"the tokenizer's decoder {kinds} cannot be followed token by token; supported are "
            "ByteLevel, and Replace, Metaspace, WordPiece, Strip, then ByteFallback, then Fuse and "
            "a Strip of the start; pass detokenize=False and decode the token ids yourself"
        )
    return (fused[0]["content"], fused[0]["start"]) if fused else ("", 0)


def _byte_level_alphabet() -> dict[str, int]:
    """Returns GPT-2's map from printable characters to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """Returns a token's bytes; one with other characters (an added token) is plain UTF-8."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


_vocabularies: weakref.WeakKeyDictionary[Any, _Vocabulary] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Any) -> _Vocabulary:
    """Returns the vocabulary of a tokenizer, built once for each transformers tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "id_to_token") or not hasattr(backend, "decoder"):
        raise TypeError(
            f"the tokenizer must be a fast one (with a `tokenizers` backend) to make text, got "
            f"{type(tokenizer).__name__}; pass detokenize=False and decode the token ids yourself"
        )
    if backend is tokenizer:
        return _Vocabulary(backend)
    vocabulary = _vocabularies.get(tokenizer)
    if vocabulary is None or vocabulary.backend is not backend:
        vocabulary = _vocabularies[tokenizer] = _Vocabulary(backend)
    return vocabulary
