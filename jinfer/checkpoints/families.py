"""Maps Hugging Face checkpoints: config.json -> ModelConfig, tensor names <-> paths of params.

A loader maps one tensor after the other, so that only one is in memory:

    config = config_from_hf(json.load(open("config.json")))
    missing = dict(expected_shapes(config))      # {("layers", 0, "attn", "q", "w"): (D, N*H), ...}
    for name in checkpoint:                      # any order, any sharding
        for place in placements(config, name):   # () for a tensor that is known and not needed
            piece = place.take(tensor)           # numpy view: rows cut, [O, I] -> [I, O]
            if place.expert is None:
                flat[place.path] = piece
            else:                                # one row of the [E, ...] stack of experts
                flat[place.path][place.expert] = piece
    params = unflatten(flat, config)

`tensor_names` and `assemble` are the inverse, for export. Unknown architectures and unknown tensors
raise. Readers of other formats (GGUF, GPTQ, ...) translate tensor names to Hugging Face's first.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.tree_util import SequenceKey

from jinfer.checkpoints.hf_config import SUPPORTED as SUPPORTED
from jinfer.checkpoints.hf_config import config_from_hf as config_from_hf
from jinfer.config.model import ModelConfig
from jinfer.models.model import Model

Path: TypeAlias = tuple[str | int, ...]
"""Keys into the params tree, e.g. ("layers", 3, "attn", "q", "w")."""

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Target of a checkpoint tensor or of a part of it.

    Attributes:
      path: the parameter.
      rows: (start, stop) along the checkpoint tensor's output axis (the last but one of a matrix,
        the only one of a vector), or None for all: how fused projections are split.
      transpose: whether [..., O, I] becomes [..., I, O].
      expert: index in the parameter's leading expert axis that this piece fills; None: the whole
        parameter.
    """

    path: Path
    rows: tuple[int, int] | None = None
    transpose: bool = False
    expert: int | None = None

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the piece of a checkpoint tensor that belongs at `path`, as a view."""
        if self.rows is not None:
            cut = slice(*self.rows)
            tensor = tensor[..., cut, :] if tensor.ndim > 1 else tensor[cut]
        return tensor.swapaxes(-1, -2) if self.transpose else tensor


@functools.lru_cache(maxsize=8)
def expected_shapes(config: ModelConfig) -> Mapping[Path, tuple[int, ...]]:
    """Returns every parameter of the model with its shape; layers as a tuple."""
    leaves, _ = jax.tree.flatten_with_path(Model(config).abstract_params())
    return {
        tuple(key.idx if isinstance(key, SequenceKey) else key.key for key in path): leaf.shape
        for path, leaf in leaves
    }


def is_linear(path: Path) -> bool:
    """Whether a parameter is the weight of a linear of a block, without routers."""
    return path[0] == "layers" and path[-1] == "w" and path[-2] in LINEARS


_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")  # of multimodal Gemma 3
_LAYER = re.compile(r"layers\.(\d{1,9})\.(.+)")
_EXPERT = re.compile(r"experts\.(\d{1,9})\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_EXPERT_PARTS = {"w1": "gate", "w3": "up", "w2": "down"}


def placements(config: ModelConfig, name: str) -> tuple[Placement, ...]:
    """Returns the targets of checkpoint tensor `name`: several if it is fused, none if not needed.

    Accepts every spelling that Hugging Face has used: prefixes `model.`, `language_model.model.`,
    `model.language_model.` or none; experts one by one (`experts.3.w1.weight`,
    `experts.3.gate_proj.weight`) or stacked as transformers 5 holds them in memory
    (`experts.gate_up_proj` [E, 2F, D], also `experts.gate_proj`, `.up_proj`, `.down_proj`).
    Not needed: the head of a tied model, stored rotary frequencies, Gemma 3's vision parts.

    Raises:
      ValueError: the model has no place for a tensor of that name.
    """
    if name.endswith("rotary_emb.inv_freq") or (
        config.family == "gemma3_text" and _NOT_TEXT.match(name)
    ):
        return ()
    short = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
    if short == "lm_head.weight" and config.tie_word_embeddings:
        return ()
    found = _top_level(short)
    if (match := _LAYER.fullmatch(short)) is not None:
        layer = int(match[1])
        found = tuple(
            dataclasses.replace(place, path=("layers", layer, *place.path))
            for place in _in_layer(config, match[2], is_moe=config.is_moe_layer(layer))
        )
    shapes = expected_shapes(config)
    if not found or any(place.path not in shapes for place in found):
        raise ValueError(
            f"there is a tensor {name!r} which a {config.family} model of this config "
            f"({config.num_layers} layers) has no place for; its tensors are spelled like "
            f"{', '.join(_layer_names(config, 0))}, model.embed_tokens.weight, model.norm.weight"
        )
    return found


def _top_level(name: str) -> tuple[Placement, ...]:
    if name == "embed_tokens.weight":
        return (Placement(("embed", "w")),)
    if name == "norm.weight":
        return (Placement(("final_norm", "scale")),)
    if name == "lm_head.weight":
        return (Placement(("lm_head", "w"), transpose=True),)
    return ()


def _in_layer(config: ModelConfig, name: str, *, is_moe: bool) -> tuple[Placement, ...]:
    """Returns the targets of a tensor by its name within a layer, as paths within the layer."""
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    if config.post_norms:  # Gemma means another place by the second name
        norms |= {
            "post_attention_layernorm": "attn_post_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and module in norms:
        return (Placement((norms[module], "scale")),)

    part, _, rest = name.partition(".")
    if part == "self_attn":
        return _in_attention(config, rest)
    if part in ("mlp", "block_sparse_moe"):
        return _in_experts(config, rest) if is_moe else _gated(rest, config.intermediate_size)
    return ()


def _in_attention(config: ModelConfig, name: str) -> tuple[Placement, ...]:
    module, _, leaf = name.rpartition(".")
    if module in ("q_norm", "k_norm") and leaf == "weight":
        return (Placement(("attn", module, "scale")),)
    if leaf not in ("weight", "bias"):
        return ()
    key = "w" if leaf == "weight" else "b"
    transpose = leaf == "weight"
    if module in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return (Placement(("attn", module[0], key), transpose=transpose),)
    if module == "qkv_proj":
        q = config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        cuts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
        return tuple(
            Placement(("attn", part, key), rows=rows, transpose=transpose)
            for part, rows in cuts.items()
        )
    return ()


def _in_experts(config: ModelConfig, name: str) -> tuple[Placement, ...]:
    if name == "gate.weight":
        return (Placement(("mlp", "router", "w"), transpose=True),)
    if (match := _EXPERT.fullmatch(name)) is not None:
        expert = int(match[1])
        part = _EXPERT_PARTS.get(match[2]) or match[2].removesuffix("_proj")
        if expert >= config.num_experts:
            return ()
        return (Placement(("mlp", part, "w"), transpose=True, expert=expert),)
    if name.startswith("experts."):  # stacked, with ".weight" or without
        name = name.removeprefix("experts.").removesuffix(".weight") + ".weight"
        return _gated(name, config.expert_intermediate_size)
    return ()


def _gated(name: str, width: int) -> tuple[Placement, ...]:
    """Returns the targets of the three projections of an MLP of hidden width `width`."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return ()
    key = "w" if leaf == "weight" else "b"
    transpose = leaf == "weight"
    if module in ("gate_proj", "up_proj", "down_proj"):
        return (Placement(("mlp", module.removesuffix("_proj"), key), transpose=transpose),)
    if module == "gate_up_proj":
        return (
            Placement(("mlp", "gate", key), rows=(0, width), transpose=transpose),
            Placement(("mlp", "up", key), rows=(width, 2 * width), transpose=transpose),
        )
    return ()


def _layer_names(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """Returns the names of a layer's tensors as the family's published checkpoints spell them."""
    fused = config.family == "phi3"
    linears: list[tuple[str, bool]] = []  # module, has bias
    if fused:
        linears.append(("self_attn.qkv_proj", config.attention_bias))
    else:
        linears += [(f"self_attn.{part}_proj", config.attention_bias) for part in "qkv"]
    linears.append(("self_attn.o_proj", config.attention_out_bias))
    if config.is_moe_layer(layer):
        is_mixtral = config.family == "mixtral"
        block = "block_sparse_moe" if is_mixtral else "mlp"
        parts = ("w1", "w2", "w3") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        linears.append((f"{block}.gate", False))
        linears += [
            (f"{block}.experts.{expert}.{part}", False)
            for expert in range(config.num_experts)
            for part in parts
        ]
    else:
        parts = ("gate_up_proj", "down_proj") if fused else ("gate_proj", "up_proj", "down_proj")
        linears += [(f"mlp.{part}", config.mlp_bias) for part in parts]
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if config.qk_norm:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    names = [f"{module}.weight" for module in norms]
    for module, has_bias in linears:
        names += [f"{module}.weight"] + [f"{module}.bias"] * has_bias
    return tuple(f"model.layers.{layer}.{name}" for name in names)


@functools.lru_cache(maxsize=8)
def tensor_names(config: ModelConfig) -> tuple[str, ...]:
    """Returns the names of a published checkpoint's tensors, as a writer writes them.

    They cover each parameter exactly once; `placements` maps them.
    """
    names = ["model.embed_tokens.weight"]
    for layer in range(config.num_layers):
        names += _layer_names(config, layer)
    names.append("model.norm.weight")
    if not config.tie_word_embeddings:
        names.append("lm_head.weight")
    return tuple(names)


@functools.lru_cache(maxsize=8)
def _names_by_path(config: ModelConfig) -> Mapping[Path, tuple[str, ...]]:
    by_path: dict[Path, tuple[str, ...]] = {}
    for name in tensor_names(config):
        for place in placements(config, name):
            by_path[place.path] = (*by_path.get(place.path, ()), name)
    return by_path


def names_of(config: ModelConfig, path: Path) -> tuple[str, ...]:
    """Returns the checkpoint tensors that fill the parameter at `path`: several for experts."""
    return _names_by_path(config)[path]


def assemble(config: ModelConfig, name: str, get: Callable[[Path], np.ndarray]) -> np.ndarray:
    """Returns the checkpoint tensor `name` from parameters; the inverse of `placements` and `take`.

    Args:
      config: the model.
      name: one of `tensor_names(config)`.
      get: returns the parameter at a path, [I, O] or [E, I, O], as numpy.
    """
    pieces: list[np.ndarray] = []
    for place in placements(config, name):
        piece = get(place.path)
        if place.expert is not None:
            piece = piece[place.expert]
        pieces.append(piece.swapaxes(-1, -2) if place.transpose else piece)
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces, axis=-2 if pieces[0].ndim > 1 else 0)


def unflatten(flat: Mapping[Path, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns the params tree for {path: leaf}; layers as a tuple."""
    tree: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    for path, leaf in flat.items():
        keys = path
        node = tree
        if path[0] == "layers":
            node, keys = layers[int(path[1])], path[2:]
        for key in keys[:-1]:
            node = node.setdefault(str(key), {})
        node[str(keys[-1])] = leaf
    tree["layers"] = tuple(layers)
    return tree
