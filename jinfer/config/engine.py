"""Configuration of the engine: limits and policies."""

from __future__ import annotations

import dataclasses

from jinfer.config.fields import check_positive
from jinfer.config.fields import require as require
from jinfer.config.speculative import SpeculativeConfig

BACKENDS = (
    "auto",
    "xla",
    "native",
    "mosaic_gpu",
    "mosaic_tpu",
)  # of attention and quantized linears


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits and policies of the engine; see `LLM` for the meaning of each field."""

    max_model_len: int
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    block_size: int = 16
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    num_decode_steps: int = 4  # decode steps that one program keeps on the device
    max_logprobs: int = 20
    seed: int = 0
    attention_impl: str = "auto"
    linear_impl: str = "auto"
    speculation: SpeculativeConfig | None = None
    num_host_pages: int = 0  # that host memory takes of those evicted from the device

    def __post_init__(self) -> None:
        for name in ("attention_impl", "linear_impl"):
            value = getattr(self, name)
            require(
                value in BACKENDS,
                f"{name} must be one of {', '.join(BACKENDS)}, got {value!r}",
            )
        check_positive(
            self,
            *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
            "num_decode_steps",
        )
        require(
            isinstance(self.max_logprobs, int) and self.max_logprobs >= 0,
            f"max_logprobs must be 0 or more, or -1 for any number, got {self.max_logprobs!r}",
        )
        require(
            isinstance(self.num_host_pages, int) and self.num_host_pages >= 0,
            f"num_host_pages must be 0 or a positive integer, got {self.num_host_pages!r}",
        )
        require(
            self.enable_prefix_caching or not self.num_host_pages,
            "cpu_offload_gb keeps what the prefix cache evicts: it needs enable_prefix_caching",
        )
        require(
            self.block_size & (self.block_size - 1) == 0,
            f"block_size must be a power of two, got {self.block_size}",
        )
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
            f"max_num_seqs ({self.max_num_seqs}): a step gives every running sequence one token",
        )
        require(
            self.enable_chunked_prefill or self.max_num_batched_tokens >= self.max_model_len,
            f"without chunked prefill a step must hold a whole prompt: raise "
            f"max_num_batched_tokens ({self.max_num_batched_tokens}) to max_model_len "
            f"({self.max_model_len}), or set enable_chunked_prefill=True",
        )
