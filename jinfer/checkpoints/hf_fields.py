"""Table of the fields of config.json and their allowed values, checked before they are read.

Fields outside the table are not read and may have any value.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jinfer.config.fields import require

MAX_LAYERS, MAX_EXPERTS = 1 << 14, 1 << 12
_MAX_WIDTH, _MAX_LENGTH = 1 << 24, (1 << 31) - 1
_TINY, _HUGE = 1e-30, 1e30  # a square, and its inverse, of what lies between is finite


class Kind(NamedTuple):
    """Allowed values of a field: a description and a test."""

    name: str
    holds: Callable[[Any], bool]


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _count(high: int) -> Kind:
    return Kind(f"a positive integer up to {high}", lambda value: _is_integer(value, 1, high))


def _number(low: float, high: float) -> Kind:
    what = "a positive number" if low > 0 else "a number"
    return Kind(f"{what} ({low:g} to {high:g})", lambda value: _is_number(value, low, high))


def _list_of(kind: Kind, plural: str) -> Kind:
    return Kind(
        f"a list of {plural}", lambda value: isinstance(value, list) and all(map(kind.holds, value))
    )


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.name} or null", lambda value: value is None or kind.holds(value))


_SWITCH = _or_null(Kind("true, false", lambda value: isinstance(value, bool)))
_TEXT = Kind("text", lambda value: isinstance(value, str))
_OBJECT = _or_null(Kind("an object", lambda value: isinstance(value, Mapping)))
_WIDTH, _LENGTH = _count(_MAX_WIDTH), _count(_MAX_LENGTH)
_POSITIVE = _number(_TINY, _HUGE)
_NOT_NEGATIVE = Kind("0 or a positive integer", lambda value: _is_integer(value, 0, _MAX_LENGTH))
_TOKEN = Kind("a token id", lambda value: _is_integer(value, 0, _MAX_LENGTH))
# -1 is an old spelling of "none".
_PAD_TOKEN = _or_null(Kind("a token id, -1", lambda value: value == -1 or _TOKEN.holds(value)))
END_TOKENS = Kind(
    "a token id, a list of token ids or null",
    lambda value: (
        value is None or _TOKEN.holds(value) or _list_of(_TOKEN, "token ids").holds(value)
    ),
)
"""Of eos_token_id, in config.json and generation_config.json."""

FIELDS: Mapping[str, Kind] = {
    "vocab_size": _WIDTH,
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": _count(MAX_LAYERS),
    "num_attention_heads": _count(1 << 16),
    "num_key_value_heads": _or_null(_count(1 << 16)),
    "head_dim": _or_null(_count(1 << 16)),
    "max_position_embeddings": _LENGTH,
    "original_max_position_embeddings": _or_null(_LENGTH),
    "rms_norm_eps": _number(_TINY, 1.0),
    "rope_theta": _POSITIVE,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    "partial_rotary_factor": _or_null(_number(_TINY, 1.0)),
    "sliding_window": _or_null(_NOT_NEGATIVE),
    "attn_logit_softcapping": _or_null(_POSITIVE),
    "final_logit_softcapping": _or_null(_POSITIVE),
    "layer_types": _or_null(_list_of(_TEXT, "names")),
    "hidden_act": _or_null(_TEXT),
    "tie_word_embeddings": _SWITCH,
    "attention_bias": _SWITCH,
    "mlp_bias": _SWITCH,
    "use_sliding_window": _SWITCH,
    "use_bidirectional_attention": _SWITCH,
    "bos_token_id": _or_null(_TOKEN),
    "eos_token_id": END_TOKENS,
    "pad_token_id": _PAD_TOKEN,
    "dtype": _or_null(_TEXT),
    "torch_dtype": _or_null(_TEXT),
    "quantization_config": _OBJECT,
    "compression_config": _OBJECT,
}
_GEMMA_FIELDS = {
    "hidden_activation": _or_null(_TEXT),
    "query_pre_attn_scalar": _POSITIVE,
    "rope_local_base_freq": _POSITIVE,
    "sliding_window_pattern": _or_null(_count(MAX_LAYERS)),
    "_sliding_window_pattern": _or_null(_count(MAX_LAYERS)),
}
_QWEN_FIELDS = {"max_window_layers": _or_null(_NOT_NEGATIVE)}
FIELDS_OF: Mapping[str, Mapping[str, Kind]] = {
    "gemma2": _GEMMA_FIELDS,
    "gemma3_text": _GEMMA_FIELDS,
    "qwen2": _QWEN_FIELDS,
    "qwen3": _QWEN_FIELDS,
    "mixtral": {
        "num_local_experts": _count(MAX_EXPERTS),
        "num_experts_per_tok": _count(MAX_EXPERTS),
    },
    "qwen3_moe": {
        "num_experts": _or_null(_count(MAX_EXPERTS)),
        "num_local_experts": _or_null(_count(MAX_EXPERTS)),
        "num_experts_per_tok": _count(MAX_EXPERTS),
        "moe_intermediate_size": _WIDTH,
        "decoder_sparse_step": _count(MAX_LAYERS),
        "mlp_only_layers": _or_null(_list_of(_NOT_NEGATIVE, "layers")),
        "norm_topk_prob": _SWITCH,
    },
}
"""Fields of one family; they are not checked for others."""

_FACTORS = _list_of(_POSITIVE, "positive numbers")
ROPE_FIELDS: Mapping[str, Kind] = {
    "rope_type": _or_null(_TEXT),
    "type": _or_null(_TEXT),
    "rope_theta": _or_null(_POSITIVE),
    "partial_rotary_factor": _or_null(_number(_TINY, 1.0)),
    "factor": _or_null(_POSITIVE),
    "original_max_position_embeddings": _or_null(_LENGTH),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "attention_factor": _or_null(_POSITIVE),
    "beta_fast": _or_null(_POSITIVE),
    "beta_slow": _or_null(_POSITIVE),
    "mscale": _or_null(_number(-_HUGE, _HUGE)),
    "mscale_all_dim": _or_null(_number(-_HUGE, _HUGE)),
    "truncate": _SWITCH,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
    # Which change nothing for text.
    "finetuned": Kind("anything", lambda value: True),
    "mrope_section": Kind("anything", lambda value: True),
}
"""Options of rope_parameters and rope_scaling; any other is refused."""


def check_fields(values: Mapping[str, Any], fields: Mapping[str, Kind]) -> None:
    """Raises ValueError for the first of `values` that is not of the kind of its field."""
    for key, kind in fields.items():
        if key in values:
            value = values[key]
            require(kind.holds(value), f"{key} must be {kind.name}, got {reprlib.repr(value)}")
