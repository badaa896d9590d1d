"""Words of a command line, valid and strange, by the flags that the parser itself declares."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

from fuzzing.values import json_strange, one_of, some

STRANGE = [
    *("", " ", "0", "1", "2", "-1", "1.5", "-0.0", "1e400", "nan", "inf", "-inf", "none", "None"),
    *("true", "false", "auto", "{}", "[]", "null", '{"a": 1}', '{"temperature": NaN}', "{", "a b"),
    *("9" * 5000, "10" * 15, "-" + "9" * 30, "1_0", "٣", "0x10", " 7", "7 ", "é🙂", "\udcff"),
    *("a\nb", "x" * 300, "--", "nowhere", "xla", "int4-g32", "int8", "fp8", "float32", "2GiB"),
    *("bfloat16", "0GiB", "99999999999GiB", "1e3", "[" * 3000, '{"method": 5}', "ngram"),
]
# Places in the working folder: none, a file, a folder, one in a file, a link to itself, a name too
# long, ...
PATHS = [
    *("out", "no/such/out", "", ".", "afile", "afolder", "afile/out", "loop", "x" * 300, "\udcff"),
    *("🙂", "/dev/null", "/proc/nope/out", "afolder/out", "out\n2", " "),
]
_PATH_FLAGS = ("output", "json", "data", "input", "text", "check", "recipe", "calibration", "heads")
# Numbers that a run may well be long for: nothing to learn from huge ones.
_LONG = ("steps", "epochs", "num_sequences", "length", "max_texts", "held_out", "batch_size")
_LONG += ("window", "num_heads", "num_layers", "max_tokens", "windows", "tree_nodes")

VALID: dict[str, Any] = {
    "max_tokens": one_of("1", "4", "none"),
    "min_tokens": one_of("0", "1", "3"),
    "temperature": one_of("0", "0.7", "1"),
    "top_p": one_of("0.5", "1"),
    "top_k": one_of("0", "1", "5"),
    "min_p": one_of("0", "0.1"),
    "presence_penalty": one_of("0.5", "-1"),
    "frequency_penalty": one_of("0.5"),
    "repetition_penalty": one_of("1.2", "0.5"),
    "seed": one_of("0", "5"),
    "stop": one_of("a", "é", "\n"),
    "stop_token_ids": one_of("5", "7"),
    "n": one_of("1", "2"),
    "logprobs": one_of("0", "2"),
    "prompt_logprobs": one_of("0", "2"),
    "num_beams": one_of("1", "2", "3"),
    "length_penalty": one_of("0", "1.5"),
    "dtype": one_of("float32", "bfloat16", "float16", "auto"),
    "kv_dtype": one_of("fp8", "int8", "float32"),
    "quantization": one_of("int8", "nf4", "int4-g32:rtn", "gguf"),
    "kv_cache_dtype": one_of("auto", "int8", "fp8", "int4"),
    "max_model_len": one_of("64", "128", "16"),
    "max_num_seqs": one_of("1", "4"),
    "max_num_batched_tokens": one_of("16", "64"),
    "block_size": one_of("8", "16"),
    "kv_cache_memory_bytes": one_of("1MiB", "4MiB"),
    "num_gpu_blocks_override": one_of("8", "20"),
    "gpu_memory_utilization": one_of("0.9", "0.5"),
    "num_decode_steps": one_of("1", "3"),
    "max_logprobs": one_of("5", "-1"),
    "attention_impl": one_of("auto", "xla"),
    "linear_impl": one_of("auto", "xla"),
    "speculative_config": one_of('{"method": "ngram"}', '{"method": "self", "format": "int8"}'),
    "sampling_params": one_of("{}", '{"top_k": 3}', '{"ignore_eos": true}', '{"n": 1}'),
    "cpu_offload_gb": one_of("0", "0.001"),
    "context": one_of("8", "16", "4096"),
    "batch": one_of("1", "4"),
    "memory": one_of("1GiB", "80GiB"),
    "page_size": one_of("16", "64"),
    "format": one_of("int4-g32", "int8-channel", "int4-g32-asym", "int8-channel:dyn"),
    "target_bits": one_of("4.5", "6"),
    "damp": one_of("0.01", "0.1"),
    "correct": one_of("0", "0.5"),
    "alpha": one_of("0.5"),
    "num_sequences": one_of("2", "3"),
    "length": one_of("16", "20"),
    "held_out": one_of("0", "1"),
    "windows": one_of("1", "2"),
    "steps": one_of("1", "2"),
    "epochs": one_of("1"),
    "batch_size": one_of("1", "2"),
    "window": one_of("8", "16"),
    "learning_rate": one_of("1e-3"),
    "weight_decay": one_of("0", "0.1"),
    "checkpoint_every": one_of("1"),
    "max_texts": one_of("2", "4"),
    "num_heads": one_of("1", "2"),
    "draft_vocab_size": one_of("50"),
    "tree_nodes": one_of("4"),
    "num_layers": one_of("1", "2"),
    "system": one_of("be brief", ""),
}


def flags_of(parser: argparse.ArgumentParser, command: Sequence[str]) -> list[argparse.Action]:
    """Returns the optional flags of a subcommand, such as ["bench", "kv"]."""
    for name in command:
        [choices] = [a.choices for a in parser._actions if isinstance(a.choices, dict)]
        parser = choices[name]
    return [a for a in parser._actions if a.option_strings and a.dest not in ("help", "debug")]


def word(rng: random.Random, action: argparse.Action, share: float) -> str:
    """Returns a value for a flag, valid with a probability of `share`."""
    if action.dest in _PATH_FLAGS and rng.random() > 0.1:
        return rng.choice(PATHS)
    if rng.random() < share:
        if action.choices:
            return str(rng.choice(list(action.choices)))
        if action.dest in VALID:
            return VALID[action.dest](rng)
    if action.dest == "sampling_params" and rng.random() < 0.7:
        return sampling_json(rng)
    if action.dest == "speculative_config" and rng.random() < 0.5:
        key = rng.choice(["method", "num_speculative_tokens", "adaptive", "window", "format"])
        return json.dumps({"method": "ngram", key: json_strange(rng)})
    text = rng.choice(STRANGE)
    is_long = action.dest in _LONG and text.strip("-0123456789_ ") == "" and len(text) > 2
    return "1" if is_long else text


SAMPLING_NAMES = (
    *("temperature", "top_k", "stop", "logit_bias", "bad_words", "allowed_token_ids", "seed"),
    *("min_tokens", "n", "detokenize", "output_kind", "max_tokens", "structured_outputs"),
)


def sampling_json(rng: random.Random) -> str:
    """Returns --sampling-params with one or two fields of strange values."""
    return json.dumps({name: json_strange(rng) for name in some(rng, SAMPLING_NAMES, 2)})


def words(rng: random.Random, action: argparse.Action, share: float) -> list[str]:
    """Returns a flag with its value, or values, or none where it takes none."""
    option = rng.choice(action.option_strings)
    if action.nargs == 0:
        return [option] if rng.random() < 0.97 else [f"{option}={rng.choice(STRANGE)}"]
    if action.nargs == "+":
        return [option, *(word(rng, action, share) for _ in range(rng.choice([1, 2])))]
    value = word(rng, action, share)
    return [f"{option}={value}"] if value.startswith("-") or rng.random() < 0.3 else [option, value]


def jsonl(rng: random.Random, vocab: int) -> tuple[bytes, dict[int, dict[str, Any]], int]:
    """Returns a JSONL file, its good lines by number, and how many bad ones it has."""
    lines: list[bytes] = []
    good: dict[int, dict[str, Any]] = {}
    num_bad = 0
    for number in range(1, rng.choice([1, 2, 4]) + 1):
        if rng.random() < 0.6:
            fields = _good_line(rng, vocab)
            good[number] = fields
            lines.append(json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode())
        elif rng.random() < 0.15:
            lines.append(rng.choice([b"", b"   ", b"\t"]))
        else:
            num_bad += 1
            lines.append(_bad_line(rng))
    end = rng.choice([b"\n", b"\r\n"])
    return end.join(lines) + rng.choice([b"", end]), good, num_bad


def _good_line(rng: random.Random, vocab: int) -> dict[str, Any]:
    prompts: list[dict[str, Any]] = [
        {"prompt": rng.choice(["a", "hello", "été", "🙂"])},
        {"prompt_token_ids": [rng.randrange(vocab) for _ in range(3)]},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    fields = rng.choice(prompts)
    if rng.random() < 0.4:
        fields["id"] = rng.choice(["x", 7, "é"])
    if rng.random() < 0.5:
        fields["sampling_params"] = rng.choice([{}, {"max_tokens": 2}, {"logprobs": 1}])
    return fields


def _bad_line(rng: random.Random) -> bytes:
    odd: list[bytes] = [b"{", b"[]", b"7", b"null", b'"a"', b"\xff\xfe{\x00", b"\xef\xbb\xbf{}"]
    odd += [b"{}", b'{"prompt": 5}', b'{"prompt": "a", "messages": []}', b'{"prompt": "\\ud800"}']
    odd += [b'{"prompt": ""}', b'{"prompt_token_ids": []}', b'{"prompt_token_ids": [-1]}']
    odd += [b'{"prompt_token_ids": [1.0]}', b'{"prompt_token_ids": [true]}', b"[" * 5000]
    odd += [b'{"prompt_token_ids": [100000]}', b'{"prompt_token_ids": [' + b"9" * 5000 + b"]}"]
    odd += [b'{"messages": []}', b'{"messages": [{}]}', b'{"messages": [{"role": "user"}]}']
    odd += [b'{"messages": "hi"}', b'{"messages": {"role": "user"}}', b'{"prompt": "a", "x": 1}']
    odd += [b'{"messages": [{"role": "user", "content": 5, "tool_calls": 7}]}', b"\x00\x00"]
    odd += [b'{"prompt": "a", "sampling_params": ' + text + b"}" for text in _ODD_PARAMS]
    odd += [b'{"prompt": "a", "id": ' + text + b"}" for text in (b"1.5", b"true", b"[]", b"{}")]
    return rng.choice(odd)


_ODD_PARAMS = [
    *(b"[]", b'""', b"0", b"false", b"7", b'"a"', b'{"temperature": "a"}', b'{"n": 0}'),
    *(b'{"max_tokens": 1e400}', b'{"max_tokens": true}', b'{"nonsense": 1}', b'{"stop": [""]}'),
    *(b'{"top_k": 1000000000000000000000000000000}', b'{"output_kind": "DELTA"}'),
    *(b'{"structured_outputs": {"a": 1}}', b'{"allowed_token_ids": []}', b'{"logprobs": 5000}'),
]
