"""Incremental text: the pieces put together are the tokenizer's own decode of all output ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jinfer.config.sampling_params import SamplingParams
from jinfer.text.detokenizer import Detokenizer

CORPUS = [
    "Hello world, hello there.",
    "日本語のテキスト 你好，世界",
    "emoji 😀👩‍👩‍👧 naïve café",
    "a  b\n\tc '.' don't",
]


def byte_level() -> Tokenizer:
    """Llama 3, Qwen, SmolLM2: tokens are bytes, some of them parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|im_start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # An added token with a character outside the byte alphabet, one with a space, one inside it.
    tokenizer.add_tokens([AddedToken("工具"), AddedToken("two words"), AddedToken("Ġé")])
    return tokenizer


def sentencepiece(decoder, model=models.BPE, spaces="▁") -> Tokenizer:
    words = [
        "▁",
        "▁hello",
        "hello",
        "▁▁",
        "a",
        "b",
        "▁a",
        "日",
        "本語",
        ".",
        ",",
        "'",
        "n't",
        "x▁y",
    ]
    words = [word.replace("▁", spaces) for word in words]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, ""]
    vocab = {token: i for i, token in enumerate(tokens)}
    if model is models.BPE:
        core = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    elif model is models.WordPiece:
        core = models.WordPiece(vocab | {"##b": len(vocab), "##日": len(vocab) + 1})
    else:
        core = models.Unigram([(token, -1.0) for token in tokens], unk_id=0)
    tokenizer = Tokenizer(core)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>", "<tool>"])
    return tokenizer


REPLACE, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
TOKENIZERS = {
    "byte_level": byte_level(),
    "llama2": sentencepiece(decoders.Sequence([REPLACE, BYTES, FUSE, decoders.Strip(" ", 1, 0)])),
    "strip_two": sentencepiece(
        decoders.Sequence([REPLACE, BYTES, FUSE, decoders.Strip(" ", 2, 0)])
    ),
    "gemma": sentencepiece(decoders.Sequence([REPLACE, BYTES, FUSE])),
    "metaspace": sentencepiece(decoders.Metaspace(), models.Unigram),
    "metaspace_never": sentencepiece(decoders.Metaspace(prepend_scheme="never"), models.Unigram),
    "metaspace_bytes": sentencepiece(decoders.Sequence([decoders.Metaspace(), BYTES])),
    "wordpiece": sentencepiece(decoders.WordPiece(), models.WordPiece, spaces="_"),
    "none": sentencepiece(None),
}
FAST = {
    name: PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for name, tokenizer in TOKENIZERS.items()
}


def stream(tokenizer, ids, **fields):
    """Pushes ids until a stop string; returns the pieces, the stop string, and how many went in."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=None, **fields))
    pieces = []
    stop = None
    num_pushed = 0
    for token_id in ids:
        stop = detokenizer.push(token_id)
        num_pushed += 1
        pieces.append(detokenizer.take())
        assert detokenizer.text == "".join(pieces)
        if stop is not None:
            break
    detokenizer.finish()
    detokenizer.finish()
    pieces.append(detokenizer.take())
    assert detokenizer.text == "".join(pieces)
    return pieces, stop, num_pushed


def ids_of(name):
    """Random ids, more often bytes and specials than a uniform choice would give, some unknown."""
    size = TOKENIZERS[name].get_vocab_size()
    few = st.sampled_from([i for i in range(size) if not 3 <= i < 259] + [3 + 0x20, 3 + 0xFF])
    utf8 = st.text(max_size=3).map(lambda text: [3 + byte for byte in text.encode()])
    chunk = st.one_of(st.integers(0, size + 3).map(lambda i: [i]), few.map(lambda i: [i]), utf8)
    return st.lists(chunk, max_size=30).map(lambda chunks: [i for chunk in chunks for i in chunk])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), skips=st.booleans())
def test_the_pieces_put_together_are_the_full_decode(name, data, skips):
    ids = data.draw(ids_of(name))
    expected = FAST[name].decode(ids, skip_special_tokens=skips) if ids else ""
    pieces, _, _ = stream(FAST[name], ids, skip_special_tokens=skips)
    assert "".join(pieces) == expected
    # A stop string that never comes only delays.
    held, stop, _ = stream(FAST[name], ids, skip_special_tokens=skips, stop=["never~", "a never~"])
    assert stop is None and "".join(held) == expected


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=40))
def test_any_bytes_give_the_same_replacement_characters(data):
    tokenizer = TOKENIZERS["byte_level"]
    alphabet = {byte: char for char, byte in _alphabet().items()}
    ids = [tokenizer.token_to_id(alphabet[byte]) for byte in data]
    assert None not in ids
    pieces, _, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == data.decode("utf-8", "replace")


def _alphabet():
    from jinfer.text import detokenizer

    return detokenizer._BYTE_OF


@pytest.mark.parametrize("name", ["byte_level", "gemma", "llama2"])
def test_no_piece_splits_a_character(name):
    text = "x 😀 語é👩‍👩‍👧."
    if name == "byte_level":
        ids = TOKENIZERS[name].encode(text).ids
    else:
        ids = [3 + byte for byte in text.encode()] + [TOKENIZERS[name].token_to_id("a")]
        text += "a"
    pieces, _, _ = stream(FAST[name], ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    if name == "byte_level":
        assert sum(bool(piece) for piece in pieces) > 5  # it does stream


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llama2", ["<0x20>"]),
        ("llama2", ["<0x20>", "<0x20>"]),
        ("llama2", ["", "▁", "▁a"]),
        ("strip_two", ["▁", "▁▁", "a"]),
        ("strip_two", ["▁", "a", "▁a"]),
        ("strip_two", ["<0x20>", "<0xFF>", "▁a"]),
        ("metaspace", ["▁▁", "▁a"]),
        ("metaspace", ["", "▁a"]),
        ("metaspace", ["</s>", "▁a"]),
        ("metaspace_bytes", ["<0xE2>", "<0x96>", "<0x81>", "▁a"]),
        ("wordpiece", ["##b", "##b", "a"]),
        ("none", ["</s>", "a", "b"]),
        ("byte_level", ["工具", "two words", "Ġé"]),
    ],
)
@pytest.mark.parametrize("skips", [True, False])
def test_the_start_of_the_text_and_odd_tokens_are_decoded_alike(name, tokens, skips):
    ids = [TOKENIZERS[name].token_to_id(token) for token in tokens]
    assert None not in ids
    pieces, _, _ = stream(TOKENIZERS[name], ids, skip_special_tokens=skips)
    assert "".join(pieces) == TOKENIZERS[name].decode(ids, skip_special_tokens=skips)


def test_bytes_that_are_no_character_are_shown_at_the_end():
    tokenizer = TOKENIZERS["byte_level"]
    half = tokenizer.encode("😀").ids[:1]
    pieces, _, _ = stream(tokenizer, half)
    assert pieces == ["", "\ufffd"]


# ---------------------------------------------------------------------- stop strings


def reference_stop(text_after, stops, includes, min_tokens):
    """Stops by looking at whole prefixes: `text_after[i]` is the decode of the first i + 1 ids."""
    for i, text in enumerate(text_after):
        before = text_after[i - 1] if i else ""
        ends = [
            (begin + len(stop), place, stop)
            for place, stop in enumerate(stops)
            for begin in range(len(text))
            if text.startswith(stop, begin) and begin + len(stop) > len(before)
        ]
        if ends and i + 1 >= min_tokens:
            end, _, stop = min(ends)
            return text[: end if includes else end - len(stop)], stop, i + 1
    return (text_after or [""])[-1], None, len(text_after)


@pytest.mark.parametrize("name", ["byte_level", "gemma", "metaspace_never"])
@settings(max_examples=100, deadline=None)
@given(data=st.data(), includes=st.booleans(), min_tokens=st.integers(0, 6))
def test_stop_strings_cut_the_text_where_a_search_of_all_of_it_would(
    name, data, includes, min_tokens
):
    tokenizer = TOKENIZERS[name]
    words = ["a", "b", "▁a", "Ġ", ".", "x▁y", "▁hello", "hello", "Ġthere"]
    pool = [i for i in map(tokenizer.token_to_id, words) if i is not None]
    ids = data.draw(st.lists(st.sampled_from(pool), max_size=16))
    text_after = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    whole = "".join(text_after[-1:])
    spans = st.tuples(st.integers(0, len(whole)), st.integers(1, 5))
    parts = spans.map(lambda span: whole[span[0] : sum(span)] or "never")
    near = st.builds(lambda part, last: part + last, parts, st.sampled_from(["", "a", "~"]))
    stops = data.draw(st.lists(near, min_size=1, max_size=3, unique=True))
    expected = reference_stop(text_after, stops, includes, min_tokens)
    pieces, stop, num_pushed = stream(
        tokenizer, ids, stop=stops, include_stop_str_in_output=includes, min_tokens=min_tokens
    )
    assert ("".join(pieces), stop, num_pushed) == expected


def test_a_possible_stop_string_is_held_back_and_no_more():
    tokenizer = TOKENIZERS["gemma"]
    ids = [tokenizer.token_to_id(token) for token in ["a", "b", "a", ".", "a", "b", "b"]]
    pieces, stop, _ = stream(tokenizer, ids, stop=["abb"])
    assert pieces == ["", "", "ab", "a.", "", "", "", ""]
    assert stop == "abb"


def test_a_stop_string_inside_a_byte_run_is_found_at_once():
    tokenizer = TOKENIZERS["gemma"]
    a = tokenizer.token_to_id("a")
    ids = [a, *(3 + byte for byte in "世。界。".encode()), a]
    pieces, stop, num_pushed = stream(tokenizer, ids, stop=["。"])
    assert ("".join(pieces), stop, num_pushed) == ("a世", "。", 7)
    # In a run that is no UTF-8 as a whole, the same bytes are not that character.
    ids = [a, 3 + 0xFF, *(3 + byte for byte in "。".encode()), a]
    pieces, stop, num_pushed = stream(tokenizer, ids, stop=["。"])
    assert ("".join(pieces), stop, num_pushed) == ("a����a", None, 6)


def test_a_stop_string_complete_before_min_tokens_is_not_found_later():
    tokenizer = TOKENIZERS["gemma"]
    ids = [tokenizer.token_to_id(token) for token in "abab"]
    # "ab" is held back for "abb" when the third token comes, and the "b" in it is old.
    pieces, stop, num_pushed = stream(tokenizer, ids, stop=["b", "abb"], min_tokens=3)
    assert ("".join(pieces), stop, num_pushed) == ("aba", "b", 4)


def test_stripping_the_start_does_not_hide_a_stop_string():
    tokenizer = TOKENIZERS["llama2"]
    ids = [tokenizer.token_to_id(token) for token in ["<0x20>", "<0x78>", "a", "b"]]
    pieces, stop, num_pushed = stream(tokenizer, ids, stop=["xa"])
    assert ("".join(pieces), stop, num_pushed) == ("", "xa", 3)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("includes", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_a_special_token_is_a_stop_string_whether_it_is_shown_or_not(name, includes, skips):
    tokenizer = TOKENIZERS[name]
    specials = ("<|end|>", "<|im_start|>") if name == "byte_level" else ("</s>", "<s>")
    end, other = map(tokenizer.token_to_id, specials)
    a = tokenizer.token_to_id("a")
    fields = {"skip_special_tokens": skips, "include_stop_str_in_output": includes}
    # Text that could become the other stop string is held back until then.
    stops = [specials[0], "aab"]
    pieces, stop, num_pushed = stream(FAST[name], [other, a, a, end, a], stop=stops, **fields)
    assert (stop, num_pushed) == (specials[0], 4)
    text = "".join(pieces)
    assert text.replace(" ", "").endswith("aa" + specials[0] * includes)
    assert (specials[1] in text) != skips and (specials[0] in text) == includes
    # Before min_tokens it is plain text, as any stop string.
    _, stop, num_pushed = stream(FAST[name], [end, a, end, a], stop=stops, min_tokens=2, **fields)
    assert (stop, num_pushed) == (specials[0], 3)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stop_string_that_holds_a_skipped_token_and_more_is_refused(name):
    special = "<|end|>" if name == "byte_level" else "</s>"
    for stop in (f"a{special}", f"{special}\n", f"{special}{special}"):
        with pytest.raises(ValueError, match=r"stop string .* holds the special token"):
            Detokenizer(FAST[name], SamplingParams(stop=["x", stop]))
        Detokenizer(FAST[name], SamplingParams(stop=["x", stop], skip_special_tokens=False))


def test_nothing_may_be_pushed_after_the_end():
    detokenizer = Detokenizer(TOKENIZERS["gemma"], SamplingParams(stop="a"))
    assert detokenizer.push(TOKENIZERS["gemma"].token_to_id("a")) == "a"
    with pytest.raises(AssertionError):
        detokenizer.push(5)
    detokenizer = Detokenizer(TOKENIZERS["byte_level"], SamplingParams())
    detokenizer.push(TOKENIZERS["byte_level"].encode("😀").ids[0])
    detokenizer.finish()
    detokenizer.finish()
    assert detokenizer.text == "\ufffd"


# ---------------------------------------------------------------------- fields, errors, time


def test_spaces_between_special_tokens_are_left_out_on_request():
    for name, with_spaces in (("none", "a </s> </s> a"), ("gemma", "a</s></s>a")):
        tokenizer = TOKENIZERS[name]
        ids = [tokenizer.token_to_id(token) for token in ["a", "</s>", "</s>", "a"]]
        both = []
        for spaces in (True, False):
            pieces, _, _ = stream(
                tokenizer, ids, skip_special_tokens=False, spaces_between_special_tokens=spaces
            )
            both.append("".join(pieces))
        assert both == [with_spaces, with_spaces.replace("</s> </s>", "</s></s>")]


def test_an_unknown_decoder_or_a_slow_tokenizer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\['CTC'\] cannot be followed token by token"):
        Detokenizer(sentencepiece(decoders.CTC()), SamplingParams())
    with pytest.raises(TypeError, match=r"must be a fast one.*got object"):
        Detokenizer(object(), SamplingParams())


class CountingTokenizer:
    """Counts the ids that are decoded."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids, **kwargs):
        self.num_decoded += len(ids)
        return self._tokenizer.decode(ids, **kwargs)


@pytest.mark.parametrize("name", ["byte_level", "llama2"])
@pytest.mark.parametrize("text", [b"\xff", b"\x80", b"\xf0\x9f", "😀".encode()])
def test_the_work_is_linear_on_long_runs_of_broken_bytes(name, text):
    if name == "byte_level":
        alphabet = {byte: char for char, byte in _alphabet().items()}
        unit = [TOKENIZERS[name].token_to_id(alphabet[byte]) for byte in text]
    else:
        unit = [3 + byte for byte in text]
    counting = CountingTokenizer(TOKENIZERS[name])
    ids = unit * (8000 // len(unit))
    detokenizer = Detokenizer(counting, SamplingParams(stop=["stop here", "。。"]))
    counting.num_decoded = 0
    num_characters = 0
    for token_id in ids:
        assert detokenizer.push(token_id) is None
        num_characters += len(detokenizer.take())
    detokenizer.finish()
    assert detokenizer.text == TOKENIZERS[name].decode(ids)
    assert counting.num_decoded <= 2 * len(ids)
    if name == "byte_level":  # and the text comes as it is made
        assert num_characters >= len(ids) // len(unit) - 1
