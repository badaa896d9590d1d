"""Translates Hugging Face's config.json, of transformers 4 or 5, into a ModelConfig."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jinfer.checkpoints.hf_fields import FIELDS, FIELDS_OF, ROPE_FIELDS, check_fields
from jinfer.config.fields import require
from jinfer.config.model import LayerType, ModelConfig, RopeConfig, RopeScaling

# Defaults of transformers' config classes for missing fields (Gemma 3's often omit some).
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
}
_GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "gemma2": {
        **_GEMMA,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        **_GEMMA,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
    },
    "phi3": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
}
SUPPORTED = tuple(_DEFAULTS)
"""Values of `model_type` that can be loaded ("gemma3", the multimodal one, by its text part)."""

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_WINDOWED_BY_FLAG = ("qwen2", "qwen3", "qwen3_moe")  # use_sliding_window gates sliding_window
_GEMMAS = ("gemma2", "gemma3_text")


def config_from_hf(hf: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Translates a config.json.

    Args:
      hf: the parsed file. Of a multimodal Gemma 3, the text part is taken.
      source: where `hf` comes from; errors begin with it.

    Raises:
      ValueError: the architecture is unknown, a required field is missing or of the wrong kind, or
        a field asks for something that the decoder does not do.
    """
    try:
        return _config(hf)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _config(hf: Mapping[str, Any]) -> ModelConfig:
    family = hf.get("model_type")
    if family == "gemma3" and isinstance(hf.get("text_config"), Mapping):
        outer = {k: hf[k] for k in ("eos_token_id", "bos_token_id", "pad_token_id") if k in hf}
        return _config({**hf["text_config"], "model_type": "gemma3_text", **outer})
    if not isinstance(family, str) or family not in _DEFAULTS:
        raise ValueError(
            f"unknown architecture {reprlib.repr(family)} (architectures: "
            f"{reprlib.repr(hf.get('architectures'))}); "
            f"supported model types: {', '.join(SUPPORTED)}, gemma3"
        )
    get = _fields(family, hf)
    num_heads = get["num_attention_heads"]
    head_dim = get["head_dim"] or get["hidden_size"] // num_heads
    layer_types, window = _layer_types(family, get)
    rope, rope_local = _ropes(family, get)
    is_gemma = family in _GEMMAS
    bias = bool(get.get("attention_bias", False))
    eos = get.get("eos_token_id")
    return ModelConfig(
        family=family,
        vocab_size=get["vocab_size"],
        hidden_size=get["hidden_size"],
        intermediate_size=get["intermediate_size"],
        num_layers=get["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=get["num_key_value_heads"] or num_heads,
        head_dim=head_dim,
        max_position_embeddings=get["max_position_embeddings"],
        norm_eps=get["rms_norm_eps"],
        norm_plus_one=is_gemma,
        post_norms=is_gemma,
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        activation=_ACTIVATIONS[_activation(family, get)],
        attention_bias=bias or family == "qwen2",
        attention_out_bias=bias,
        mlp_bias=bool(get.get("mlp_bias", False)),
        tie_word_embeddings=bool(get["tie_word_embeddings"]),
        embedding_scale=get["hidden_size"] ** 0.5 if is_gemma else 1.0,
        attention_scale=get["query_pre_attn_scalar"] ** -0.5 if is_gemma else None,
        attention_soft_cap=get.get("attn_logit_softcapping"),
        final_soft_cap=get.get("final_logit_softcapping"),
        sliding_window=window,
        layer_types=layer_types,
        rope=rope,
        rope_local=rope_local,
        bos_token_id=get.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=None if get.get("pad_token_id") == -1 else get.get("pad_token_id"),
        **_experts(family, get),
    )


def _fields(family: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checked fields, with the family's defaults for missing ones."""
    get: dict[str, Any] = {**_COMMON, **_DEFAULTS[family], **hf}
    if family == "qwen3_moe":  # transformers 5 writes the second spelling
        stated = (hf.get(key) for key in ("num_experts", "num_local_experts"))
        get["num_experts"] = next((count for count in stated if count is not None), 128)
    for key in _REQUIRED:
        require(get.get(key) is not None, f"this {family} model lacks the field {key!r}")
    check_fields(get, FIELDS)
    check_fields(get, FIELDS_OF.get(family, {}))
    _reject_unsupported(family, get)
    return get


def _activation(family: str, get: Mapping[str, Any]) -> str:
    # Some of Gemma's files have a hidden_act, too, which transformers ignores.
    activation = get["hidden_act"]
    if family in _GEMMAS:
        activation = get["hidden_activation"] or _GEMMA["hidden_activation"]
    require(
        activation in _ACTIVATIONS,
        f"unknown activation {activation!r}; supported: {', '.join(_ACTIVATIONS)}",
    )
    return activation


def _reject_unsupported(family: str, get: Mapping[str, Any]) -> None:
    """Refuses options that transformers' model of the family ignores or that are not supported."""
    require(
        not get.get("use_bidirectional_attention"),
        "use_bidirectional_attention is set: an encoder; only causal decoders are supported",
    )
    require(
        family != "gemma3_text" or get.get("attn_logit_softcapping") is None,
        "attn_logit_softcapping is set, but Gemma 3 has no attention soft cap",
    )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        require(
            family in _GEMMAS or get.get(key) is None,
            f"{key} is set, but {family} has no such option",
        )
    require(
        family in ("llama", "qwen3", "qwen3_moe", *_GEMMAS) or not get.get("attention_bias"),
        f"attention_bias is set, but {family} has no such option",
    )
    require(
        family == "llama" or not get.get("mlp_bias"),
        f"mlp_bias is set, but {family} has no such option",
    )


def _layer_types(family: str, get: Mapping[str, Any]) -> tuple[tuple[LayerType, ...], int | None]:
    """Returns each layer's kind of attention, and the window if any layer has one."""
    num_layers = get["num_hidden_layers"]
    window = get.get("sliding_window")
    if family in _WINDOWED_BY_FLAG and not get.get("use_sliding_window", False):
        window = None
    if family == "llama":
        window = None  # transformers' Llama has no window, whatever the file says
    names: dict[str, LayerType] = {"full_attention": "full", "sliding_attention": "sliding"}
    if get.get("layer_types"):
        for name in get["layer_types"]:
            require(name in names, f"unknown layer type {name!r}; supported: {', '.join(names)}")
        types = tuple(names[name] for name in get["layer_types"])
        gate = " and use_sliding_window" if family in _WINDOWED_BY_FLAG else ""
        why = "llama has none" if family == "llama" else f"set sliding_window{gate}"
        require(
            bool(window) or "sliding" not in types,
            f"layer_types has sliding layers, but no window is in force: {why}",
        )
    elif not window:
        types: tuple[LayerType, ...] = ("full",) * num_layers
    else:
        first, period = 0, 0
        if family in ("qwen2", "qwen3"):
            first = get["max_window_layers"] or 0
        elif family == "gemma2":
            period = 2
        elif family == "gemma3_text":
            period = get.get("sliding_window_pattern") or get.get("_sliding_window_pattern") or 6
        types = tuple(
            "sliding" if i >= first and not (period and (i + 1) % period == 0) else "full"
            for i in range(num_layers)
        )
    return types, window if "sliding" in types else None


def _experts(family: str, get: Mapping[str, Any]) -> dict[str, Any]:
    if family == "mixtral":
        return {
            "num_experts": get["num_local_experts"],
            "num_experts_per_token": get["num_experts_per_tok"],
            "expert_intermediate_size": get["intermediate_size"],
            "norm_topk_prob": True,
        }
    if family == "qwen3_moe":
        only_mlp = get.get("mlp_only_layers") or ()
        step = get["decoder_sparse_step"]
        return {
            "num_experts": get["num_experts"],
            "num_experts_per_token": get["num_experts_per_tok"],
            "expert_intermediate_size": get["moe_intermediate_size"],
            "norm_topk_prob": bool(get["norm_topk_prob"]),
            "dense_layers": tuple(
                i for i in range(get["num_hidden_layers"]) if i in only_mlp or (i + 1) % step
            ),
        }
    return {}


def _ropes(family: str, get: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """Returns the rope of full layers (of all layers, outside Gemma 3) and that of sliding ones."""
    stated = _stated_rope(get)
    nested = {k: stated.get(k) or {} for k in ("full_attention", "sliding_attention")}
    is_nested = any(k in stated for k in nested)
    if family == "gemma3_text":
        full = nested["full_attention"] if is_nested else stated
        local = nested["sliding_attention"]
        return (
            _rope(family, get, full, get["rope_theta"]),
            _rope(family, get, local, get["rope_local_base_freq"]),
        )
    if is_nested:
        full = _rope(family, get, nested["full_attention"], get["rope_theta"])
        local = _rope(family, get, nested["sliding_attention"], get["rope_theta"])
        return full, None if local == full else local
    return _rope(family, get, stated, get["rope_theta"]), None


def _stated_rope(get: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rope's own dict, under its newer or its older name; both must agree.

    (transformers lets an older one that was added by hand replace the newer one as a whole, theta
    included.)
    """
    stated, old = (dict(get.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    for rope, key in itertools.product((stated, old), ("full_attention", "sliding_attention")):
        part = rope.get(key)
        require(
            isinstance(part, Mapping | None),
            f"{key} of the rope must be an object or null, got {reprlib.repr(part)} (rope_scaling "
            f"or rope_parameters)",
        )
    full = stated.get("full_attention") or stated
    kinds = ("rope_type", "type")
    is_same = _kind(old) == _kind(full) and all(
        full.get(key) == value for key, value in old.items() if key not in kinds
    )
    require(
        is_same or not stated or not old,
        "it has both rope_parameters and rope_scaling, and they differ: write what is "
        "meant into rope_parameters and take rope_scaling out",
    )
    return stated or old


def _kind(stated: Mapping[str, Any]) -> Any:
    return stated.get("rope_type") or stated.get("type") or "default"


def _original_max_position(
    scaling: str, get: Mapping[str, Any], stated: Mapping[str, Any]
) -> int | None:
    """Returns the context that the model was trained on before its rope was scaled."""
    max_position = get["max_position_embeddings"]
    if scaling in ("llama3", "yarn", "longrope"):
        # The field outside the rope's own dict takes precedence, as in transformers.
        return (
            get.get("original_max_position_embeddings")
            or stated.get("original_max_position_embeddings")
            or max_position
        )
    if scaling == "dynamic":
        return max_position  # transformers 5 ignores the field
    return None


def _rope(
    family: str, get: Mapping[str, Any], stated: Mapping[str, Any], theta: float
) -> RopeConfig:
    for key in stated:
        require(key in ROPE_FIELDS, f"unknown rope option {key!r}; known: {', '.join(ROPE_FIELDS)}")
    check_fields(stated, ROPE_FIELDS)
    kind = _kind(stated)
    require(
        kind != "default" or stated.get("factor") in (None, 1) or "rope_type" in stated,
        f"the rope scaling has a factor ({stated.get('factor')}) but no rope_type",
    )
    if kind == "su" or (family == "phi3" and kind == "yarn"):  # early Phi-3 spellings
        kind = "longrope"
    scaling = "none" if kind == "default" else kind
    require(
        scaling in get_args(RopeScaling),
        f"unknown rope_type {kind!r}; supported: default, {', '.join(get_args(RopeScaling)[1:])}",
    )
    partial = stated.get("partial_rotary_factor") or get.get("partial_rotary_factor") or 1.0
    require(
        family == "phi3" or partial == 1.0,
        f"partial_rotary_factor is {partial}, but {family} rotates whole heads",
    )
    original = _original_max_position(scaling, get, stated)
    factor = stated.get("factor")
    if factor is None:
        require(
            scaling in ("none", "yarn", "longrope"),
            f"the {kind} rope scaling lacks 'factor'",
        )
        factor = get["max_position_embeddings"] / original if original else 1.0
    needed = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor", "long_factor"),
    }
    for key in needed.get(scaling, ()):
        require(key in stated, f"the {scaling} rope scaling lacks {key!r}")
    return RopeConfig(
        theta=float(stated.get("rope_theta") or theta),
        scaling=scaling,
        partial_factor=float(partial),
        factor=float(factor),
        original_max_position=original,
        low_freq_factor=float(stated.get("low_freq_factor", 1.0)),
        high_freq_factor=float(stated.get("high_freq_factor", 4.0)),
        attention_factor=stated.get("attention_factor"),
        beta_fast=float(stated.get("beta_fast") or 32.0),
        beta_slow=float(stated.get("beta_slow") or 1.0),
        mscale=stated.get("mscale"),
        mscale_all_dim=stated.get("mscale_all_dim"),
        truncate=bool(stated.get("truncate", True)),
        short_factor=tuple(stated.get("short_factor", ())),
        long_factor=tuple(stated.get("long_factor", ())),
    )
