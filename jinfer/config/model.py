"""Model, cache and engine configurations: frozen, validated once, without jax."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from jinfer.config.fields import check_fields, check_positive, shown
from jinfer.config.fields import require as require
from jinfer.config.static_kv import StaticKV

# Formats of K and V in the cache and the bits of a value; those below 16 have scales beside.
KV_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8, "int8": 8, "int4": 4}
_KV_NAMES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}

RopeScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]
LayerType = Literal["full", "sliding"]
BACKENDS = ("auto", "xla", "mosaic_gpu", "mosaic_tpu")  # of attention and quantized linears
MAX_SPECULATIVE_TOKENS = 16


def kv_format(name: str, field: str = "kv_cache_dtype") -> str:
    """Returns the one name of a KV format that goes by several; `field` is what it is given for.

    Raises:
      ValueError: K and V cannot be kept so.
    """
    found = _KV_NAMES.get(name, name) if isinstance(name, str) else name
    require(
        isinstance(found, str) and found in KV_BITS,
        f"{field} must be auto or one of {', '.join([*KV_BITS, *_KV_NAMES])}, got {name!r}",
    )
    return found


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV pool: `num_pages` pages a layer, `page_size` tokens each.

    Attributes:
      dtype: format of K and V, see `KV_BITS`; fp8 and fp8_e4m3 become float8_e4m3fn.
    """

    num_pages: int
    page_size: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", kv_format(self.dtype))
        require(self.num_pages > 0, f"num_pages must be positive, got {self.num_pages}")
        require(
            self.page_size > 0 and self.page_size & (self.page_size - 1) == 0,
            f"page_size must be a power of two, got {self.page_size}",
        )

    @property
    def is_quantized(self) -> bool:
        """Whether every token and head has a scale beside its K and one beside its V."""
        return KV_BITS[self.dtype] < 16

    @property
    def num_slots(self) -> int:
        """Token places in one layer's share of the pool."""
        return self.num_pages * self.page_size


_SPECULATIVE_FIELDS = {
    "ngram": ("num_speculative_tokens", "adaptive", "prompt_lookup_max", "prompt_lookup_min"),
    "medusa": ("adaptive", "heads", "tree", "acceptance", "epsilon", "alpha"),
    "lookahead": ("adaptive", "window", "ngram_size", "num_guesses"),
    "self": ("num_speculative_tokens", "adaptive", "format"),
    "draft": ("num_speculative_tokens", "adaptive", "model", "params", "tokenizer"),
}
TREE_METHODS = ("medusa", "lookahead")
MAX_TREE_NODES = 63


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How several tokens are drafted and then verified in one step of the model.

    Attributes:
      method: "ngram": what mostly followed when the text ended alike. "self": the model
        itself, its linears rounded to fewer bits, drafts in the same KV pages. "draft": another
        model of the same vocabulary drafts. "medusa": a tree of the guesses of trained heads.
        "lookahead": the model's own parallel guesses, as n-grams.
      num_speculative_tokens: most drafts a sequence and step; those of a tree are its nodes.
      adaptive: carry fewer drafts (a tree: none), or none, where steps with drafts are measured to
        bring fewer tokens a second; otherwise all that there are.
      prompt_lookup_max, prompt_lookup_min: ("ngram") tokens at the end of the text that are looked
        for, as many as can be found.
      format: ("self") of the rounded weights, as `LLM(quantization=)` has it.
      model, params, tokenizer: ("draft") as `LLM` takes them.
      heads: ("medusa") the folder that `jinfer train-medusa` wrote.
      tree: ("medusa") guesses to verify, each a list of ranks, see `spec.medusa_tree`; None: the
        tree that was fitted to the heads.
      acceptance: ("medusa") "lossless": the tokens are those of plain decoding; "typical": lossy,
        sampled rows keep drafts that are likely enough, see `spec.tree_accept`.
      epsilon, alpha: ("medusa") of typical acceptance.
      window, ngram_size, num_guesses: ("lookahead") W, N and G of `spec.lookahead`; its trees have
        (W + G) (N - 1) nodes, which must not be more than 63.
    """

    method: str
    num_speculative_tokens: int = 4
    adaptive: bool = True
    prompt_lookup_max: int = 3
    prompt_lookup_min: int = 1
    format: str = "int4-g128"
    model: Any = None
    params: Any = dataclasses.field(default=None, repr=False, compare=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False)
    heads: str | os.PathLike[str] | None = None
    tree: tuple[tuple[int, ...], ...] | None = None
    acceptance: str = "lossless"
    epsilon: float = 0.09
    alpha: float = 0.3
    window: int = 5
    ngram_size: int = 4
    num_guesses: int = 5

    def __post_init__(self) -> None:
        positive = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        for name in (*positive, "window", "ngram_size", "num_guesses"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                f"speculative_config: {name} must be a positive integer, got {value!r}",
            )
        check_fields(self, "speculative_config: ")
        require(
            self.is_tree or self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS,
            f"speculative_config: num_speculative_tokens must be at most {MAX_SPECULATIVE_TOKENS}, "
            f"got {self.num_speculative_tokens}",
        )
        require(
            self.prompt_lookup_min <= self.prompt_lookup_max,
            f"speculative_config: prompt_lookup_min ({self.prompt_lookup_min}) must not exceed "
            f"prompt_lookup_max ({self.prompt_lookup_max})",
        )
        require(
            self.method != "draft" or self.model is not None,
            'speculative_config: method "draft" needs a "model"',
        )
        require(
            self.acceptance in ("lossless", "typical"),
            f'speculative_config: acceptance must be "lossless" or "typical", got '
            f"{self.acceptance!r}",
        )
        for name in ("epsilon", "alpha"):
            value = getattr(self, name)
            require(
                isinstance(value, (int, float)) and 0 < value <= 1,
                f"speculative_config: {name} must be above 0 and at most 1, got {value!r}",
            )
        require(
            self.method != "medusa" or isinstance(self.heads, (str, os.PathLike)),
            'speculative_config: method "medusa" needs "heads", the folder that jinfer '
            f"train-medusa wrote; got {self.heads!r}",
        )
        nodes = (self.window + self.num_guesses) * (self.ngram_size - 1)
        require(
            self.method != "lookahead" or 0 < nodes <= MAX_TREE_NODES,
            "speculative_config: (window + num_guesses) * (ngram_size - 1) must be 1 to "
            f"{MAX_TREE_NODES}, got {nodes}",
        )

    @property
    def is_tree(self) -> bool:
        """Whether the drafts of a sequence are a tree."""
        return self.method in TREE_METHODS

    @property
    def max_depth(self) -> int:
        """Most drafts of a sequence that can stand in one step."""
        if not self.is_tree:
            return self.num_speculative_tokens
        if self.method == "lookahead":
            return self.ngram_size - 1
        return max(map(len, self.tree or ()), default=0)

    @property
    def num_levels(self) -> int:
        """Levels of a tree below its root."""
        return self.max_depth + (self.window - 1 if self.method == "lookahead" else 0)

    @property
    def num_ranks(self) -> int:
        """Guesses of each Medusa head that the tree asks for."""
        return 1 + max((max(node) for node in self.tree or ()), default=0)

    @property
    def typical(self) -> tuple[float, float] | None:
        """(epsilon, alpha), or None for lossless acceptance."""
        return (self.epsilon, self.alpha) if self.acceptance == "typical" else None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> SpeculativeConfig:
        """Makes a config of what a user gives.

        Raises:
          ValueError: an unknown method, or a key that the method does not have.
          TypeError: it is no dict.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(
                'speculative_config must be a dict like {"method": "ngram"}, got '
                f"{type(fields).__name__}"
            )
        method = fields.get("method")
        methods = ", ".join(_SPECULATIVE_FIELDS)
        require(
            isinstance(method, str) and method in _SPECULATIVE_FIELDS,
            f"speculative_config: method must be one of {methods}, got {method!r}",
        )
        known = _SPECULATIVE_FIELDS[str(method)]
        for name in fields:
            require(
                name == "method" or name in known,
                f'speculative_config: method "{method}" has no {name!r}; it takes '
                f"{', '.join(known)}",
            )
        config = cls(**fields)
        for name in ("epsilon", "alpha"):
            require(
                config.typical is not None or name not in fields,
                f'speculative_config: {name} goes with "acceptance": "typical"',
            )
        is_tree = config.tree is None or isinstance(config.tree, (list, tuple))
        require(is_tree, f"speculative_config: tree must be a list, got {shown(config.tree)}")
        nodes = len(config.tree or ())
        if method == "lookahead":
            nodes = (config.window + config.num_guesses) * (config.ngram_size - 1)
        return dataclasses.replace(config, num_speculative_tokens=nodes) if nodes else config


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
