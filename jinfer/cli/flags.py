"""Flags shared by the commands: the model, fields of SamplingParams and arguments of LLM.

The classes themselves check the values.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from jinfer.config import memory

DEFAULT_MODEL = "smollm2"
DEFAULT_SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 256}

BOOL = argparse.BooleanOptionalAction
Flags = tuple[tuple[str, dict[str, Any]], ...]


def _int_or_none(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or none, got {text!r}") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def path(text: str) -> Path:
    """Parses the path of a file or folder for argparse; refuses an empty string."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(text)


def input_file(text: str) -> Path:
    """Parses the path of an input file for argparse; it is not opened yet."""
    found = path(text)
    if os.path.isdir(found):
        raise argparse.ArgumentTypeError(f"expected a file, {text!r} is a folder")
    return found


def result_file(text: str) -> Path:
    """Parses the path of a result file for argparse; refuses a folder."""
    found = path(text)
    if os.path.isdir(found):  # is_dir raises for names that are too long
        raise argparse.ArgumentTypeError(f"expected a file, {text!r} is a folder")
    return found


def check_result_file(file: Path | None) -> None:
    """Checks before the work that `--json FILE` can be written, and makes its folder.

    Raises:
      ValueError: it cannot be written; an existing file keeps its content.
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        file.open("ab").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise ValueError(
            f"--json {str(file)!r:.200} cannot be written: {error.strerror}"
        ) from error


def size(text: str) -> int:
    """Parses a size such as 2GiB for argparse; returns bytes."""
    try:
        return memory.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def fit_positions(given: int | None, default: int, config: Any, flag: str) -> int:
    """Returns the tokens of a sequence: those given, else the default or the model's limit.

    Raises:
      ValueError: more are given than the model has positions.
    """
    if given is None:
        return min(default, config.max_context_len)
    check_positions(config, given, flag)
    return given


def check_positions(config: Any, num_tokens: int, flag: str) -> None:
    """Raises ValueError, naming the flag, for sequences longer than the model's context."""
    if num_tokens > config.max_context_len:
        raise ValueError(
            f"--{flag} {num_tokens} exceeds the model's {config.max_context_len} positions"
        )


# Flags that are fields of SamplingParams or arguments of LLM; only those given are passed on.
SAMPLING_FLAGS: Flags = (
    (
        "max-tokens",
        {"type": _int_or_none, "help": "most new tokens; none: up to the context length"},
    ),
    ("min-tokens", {"type": int, "help": "least new tokens before the text may end"}),
    ("temperature", {"type": float, "help": "0 (default): greedy"}),
    ("top-p", {"type": float, "help": "sample from the most likely tokens up to this probability"}),
    ("top-k", {"type": int, "help": "sample from the K most likely tokens"}),
    ("min-p", {"type": float, "help": "least probability, relative to the most likely token's"}),
    ("presence-penalty", {"type": float}),
    ("frequency-penalty", {"type": float}),
    ("repetition-penalty", {"type": float}),
    ("seed", {"type": int, "help": "makes sampled results repeatable"}),
    (
        "stop",
        {
            "action": "append",
            "metavar": "TEXT",
            "help": "end the text at this string; may be repeated",
        },
    ),
    (
        "stop-token-ids",
        {"type": int, "nargs": "+", "metavar": "ID", "help": "end the text at these tokens"},
    ),
    ("ignore-eos", {"action": "store_true", "help": "do not end at the model's end token"}),
)
GENERATE_FLAGS: Flags = (
    ("n", {"type": int, "help": "samples per prompt"}),
    ("logprobs", {"type": int, "help": "log probabilities per token (JSONL only)"}),
    ("prompt-logprobs", {"type": int, "help": "the same for the prompt's tokens (JSONL only)"}),
)
BEAM_FLAGS: Flags = (
    ("num-beams", {"type": int, "metavar": "N", "help": "beam width"}),
    ("length-penalty", {"type": float, "help": "above 0 favours long texts (default: 1)"}),
    (
        "early-stopping",
        {
            "choices": ("true", "false", "never"),
            "help": (
                "when to end once N texts are complete: at once (true), if no better one is "
                "likely (false, the default) or possible (never)"
            ),
        },
    ),
)
# Fields of SamplingParams that a beam search also has.
_BEAM_FIELDS = ("max_tokens", "temperature", "ignore_eos", "stop_token_ids")
ENGINE_FLAGS: Flags = (
    ("dtype", {"help": "dtype of weights and activations: auto, float32, bfloat16 or float16"}),
    (
        "quantization",
        {
            "metavar": "HOW",
            "help": "quantize while loading: fp8, int8, nf4, int4-g64:rtn, gguf, ...",
        },
    ),
    (
        "kv-cache-dtype",
        {"help": "dtype of K and V: auto, float32, ..., or quantized: fp8, int8, int4"},
    ),
    (
        "max-model-len",
        {"type": int, "help": "context length in tokens, prompt and output together"},
    ),
    ("max-num-seqs", {"type": int, "help": "most sequences in one step"}),
    ("max-num-batched-tokens", {"type": int, "help": "most tokens in one step"}),
    ("block-size", {"type": int, "help": "tokens per KV page"}),
    (
        "kv-cache-memory-bytes",
        {"type": size, "metavar": "SIZE", "help": "size of the KV pool, such as 2GiB"},
    ),
    ("num-gpu-blocks-override", {"type": int, "metavar": "PAGES", "help": "number of KV pages"}),
    (
        "gpu-memory-utilization",
        {"type": float, "help": "share of the device's memory to use (default: 0.9)"},
    ),
    ("tokenizer", {"help": "folder or hub name, if not the model's own"}),
    ("revision", {"help": "branch, tag or commit of a hub model"}),
    ("num-decode-steps", {"type": int, "help": "most decode steps in one program"}),
    ("max-logprobs", {"type": int, "help": "most log probabilities that a request may ask for"}),
    ("attention-impl", {"help": "backend of attention (default: auto)"}),
    ("linear-impl", {"help": "backend of products with quantized weights (default: auto)"}),
    (
        "speculative-config",
        {
            "type": _json_object,
            "metavar": "JSON",
            "help": 'such as {"method": "ngram", "num_speculative_tokens": 4}',
        },
    ),
    ("enable-chunked-prefill", {"action": BOOL, "help": "split long prompts over steps"}),
    (
        "cpu-offload-gb",
        {
            "type": float,
            "metavar": "GIB",
            "help": "host memory for KV pages evicted from the device",
        },
    ),
    ("enable-prefix-caching", {"action": BOOL, "help": "reuse the KV of equal prompt beginnings"}),
)


def add_flags(group: Any, flags: Flags) -> None:
    """Declares flags that are absent from the namespace unless given."""
    for name, options in flags:
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)


def _given(args: argparse.Namespace, flags: Flags) -> dict[str, Any]:
    names = (name.replace("-", "_") for name, _ in flags)
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def add_model_arguments(parser: argparse.ArgumentParser) -> Any:
    """Adds the model, sampling and engine flags; returns the group of the sampling ones."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="folder, GGUF file, hub name, or smollm2 (default: SmolLM2-135M-Instruct, kept in a "
        "cache folder after one download)",
    )
    sampling = parser.add_argument_group(
        "sampling", "defaults: " + ", ".join(f"{k} {v:g}" for k, v in DEFAULT_SAMPLING.items())
    )
    add_flags(sampling, SAMPLING_FLAGS)
    sampling.add_argument(
        "--sampling-params",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further fields of SamplingParams",
    )
    engine = parser.add_argument_group("engine", "passed to LLM")
    add_flags(engine, ENGINE_FLAGS)
    return sampling


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Collects the fields of SamplingParams: defaults, then --sampling-params, then flags."""
    if "output_kind" in args.sampling_params:
        raise ValueError("output_kind is set by the command; drop it from --sampling-params")
    flags = (*SAMPLING_FLAGS, *GENERATE_FLAGS)
    return {**DEFAULT_SAMPLING, **args.sampling_params, **_given(args, flags)}


def make_params(fields: dict[str, Any], **more: Any) -> Any:
    """Builds SamplingParams, which checks them."""
    from jinfer.config.sampling_params import SamplingParams

    return SamplingParams(**fields, **more)


def make_beam_params(args: argparse.Namespace) -> Any | None:
    """Builds BeamSearchParams from the flags, or returns None without --num-beams.

    Raises:
      ValueError: a flag applies only to beam search, or not to it.
    """
    from jinfer.config.beam_params import BeamSearchParams

    beams = _given(args, BEAM_FLAGS)
    if "num_beams" not in beams:
        if beams:
            raise ValueError(f"--{next(iter(beams)).replace('_', '-')} goes with --num-beams")
        return None
    fields = sampling_fields(args)
    num_texts = fields.pop("n", 1)
    for name in fields:
        if name not in _BEAM_FIELDS:
            known = ", ".join(("n", *_BEAM_FIELDS))
            raise ValueError(
                f"{name} has no effect on a beam search (--num-beams), which takes {known}"
            )
    if "early_stopping" in beams:
        modes = {"true": True, "false": False, "never": "never"}
        fields["early_stopping"] = modes[beams["early_stopping"]]
    if "length_penalty" in beams:
        fields["length_penalty"] = beams["length_penalty"]
    return BeamSearchParams(beam_width=beams["num_beams"], num_return_sequences=num_texts, **fields)


def make_text_params(fields: dict[str, Any]) -> Any:
    """Builds SamplingParams for streamed text; refuses fields whose results cannot be shown."""
    params = make_params(fields)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            raise ValueError(f"{name} are written only to JSONL results: use --input and --output")
    if not params.detokenize:
        raise ValueError("detokenize=False leaves no text to print: use --input and --output")
    return params


def load_llm(args: argparse.Namespace) -> Any:
    """Returns an `LLM` made from the flags."""
    from jinfer.llm import LLM

    return LLM(args.model, **_given(args, ENGINE_FLAGS))
