"""Configuration of a model: dimensions, ropes, layer types; frozen and validated once."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jinfer.config.fields import check_fields, check_positive, shown
from jinfer.config.fields import require as require
from jinfer.config.static_kv import StaticKV

RopeScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]


LayerType = Literal["full", "sliding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched beyond the trained context.

    Fields carry the names of Hugging Face's `rope_parameters`; those that a scaling does not use
    keep their defaults.
    """

    theta: float = 10000.0
    scaling: RopeScaling = "none"
    partial_factor: float = 1.0  # share of head_dim that rotates
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer, whatever its family.

    Shapes: D = hidden_size, F = intermediate_size, N = num_heads, K = num_kv_heads, H = head_dim,
    V = vocab_size, L = num_layers, E = num_experts.
    """

    family: str  # "llama", "qwen3", ...: for messages only; no code branches on it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-6
    norm_plus_one: bool = False  # Gemma: x * (1 + gamma)
    post_norms: bool = False  # Gemma: norms after attention and MLP, before the residual sum
    qk_norm: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    attention_bias: bool = False  # q, k, v
    attention_out_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # default head_dim ** -0.5
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] = ()  # empty: all "full", or all "sliding" given a window
    rope: RopeConfig = RopeConfig()
    rope_local: RopeConfig | None = None  # for "sliding" layers (Gemma 3)
    num_experts: int = 0  # 0: dense MLP
    num_experts_per_token: int = 0
    expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()  # layers with a dense MLP in a mixture-of-experts model
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    static_kv: StaticKV | None = None  # scales of K and V that the checkpoint brings

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
            *("num_kv_heads", "head_dim", "max_position_embeddings", "sliding_window"),
        )
        optional = type(None)
        kinds: dict[str, tuple[type, ...]] = {
            "rope": (RopeConfig,),
            "rope_local": (RopeConfig, optional),
            "static_kv": (StaticKV, optional),
            "layer_types": (tuple,),
        }
        for name, classes in kinds.items():
            value = getattr(self, name)
            what = classes[0].__name__
            require(isinstance(value, classes), f"{name} must be a {what}, got {shown(value)}")
        require(self.head_dim % 2 == 0, f"head_dim must be even (rotary), got {self.head_dim}")
        activations = ("silu", "gelu", "gelu_tanh")
        is_known = isinstance(self.activation, str) and self.activation in activations
        require(is_known, f"activation must be one of {activations}, got {shown(self.activation)}")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
            f"({self.num_kv_heads})",
        )
        if self.static_kv is not None:
            self.static_kv.check(self.num_layers, self.num_kv_heads)
        if not self.layer_types:
            kind: LayerType = "sliding" if self.sliding_window else "full"
            object.__setattr__(self, "layer_types", (kind,) * self.num_layers)
        require(
            len(self.layer_types) == self.num_layers
            and all(isinstance(t, str) and t in ("full", "sliding") for t in self.layer_types),
            f'layer_types must have {self.num_layers} entries, "full" or "sliding", got '
            f"{len(self.layer_types)}: {shown(self.layer_types)}",
        )
        require(
            "sliding" not in self.layer_types or bool(self.sliding_window),
            "layer_types has sliding layers but sliding_window is not set",
        )
        require(
            self.num_experts == 0 or 0 < self.num_experts_per_token <= self.num_experts,
            f"num_experts_per_token ({self.num_experts_per_token}) must lie in "
            f"1..{self.num_experts}",
        )

    @property
    def sm_scale(self) -> float:
        """Factor on q . k before the softmax."""
        return self.attention_scale if self.attention_scale is not None else self.head_dim**-0.5

    @property
    def max_context_len(self) -> int:
        """Positions that the model is good for, with what its rope scaling adds.

        Configs give the length before stretching for linear, dynamic and yarn ropes, and after it
        for llama3 and longrope ones.
        """
        rope = self.rope
        if rope.scaling in ("linear", "dynamic"):
            return int(self.max_position_embeddings * rope.factor)
        if rope.scaling == "yarn" and rope.original_max_position:
            return max(self.max_position_embeddings, int(rope.original_max_position * rope.factor))
        return self.max_position_embeddings

    def window(self, layer: int) -> int | None:
        """Sliding window of `layer` in tokens (itself included), or None for full attention."""
        return self.sliding_window if self.layer_types[layer] == "sliding" else None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has experts rather than a dense MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def kind_of(self, layer: int) -> int:
        """The first layer that computes as `layer` does, with weights of its own."""
        kinds = [(self.layer_types[i], self.is_moe_layer(i)) for i in range(layer + 1)]
        return kinds.index(kinds[layer])
