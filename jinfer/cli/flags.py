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
    """Reads the path of a file or folder for argparse; an empty text is none."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(text)


def input_file(text: str) -> Path:
    """Reads the path of a file to be read; whether there is one shows when it is read."""
    found = path(text)
    if os.path.isdir(found):
        raise argparse.ArgumentTypeError(f"expected a file, {text!r} is a folder")
    return found


def result_file(text: str) -> Path:
    """Reads the path of a file to be written, before the work that it takes the result of."""
    found = path(text)
    if os.path.isdir(found):  # is_dir raises for names that are too long
        raise argparse.ArgumentTypeError(f"expected a file, {text!r} is a folder")
    return found


def check_result_file(file: Path | None) -> None:
    """Makes the folder of `--json FILE`; called before the work whose result goes there.

    Raises:
      ValueError: the file cannot be written; a file that is there keeps its content.
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
    """Reads a size such as 2GiB for argparse."""
    try:
        return memory.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def fit_positions(given: int | None, default: int, config: Any, flag: str) -> int:
    """Returns the tokens of a sequence: what was given, else the default or what the model allows.

    Raises:
      ValueError: more were given than the model was made for.
    """
    if given is None:
        return min(default, config.max_context_len)
    check_positions(config, given, flag)
    return given


def check_positions(config: Any, num_tokens: int, flag: str) -> None:
    """Raises ValueError, naming the flag, for sequences longer than a model was made for."""
    if num_tokens > config.max_context_len:
        raise ValueError(
            f"--{flag} {num_tokens} is beyond the {config.max_context_len} positions the model was "
            "made for"
        )


# Flags that are fields of SamplingParams or arguments of LLM; only those given are passed on.
SAMPLING_FLAGS: Flags = (
    ("max-tokens", {"type": _int_or_none, "help": "most new tokens; none: to the context's end"}),
    ("min-tokens", {"type": int}),
    ("temperature", {"type": float, "help": "0 (default): greedy"}),
    ("top-p", {"type": float}),
    ("top-k", {"type": int}),
    ("min-p", {"type": float}),
    ("presence-penalty", {"type": float}),
    ("frequency-penalty", {"type": float}),
    ("repetition-penalty", {"type": float}),
    ("seed", {"type": int, "help": "a request's result depends on nothing else then"}),
    ("stop", {"action": "append", "metavar": "TEXT", "help": "stop there; may be repeated"}),
    ("stop-token-ids", {"type": int, "nargs": "+", "metavar": "ID"}),
    ("ignore-eos", {"action": "store_true"}),
)
GENERATE_FLAGS: Flags = (
    ("n", {"type": int, "help": "samples of each prompt"}),
    ("logprobs", {"type": int, "help": "JSONL only"}),
    ("prompt-logprobs", {"type": int, "help": "JSONL only"}),
)
BEAM_FLAGS: Flags = (
    ("num-beams", {"type": int, "metavar": "N", "help": "keep the N likeliest texts, not one"}),
    ("length-penalty", {"type": float, "help": "above 0 favours long texts (default 1)"}),
    ("early-stopping", {"choices": ("true", "false", "never"), "help": "when N texts have ended"}),
)
# What a beam search has of SamplingParams' fields.
_BEAM_FIELDS = ("max_tokens", "temperature", "ignore_eos", "stop_token_ids")
ENGINE_FLAGS: Flags = (
    ("dtype", {"help": "of weights and activations, such as float32 or bfloat16"}),
    ("quantization", {"metavar": "HOW", "help": "fp8, int8, nf4, int4-g64:rtn, gguf"}),
    ("kv-cache-dtype", {"help": "of K and V: auto (stated, or as weights), fp8, int8, int4, ..."}),
    ("max-model-len", {"type": int, "help": "context in tokens, prompt and output together"}),
    ("max-num-seqs", {"type": int, "help": "sequences decoded together"}),
    ("max-num-batched-tokens", {"type": int, "help": "token budget of one step"}),
    ("block-size", {"type": int, "help": "tokens a KV page"}),
    ("kv-cache-memory-bytes", {"type": size, "metavar": "SIZE", "help": "say 2GiB"}),
    ("num-gpu-blocks-override", {"type": int, "metavar": "PAGES", "help": "pages, as given"}),
    ("gpu-memory-utilization", {"type": float}),
    ("tokenizer", {"help": "folder or hub name, if not the model's own"}),
    ("revision", {"help": "of a hub model"}),
    ("num-decode-steps", {"type": int, "help": "decode steps that stay on the device"}),
    ("max-logprobs", {"type": int, "help": "most logprobs that a request may ask for"}),
    ("attention-impl", {"help": "name one kernel instead of the automatic choice"}),
    ("linear-impl", {"help": "the same for quantized weights"}),
    (
        "speculative-config",
        {
            "type": _json_object,
            "metavar": "JSON",
            "help": 'say {"method": "ngram", "num_speculative_tokens": 4}',
        },
    ),
    ("enable-chunked-prefill", {"action": BOOL, "help": "spread prompts over steps"}),
    ("cpu-offload-gb", {"type": float, "metavar": "GIB", "help": "host memory for evicted KV"}),
    ("enable-prefix-caching", {"action": BOOL, "help": "keep the KV of past prompts"}),
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
        help="any further fields of SamplingParams",
    )
    engine = parser.add_argument_group("engine", "passed to LLM")
    add_flags(engine, ENGINE_FLAGS)
    return sampling


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Collects the fields of SamplingParams: defaults, then --sampling-params, then flags."""
    if "output_kind" in args.sampling_params:
        raise ValueError("output_kind is the command's own choice; drop it from --sampling-params")
    flags = (*SAMPLING_FLAGS, *GENERATE_FLAGS)
    return {**DEFAULT_SAMPLING, **args.sampling_params, **_given(args, flags)}


def make_params(fields: dict[str, Any], **more: Any) -> Any:
    """Builds SamplingParams, which checks them."""
    from jinfer.config.sampling_params import SamplingParams

    return SamplingParams(**fields, **more)


def make_beam_params(args: argparse.Namespace) -> Any | None:
    """Builds BeamSearchParams of the flags, or returns None where they name no beams.

    Raises:
      ValueError: a flag goes with beam search alone, or not with it.
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
                f"{name} has no effect on a beam search (--num-beams), which has {known}"
            )
    if "early_stopping" in beams:
        modes = {"true": True, "false": False, "never": "never"}
        fields["early_stopping"] = modes[beams["early_stopping"]]
    if "length_penalty" in beams:
        fields["length_penalty"] = beams["length_penalty"]
    return BeamSearchParams(beam_width=beams["num_beams"], num_return_sequences=num_texts, **fields)


def make_text_params(fields: dict[str, Any]) -> Any:
    """Builds the parameters of a stream of text; refuses fields that it cannot show."""
    params = make_params(fields)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            raise ValueError(f"{name} are written to JSONL results only: use --input and --output")
    if not params.detokenize:
        raise ValueError("text is printed here: detokenize=False goes with --input and --output")
    return params


def load_llm(args: argparse.Namespace) -> Any:
    """Loads the model that the flags name into an engine."""
    from jinfer.llm import LLM

    return LLM(args.model, **_given(args, ENGINE_FLAGS))
