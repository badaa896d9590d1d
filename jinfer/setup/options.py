"""The arguments of `LLM` as one frozen value; loads its tokenizer and sampling defaults."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jinfer.checkpoints.fill import resolve_dtype
from jinfer.config.fields import check_kinds, require, shown
from jinfer.config.speculative import SpeculativeConfig

logger = logging.getLogger(__name__)

# Types of the options; everything else is checked where it is used.
_SIZES = (
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
    *("num_decode_steps", "kv_cache_memory_bytes", "num_gpu_blocks_override"),
)
_NAMES = ("quantization", "revision", "chat_template")
_KINDS = {
    "ints": (*_SIZES, "max_logprobs", "seed"),
    "floats": ("gpu_memory_utilization", "cpu_offload_gb"),
    "flags": ("skip_tokenizer_init", "enable_chunked_prefill", "enable_prefix_caching"),
    "texts": (*_NAMES, "kv_cache_dtype", "attention_impl", "linear_impl", "generation_config"),
    "optional": (*_SIZES, *_NAMES),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMOptions:
    """The keyword arguments of `LLM`, documented there, without models and weights.

    Attributes:
      speculation: the parsed `speculative_config`, without the draft model and its weights, which
        `speculation.DraftSource` holds, and without Medusa's tree, which comes with the heads.
    """

    skip_tokenizer_init: bool = False
    chat_template: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    revision: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    num_decode_steps: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    max_logprobs: int = 20
    seed: int = 0
    attention_impl: str = "auto"
    linear_impl: str = "auto"
    speculation: SpeculativeConfig | None = None
    cpu_offload_gb: float = 0
    generation_config: str = "auto"

    def __post_init__(self) -> None:
        check_kinds(vars(self), **_KINDS)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> LLMOptions:
        """Returns the options among the arguments of `LLM`; other arguments are left out.

        Raises:
          ValueError, TypeError: an argument has the wrong type or an invalid value.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"speculation"}
        options = cls(**{name: given[name] for name in names})
        dtype, fields = given["dtype"], given["speculative_config"]
        if not isinstance(dtype, str):
            dtype = "auto" if dtype is None else resolve_dtype(dtype, "").name
        speculation = None if fields is None else SpeculativeConfig.of(fields)
        return dataclasses.replace(options, dtype=dtype, speculation=speculation)


def take_tokenizer(
    tokenizer: Any | None,
    source: str | os.PathLike[str] | None,
    revision: str | None,
    *,
    skips: bool = False,
) -> Any | None:
    """Returns the tokenizer given to `LLM`, or loads it, by default from `source`."""
    if skips:
        require(tokenizer is None, "skip_tokenizer_init and tokenizer exclude each other: drop one")
        return None
    if tokenizer is not None:
        revision = None  # applies to the model only
    tokenizer = source if tokenizer is None else tokenizer
    if isinstance(tokenizer, (str, os.PathLike)):
        from jinfer.checkpoints.tokenizer import load_tokenizer

        return load_tokenizer(tokenizer, revision=revision)
    if tokenizer is not None and not (
        hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")
    ):
        raise TypeError(
            f"tokenizer must be a tokenizer of transformers, or a path, got {shown(tokenizer)}"
        )
    return tokenizer


def enable_compilation_cache() -> None:
    """Sets JAX's compilation cache folder, unless JAX has one or its cache is switched off."""
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    from jinfer.checkpoints.default_model import cache_dir

    folder = cache_dir() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("no compilation cache: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def sampling_defaults(
    model: str | os.PathLike[str] | None, source: str, revision: str | None = None
) -> dict[str, Any]:
    """Returns fields of `SamplingParams` from the generation_config.json of a model's folder.

    Args:
      model: as given to `LLM`; None for a model in memory.
      source: "auto", or "none" for no fields at all.
      revision: branch, tag or commit of a hub name.
    """
    from jinfer.checkpoints.locate import fetch_from_hub, locate

    if source not in ("auto", "none"):
        raise ValueError(f'generation_config must be "auto" or "none", got {source!r}')
    if source == "none" or model is None:
        return {}
    name = "generation_config.json"
    if locate(model, revision) is None:
        path = fetch_from_hub(os.fspath(model), revision, (name,)) / name
    else:
        path = pathlib.Path(model).expanduser() / name
    if not path.is_file():
        return {}
    given = json.loads(path.read_text(encoding="utf-8"))
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    fields = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("max_new_tokens") is not None:
        fields["max_tokens"] = given["max_new_tokens"]
    if given.get("do_sample") is False:
        fields["temperature"] = 0.0
    return fields


def per_prompt(name: str, values: Any, count: int) -> list[Any]:
    """Returns a list of one value per prompt, from one value for all or a list or array."""
    if isinstance(values, str) or not (isinstance(values, Sequence) or getattr(values, "ndim", 0)):
        return [values] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts")
    return list(values)
