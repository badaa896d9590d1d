"""Reads the scales of a quantized KV cache in a checkpoint: names, scheme, and use by a pool.

`kv_cache_scheme` of the quantization_config describes them (compressed-tensors; AutoFP8 wrote
"static"). Files without it mean fp8 with one scale per layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jinfer.config.model import ModelConfig
from jinfer.config.static_kv import StaticKV

Scheme = Mapping[str, Any] | str

# Of the attention; of old of its projections, or one for both. Others quantize queries and weights
# of attention, or shift codes: they are known, and not used.
_NAME = re.compile(
    r"(?!.*(?:vision|audio)).*\blayers\.(?P<layer>\d+)\.self_attn\.(?:"
    r"(?:attn\.|qkv_proj\.|k_proj\.|v_proj\.)?(?P<kind>k|v|kv)_scale"
    r"|(?P<old>[kv])_proj\.output_scale"
    r"|(?P<other>(?:q|prob|prob_output)_scale|[qkv]_zero_point|q_proj\.output_scale))"
)


def kv_scale_of(name: str) -> tuple[int, str] | None:
    """Returns (layer, kind: "k", "v", "kv", ...) of a tensor of a quantized KV cache, or None."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return int(found["layer"]), found["kind"] or found["old"] or found["other"]


def scheme_of(stated: Mapping[str, Any] | None) -> Scheme | None:
    """Returns the `kv_cache_scheme` of a `quantization_config`, None if it has none.

    Raises:
      ValueError: it is neither an object nor a name.
    """
    scheme = (stated or {}).get("kv_cache_scheme") or None
    if scheme is not None and not isinstance(scheme, Mapping | str):
        raise ValueError(f"kv_cache_scheme must be an object or a name, got {scheme!r}")
    return dict(scheme) if isinstance(scheme, Mapping) else scheme


def scheme_for(scales: Iterable[Mapping[str, np.ndarray]]) -> Scheme:
    """Returns the scheme of scales that are stored without one: fp8."""
    is_tensor = all(np.size(scale) == 1 for kinds in scales for scale in kinds.values())
    return {
        **{"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False},
        **{"strategy": "tensor" if is_tensor else "attn_head"},
        **{"group_size": None, "block_structure": None, "actorder": None},
        **{"observer": "minmax", "observer_kwargs": {}},
    }


def static_kv(
    config: ModelConfig, scheme: Scheme | None, scales: Mapping[int, Mapping[str, np.ndarray]]
) -> tuple[StaticKV | None, str | None]:
    """Returns the scales for a pool, or why they cannot be used; (None, None) if there are none."""
    if scheme is None and not scales:
        return None, None
    dtype, reason = _format(scheme)
    others = sorted({kind for kinds in scales.values() for kind in kinds} - {"k", "v", "kv"})
    if reason is None and others:
        reason = f"they come with {', '.join(others)}, which is not supported"
    if reason is not None:
        return None, reason
    found: dict[str, list[tuple[float, ...]]] = {"k": [], "v": []}
    for layer in range(config.num_layers):
        for kind, rows in found.items():
            kinds = scales.get(layer, {})
            scale = kinds.get(kind, kinds.get("kv"))
            if scale is None:
                return None, f"there is none for {kind} of layer {layer}"
            if scale.size not in (1, config.num_kv_heads):
                return None, (
                    f"layer {layer} has {list(scale.shape)} for {kind}, expected one or "
                    f"{config.num_kv_heads} (KV heads)"
                )
            rows.append(tuple(float(x) for x in scale.astype(np.float32).reshape(-1)))
    k, v = (_alike(rows) for rows in found.values())
    return StaticKV(dtype=dtype, k=k, v=v, is_default=scheme is not None), None


def _format(scheme: Scheme | None) -> tuple[str, str | None]:
    """Returns the pool's format, or the reason why there is none for the scheme."""
    if not isinstance(scheme, Mapping):
        is_known = scheme in (None, "static")
        return "float8_e4m3fn", None if is_known else f"kv_cache_scheme is {scheme!r}"
    wanted = {
        "num_bits": (8,),
        "type": ("float", "int"),
        "symmetric": (True,),
        "dynamic": (False, None),
        "strategy": ("tensor", "attn_head", None),
    }
    values = {"type": "int", "symmetric": True, "num_bits": 8} | dict(scheme)
    for key, allowed in wanted.items():
        if values.get(key) not in allowed:
            return "", f"kv_cache_scheme has {key} {values.get(key)!r}"
    return {"float": "float8_e4m3fn", "int": "int8"}[values["type"]], None


def _alike(rows: list[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """Returns rows of one length; a scale of a whole layer is repeated for each head if needed."""
    longest = max(map(len, rows))
    return tuple(row if len(row) == longest else row * longest for row in rows)
