"""Turns `LLMOptions` into the configs of an engine: fills in platform defaults, sizes the KV pool.

An option of None means the platform's default.
"""

from __future__ import annotations

import dataclasses

import jax

from jinfer.config import memory
from jinfer.config.cache import KV_BITS, CacheConfig
from jinfer.config.engine import EngineConfig
from jinfer.config.fields import require
from jinfer.config.model import ModelConfig
from jinfer.config.typing import Params
from jinfer.kv import cache as kv_cache
from jinfer.kv.codes import resolve_format
from jinfer.linear.weight import num_bytes
from jinfer.setup.options import LLMOptions
from jinfer.setup.speculation import Speculation

MAX_NUM_SEQS = 65536


def resolve(
    options: LLMOptions, model: ModelConfig, params: Params, speculation: Speculation
) -> tuple[EngineConfig, CacheConfig]:
    """Returns the limits of an engine and the size of its KV pool.

    Args:
      options: the arguments of `LLM`.
      model: the config of the served model.
      params: its weights, placed.
      speculation: how the engine drafts, with the weights for that.

    Raises:
      ValueError: the options contradict each other, the model or the memory.
    """
    sizes = _step_sizes(options, model, params)
    num_pages = _num_pages(options, sizes, model, params, speculation)
    num_slots = num_pages * sizes.block_size
    max_model_len = _resolve_max_model_len(options.max_model_len, model, num_slots)
    _check_speculation(options, model, speculation, max_model_len)
    budget = sizes.max_num_batched_tokens
    if options.max_num_batched_tokens is None and not options.enable_chunked_prefill:
        budget = max(budget, max_model_len)
    num_decode_steps = options.num_decode_steps
    if num_decode_steps is None:
        num_decode_steps = 1 if jax.default_backend() == "cpu" else 8
    max_logprobs = options.max_logprobs
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=sizes.block_size,
        enable_chunked_prefill=options.enable_chunked_prefill,
        enable_prefix_caching=options.enable_prefix_caching,
        num_decode_steps=num_decode_steps,
        max_logprobs=model.vocab_size if max_logprobs == -1 else max_logprobs,
        seed=options.seed,
        attention_impl=options.attention_impl,
        linear_impl=options.linear_impl,
        speculation=speculation.config,
        num_host_pages=_num_host_pages(
            model, sizes.block_size, sizes.kv_dtype, options.cpu_offload_gb
        ),
    )
    cache = CacheConfig(num_pages=num_pages, page_size=sizes.block_size, dtype=sizes.kv_dtype)
    return config, cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StepSizes:
    """Sizes of a step and a page."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_dtype: str


def _step_sizes(options: LLMOptions, model: ModelConfig, params: Params) -> _StepSizes:
    """Fills in the platform's defaults and checks the sizes that memory depends on."""
    on_cpu = jax.default_backend() == "cpu"
    max_num_seqs = options.max_num_seqs
    if max_num_seqs is None:
        max_num_seqs = 32 if on_cpu else 128
    budget = options.max_num_batched_tokens
    if budget is None:
        budget = max(512 if on_cpu else 2048, max_num_seqs)
    kv_dtype = resolve_format(options.kv_cache_dtype, model, str(params["embed"]["w"].dtype))
    block_size = options.block_size
    if block_size is None:
        block_size = _default_block_size(kv_dtype)
    require(
        not isinstance(max_num_seqs, int) or max_num_seqs <= MAX_NUM_SEQS,
        f"max_num_seqs must be at most {MAX_NUM_SEQS}, got {max_num_seqs}: each sequence takes a "
        "row of state on the device",
    )
    # Made for its checks only; max_model_len may depend on the pool's size and is resolved later.
    EngineConfig(
        max_model_len=1 if options.max_model_len is None else options.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
        attention_impl=options.attention_impl,
        linear_impl=options.linear_impl,
    )
    for name in ("num_gpu_blocks_override", "kv_cache_memory_bytes"):
        value = getattr(options, name)
        require(
            value is None or (isinstance(value, int) and value > 0),
            f"{name} must be a positive integer, got {value!r}",
        )
    return _StepSizes(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
        kv_dtype=kv_dtype,
    )


def _default_block_size(kv_dtype: str) -> int:
    """Returns 64 tokens; on TPUs with quantized K and V 128, so that scales fill all lanes."""
    return 128 if jax.default_backend() == "tpu" and KV_BITS[kv_dtype] < 16 else 64


def _num_pages(
    options: LLMOptions,
    sizes: _StepSizes,
    model: ModelConfig,
    params: Params,
    speculation: Speculation,
) -> int:
    """Returns the pages of the KV pool; a draft model's pool has the same number."""
    stored = kv_cache.as_stored(model, sizes.kv_dtype)
    page_bytes = memory.page_bytes(stored, sizes.block_size, sizes.kv_dtype)
    if options.num_gpu_blocks_override is not None:
        stats = jax.local_devices()[0].memory_stats() or {}
        limit = stats.get("bytes_limit", memory.host_memory_bytes())
        require(
            options.num_gpu_blocks_override * page_bytes <= limit,
            f"num_gpu_blocks_override={options.num_gpu_blocks_override} pages of "
            f"{memory.format_size(page_bytes)} are more than the memory of "
            f"{memory.format_size(limit)}",
        )
        return options.num_gpu_blocks_override
    budget_bytes = options.kv_cache_memory_bytes
    if budget_bytes is None:
        budget_bytes = _kv_budget_bytes(options, sizes, model, params, speculation)
    drafter = speculation.drafter
    if drafter is not None and drafter.own_kv_config is not None:
        own = kv_cache.as_stored(drafter.own_kv_config, sizes.kv_dtype)
        draft_page_bytes = memory.page_bytes(own, sizes.block_size, sizes.kv_dtype)
        # The target's share of the budget.
        budget_bytes = budget_bytes * page_bytes // (page_bytes + draft_page_bytes)
    longest = options.max_model_len or model.max_context_len
    num_pages = memory.num_pages(
        stored,
        page_size=sizes.block_size,
        dtype=sizes.kv_dtype,
        budget_bytes=budget_bytes,
        max_tokens=sizes.max_num_seqs * -(-longest // sizes.block_size) * sizes.block_size,
    )
    if num_pages < 1:
        raise ValueError(
            f"no room for a KV cache: one page takes {page_bytes} bytes, left are "
            f"{budget_bytes}; raise kv_cache_memory_bytes or gpu_memory_utilization"
        )
    return num_pages


def _kv_budget_bytes(
    options: LLMOptions,
    sizes: _StepSizes,
    model: ModelConfig,
    params: Params,
    speculation: Speculation,
) -> int:
    """Returns the memory left by weights, other users of the device and a step's temporaries."""
    jax.block_until_ready(params)  # so that bytes_in_use includes copies made by placement
    stats = jax.local_devices()[0].memory_stats() or {}
    used_bytes = num_bytes((params, speculation.heads))
    if speculation.drafter is not None:
        used_bytes += speculation.drafter.num_weight_bytes(params)
    return memory.kv_budget_bytes(
        device_bytes=stats.get("bytes_limit"),
        # Other users of the device count as well: a trainer with its optimizer, another engine.
        used_bytes=max(used_bytes, stats.get("bytes_in_use", 0)),
        gpu_memory_utilization=options.gpu_memory_utilization,
        reserved_bytes=memory.temp_bytes(
            model, num_tokens=sizes.max_num_batched_tokens, num_seqs=sizes.max_num_seqs
        ),
    )


def _check_speculation(
    options: LLMOptions, model: ModelConfig, speculation: Speculation, max_model_len: int
) -> None:
    """Raises ValueError if a drafter or its trees contradict the other options."""
    own = None if speculation.drafter is None else speculation.drafter.own_kv_config
    if own is not None and options.cpu_offload_gb:
        raise ValueError(
            "cpu_offload_gb is not supported with a draft model that has its own KV cache: drop one"
        )
    if own is not None and own.max_context_len < max_model_len:
        raise ValueError(
            f"speculative_config: the draft model has {own.max_context_len} positions, fewer than "
            f"max_model_len={max_model_len}: lower max_model_len to that"
        )
    config, window = speculation.config, model.sliding_window
    if config is not None and config.is_tree and window is not None:
        require(
            config.num_levels < window,
            f"trees of {config.num_levels} levels do not fit a sliding window of {window} tokens: "
            "give a smaller tree or window",
        )


def _num_host_pages(config: ModelConfig, page_size: int, dtype: str, gib: float) -> int:
    """Returns how many pages fit `gib` GiB of host memory."""
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
    longest = config.max_context_len
    if wanted is None:
        return min(longest, num_slots)
    if wanted > longest:
        raise ValueError(f"max_model_len={wanted} exceeds the model's {longest} positions")
    if wanted > num_slots:
        raise ValueError(
            f"max_model_len={wanted} does not fit the KV pool of {num_slots} tokens: raise "
            "kv_cache_memory_bytes or num_gpu_blocks_override, or lower max_model_len"
        )
    return wanted
