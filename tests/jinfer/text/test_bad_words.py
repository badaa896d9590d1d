"""Every place where a word may begin in a text is banned, and nothing that is not that word."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jinfer.checkpoints.tokenizer import load_tokenizer
from jinfer.text.bad_words import encode_bad_word

BEFORE = ("", " ", "\n", "A ", "I see ", "a\n", "a\n\n", "\t", "(", '"', ' "', "so, ")


def merged(merges):
    return [tuple(merge.split()) for merge in merges]


def byte_level(*, add_prefix_space=False):
    """ "Tokyo" is two tokens, " Tokyo" one; " Kyo" is three, "Kyo" one."""
    merges = merged(["T o", "k y", "ky o", "Ġ To", "ĠTo kyo", "K yo", "y o", "Ġ K"])
    merges = sorted(merges, key=lambda pair: pair == ("K", "yo"))  # after its parts
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece(kind, *, has_bytes=True):
    """The same words with ▁ for a space; `kind`: how a text is given its first one, if at all."""
    merges = merged(["T o", "k y", "ky o", "▁ To", "▁To kyo", "K yo", "y o", "▁ K", "▁ ▁"])
    merges = sorted(merges, key=lambda pair: pair == ("K", "yo"))
    tokens = ["<unk>", "▁", *"TokyKIseaASo,n()\"'.t0"]
    tokens += [f"<0x{i:02X}>" for i in range(256)] if has_bytes else ["\n", "\t"]
    tokens += ["".join(pair) for pair in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=has_bytes
    )
    backend = Tokenizer(model)
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace()
    else:
        steps = [normalizers.Prepend("▁")] if kind == "prepend" else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level, prefix space": byte_level(add_prefix_space=True),
    "sentencepiece": sentencepiece("prepend"),
    "sentencepiece, no prefix": sentencepiece("plain"),
    "sentencepiece, metaspace": sentencepiece("metaspace"),
    "sentencepiece, no bytes": sentencepiece("prepend", has_bytes=False),
}


def meets(ids, sequences):
    """Whether a sequence occurs in `ids`, as the sampler finds it."""
    return any(
        ids[end - len(word) : end] == word
        for word in sequences
        for end in range(len(word), len(ids) + 1)
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("word", ["Tokyo", " Tokyo", "Kyo", "To", "k", "(Tokyo", "o'T", "To kyo"])
def test_a_word_is_met_wherever_it_begins(name, word):
    tokenizer = TOKENIZERS[name]
    sequences = encode_bad_word(tokenizer, word)
    assert all(sequences)
    for before in BEFORE:
        ids = tokenizer.encode(before + word.lstrip() + ".", add_special_tokens=False)
        assert meets(ids, sequences), (before, tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_another_word_is_not_met(name):
    tokenizer = TOKENIZERS[name]
    sequences = encode_bad_word(tokenizer, "Tokyo")
    lengths = sorted(map(len, sequences))
    assert lengths[:2] == [1, 2], "one token after a space, two elsewhere: both are banned"
    for text in ("", " ", "\n", "  ", "To", " To", "kyo", "To kyo", "Toky", "ToTo", "(", "o T"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert not meets(ids, sequences), tokenizer.convert_ids_to_tokens(ids)
    assert all("Tokyo" in tokenizer.decode(ids) for ids in sequences)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_word_is_met_with_the_first_piece_of_another_place(name):
    """What a model does whose " Tokyo" is banned: " To", "kyo"."""
    tokenizer = TOKENIZERS[name]
    space = "Ġ" if name.startswith("byte") else "▁"
    evasion = tokenizer.convert_tokens_to_ids([f"{space}To", "kyo"])
    assert meets(evasion, encode_bad_word(tokenizer, "Tokyo"))


def test_a_sequence_that_ends_in_another_is_left_out():
    tokenizer = TOKENIZERS["sentencepiece"]
    for word in ("Tokyo", "Kyo", "To", "(To", "k o"):
        found = encode_bad_word(tokenizer, word)
        for ids in found:
            assert not any(a is not ids and ids[-len(a) :] == a for a in found)


def test_a_word_that_the_vocabulary_cannot_spell_bans_nothing_else():
    tokenizer = TOKENIZERS["sentencepiece, no bytes"]
    assert encode_bad_word(tokenizer, "Zoo") == []
    assert encode_bad_word(tokenizer, "<unk>") == [[tokenizer.unk_token_id]]


@pytest.mark.parametrize(("word", "match"), [("To ", "a space at its end"), ("T a ", "at its end")])
def test_a_word_that_would_never_be_met_is_refused_by_name(word, match):
    for tokenizer in TOKENIZERS.values():
        with pytest.raises(ValueError, match=f"bad_words holds {word!r}.*{match}"):
            encode_bad_word(tokenizer, word)


def test_blanks_themselves_may_be_banned():
    tokenizer = TOKENIZERS["byte-level"]
    for word in (" ", "\n", "\t"):
        assert meets(tokenizer.encode(f"a{word}"), encode_bad_word(tokenizer, word))


def test_the_default_models_words_are_met_wherever_they_begin(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    words = "Tokyo Kyoto cat catalog Zürich 日本 ' 's 3 1984 (Tokyo) e-mail C++ naïve <b> #tag @me"
    for word in [*words.split(), "New York", "to be or not", "<|im_end|>"]:
        sequences = encode_bad_word(tokenizer, word)
        assert 1 <= len(sequences) <= 6
        for before in ("", " ", "\n", "A ", "I see ", "a\n", "a\n\n"):
            ids = tokenizer.encode(before + word)
            assert meets(ids, sequences), (before, tokenizer.convert_ids_to_tokens(ids))
