"""Opens GGUF files as checkpoints: metadata -> ModelConfig, tensors under Hugging Face names.

Differences from Hugging Face, which are undone here:
- "llama" files hold the rows of q and k in the order of interleaved rotation:
      row 2j of a head = row j there,  row 2j + 1 = row j + head_dim / 2;
- Gemma files hold 1 + gamma for gamma;
- Llama 3.1's rope scaling is a tensor of divisors, rope_freqs.weight, rather than four numbers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jinfer.checkpoints.families import Path, config_from_hf, is_linear, placements
from jinfer.checkpoints.gguf.blocks import FORMATS, qtensor_of, read_blocks
from jinfer.checkpoints.gguf.ends import eos_token_ids
from jinfer.checkpoints.gguf.file import GGUFFile
from jinfer.config.model import ModelConfig
from jinfer.linear.qtensor import QTensor

ARCHITECTURES = {
    "llama": "llama",  # also Mistral; with experts, Mixtral
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
"""general.architecture -> Hugging Face's model_type."""

# Keys that change the maths in unsupported ways; no supported family writes them.
_REFUSED = (
    *("logit_scale", "residual_scale", "embedding_scale", "expert_shared_count"),
    *("attention.clamp_kqv", "attention.max_alibi_bias", "attention.temperature_length"),
    *("attention.output_scale", "router_logit_softcapping", "rope.scaling.yarn_log_multiplier"),
)
_NEUTRAL = {  # such keys that are accepted with a value that changes nothing
    "attention.causal": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
}

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class _Metadata:
    """Lookups under the architecture's prefix; errors name the file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.arch = str(file.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.arch}.{key}")
        if isinstance(value, float):  # float32 0.00001 reads as 9.99999974e-06
            return float(str(np.float32(value)))
        return default if value is None else value

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.file.path} lacks the metadata {self.arch}.{key}")
        return value

    def tokenizer(self, key: str) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}")


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Translates a file's metadata; raises as `hf_config`."""
    config = config_from_hf(hf_config(file), str(file.path))
    return dataclasses.replace(
        config,
        attention_bias=_has_bias(file, "attn_q") or _has_bias(file, "attn_qkv"),
        attention_out_bias=_has_bias(file, "attn_output"),
        mlp_bias=_has_bias(file, "ffn_down"),
    )


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """Returns a file's metadata as Hugging Face's config.json would spell it.

    Raises:
      ValueError: the architecture is unknown, or a key is missing or not supported.
    """
    meta = _Metadata(file)
    if meta.arch not in ARCHITECTURES:
        raise ValueError(
            f"unknown GGUF architecture {reprlib.repr(meta.arch)} in {file.path}; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    for key in _REFUSED:
        if meta.get(key):
            raise ValueError(
                f"{file.path} sets {meta.arch}.{key} to {meta.get(key)}, which is not supported"
            )
    for key, neutral in _NEUTRAL.items():
        if (value := meta.get(key, neutral[0])) not in neutral:
            raise ValueError(f"{file.path} sets {meta.arch}.{key} to {value}: not supported")
    num_heads = int(meta.require("attention.head_count"))
    hidden_size = int(meta.require("embedding_length"))
    head_dim = int(meta.get("attention.key_length", hidden_size // num_heads))
    if (value_dim := meta.get("attention.value_length", head_dim)) != head_dim:
        raise ValueError(
            f"{file.path}: {meta.arch}.attention.value_length is {value_dim} and "
            f"attention.key_length {head_dim}: different lengths are not supported"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight'")
    family = ARCHITECTURES[meta.arch]
    if family == "llama" and meta.get("expert_count"):
        family = "mixtral"
    hf: dict[str, Any] = {
        "model_type": family,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": _intermediate_size(meta),
        "num_hidden_layers": int(meta.require("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(meta.get("attention.head_count_kv", num_heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(meta.require("context_length")),
        "rms_norm_eps": meta.require("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": meta.tokenizer("bos_token_id"),
        "eos_token_id": list(eos_token_ids(file)),
        "pad_token_id": meta.tokenizer("padding_token_id"),
        **_windows(meta, family),
        **_experts(meta),
        **_rope(file, meta, family, head_dim),
    }
    if family in ("gemma2", "gemma3_text"):
        hf |= _gemma(meta, family, hf)
    if family == "llama":
        hf["attention_bias"] = _has_bias(file, "attn_q")
        hf["mlp_bias"] = _has_bias(file, "ffn_down")
    return hf


def _has_bias(file: GGUFFile, module: str) -> bool:
    return f"blk.0.{module}.bias" in file.tensors


def _intermediate_size(meta: _Metadata) -> int:
    width = meta.get("feed_forward_length")
    if width is None:  # missing in some files with experts in every layer
        width = meta.require("expert_feed_forward_length")
    return width


def _windows(meta: _Metadata, family: str) -> dict[str, Any]:
    window = meta.get("attention.sliding_window")
    if family == "gemma2" and window is None:
        window = 4096
    found: dict[str, Any] = {"sliding_window": int(window) if window else None}
    pattern = meta.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        found["layer_types"] = ["sliding_attention" if w else "full_attention" for w in pattern]
    elif pattern and family == "gemma3_text":
        found["sliding_window_pattern"] = int(pattern)
    return found


def _experts(meta: _Metadata) -> dict[str, Any]:
    count = meta.get("expert_count")
    if not count:
        return {}
    return {
        "num_experts": int(count),
        "num_local_experts": int(count),
        "num_experts_per_tok": int(meta.require("expert_used_count")),
        "moe_intermediate_size": int(
            meta.get("expert_feed_forward_length") or _intermediate_size(meta)
        ),
        "norm_topk_prob": bool(meta.get("expert_weights_norm", True)),
    }


def _gemma(meta: _Metadata, family: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    # The 27B models scale by model width a head; llama.cpp knows them by their depth too.
    is_27b = hf["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}[family]
    per_head = hf["hidden_size"] / hf["num_attention_heads"]
    scalar = per_head if is_27b else hf["head_dim"]
    if scale := meta.get("attention.scale"):
        scalar = scale**-2.0
    found: dict[str, Any] = {"query_pre_attn_scalar": scalar}
    for ours, theirs in (("attn", "attn_logit_softcapping"), ("final", "final_logit_softcapping")):
        if (cap := meta.get(f"{ours}_logit_softcapping")) is not None:
            found[theirs] = cap or None
    return found


def _rope(file: GGUFFile, meta: _Metadata, family: str, head_dim: int) -> dict[str, Any]:
    context = int(meta.require("context_length"))
    original = int(meta.get("rope.scaling.original_context_length", context))
    rotated = int(meta.get("rope.dimension_count", head_dim))
    factor = float(meta.get("rope.scaling.factor", meta.get("rope.scale_linear")) or 1.0)
    kind = meta.get("rope.scaling.type") or ("none" if factor == 1.0 else "linear")
    rope: dict[str, Any] = {
        "rope_type": "default" if kind == "none" else kind,
        "rope_theta": float(meta.get("rope.freq_base", 10000.0)),
    }
    if kind != "none":
        rope["factor"] = factor
    attention_factor = meta.get("rope.scaling.attn_factor")
    if kind == "yarn":
        rope["original_max_position_embeddings"] = original
        rope["beta_fast"] = meta.get("rope.scaling.yarn_beta_fast")
        rope["beta_slow"] = meta.get("rope.scaling.yarn_beta_slow")
        if attention_factor not in (None, 1.0):  # multiplied with yarn's own factor
            rope["attention_factor"] = float(attention_factor) * (1.0 + 0.1 * math.log(factor))
    if "rope_factors_long.weight" in file.tensors:
        short, long = (file.read(f"rope_factors_{part}.weight") for part in ("short", "long"))
        rope |= {
            "rope_type": "longrope",
            "factor": context / original,
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
            "original_max_position_embeddings": original,
            "attention_factor": attention_factor,
        }
    elif "rope_freqs.weight" in file.tensors:
        divisors = file.read("rope_freqs.weight")
        if divisors.shape != (rotated // 2,):
            raise ValueError(
                f"{file.path}: rope_freqs.weight has {divisors.size} numbers, not {rotated // 2}"
            )
        rope |= _frequency_divisors(divisors, rope["rope_theta"], rotated, original)
    if rotated != head_dim and family != "phi3":
        raise ValueError(
            f"{file.path}: {meta.arch}.rope.dimension_count is {rotated}, heads have {head_dim}: "
            f"{meta.arch} models rotate whole heads"
        )
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    if family == "phi3":  # its field outside the rope takes precedence
        return {"rope_parameters": rope, "original_max_position_embeddings": original}
    if family != "gemma3_text":
        return {"rope_parameters": rope}
    local = float(meta.get("rope.freq_base_swa", 10000.0))
    return {
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    }


def _frequency_divisors(
    divisors: np.ndarray, theta: float, rotated: int, context: int
) -> dict[str, Any]:
    """Returns the rope scaling that divides the frequencies by the given divisors.

    Llama 3.1's scaling if its numbers (8192 original positions, factors 1 and 4) give these
    divisors; otherwise longrope with these divisors at every length.
    """
    factor = float(divisors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    if np.allclose(1.0 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-4):
        return {
            "rope_type": "llama3",
            "factor": round(factor, 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "short_factor": divisors.tolist(),
        "long_factor": divisors.tolist(),
        "original_max_position_embeddings": context,
    }


class GGUFCheckpoint:
    """A GGUF file as a `Checkpoint`.

    Args:
      path: of the file.
      keeps_quantized: whether linears of the types in `gguf.blocks.FORMATS` are kept quantized.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: truncated, one of several parts, or of an unknown architecture, type or tensor.
    """

    def __init__(self, path: str | os.PathLike[str], *, keeps_quantized: bool = False) -> None:
        self._file = GGUFFile(path)
        self._keeps_quantized = keeps_quantized
        self.path = pathlib.Path(path)
        num_parts = int(self._file.metadata.get("split.count", 1))
        if num_parts > 1:
            raise ValueError(
                f"{path} is one of {num_parts} parts (split.count); merge them first: "
                f"llama-gguf-split --merge"
            )
        self.config = gguf_config(self._file)
        self.hf = hf_config(self._file)
        kinds = {tensor.type_name for tensor in self._file.tensors.values()}
        self.dtype = "float32" if kinds == {"F32"} else "bfloat16"
        self._stored: dict[str, str] = {}  # Hugging Face name -> ours
        for name in self._file.tensors:
            if name in _ROPE_TENSORS or name.endswith("attn_rot_embd.weight"):
                continue
            hf_name = self._hf_name(name)
            if hf_name is None:
                known = ", ".join(["token_embd", "output_norm", "output", *_IN_LAYER])
                raise ValueError(f"unknown tensor {name!r} in {path}; supported: {known}")
            try:
                placements(self.config, hf_name)
            except ValueError as error:
                raise ValueError(
                    f"{path} has a tensor {name!r}, but a {self.config.family} model of "
                    f"{self.config.num_layers} layers has no place for it"
                ) from error
            self._stored[hf_name] = name
        self.shapes: Mapping[str, tuple[int, ...]] = {
            hf_name: self._file.tensors[name].shape for hf_name, name in self._stored.items()
        }

    def _hf_name(self, name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        if module in _TOP:
            return f"{_TOP[module]}.{leaf}"
        match = _LAYER_TENSOR.fullmatch(name)
        if match is None or match[2] not in _IN_LAYER:
            return None
        inner = _IN_LAYER[match[2]]
        if match[2] == "ffn_norm" and self.config.post_norms:
            inner = "pre_feedforward_layernorm"
        if match[2] == "ffn_up" and self.config.family == "phi3":
            inner = "mlp.gate_up_proj"
        return f"model.layers.{match[1]}.{inner}.{match[3]}"

    def read(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        stored = self._stored[name]
        is_gamma = self.config.norm_plus_one and stored.endswith("norm.weight")
        tensor = self._file.read(stored, np.float32 if is_gamma else dtype)
        if is_gamma:
            tensor -= 1.0
        return self._in_halves(stored, tensor)

    def _in_halves(self, stored: str, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of a "llama" file's q and k in Hugging Face's order."""
        part = stored.split(".")[-2]
        if self.config.family not in ("llama", "mixtral") or part not in ("attn_q", "attn_k"):
            return rows
        # [heads, head_dim / 2, 2, ...] -> [heads, 2, head_dim / 2, ...]
        halves = rows.reshape(-1, self.config.head_dim // 2, 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)

    def read_quantized(self, name: str) -> QTensor | None:
        """Returns a linear of a block that is kept quantized, or None."""
        stored = self._stored[name]
        type_name = self._file.tensors[stored].type_name
        places = placements(self.config, name)
        is_kept = self._keeps_quantized and type_name in FORMATS
        if not is_kept or not all(is_linear(place.path) for place in places):
            return None
        parts = read_blocks(self._file.stored(stored), type_name)
        codes, scale = (self._in_halves(stored, part) for part in parts)
        return qtensor_of(codes, scale, type_name)

    def label(self, name: str) -> str:
        return self._stored[name]

    def spell(self, path: Path, expert: int = 0) -> str:
        prefix = f"blk.{path[1]}." if path[0] == "layers" else ""
        leaf = "bias" if path[-1] == "b" else "weight"
        for module in _IN_LAYER if prefix else _TOP:
            name = f"{prefix}{module}.{leaf}"
            try:
                places = placements(self.config, self._hf_name(name) or name)
            except ValueError:  # not a tensor of this family
                continue
            if any(place.path == path for place in places):
                return name
        return "/".join(map(str, path))
