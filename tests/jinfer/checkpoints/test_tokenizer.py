"""Tokenizers from GGUF metadata: against transformers, against sentencepiece, and round trips."""

import importlib.util
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import unicodedata

import gguf
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jinfer.checkpoints.gguf.file import GGUFFile
from jinfer.checkpoints.tokenizer import BYTE_LEVEL_SPLITS, NFC, load_tokenizer, tokenizer_from_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces   and more    ",
    "tabs\tand\n\nlines\r\n  \n end\n",
    "日本語のテキスト、中文文本。한국어",
    "emoji 😀👩‍👩‍👧 and 🏳️‍🌈",
    "a\u0301 combining, ﬁ ligature, Å",
    "don't I'LL we've",
    "0 12 345 6789 ½ ٣",
    "x = {'a': [1, 2.5e-3]}  # code\n\tif x != y: return",
    "null \x00 and \x7f and \u200b",
    "<|im_start|>user\nhi<|im_end|>",
    "Ünïcödé ßtraße łódź кириллица עברית العربية",
]


def write_vocabulary(path, kind, tokens, *, types=None, merges=None, scores=None, **keys):
    """Writes a GGUF file with a tokenizer and no tensors."""
    writer = gguf.GGUFWriter(path, keys.pop("arch", "llama"))
    writer.add_context_length(77)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [NORMAL] * len(tokens))
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for key, value in keys.items():
        key = key.replace("__", ".") if "__" in key else f"tokenizer.ggml.{key}"
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return load_tokenizer("smollm2")


# The default model's tokenizer: byte-level BPE.


@pytest.mark.parametrize("text", TEXTS)
def test_the_default_model_decodes_what_it_encodes(text, smollm2):
    assert smollm2.decode(smollm2.encode(text)) == text


@pytest.fixture(scope="module")
def known_bytes(smollm2):
    """The spelled bytes that have a token: those of planes without characters have none."""
    return {token for token in smollm2.get_vocab() if len(token) == 1}


@settings(deadline=None)
@given(st.text())
def test_the_default_model_decodes_whatever_it_encodes(smollm2, known_bytes, text):
    pieces = smollm2.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assume(known_bytes.issuperset("".join(piece for piece, _ in pieces)))
    assert smollm2.decode(smollm2.encode(text)) == text


def test_the_default_models_special_tokens_and_template(smollm2):
    assert smollm2.eos_token_id == 2 and smollm2.bos_token_id == 1 and len(smollm2) == 49152
    assert smollm2.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert smollm2.decode([1, 6004, 2], skip_special_tokens=True) == "hi"
    assert smollm2.model_max_length == 8192
    chat = smollm2.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_the_default_model_encodes_as_transformers_own_conversion(
    smollm2, smollm2_path, shared_data
):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    text = (shared_data / "text" / "wiki.test.raw").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)[:1500]
    prompts = (shared_data / "prompts" / "mt_bench_question.jsonl").read_text().splitlines()
    lines += [turn for line in prompts for turn in json.loads(line)["turns"]]
    # transformers does not set numerals other than 0-9 apart in such a file; llama.cpp and the
    # tokenizer that the model was trained with do.
    lines = [s for s in lines if not any(c.isnumeric() and not c.isdecimal() for c in s)]
    assert sum(not line.isascii() for line in lines) > 100
    for line in [*lines, *(t for t in TEXTS if "½" not in t)]:
        assert smollm2.encode(line) == reference.encode(line), line


def test_a_tokenizer_is_built_without_torch(smollm2_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from jinfer.checkpoints.tokenizer import load_tokenizer\n"
        "print(load_tokenizer('smollm2').encode('Hello world'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[19556, 905]", done.stderr
    assert done.stderr == ""


# Byte-level BPE of other models.


@pytest.fixture(scope="module")
def byte_level():
    """A small byte-level BPE: (tokens, merges), trained on the texts above."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    trained.train_from_iterator(TEXTS * 3 + ["the cat sat on the mat, 2024 2025"] * 4, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(merge) for merge in model["merges"]]


@pytest.mark.parametrize("pre", sorted(BYTE_LEVEL_SPLITS))
def test_every_pre_tokenizer_keeps_the_text(pre, byte_level, tmp_path):
    tokens, merges = byte_level
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, merges=merges, pre=pre)
    tokenizer = load_tokenizer(path)
    for text in TEXTS:
        kept = unicodedata.normalize("NFC", text) if pre in NFC else text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == kept
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  It's 2024,\n ok")
    assert len(pieces) > 4


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("gpt-2", ["ab", " ", " It", "'s", " 12345", ",", "\n", "Ok", "'", "LL"]),
        ("smollm", ["ab", " ", " It", "'s", " ", *"12345", ",", "\n", "Ok", "'", "LL"]),
        ("llama-bpe", ["ab", " ", " It", "'s", " ", "123", "45", ",\n", "Ok", "'LL"]),
        ("qwen2", ["ab", " ", " It", "'s", " ", *"12345", ",\n", "Ok", "'LL"]),
        ("tekken", ["ab", " ", " It", "'s", " ", *"12345", ",\n", "Ok", "'LL"]),
        ("gpt-4o", ["ab", " ", " It's", " ", "123", "45", ",\n", "Ok'LL"]),
        ("qwen35", ["ab", " ", " It", "'s", " ", *"12345", ",\n", "Ok", "'LL"]),
        ("deepseek-llm", ["ab", " ", " It", "'", "s", " ", "12345", ",", "\n", "Ok", "'", "LL"]),
        ("deepseek-coder", ["ab", " ", " It", "'", "s", " ", *"12345", ",", "\n", "Ok", "'", "LL"]),
        ("falcon", ["ab", " ", " It", "'", "s", " ", "123", "45", ",", "\n", "Ok", "'", "LL"]),
    ],
)
def test_texts_are_cut_as_the_model_was_trained(pre, pieces, byte_level, tmp_path):
    tokens, merges = byte_level
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, merges=merges, pre=pre)
    cut = load_tokenizer(path).backend_tokenizer.pre_tokenizer
    decode = decoders.ByteLevel().decode
    assert [decode([p]) for p, _ in cut.pre_tokenize_str("ab  It's 12345,\nOk'LL")] == pieces


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("qwen2", ["กำล", "ัง", " `+=`", " 日本ab", " ვx"]),
        ("qwen35", ["กำลัง", " `+=`", " 日本ab", " ვx"]),
        ("deepseek-llm", ["กำลัง", " `+=`", " ", "日本", "ab", " ", "ვ", "x"]),
        ("deepseek-coder", ["กำล", "ั", "ง", " `+=`", " ", "日本", "ab", " ", "ვ", "x"]),
        ("falcon", ["กำล", "ั", "ง", " ", "`+=`", " 日本ab", " ვx"]),
        ("default", ["กำล", "ั", "ง", " `", "+=", "`", " 日本ab", " ვx"]),
    ],
)
def test_marks_scripts_and_signs_are_cut_as_the_model_was_trained(pre, pieces):
    splits = [pre_tokenizers.Split(Regex(s), behavior="isolated") for s in BYTE_LEVEL_SPLITS[pre]]
    cut = pre_tokenizers.Sequence(splits).pre_tokenize_str("กำลัง `+=` 日本ab ვx")
    assert [piece for piece, _ in cut] == pieces


PAIRS = pathlib.Path(os.environ.get("JINFER_LLAMA_CPP_MODELS", "nowhere"))


@pytest.mark.parametrize(
    "name",
    [
        *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe"),
        *("llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"),
    ],
)
def test_published_vocabularies_encode_as_llama_cpp_does(name):
    path = PAIRS / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip("JINFER_LLAMA_CPP_MODELS must name the folder models of llama.cpp's sources")
    texts = pathlib.Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = pathlib.Path(f"{path}.out").read_text().splitlines()
    tokenizer = load_tokenizer(path)
    assert len(texts) >= 46
    for text, line in zip(texts, lines):
        ids = [int(token_id) for token_id in line.split()]
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text


def test_whole_words_go_before_merges_in_llama3(byte_level, tmp_path):
    tokens, merges = byte_level
    tokens = [*tokens, "zqj"]  # no merge leads there
    whole = [len(tokens) - 1]
    for pre, expected in (("llama-bpe", whole), ("glm4", whole), ("qwen2", None)):
        path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, merges=merges, pre=pre)
        ids = load_tokenizer(path).encode("zqj", add_special_tokens=False)
        assert ids == (expected or [tokens.index(c) for c in "zqj"])


@pytest.mark.parametrize(
    "pre, stated, adds_bos",
    [
        ("qwen2", {}, False),
        ("qwen2", {"add_bos_token": True}, True),
        ("glm4", {}, False),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
    ],
)
def test_bos_is_added_as_the_file_or_its_kind_says(pre, stated, adds_bos, byte_level, tmp_path):
    tokens, merges = byte_level
    tokens = [*tokens, "<bos>", "<eos>"]
    n = len(tokens)
    types = [NORMAL] * (n - 2) + [CONTROL] * 2
    path = write_vocabulary(
        tmp_path / "v.gguf",
        "gpt2",
        tokens,
        types=types,
        merges=merges,
        pre=pre,
        bos_token_id=n - 2,
        eos_token_id=n - 1,
        add_eos_token=True,
        **stated,
    )
    tokenizer = load_tokenizer(path)
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    assert tokenizer.encode("the cat") == [n - 2] * adds_bos + plain + [n - 1]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")


def test_control_and_user_defined_tokens_stay_whole(byte_level, tmp_path):
    tokens, merges = byte_level
    n = len(tokens)
    tokens = [*tokens, "<｜end▁of▁text｜>", "<think>", "<|im_end|>", "[PAD]"]
    types = [NORMAL] * n + [CONTROL, USER_DEFINED, NORMAL, UNUSED]
    path = write_vocabulary(
        tmp_path / "v.gguf", "gpt2", tokens, types=types, merges=merges, pre="qwen2"
    )
    tokenizer = load_tokenizer(path)
    assert len(tokenizer) == len(tokens)
    text = "a<｜end▁of▁text｜><think>b<|im_end|>"
    ids = tokenizer.encode(text)
    assert {n, n + 1, n + 2} <= set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert n + 3 not in tokenizer.encode("[PAD]")


def test_chat_templates_are_taken_over(byte_level, tmp_path):
    tokens, merges = byte_level
    args = (tmp_path / "v.gguf", "gpt2", tokens)
    one = {"tokenizer__chat_template": "{{ messages[0]['content'] }}!"}
    path = write_vocabulary(*args, merges=merges, pre="qwen2", **one)
    messages = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(path).apply_chat_template(messages, tokenize=False) == "hi!"
    two = {**one, "tokenizer__chat_template__tool_use": "tools"}
    path = write_vocabulary(*args, merges=merges, pre="qwen2", **two)
    assert load_tokenizer(path).chat_template == {
        "default": "{{ messages[0]['content'] }}!",
        "tool_use": "tools",
    }
    path = write_vocabulary(*args, merges=merges, pre="qwen2")
    assert load_tokenizer(path).chat_template is None


def test_golden_files_encode_as_the_folder_they_were_made_from(shared_data):
    folder = load_tokenizer(shared_data / "quantized" / "base-tiny-llama")
    file = load_tokenizer(shared_data / "quantized" / "gguf-f16")
    for text in TEXTS:
        plain = file.encode(text, add_special_tokens=False)
        assert plain == folder.encode(text, add_special_tokens=False)
        assert file.encode(text) == [256, *plain]
        assert file.decode(plain) == text


# Sentencepiece.


def spm_vocabulary(pieces: list[str]):
    """(tokens, types, scores): <unk> <s> </s>, the bytes, then pieces, best first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    return tokens, types, scores


SPM_PIECES = [
    *("▁t", "he", "▁a", "in", "▁the", "at", "▁c", "▁cat", "▁in", "ing", "re", "▁s", "▁sat", "▁▁"),
    *("▁▁▁", "th", "ha", "hat", "that", "▁that", "ca", "atin", "日本", "▁", *"theainrcsgbdou日本"),
    *("<0", "x4", "<0x4", "1>", *"<0x41>"),  # not to be merged into a byte
]


def encode_by_score(text: str, tokens, scores, add_space: bool) -> list[int]:
    """Sentencepiece's BPE, literally: merge the best-scored neighbours, leftmost first."""
    text = text.replace(" ", "▁")
    symbols = list(("▁" if add_space and text else "") + text)
    known = {token: i for i, token in enumerate(tokens) if i >= 259}
    while True:
        pairs = [
            (-scores[known[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in known
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = []
    for symbol in symbols:
        ids += [known[symbol]] if symbol in known else [3 + byte for byte in symbol.encode()]
    return ids


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_files_merge_the_best_score_first(add_space, tmp_path):
    tokens, types, scores = spm_vocabulary(SPM_PIECES)
    path = write_vocabulary(
        tmp_path / "v.gguf",
        "llama",
        tokens,
        types=types,
        scores=scores,
        add_space_prefix=add_space,
        bos_token_id=1,
        eos_token_id=2,
    )
    tokenizer = load_tokenizer(path)
    rng = random.Random(0)
    texts = ["".join(rng.choices("theaincrgsb  日本é\n", k=rng.randint(0, 40))) for _ in range(400)]
    for text in [*texts, *TEXTS, "<0x41>"]:
        if "<|" in text:
            continue
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == encode_by_score(text, tokens, scores, add_space), text
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == [1, *ids]  # these add bos unless told otherwise


def test_sentencepiece_files_encode_as_sentencepiece(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    corpus = ["the cat sat in the hat", "that thing is catching rain again", "日本 語"] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    reference = spm.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ids = range(reference.vocab_size())
    types = [
        UNKNOWN
        if reference.is_unknown(i)
        else CONTROL
        if reference.is_control(i)
        else BYTE
        if reference.is_byte(i)
        else NORMAL
        for i in ids
    ]
    path = write_vocabulary(
        tmp_path / "v.gguf",
        "llama",
        [reference.id_to_piece(i) for i in ids],
        types=types,
        scores=[reference.get_score(i) for i in ids],
    )
    tokenizer = load_tokenizer(path)
    for text in [*corpus[:3], *TEXTS, "catching  the hat"]:
        if text and "\x00" not in text:
            assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


def test_gemma_files_go_by_token_order_and_keep_whitespace_runs_whole(tmp_path):
    tokens, types, _ = spm_vocabulary(SPM_PIECES)
    tokens = [*tokens, "\n\n", "     "]
    types = [*types, USER_DEFINED, USER_DEFINED]
    path = write_vocabulary(
        tmp_path / "v.gguf",
        "llama",
        tokens,
        types=types,
        scores=[float(i) for i in range(len(tokens))],
        arch="gemma2",
        add_space_prefix=False,
        bos_token_id=1,
    )
    tokenizer = load_tokenizer(path)
    by_order = [-float(i) for i in range(len(tokens))]
    misled = [float(i) for i in range(len(tokens))]
    for text in ["the cat in the hat that sat", "  catin"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == encode_by_score(text, tokens, by_order, add_space=False)
        assert ids != encode_by_score(text, tokens, misled, add_space=False)
    ids = tokenizer.encode("the\n\ncat     sat", add_special_tokens=False)
    assert len(tokens) - 2 in ids and len(tokens) - 1 in ids
    assert tokenizer.decode(ids) == "the\n\ncat     sat"


def test_gemma4_files_go_by_their_merges_and_put_no_space_before_a_text(tmp_path):
    tokens, types, _ = spm_vocabulary(["th", "he", "the", "▁the", "cat", "ca", "at", *"▁theca"])
    path = write_vocabulary(
        tmp_path / "v.gguf",
        "gemma4",
        tokens,
        types=types,
        scores=[-1000.0] * len(tokens),
        merges=["h e", "t he", "▁ the", "a t", "x y"],
        bos_token_id=1,
    )
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("the the cat é")
    words = ["the", "▁the", "▁", "c", "at", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens(ids) == [tokens[1], *words]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the the cat é"


def test_special_tokens_of_phi3_swallow_the_space_after_them(tmp_path):
    tokens, types, scores = spm_vocabulary(SPM_PIECES)
    tokens, types, scores = [*tokens, "<|user|>"], [*types, CONTROL], [*scores, -1000.0]
    args = (tmp_path / "v.gguf", "llama", tokens)
    common = {"types": types, "scores": scores, "arch": "phi3"}
    for name, num_after in (("Phi-3 mini", 1), ("another", 2)):
        path = write_vocabulary(*args, **common, general__name=name)
        ids = load_tokenizer(path).encode("<|user|>\nthe", add_special_tokens=False)
        assert ids[0] == len(tokens) - 1
        assert (3 + 10 in ids) == (num_after == 2)  # the line break


# What cannot be read.


@pytest.mark.parametrize(
    "kind, keys, parts",
    [
        ("gpt2", {"pre": "kimi-k2"}, ("pre-tokenizer 'kimi-k2'", "llama-bpe", "smollm")),
        ("bert", {}, ("tokenizer.ggml.model is 'bert'", "gpt2", "llama")),
    ],
)
def test_an_unknown_tokenizer_is_named_in_one_line(kind, keys, parts, byte_level, tmp_path):
    tokens, merges = byte_level
    path = write_vocabulary(tmp_path / "v.gguf", kind, tokens, merges=merges, **keys)
    with pytest.raises(ValueError) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_file_without_a_pre_tokenizer_says_what_is_assumed(byte_level, tmp_path, caplog):
    tokens, merges = byte_level
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, merges=merges)
    tokenizer = tokenizer_from_gguf(GGUFFile(path))
    assert "names no pre-tokenizer" in caplog.text
    assert tokenizer.decode(tokenizer.encode(TEXTS[5])) == TEXTS[5]


def test_repeated_tokens_are_refused(byte_level, tmp_path):
    tokens, merges = byte_level
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", [*tokens, tokens[0]], merges=merges)
    with pytest.raises(ValueError, match="same token twice"):
        load_tokenizer(path)


def test_places_without_a_tokenizer_are_named_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^no tokenizer in .*tokenizer\.json.*$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"^cannot load a tokenizer from .*$"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^no model at .*$"):
        load_tokenizer(tmp_path / "nowhere.gguf")


def test_a_sentencepiece_file_alone_asks_for_sentencepiece(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    missing = lambda name, *more: None if name == "sentencepiece" else real(name, *more)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", missing)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ValueError, match=r"^.*tokenizer\.model is .*pip install sentencepiece$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json", "vocab.json"])
@pytest.mark.parametrize("text", ["{}", "[]", '{"model": 3}', '{"config": []}', "null"])
def test_damaged_tokenizer_files_are_a_line_that_names_their_folder(tmp_path, name, text):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"^cannot load a tokenizer from .*$") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_reason_of_a_damaged_tokenizer_stays_short(byte_level, tmp_path):
    tokens, merges = byte_level
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, merges=merges)
    load_tokenizer(path).save_pretrained(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding": "x" * 5000}))
    with pytest.raises(ValueError, match="cannot load a tokenizer") as error:
        load_tokenizer(tmp_path / "t")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("longest", [{"a": 1}, "512", True, [512]])
def test_a_model_max_length_that_is_no_number_is_named(byte_level, tmp_path, longest):
    tokens, merges = byte_level
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, merges=merges)
    load_tokenizer(path).save_pretrained(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": longest}))
    with pytest.raises(ValueError, match="must have a number as model_max_length"):
        load_tokenizer(tmp_path / "t")


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_tokenizer("some-org/no-such-model")
    assert "\n" not in str(error.value) and "some-org/no-such-model" in str(error.value)


def test_every_split_is_a_valid_expression():
    for splits in BYTE_LEVEL_SPLITS.values():
        for split in splits:
            assert Regex(split)
