"""Tokenizers through GGUF metadata and back, and models through `jinfer convert --export gguf`."""

import json
import shutil
import types

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from jinfer.checkpoints.families import assemble, config_from_hf, expected_shapes, tensor_names
from jinfer.checkpoints.gguf.file import GGUFFile
from jinfer.checkpoints.gguf.vocabulary import SAMPLES, tokenizer_metadata
from jinfer.checkpoints.load import load_config
from jinfer.checkpoints.tokenizer import (
    BYTE_LEVEL_SPLITS,
    NFC,
    WHOLE_WORDS_FIRST,
    load_tokenizer,
    tokenizer_from_gguf,
)
from jinfer.cli.main import main
from jinfer.setup.options import sampling_defaults

TEXTS = [*SAMPLES, "the quick brown fox jumps over the lazy dog, then the other foxes"] * 2


def byte_level(pre):
    backend = Tokenizer(models.BPE(ignore_merges=pre in WHOLE_WORDS_FIRST))
    if pre in NFC:
        backend.normalizer = normalizers.NFC()
    splits = [
        pre_tokenizers.Split(Regex(split), behavior="isolated") for split in BYTE_LEVEL_SPLITS[pre]
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages[0]['content'] }}",
        clean_up_tokenization_spaces=False,
    )


def sentencepiece():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz,"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("q", "u"), ("o", "x"), ("f", "ox")]
    tokens += ["".join(merge) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    "pre",
    [
        *("smollm", "qwen2", "gpt-2", "gpt-4o", "qwen35", "deepseek-llm", "deepseek-coder"),
        *("falcon", "command-r", "olmo", "tekken"),
    ],
)
def test_the_pre_tokenizer_is_found_by_its_splits(pre):
    metadata = tokenizer_metadata(byte_level(pre), 330, architecture="llama")
    assert metadata["tokenizer.ggml.pre"] == pre
    kinds = metadata["tokenizer.ggml.token_type"]
    tokens = metadata["tokenizer.ggml.tokens"]
    assert kinds[tokens.index("<tool>")] == 4 and kinds[0] == kinds[1] == 3
    assert tokens[-1] == "[PAD329]" and kinds[-1] == 5


def test_sentencepiece_merges_become_scores():
    metadata = tokenizer_metadata(sentencepiece(), 300, architecture="llama")
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    best = sorted(("the", "th", "▁the", "qu"), key=lambda t: -scores[tokens.index(t)])
    assert best == ["th", "the", "▁the", "qu"]
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.token_type"][tokens.index("<0x41>")] == 6


def test_what_gguf_cannot_say_is_refused():
    with pytest.raises(ValueError, match="ids up to 320, the model only 300"):
        tokenizer_metadata(byte_level("smollm"), 300, architecture="llama")
    odd = byte_level("smollm")
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[aeiou]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(ValueError, match="no pre-tokenizer that GGUF names"):
        tokenizer_metadata(odd, 330, architecture="llama")
    odd = byte_level("smollm")
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match=r"no pre-tokenizer that GGUF names"):
        tokenizer_metadata(odd, 330, architecture="llama")


@pytest.mark.parametrize("make", [lambda: byte_level("gpt-4o"), sentencepiece])
@pytest.mark.parametrize(
    "step",
    [
        *(normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD()),
        *(normalizers.Lowercase(), normalizers.StripAccents(), normalizers.Strip()),
        *(normalizers.Nmt(), normalizers.Replace("colour", "color"), normalizers.Prepend("!")),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_normalizer_that_gguf_has_no_name_for_is_refused(make, step):
    odd = make()
    own = odd.backend_tokenizer.normalizer
    steps = [step] if own is None else [own, step]
    odd.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    with pytest.raises(ValueError, match=r"^GGUF (has no name|cannot hold this tokenizer).*$"):
        tokenizer_metadata(odd, 330, architecture="llama")


def test_qwens_normalizer_comes_back_and_llama_cpps_want_of_it_is_told(tmp_path, caplog):
    qwen = byte_level("qwen2")
    metadata = tokenizer_metadata(qwen, 330, architecture="qwen2")
    assert "composes letters (NFC)" in caplog.text and len(caplog.records) == 1
    file = types.SimpleNamespace(path="m.gguf", metadata=metadata)
    again = tokenizer_from_gguf(file)
    for text in ("e\u0301", "caf\u00e9 cafe\u0301", "\u1100\u1161 \u212b"):
        assert again.encode(text) == qwen.encode(text)
    assert again.encode("e\u0301") == again.encode("\u00e9")
    qwen.backend_tokenizer.normalizer = normalizers.Sequence([])
    metadata = tokenizer_metadata(qwen, 330, architecture="qwen2")
    assert metadata["tokenizer.ggml.pre"] == "deepseek-r1-qwen"  # which cuts alike, as it is
    assert len(caplog.records) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of width 288, no multiple of 256, with a tokenizer."""
    hf = {
        "model_type": "llama",
        **{"vocab_size": 330, "hidden_size": 288, "intermediate_size": 256},
        **{"num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        **{"bos_token_id": 0, "eos_token_id": 1},
    }
    config, rng = config_from_hf(hf), np.random.default_rng(0)
    flat = {
        path: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float16)
        for path, shape in expected_shapes(config).items()
    }
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    tensors = {
        name: np.ascontiguousarray(assemble(config, name, flat.__getitem__))
        for name in tensor_names(config)
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    byte_level("smollm").save_pretrained(folder)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return folder


def run(*argv):
    return main([*map(str, argv), "--debug"])


def test_convert_writes_gguf_that_loads_with_tokenizer_and_template(folder, tmp_path):
    out = tmp_path / "m.gguf"
    calibration = ("--calibration", folder / "text.txt", "--num-sequences", 4, "--length", 16)
    run(
        "convert",
        "--model",
        folder,
        "--export",
        "gguf",
        "--output",
        out,
        "--type",
        "Q4_K",
        *calibration,
    )
    file = GGUFFile(out)
    kinds = {name: tensor.type_name for name, tensor in file.tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == "Q5_0" and kinds["blk.1.ffn_down.weight"] == "Q4_K"
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    meant, found = load_tokenizer(folder), load_tokenizer(out)
    for text in TEXTS:
        assert meant.encode(text) == found.encode(text)
    messages = [{"role": "user", "content": "fox"}]
    assert found.apply_chat_template(messages, tokenize=False) == "fox"
    other = gguf.GGUFReader(out)  # the package's own
    assert {t.name for t in other.tensors} == kinds.keys()
    plain = tmp_path / "plain.gguf"
    run("convert", "--model", folder, "--export", "gguf", "--output", plain, "--type", "Q4_K")
    name = "blk.0.attn_q.weight"
    assert not np.array_equal(GGUFFile(plain).read(name), file.read(name))


def test_quantize_exports_gguf_without_rounding_twice(folder, tmp_path):
    out = tmp_path / "q"
    argv = ("quantize", "--model", folder, "--method", "rtn", "--output", out, "--held-out", 0)
    run(*argv, "--format", "int8-g32", "--export", "gguf")
    kinds = {t.type_name for t in GGUFFile(out / "model.gguf").tensors.values()}
    assert kinds == {"F32", "F16", "Q8_0"}
    assert (out / "quantization.md").is_file()
    with pytest.raises(ValueError, match="no zero points"):
        argv = (*argv[:-3], tmp_path / "r", *argv[-2:])
        run(*argv, "--format", "int4-g32-asym", "--export", "gguf")


@pytest.mark.parametrize("export", ["native", "gguf"])
def test_quantize_keeps_what_a_folder_states_of_generation(export, folder, tmp_path):
    model, out = tmp_path / "model", tmp_path / "q"
    shutil.copytree(folder, model)
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 7], "top_k": 3}')
    argv = ("quantize", "--model", model, "--method", "rtn", "--output", out, "--held-out", 0)
    run(*argv, "--format", "int8-g32", "--export", export)
    assert load_config(model).eos_token_ids == load_config(out).eos_token_ids == (1, 7)
    assert sampling_defaults(out, "auto") == {"top_k": 3}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--export", "gptq", "--type", "Q4_0"), "--type goes with --export gguf"),
        (("--export", "gguf", "--type", "Q4_0", "--seed", "0"), "--seed goes with --calibration"),
        (("--export", "gptq", "--num-sequences", "4"), "--num-sequences goes with --calibration"),
        (("--export", "gguf", "--calibration", "self"), "give a --type too"),
    ],
)
def test_options_without_effect_are_refused(folder, tmp_path, argv, words):
    with pytest.raises(ValueError, match=words):
        run("convert", "--model", folder, "--output", tmp_path / "o", *argv)
