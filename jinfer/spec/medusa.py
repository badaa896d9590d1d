"""Medusa heads: what each makes of a hidden state, how they start, where they lie on disk.

From the hidden state of the token at position t, head k (from 0) guesses the token at t + 2 + k;
the model's own head gives t + 1. Cai et al. 2024 (arXiv:2401.10774).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jinfer import ops
from jinfer.config import ModelConfig, require
from jinfer.models.model import Model
from jinfer.qtensor import QTensor
from jinfer.spec.medusa_tree import Tree, check_tree
from jinfer.typing import Params

_CONFIG_FILE, _WEIGHTS_FILE = "medusa.json", "heads.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """The shape of a set of heads.

    Attributes:
      num_heads: tokens guessed beyond the model's own next one.
      hidden_size, vocab_size: the model's.
      shared_unembedding: the heads have the model's unembedding instead of a linear each: D * D
        instead of D * (D + V) weights a head, which suits small models with large vocabularies.
    """

    num_heads: int
    hidden_size: int
    vocab_size: int
    shared_unembedding: bool

    def __post_init__(self) -> None:
        require(self.num_heads > 0, f"num_heads must be positive, got {self.num_heads}")

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError, naming both, unless the heads are made for a model of this shape."""
        for name in ("hidden_size", "vocab_size"):
            ours, theirs = getattr(self, name), getattr(model, name)
            require(
                ours == theirs,
                f"these Medusa heads are made for {name}={ours}, the model ({model.family}) has "
                f"{name}={theirs}: train heads for this model",
            )


def init(config: MedusaConfig, model: Model, params: Params) -> dict[str, Array]:
    """Returns heads that all say what the model's own head says.

    The residual block x + silu(x w + b) starts at zero, the linear as a copy of the model's.

    Returns:
      w [K, D, D], b [K, D], and unless shared head [K, D, V], f32.
    """
    config.check(model.config)
    k, d = config.num_heads, config.hidden_size
    heads = {"w": jnp.zeros((k, d, d), jnp.float32), "b": jnp.zeros((k, d), jnp.float32)}
    if not config.shared_unembedding:
        is_tied = model.config.tie_word_embeddings
        w = params["embed"]["w"] if is_tied else params["lm_head"]["w"]
        if isinstance(w, QTensor):
            raise ValueError("the model's head is quantized: train heads with shared_unembedding")
        w = (w.T if is_tied else w).astype(jnp.float32)
        heads["head"] = jnp.tile(w[None], (k, 1, 1))
    return heads


def head_logits(
    model: Model, params: Params, heads: Mapping[str, Array], k: int, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Returns head k's f32 logits for the token k + 2 places after each hidden state's own.

    Args:
      model: static.
      params: the model's weights.
      heads: see `init`.
      k: 0 .. K - 1.
      hidden: after the final norm.
    """
    with jax.named_scope(f"medusa{k}"):
        x = hidden.astype(jnp.float32)
        x = x + jax.nn.silu(ops.linear(x, heads["w"][k], heads["b"][k]))
        if "head" not in heads:
            return model.unembed(params, x.astype(hidden.dtype))
        return ops.soft_cap(
            ops.head(x, heads["head"][k], is_tied=False), model.config.final_soft_cap
        )


def save(
    path: str | os.PathLike[str],
    config: MedusaConfig,
    heads: Mapping[str, Array],
    *,
    rank_accuracies: Sequence[Sequence[float]],
    tree: Tree,
) -> None:
    """Writes a folder that `load` reads: weights, shape, measured accuracies and the tree."""
    from safetensors.numpy import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(leaf) for name, leaf in heads.items()}, folder / _WEIGHTS_FILE)
    described = {
        **dataclasses.asdict(config),
        "rank_accuracies": [[float(x) for x in row] for row in rank_accuracies],
        "tree": [list(node) for node in tree],
    }
    (folder / _CONFIG_FILE).write_text(json.dumps(described, indent=1) + "\n")


def load(
    path: str | os.PathLike[str], model: ModelConfig
) -> tuple[MedusaConfig, dict[str, Array], Tree]:
    """Reads the heads of `save`, for a model of the given shape.

    Raises:
      FileNotFoundError: there are no heads.
      ValueError: they are made for another model, or the tree is deeper than they are many.
    """
    from safetensors.numpy import load_file

    folder = Path(path)
    if not (folder / _CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {_CONFIG_FILE}: make heads with jinfer train-medusa --output {folder}"
        )
    described: dict[str, Any] = json.loads((folder / _CONFIG_FILE).read_text())
    names = [field.name for field in dataclasses.fields(MedusaConfig)]
    config = MedusaConfig(**{name: described[name] for name in names})
    config.check(model)
    tree = tuple(tuple(node) for node in described["tree"])
    check_tree(tree, num_heads=config.num_heads)
    heads = {name: jnp.asarray(x) for name, x in load_file(folder / _WEIGHTS_FILE).items()}
    return config, heads, tree
