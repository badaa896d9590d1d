"""Arguments of the Python door, valid and strange, and what the valid ones mean."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from fuzzing.oracle import expect
from fuzzing.values import LONE, one_of, pick, some, strange

Valid = Callable[[random.Random], Any]


def _ids(vocab: int) -> Valid:
    """Lists of token ids in several spellings, short or covering much of the vocabulary."""

    def make(rng: random.Random) -> Any:
        ids = [rng.randrange(vocab) for _ in range(rng.choice([1, 1, 2, 5, 200]))]
        return rng.choice([list, tuple, np.array, set, lambda x: list(map(np.int64, x))])(ids)

    return make


def sampling_fields(vocab: int) -> dict[str, Valid]:
    """Makers of valid values of SamplingParams' fields."""
    ids = _ids(vocab)
    texts = one_of("a", "ab", ["a", "e"], ["the"], ("\n",), " ", "é", ["zz", "q"], [])
    flag = one_of(True, False)
    penalty = one_of(0, 0.5, -0.5, 2, -2, np.float32(1.25))
    return {
        "n": one_of(1, 1, 2, 3, np.int32(2)),
        "temperature": one_of(0, 0, 0.0, 0.01, 0.7, 1, 1.5, np.float32(0.5), 1e-5, 100.0),
        "top_p": one_of(1, 1.0, 0.9, 0.1, 1e-6, np.float64(0.5)),
        "top_k": one_of(0, -1, 1, 2, 10, 299, 300, 1000),
        "min_p": one_of(0, 0.0, 0.05, 0.5, 1.0),
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "repetition_penalty": one_of(1, 1.0, 1.3, 0.5, 10.0, np.float32(1.1)),
        "logit_bias": one_of({7: 5.0}, {"5": 3}, {0: -100, 1: 100}, {3: 1e9}, {}, {9: -1e9}),
        "allowed_token_ids": ids,
        "bad_words": texts,
        "min_tokens": one_of(0, 1, 2, 5, 8),
        "max_tokens": one_of(1, 2, 5, 8, 12, None),
        "stop": texts,
        "stop_token_ids": ids,
        "ignore_eos": flag,
        "seed": one_of(0, 5, 2**63, 2**64 - 1, -1, None, np.int64(3)),
        "logprobs": one_of(None, 0, 1, 5, 20, -1),
        "prompt_logprobs": one_of(None, 0, 1, 5),
        "detokenize": flag,
        "skip_special_tokens": flag,
        "spaces_between_special_tokens": flag,
        "include_stop_str_in_output": flag,
        "output_kind": one_of("FINAL_ONLY", "cumulative", "CUMULATIVE"),
        "skip_reading_prefix_cache": one_of(True, False, None),
        "structured_outputs": one_of(None, {}),
        "best_of": one_of(None, 1),
        "logits_processors": one_of(None, []),
        "extra_args": one_of(None, {}),
    }


def sampling(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Fields of SamplingParams; half of all cases hold no strange value on purpose."""
    makers = sampling_fields(vocab)
    share = rng.choice([1.0, 0.75])
    fields = {name: pick(rng, makers[name], share) for name in some(rng, list(makers), 6)}
    fields.setdefault("max_tokens", rng.choice([3, 6]))
    if rng.random() < 0.5:
        fields.setdefault("temperature", 0)
    if rng.random() < 0.03:
        fields[rng.choice(["max_new_tokens", "nonsense", LONE, "stop_words"])] = strange(rng)
    return fields


# Documented changes of a value: small temperatures, filters of greedy requests, fresh seeds.
_CHANGED = ("temperature", "top_p", "top_k", "min_p", "seed", "output_kind", "logit_bias")


def check_kept(name: str, given: Any, kept: Any) -> None:
    """Raises MismatchError where a field keeps another value than it was given."""
    if name in _CHANGED or kept is None:
        return
    if isinstance(kept, bool):
        same = kept == bool(given)
    elif isinstance(kept, (int, float)):
        is_bool = isinstance(given, (bool, np.bool_)) or str(getattr(given, "dtype", "")) == "bool"
        value = float(given) if isinstance(given, Fraction) else given  # a float keeps it rounded
        same = not is_bool and not isinstance(value, str) and np.all(np.asarray(value) == kept)
    else:
        return
    expect(same, f"{name} keeps another value", repr(given)[:80], repr(kept)[:80])


# ---------------------------------------------------------------------- prompts


def _one_prompt(rng: random.Random, tokenizer: Any, vocab: int) -> Any:
    ids = [rng.randrange(vocab) for _ in range(rng.choice([1, 2, 9, 30]))]
    text = rng.choice(["a", "hello", "été", "🙂", "a" * 62, " ", "\n", "a\x00b"])
    return rng.choice(
        [
            text,
            ids,
            tuple(ids),
            np.array(ids),
            np.array(ids, np.int32),
            jnp.array(ids),
            [np.int64(i) for i in ids],
            {"prompt": text},
            {"prompt_token_ids": ids},
            {"prompt_token_ids": np.array(ids)},
            {"prompt": text, "cache_salt": rng.choice(["s", None])},
            {"prompt_token_ids": ids, "cache_salt": "salt"},
        ]
    )


def _odd_prompt(rng: random.Random, vocab: int) -> Any:
    odd = [
        [vocab],
        [-1],
        [1.0],
        [True],
        [1, "a"],
        [1, None],
        [[1], [2]],
        [2**40],
        [],
        "",
        LONE,
        f"a{LONE}",
        "a" * 64,
        "a" * 5000,
        [1] * 64,
        [1] * 63,
        {"prompt": 5},
        {"prompt": [1, 2]},
        {"prompt": None},
        {"prompt_token_ids": "abc"},
        {"prompt_token_ids": [1.5]},
        {"prompt_token_ids": None},
        {"prompt_token_ids": {1: 2}},
        {"prompt_token_ids": [1], "cache_salt": ""},
        {"prompt_token_ids": [1], "cache_salt": 7},
        {"prompt_token_ids": [1], "cache_salt": LONE},
        {"prompt": "a", "prompt_token_ids": [1]},
        {"prompt": "a", "more": 1},
        {"prompt": "a", 7: 1},
        {},
        np.array([[1, 2], [3, 4]]),
        np.array([1.0, 2.0]),
        np.array([True, False]),
        np.array([], np.int32),
        jnp.zeros((2, 2), jnp.int32),
        range(3),
        iter([1, 2]),
        b"abc",
    ]
    return rng.choice([*odd, strange(rng)])


def prompts(rng: random.Random, tokenizer: Any, vocab: int) -> Any:
    """What `generate` may be given: one prompt or several, of any form."""

    def one() -> Any:
        return _one_prompt(rng, tokenizer, vocab) if rng.random() < 0.6 else _odd_prompt(rng, vocab)

    return rng.choice([one, one, lambda: [one()], lambda: [one(), one()], lambda: (one(), one())])()


def read_prompts(prompts: Any, tokenizer: Any) -> list[list[int]] | None:
    """Returns the token ids of prompts as a simple reader understands them; None: they are none."""
    if isinstance(prompts, (str, Mapping)) or _is_ids(prompts):
        one = _read_one(prompts, tokenizer)
        return None if one is None else [one]
    if isinstance(prompts, np.ndarray) or hasattr(prompts, "__array__"):
        prompts = list(np.asarray(prompts))
    if not isinstance(prompts, Sequence):
        return None
    found = [_read_one(prompt, tokenizer) for prompt in prompts]
    return None if any(one is None for one in found) else found  # pyright: ignore


def _is_ids(value: Any) -> bool:
    if isinstance(value, (str, bytes, bytearray, Mapping)):
        return False
    if hasattr(value, "__array__") and not isinstance(value, Sequence):
        array = np.asarray(value)
        return array.ndim == 1 and array.size > 0 and array.dtype.kind in "iu"
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(hasattr(v, "__index__") and not isinstance(v, bool) for v in value)
        and all(np.ndim(v) == 0 for v in value)
    )


def _read_one(prompt: Any, tokenizer: Any) -> list[int] | None:
    if isinstance(prompt, Mapping):
        keys = [key for key in prompt if key != "cache_salt"]
        if len(keys) != 1 or keys[0] not in ("prompt", "prompt_token_ids"):
            return None
        prompt = prompt[keys[0]]
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return [int(i) for i in prompt] if _is_ids(prompt) else None


# ---------------------------------------------------------------------- chat

_MESSAGES = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be"}, {"role": "user", "content": "é"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
]
_ODD_MESSAGES = [
    [],
    [[]],
    [{}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": None, "content": "a"}],
    [{"content": "a"}],
    [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [None]}],
    [{"role": "user", "content": [{"type": "text", "text": None}]}],
    [{"role": "user", "content": LONE}],
    [{"role": "user", "content": {"a": 1}}],
    [{"role": "user", "content": "a" * 300}],
    [{"role": "user", "content": "a", "tool_calls": 7}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{"}}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [None]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"function": None}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"arguments": 5}}]}],
    ["a"],
    [None],
    [[{"role": "user", "content": "a"}], None],
    [{"role": "user", "content": "a"}, "b"],
    [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]],
]
_TEMPLATES = [
    "{{ messages[0].content }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{% for %}",
    "{{ 1 / 0 }}",
    "{{ messages[9].role }}",
    "{{ nothing.at.all }}",
    "",
    "x" * 20,
    "{{ messages | length }}\n{{ 'a\nb' }}",
    "{% include 'x' %}",
    "{{ range(10**9) | list }}",
]


def chat(rng: random.Random) -> dict[str, Any]:
    """Arguments of `LLM.chat`."""
    messages = rng.choice(_MESSAGES) if rng.random() < 0.5 else rng.choice(_ODD_MESSAGES)
    if rng.random() < 0.1:
        messages = strange(rng)
    makers: dict[str, Valid] = {
        "chat_template": one_of(None, *_TEMPLATES),
        "add_generation_prompt": one_of(True, False),
        "continue_final_message": one_of(True, False),
        "tools": one_of(None, [], [{"type": "function", "function": {"name": "f"}}]),
        "chat_template_kwargs": one_of(None, {}, {"more": 1}, {"messages": 1}, {"tools": 2}),
        "sampling_params": one_of(None, []),
    }
    fields = {"messages": messages}
    for name in rng.sample(list(makers), rng.choice([0, 0, 1, 2])):
        fields[name] = pick(rng, makers[name], 0.7)
    return fields


def render_chat(fields: Mapping[str, Any]) -> list[str] | None:
    """Returns the text of a plain valid chat in the door's template; None: not such a one."""
    extra = set(fields) - {"messages", "sampling_params", "add_generation_prompt"}
    messages = fields.get("messages")
    if extra or not any(messages is valid for valid in _MESSAGES):
        return None
    adds = fields.get("add_generation_prompt", True)
    if not isinstance(adds, bool):
        return None
    text = ""
    for message in messages:  # pyright: ignore
        content = message["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        text += f"{message['role']}: {content}\n"
    return [text + ("assistant: " if adds else "")]


# ---------------------------------------------------------------------- engines and beams


def llm_options(rng: random.Random, max_len: int) -> dict[str, Any]:
    """Arguments of LLM beside model and params."""
    flag = one_of(True, False)
    formats = one_of("int8", "fp8", "nf4", "int4-g32:rtn", "int4-g32", "int4-g7", "gguf", "int9")
    makers: dict[str, Valid] = {
        "dtype": one_of("auto", "float32", "bfloat16", "float16", "float64", "int8"),
        "quantization": one_of(None, formats(rng)),
        "kv_cache_dtype": one_of("auto", "float32", "bfloat16", "fp8", "int8", "int4", "fp4"),
        "revision": one_of(None, "main"),
        "max_model_len": one_of(None, 16, 64, 128, 129, 1, 2),
        "max_num_seqs": one_of(None, 1, 4, 25),
        "max_num_batched_tokens": one_of(None, 24, 4, 3, 64),
        "block_size": one_of(None, 8, 16, 1, 7),
        "enable_chunked_prefill": flag,
        "enable_prefix_caching": flag,
        "num_decode_steps": one_of(None, 1, 2),
        "gpu_memory_utilization": one_of(0.9, 0.5, 1, 1.0, 0, 2),
        "kv_cache_memory_bytes": one_of(None, 2**20, 10, 2**16),
        "num_gpu_blocks_override": one_of(None, 8, 16, 1),
        "max_logprobs": one_of(20, 0, -1, 5),
        "seed": one_of(0, 5, 2**40),
        "attention_impl": one_of("auto", "xla", "mosaic_gpu", "mosaic_tpu"),
        "linear_impl": one_of("auto", "xla", "mosaic_gpu"),
        "cpu_offload_gb": one_of(0, 0.001, 0.0, 1e-9),
        "generation_config": one_of("auto", "none"),
        "skip_tokenizer_init": flag,
        "chat_template": one_of(None, "{{ messages }}"),
        "enable_lora": one_of(False, True),
        "swap_space": one_of(4, 0),
        "tensor_parallel_size": one_of(1, 2),
        "enforce_eager": flag,
        "nonsense": one_of(1, None),
    }
    return {name: pick(rng, makers[name], 0.65) for name in some(rng, list(makers), 3)}


def speculative(rng: random.Random, model: Any, params: Any, tokenizer: Any) -> Any:
    """A speculative_config, or anything in its place."""
    if rng.random() < 0.08:
        return strange(rng)
    number = one_of(1, 2, 4, 16, 17, 0, np.int64(2))
    makers: dict[str, Valid] = {
        "num_speculative_tokens": number,
        "adaptive": one_of(True, False),
        "prompt_lookup_max": one_of(3, 1, 2),
        "prompt_lookup_min": one_of(1, 2, 4),
        "format": one_of("int4-g32", "int8-channel", "fp8", "int4-g128", "int3-g32:rtn"),
        "model": one_of(model, "nowhere/at/all"),
        "params": one_of(params, None),
        "tokenizer": one_of(tokenizer, None),
        "heads": one_of("nowhere"),
        "tree": one_of(None, [[0]], [[0], [0, 1]]),
        "acceptance": one_of("lossless", "typical"),
        "epsilon": one_of(0.1, 1),
        "alpha": one_of(0.3),
        "window": one_of(2, 3, 5),
        "ngram_size": one_of(2, 3, 1),
        "num_guesses": one_of(1, 3, 5),
        "nonsense": one_of(1),
    }
    own = {
        "ngram": ["num_speculative_tokens", "adaptive", "prompt_lookup_max", "prompt_lookup_min"],
        "self": ["num_speculative_tokens", "adaptive", "format"],
        "draft": ["num_speculative_tokens", "adaptive", "tokenizer"],
        "medusa": ["heads", "tree", "acceptance", "epsilon", "alpha"],
        "lookahead": ["adaptive", "window", "ngram_size", "num_guesses"],
    }
    method = rng.choice([*own, "ngram", "self", "lookahead"])
    config: dict[Any, Any] = {"method": method}
    if method == "draft":
        config |= {"model": pick(rng, makers["model"], 0.9), "params": params}
    if method == "medusa":
        config |= {"heads": "nowhere"}
    for name in rng.sample(own[method], rng.randint(0, len(own[method]))):
        config[name] = pick(rng, makers[name], 0.75)
    if rng.random() < 0.1:
        name = rng.choice(list(makers))
        config[name] = pick(rng, makers[name], 0.6)
    if rng.random() < 0.05:
        config["method"] = strange(rng)
    if rng.random() < 0.03:
        config[rng.choice([5, None, LONE, ""])] = 1
    return config


def beams(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Fields of BeamSearchParams."""
    makers: dict[str, Valid] = {
        "ignore_eos": one_of(True, False),
        "stop_token_ids": _ids(vocab),
        "temperature": one_of(0, 0.0, 1, 0.5, 2.0),
        "length_penalty": one_of(0, 1, 1.0, -1.0, 2.5),
        "early_stopping": one_of(True, False, "never"),
        "num_return_sequences": one_of(None, 1, 2, 4),
        "allowed_token_ids": _ids(vocab),
        "include_stop_str_in_output": one_of(True, False),
        "skip_special_tokens": one_of(True, False),
        "structured_outputs": one_of(None),
        "stop": one_of("a"),
    }
    share = rng.choice([1.0, 0.75])
    fields = {
        "beam_width": pick(rng, one_of(1, 2, 3, 4, np.int32(2), 5), 0.9),
        "max_tokens": pick(rng, one_of(1, 2, 4, 6, 100), 0.9),
    }
    names = [name for name in makers if name not in ("structured_outputs", "stop")]
    if rng.random() < 0.05:
        names = list(makers)
    return fields | {name: pick(rng, makers[name], share) for name in some(rng, names, 4)}
