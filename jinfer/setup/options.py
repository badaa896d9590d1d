"""What `LLM` is asked for, made into configs: defaults by platform, memory."""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jinfer.config import memory
from jinfer.config.cache import KV_BITS, CacheConfig
from jinfer.config.engine import EngineConfig
from jinfer.config.fields import require, shown
from jinfer.config.model import ModelConfig
from jinfer.config.sampling_params import SamplingParams
from jinfer.config.speculative import SpeculativeConfig
from jinfer.config.typing import Params
from jinfer.engine.device.drafter import Drafter
from jinfer.kv import cache as kv_cache
from jinfer.kv.codes import resolve_format
from jinfer.linear.weight import num_bytes
from jinfer.speculation import medusa_tree

logger = logging.getLogger(__name__)

MAX_NUM_SEQS = 65536


def resolve(
    model: ModelConfig,
    params: Params,
    *,
    kv_cache_dtype: str,
    max_model_len: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    block_size: int | None,
    enable_chunked_prefill: bool,
    enable_prefix_caching: bool,
    num_decode_steps: int | None,
    gpu_memory_utilization: float,
    kv_cache_memory_bytes: int | None,
    num_gpu_blocks_override: int | None,
    max_logprobs: int,
    seed: int,
    attention_impl: str,
    linear_impl: str,
    speculation: SpeculativeConfig | None,
    drafter: Drafter | None,
    cpu_offload_gb: float,
) -> tuple[EngineConfig, CacheConfig]:
    """Resolves the arguments of `LLM`; None stands for the platform's default.

    Raises:
      ValueError: they contradict each other, the model or the memory.
    """
    on_cpu = jax.default_backend() == "cpu"
    max_num_seqs = (32 if on_cpu else 128) if max_num_seqs is None else max_num_seqs
    budget = max_num_batched_tokens
    if budget is None:
        budget = max(512 if on_cpu else 2048, max_num_seqs)
    kv_cache_dtype = resolve_format(kv_cache_dtype, model, str(params["embed"]["w"].dtype))
    if block_size is None:
        block_size = _default_block_size(kv_cache_dtype)
    require(
        not isinstance(max_num_seqs, int) or max_num_seqs <= MAX_NUM_SEQS,
        f"max_num_seqs must be at most {MAX_NUM_SEQS}, got {max_num_seqs}: each has its rows on "
        "the device",
    )
    # Checks the fields before memory is counted in them; a length that is not given comes later.
    EngineConfig(
        max_model_len=1 if max_model_len is None else max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
        attention_impl=attention_impl,
        linear_impl=linear_impl,
    )
    for name, value in (
        ("num_gpu_blocks_override", num_gpu_blocks_override),
        ("kv_cache_memory_bytes", kv_cache_memory_bytes),
    ):
        require(
            value is None or (isinstance(value, int) and value > 0),
            f"{name} must be a positive integer, got {value!r}",
        )
    longest = max_model_len or model.max_context_len
    num_pages = _num_pages(
        model,
        params,
        page_size=block_size,
        dtype=kv_cache_dtype,
        max_tokens=max_num_seqs * -(-longest // block_size) * block_size,
        num_tokens=budget,
        num_seqs=max_num_seqs,
        drafter=drafter,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        num_gpu_blocks_override=num_gpu_blocks_override,
    )
    max_model_len = _resolve_max_model_len(max_model_len, model, num_pages * block_size)
    own = None if drafter is None else drafter.own_kv_config
    if own is not None and cpu_offload_gb:
        raise ValueError(
            "cpu_offload_gb keeps the KV of one model: drafts here have KV of their own"
        )
    if own is not None and own.max_context_len < max_model_len:
        raise ValueError(
            f"speculative_config: the draft model was made for {own.max_context_len} positions, "
            f"fewer than max_model_len={max_model_len}: lower it to that"
        )
    if max_num_batched_tokens is None and not enable_chunked_prefill:
        budget = max(budget, max_model_len)
    if num_decode_steps is None:
        num_decode_steps = 1 if on_cpu else 8
    sees = model.sliding_window
    require(
        sees is None
        or speculation is None
        or not speculation.is_tree
        or speculation.num_levels < sees,
        f"trees of {0 if speculation is None else speculation.num_levels} levels do not fit a "
        f"sliding window of {sees} tokens: give a smaller tree or window",
    )
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
        enable_chunked_prefill=enable_chunked_prefill,
        enable_prefix_caching=enable_prefix_caching,
        num_decode_steps=num_decode_steps,
        max_logprobs=model.vocab_size if max_logprobs == -1 else max_logprobs,
        seed=seed,
        attention_impl=attention_impl,
        linear_impl=linear_impl,
        speculation=speculation,
        num_host_pages=_num_host_pages(model, block_size, kv_cache_dtype, cpu_offload_gb),
    )
    return config, CacheConfig(num_pages=num_pages, page_size=block_size, dtype=kv_cache_dtype)


def take_heads(
    config: Mapping[str, Any] | None, model: ModelConfig
) -> tuple[Mapping[str, Any] | None, Params | None]:
    """Loads the Medusa heads that a `speculative_config` names.

    Returns:
      The config with the tree to use, and the heads; as it was and None if it names none.

    Raises:
      FileNotFoundError: there are no heads.
      ValueError: the config is wrong, the heads are made for another model, or the tree is too deep
        or too large.
    """
    if config is None or SpeculativeConfig.of(config).method != "medusa":
        return config, None
    from jinfer.speculation import medusa

    shape, heads, tree = medusa.load(config["heads"], model)
    if config.get("tree") is not None:
        tree = medusa_tree.read_tree(config["tree"])
        medusa_tree.check_tree(tree, num_heads=shape.num_heads)
    highest = max(max(node) for node in tree)
    require(
        highest < shape.num_guessable,
        f"the tree asks for the guess of rank {highest}, the heads guess among "
        f"{shape.num_guessable} tokens",
    )
    return {**config, "tree": tree}, heads


def take_tokenizer(
    tokenizer: Any | None,
    source: str | os.PathLike[str] | None,
    revision: str | None,
    *,
    skips: bool = False,
) -> Any | None:
    """Returns the tokenizer that `LLM` was given, or loads it, by default that of `source`."""
    if skips:
        require(tokenizer is None, "skip_tokenizer_init goes without a tokenizer: drop one of both")
        return None
    if tokenizer is not None:
        revision = None  # it is the model's
    tokenizer = source if tokenizer is None else tokenizer
    if isinstance(tokenizer, (str, os.PathLike)):
        from jinfer.checkpoints.tokenizer import load_tokenizer

        return load_tokenizer(tokenizer, revision=revision)
    if tokenizer is not None and not (
        hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")
    ):
        raise TypeError(f"tokenizer must be one of transformers or a path, got {shown(tokenizer)}")
    return tokenizer


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the cache folder, unless JAX was told where, or not to."""
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
      model: as given to `LLM`; None for one in memory.
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
    """One value for all prompts, or a list or array with one for each, as a list."""
    if isinstance(values, str) or not (isinstance(values, Sequence) or getattr(values, "ndim", 0)):
        return [values] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts")
    return list(values)


def check_params(params: Any, make_default: Callable[[], SamplingParams]) -> SamplingParams:
    """Returns `params`, or the default for None; raises TypeError for anything else."""
    params = make_default() if params is None else params
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
    return params


def _default_block_size(kv_dtype: str) -> int:
    """Pages of 64 tokens; where a TPU's kernel reads scales, 128 to fill a register's lanes."""
    return 128 if jax.default_backend() == "tpu" and KV_BITS[kv_dtype] < 16 else 64


def _num_pages(
    config: ModelConfig,
    params: Params,
    *,
    page_size: int,
    dtype: str,
    max_tokens: int,
    num_tokens: int,
    num_seqs: int,
    drafter: Drafter | None,
    gpu_memory_utilization: float,
    kv_cache_memory_bytes: int | None,
    num_gpu_blocks_override: int | None,
) -> int:
    """Sizes the KV pool, and with it that of a drafting model: both have as many pages."""
    stored = kv_cache.as_stored(config, dtype)
    page_bytes = memory.page_bytes(stored, page_size, dtype)
    jax.block_until_ready(params)  # copies made while they were placed count, too
    stats = jax.local_devices()[0].memory_stats() or {}
    if num_gpu_blocks_override is not None:
        limit = stats.get("bytes_limit", memory.host_memory_bytes())
        require(
            num_gpu_blocks_override * page_bytes <= limit,
            f"num_gpu_blocks_override={num_gpu_blocks_override} pages of "
            f"{memory.format_size(page_bytes)} are more than the memory of "
            f"{memory.format_size(limit)}",
        )
        return num_gpu_blocks_override
    if kv_cache_memory_bytes is None:
        used_bytes = num_bytes(params)
        if drafter is not None:
            used_bytes += drafter.num_weight_bytes(params)
        # Others may live there, too: a trainer with its optimizer, another engine.
        used_bytes = max(used_bytes, stats.get("bytes_in_use", 0))
        kv_cache_memory_bytes = memory.kv_budget_bytes(
            device_bytes=stats.get("bytes_limit"),
            used_bytes=used_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            reserved_bytes=memory.temp_bytes(config, num_tokens=num_tokens, num_seqs=num_seqs),
        )
    if drafter is not None and drafter.own_kv_config is not None:
        own = kv_cache.as_stored(drafter.own_kv_config, dtype)
        draft_page_bytes = memory.page_bytes(own, page_size, dtype)
        # The target's share of what there is.
        kv_cache_memory_bytes = (
            kv_cache_memory_bytes * page_bytes // (page_bytes + draft_page_bytes)
        )
    num_pages = memory.num_pages(
        stored,
        page_size=page_size,
        dtype=dtype,
        budget_bytes=kv_cache_memory_bytes,
        max_tokens=max_tokens,
    )
    if num_pages < 1:
        raise ValueError(
            f"no room for a KV cache: one page takes {page_bytes} bytes, left are "
            f"{kv_cache_memory_bytes}; raise kv_cache_memory_bytes or gpu_memory_utilization"
        )
    return num_pages


def _num_host_pages(config: ModelConfig, page_size: int, dtype: str, gib: float) -> int:
    """Pages of `gib` GiB of host memory."""
    require(isinstance(gib, (int, float)), f"cpu_offload_gb must be a number, got {gib!r}")
    page_bytes = memory.page_bytes(kv_cache.as_stored(config, dtype), page_size, dtype)
    most = memory.host_memory_bytes()
    if not 0 <= gib <= most / 2**30:
        raise ValueError(
            f"cpu_offload_gb must lie between 0 and this machine's memory of "
            f"{memory.format_size(most)}, got {gib}"
        )
    num_bytes = int(gib * 2**30)
    if 0 < num_bytes < page_bytes or (gib and not num_bytes):
        raise ValueError(
            f"cpu_offload_gb={gib} has no room for one page of {memory.format_size(page_bytes)}: "
            "raise it, or lower block_size"
        )
    return num_bytes // page_bytes


def _resolve_max_model_len(wanted: int | None, config: ModelConfig, num_slots: int) -> int:
    made_for = config.max_context_len
    if wanted is None:
        return min(made_for, num_slots)
    if wanted > made_for:
        raise ValueError(
            f"max_model_len={wanted} is beyond the {made_for} positions the model was made for"
        )
    if wanted > num_slots:
        raise ValueError(
            f"max_model_len={wanted} does not fit the KV pool of {num_slots} tokens: raise "
            "kv_cache_memory_bytes or num_gpu_blocks_override, or lower max_model_len"
        )
    return wanted
