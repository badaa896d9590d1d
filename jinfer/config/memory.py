"""Computes the bytes that a model needs: weights, KV cache, one step's temporaries.

KV bytes = 2 (K and V) * layers * kv_heads * (head_dim * bytes a value + bytes a scale) * tokens
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Literal

from jinfer.config.cache import KV_BITS, kv_format
from jinfer.config.fields import shown
from jinfer.config.model import ModelConfig
from jinfer.config.quant_format import ACTS, TENSOR, QFormat

Part = Literal["embedding", "attention", "mlp", "norms", "head"]

DTYPE_BYTES: Mapping[str, float] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "int4": 0.5,
}
SCALE_BYTES = 2  # scales of quantized weights are kept in 16 bits, unless
# one of the names that `LLM(quantization=...)` takes besides formats says otherwise: those of
# formats whose scales are f32.
FLOAT32_SCALES: Mapping[str, str] = {
    "fp8": "fp8-e4m3-channel:dyn",
    "int8": "int8-channel:dyn",
    "nf4": "nf4-g64",
}
KV_SCALE_BYTES = 4  # a scale a token and head, of formats below 16 bits
CPU_KV_BYTES = 2**30  # what the pool takes on a CPU, unless the weights are larger

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightShape:
    """One kind of weight: `count` tensors of `shape` ([..., I, O] where a linear reads it)."""

    name: str
    part: Part
    shape: tuple[int, ...]
    count: int
    is_quantizable: bool

    @property
    def num_params(self) -> int:
        """Parameters of all `count` tensors."""
        return self.count * math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes for `batch` sequences of `context` tokens; see `plan()`."""

    num_params: int
    weight_bytes: int
    part_bytes: Mapping[Part, int]
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    kv_bytes: int
    temp_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights, KV cache and temporaries together."""
        return self.weight_bytes + self.kv_bytes + self.temp_bytes


def dtype_bytes(dtype: str) -> float:
    """Bytes of one value of `dtype`, by its JAX name.

    Raises:
      ValueError: the dtype is not one that weights or KV are stored in.
    """
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r:.80}")
    return DTYPE_BYTES[dtype]


MAX_BYTES = 2**63
"""Sizes must be below: no machine has as much."""


def parse_size(text: str) -> int:
    """Reads a size such as "80GiB", "512 MiB", "1.5G" or "4096" (bytes).

    Raises:
      ValueError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if not match:
        raise ValueError(f"a size must read like 80GiB, 512MiB or 4096, got {text!r}")
    num_bytes = float(match[1]) * _UNITS[match[2] or ""]
    if num_bytes >= MAX_BYTES:
        raise ValueError(f"a size must be below 2**63 bytes, got {shown(text)}")
    return int(num_bytes)


def format_size(num_bytes: float) -> str:
    """Prints bytes in the binary unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"


def weight_shapes(config: ModelConfig) -> tuple[WeightShape, ...]:
    """Lists every weight of `config` by shape; norms, biases, embeddings and routers stay dense."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    num_layers = config.num_layers
    num_moe = sum(config.is_moe_layer(layer) for layer in range(num_layers))
    num_dense = num_layers - num_moe
    shapes = []

    def add(name: str, part: Part, count: int, *shape: int, quantizable: bool = False) -> None:
        if count:
            shapes.append(
                WeightShape(
                    name=name, part=part, shape=shape, count=count, is_quantizable=quantizable
                )
            )

    add("embed", "embedding", 1, v, d)
    add("attn.q", "attention", num_layers, d, q, quantizable=True)
    add("attn.k, attn.v", "attention", 2 * num_layers, d, kv, quantizable=True)
    add("attn.o", "attention", num_layers, q, d, quantizable=True)
    add("attn.q.b", "attention", num_layers * config.attention_bias, q)
    add("attn.k.b, attn.v.b", "attention", 2 * num_layers * config.attention_bias, kv)
    add("attn.o.b", "attention", num_layers * config.attention_out_bias, d)
    add("mlp.gate, mlp.up", "mlp", 2 * num_dense, d, f, quantizable=True)
    add("mlp.down", "mlp", num_dense, f, d, quantizable=True)
    add("mlp.gate.b, mlp.up.b", "mlp", 2 * num_dense * config.mlp_bias, f)
    add("mlp.down.b", "mlp", num_dense * config.mlp_bias, d)
    e, fe = config.num_experts, config.expert_intermediate_size or f
    add("mlp.router", "mlp", num_moe, d, e)
    add("experts.gate, experts.up", "mlp", 2 * num_moe, e, d, fe, quantizable=True)
    add("experts.down", "mlp", num_moe, e, fe, d, quantizable=True)
    add("norms", "norms", (4 if config.post_norms else 2) * num_layers + 1, d)
    add("q_norm, k_norm", "norms", 2 * num_layers * config.qk_norm, config.head_dim)
    add("lm_head", "head", 0 if config.tie_word_embeddings else 1, d, v)
    return tuple(shapes)


def quantized_bytes(shape: tuple[int, ...], quantization: str) -> int:
    """Bytes of a weight [..., I, O] quantized as `quantization`: codes, scales, zero points.

    Args:
      shape: logical shape; groups run along I, and a short last group counts as one.
      quantization: such as "int4-g128", "int4-g64-asym", "int8-channel", "fp8-e4m3-channel:dyn",
        or one of the names "fp8", "int8" (W8A8) and "nf4"; a method after it ("int4-g64:rtn")
        makes no difference.

    Raises:
      ValueError: `quantization` is not a format.
    """
    scale_bytes = 4.0 if quantization in FLOAT32_SCALES else SCALE_BYTES
    name = FLOAT32_SCALES.get(quantization, quantization)
    try:
        stored, *more = name.split(":")  # what happens to the inputs, then the method
        fmt = QFormat.parse(":".join([stored, *(word for word in more if word in ACTS)]))
    except ValueError:
        raise ValueError(
            f"quantization must be fp8, int8, nf4, or read like int4-g128, int4-g64-asym, "
            f"int8-channel or fp8-e4m3-channel, got {quantization!r}"
        ) from None
    *lead, num_in, num_out = shape
    num_scales = 1 if fmt.group == TENSOR else math.ceil(num_out / fmt.block)
    if fmt.group > 0:
        num_scales *= math.ceil(num_in / fmt.group)
    code_bytes = math.ceil(num_in * fmt.bits / 8) * num_out
    if fmt.bits == 4:
        code_bytes = num_in * num_out / 2
    zero_bytes = 0.0
    if not fmt.symmetric:
        zero_bytes = 4.0 if fmt.float_zero else 0.5 if fmt.bits == 4 else 1.0
    if fmt.double_quant:
        scale_bytes = 1 + 4 / 256
    return math.ceil(math.prod(lead) * (code_bytes + num_scales * (scale_bytes + zero_bytes)))


def part_bytes(config: ModelConfig, dtype: str, quantization: str | None = None) -> dict[Part, int]:
    """Bytes of the weights by part; `quantization` applies to the linears inside the blocks."""
    parts: dict[Part, int] = {}
    for weight in weight_shapes(config):
        if quantization is not None and weight.is_quantizable:
            size = weight.count * quantized_bytes(weight.shape, quantization)
        else:
            size = math.ceil(weight.num_params * dtype_bytes(dtype))
        parts[weight.part] = parts.get(weight.part, 0) + size
    return parts


def num_params(config: ModelConfig) -> int:
    """Parameters of the model; a tied head counts once."""
    return sum(weight.num_params for weight in weight_shapes(config))


def weight_bytes(config: ModelConfig, dtype: str, quantization: str | None = None) -> int:
    """Bytes of all weights of `config` in `dtype`, its linears quantized where asked."""
    return sum(part_bytes(config, dtype, quantization).values())


def kv_bytes(config: ModelConfig, num_tokens: int, dtype: str) -> int:
    """Bytes of K and V of `num_tokens` tokens in every layer; windows do not shrink the pool.

    Raises:
      ValueError: K and V cannot be kept as `dtype`.
    """
    bits = KV_BITS[kv_format(dtype)]
    head_bytes = config.head_dim * bits / 8 + (KV_SCALE_BYTES if bits < 16 else 0)
    return math.ceil(2 * config.num_layers * config.num_kv_heads * head_bytes * num_tokens)


def page_bytes(config: ModelConfig, page_size: int, dtype: str) -> int:
    """Bytes of one page of `page_size` tokens through all layers."""
    return kv_bytes(config, page_size, dtype)


def num_pages(
    config: ModelConfig,
    *,
    page_size: int,
    dtype: str,
    budget_bytes: int,
    max_tokens: int | None = None,
) -> int:
    """Pages of `page_size` tokens that fit `budget_bytes`.

    Args:
      config: the model.
      page_size: tokens a page.
      dtype: format of K and V.
      budget_bytes: memory for the pool; see `kv_budget_bytes`.
      max_tokens: tokens that can ever be live (max_num_seqs * max_model_len); no more pages than
        they need. A sequence's last page may be part empty: round its length up first.

    Returns:
      The number of pages; 0 if not even one fits.
    """
    pages = max(0, budget_bytes) // page_bytes(config, page_size, dtype)
    return pages if max_tokens is None else min(pages, math.ceil(max_tokens / page_size))


def temp_bytes(config: ModelConfig, *, num_tokens: int, num_seqs: int) -> int:
    """Estimates one step's temporaries: activations of `num_tokens`, f32 logits of `num_seqs`.

    Residual, q, k, v, attention output and the gated MLP's three activations in f32, and three
    copies of the logits for the sampler (logits, sorted, cumulated). An estimate from above, not
    a measurement.
    """
    width = config.intermediate_size
    if config.num_experts:
        width = max(width, config.num_experts_per_token * config.expert_intermediate_size)
    heads = config.num_heads + config.num_kv_heads
    activations = 3 * config.hidden_size + 2 * heads * config.head_dim + 3 * width
    return 4 * (num_tokens * activations + 3 * num_seqs * config.vocab_size)


def host_memory_bytes() -> int:
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def kv_budget_bytes(
    *,
    device_bytes: int | None,
    used_bytes: int,
    gpu_memory_utilization: float = 0.9,
    reserved_bytes: int = 0,
) -> int:
    """Bytes that the KV pool may take.

    Args:
      device_bytes: memory of the accelerator; None on a CPU, where the pool gets `CPU_KV_BYTES`, or
        as much as is used already if that is more, but at most a quarter of the host's memory.
      used_bytes: what weights and others hold already.
      gpu_memory_utilization: share of `device_bytes` that weights, pool and steps may use.
      reserved_bytes: kept free for a step's temporaries.

    Returns:
      The budget; 0 or less when the weights alone fill the share.
    """
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization must lie in (0, 1], got {gpu_memory_utilization}")
    if device_bytes is None:
        return min(max(CPU_KV_BYTES, used_bytes), host_memory_bytes() // 4)
    return int(device_bytes * gpu_memory_utilization) - used_bytes - reserved_bytes


def plan(
    config: ModelConfig,
    *,
    context: int,
    batch: int,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    quantization: str | None = None,
) -> Plan:
    """Adds up what `batch` sequences of `context` tokens need.

    Args:
      config: the model.
      context: tokens of each sequence, prompt and output together.
      batch: sequences at once.
      dtype: dtype of the weights, and of KV unless `kv_dtype` names another.
      kv_dtype: format of K and V, such as "fp8"; see `config.KV_BITS`.
      quantization: format of the linears inside the blocks, such as "int4-g128".
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    parts = part_bytes(config, dtype, quantization)
    kv_dtype = kv_dtype or dtype
    return Plan(
        num_params=num_params(config),
        weight_bytes=sum(parts.values()),
        part_bytes=parts,
        kv_bytes_per_token=kv_bytes(config, 1, kv_dtype),
        kv_bytes_per_sequence=kv_bytes(config, context, kv_dtype),
        kv_bytes=kv_bytes(config, batch * context, kv_dtype),
        temp_bytes=temp_bytes(config, num_tokens=batch, num_seqs=batch),
    )


def _preset(
    family: str, dims: tuple[int, int, int, int, int, int, int], context: int, **rest
) -> ModelConfig:
    """Builds a config from (V, D, F, L, N, K, H): enough for arithmetic, not for running."""
    v, d, f, num_layers, n, k, h = dims
    return ModelConfig(
        family=family,
        vocab_size=v,
        hidden_size=d,
        intermediate_size=f,
        num_layers=num_layers,
        num_heads=n,
        num_kv_heads=k,
        head_dim=h,
        max_position_embeddings=context,
        **rest,
    )


_TIED = {"tie_word_embeddings": True}
_QWEN3 = {"qk_norm": True}
_GEMMA2 = {"post_norms": True, **_TIED}
_GEMMA3 = {"post_norms": True, "qk_norm": True, **_TIED}
_A3B = {"num_experts": 128, "num_experts_per_token": 8, "expert_intermediate_size": 768}

PRESETS: Mapping[str, ModelConfig] = {
    "smollm2": _preset("llama", (49152, 576, 1536, 30, 9, 3, 64), 8192, **_TIED),
    "llama-2-7b": _preset("llama", (32000, 4096, 11008, 32, 32, 32, 128), 4096),
    "llama-2-13b": _preset("llama", (32000, 5120, 13824, 40, 40, 40, 128), 4096),
    "llama-2-70b": _preset("llama", (32000, 8192, 28672, 80, 64, 8, 128), 4096),
    "llama-3-8b": _preset("llama", (128256, 4096, 14336, 32, 32, 8, 128), 8192),
    "llama-3-70b": _preset("llama", (128256, 8192, 28672, 80, 64, 8, 128), 8192),
    "llama-3.2-1b": _preset("llama", (128256, 2048, 8192, 16, 32, 8, 64), 131072, **_TIED),
    "llama-3.2-3b": _preset("llama", (128256, 3072, 8192, 28, 24, 8, 128), 131072, **_TIED),
    "mistral-7b": _preset("mistral", (32000, 4096, 14336, 32, 32, 8, 128), 32768),
    "qwen2.5-7b": _preset(
        "qwen2", (152064, 3584, 18944, 28, 28, 4, 128), 32768, attention_bias=True
    ),
    "qwen3-0.6b": _preset("qwen3", (151936, 1024, 3072, 28, 16, 8, 128), 40960, **_QWEN3, **_TIED),
    "qwen3-8b": _preset("qwen3", (151936, 4096, 12288, 36, 32, 8, 128), 40960, **_QWEN3),
    "gemma-2-9b": _preset("gemma2", (256000, 3584, 14336, 42, 16, 8, 256), 8192, **_GEMMA2),
    "gemma-3-1b": _preset("gemma3", (262144, 1152, 6912, 26, 4, 1, 256), 32768, **_GEMMA3),
    "phi-3-mini": _preset("phi3", (32064, 3072, 8192, 32, 32, 32, 96), 4096),
    "mixtral-8x7b": _preset(
        "mixtral",
        (32000, 4096, 14336, 32, 32, 8, 128),
        32768,
        num_experts=8,
        num_experts_per_token=2,
        expert_intermediate_size=14336,
    ),
    "qwen3-30b-a3b": _preset(
        "qwen3_moe", (151936, 2048, 6144, 48, 32, 4, 128), 40960, **_QWEN3, **_A3B
    ),
}
