"""Medusa heads: initialization, logits and guesses, loading and saving.

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
from jaxtyping import Array, Float, Int

from jinfer.checkpoints.files import writing
from jinfer.config.fields import one_line, require
from jinfer.config.model import ModelConfig
from jinfer.config.typing import Params
from jinfer.linear import ops
from jinfer.linear.weight import is_weight
from jinfer.models.model import Model
from jinfer.speculation.medusa_tree import Tree, check_tree

_CONFIG_FILE, _WEIGHTS_FILE = "medusa.json", "heads.safetensors"
_ROOT_EPS = 1e-6  # of the norm of a root's embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """The shape of a set of heads.

    Attributes:
      num_heads: tokens guessed beyond the model's own next one.
      hidden_size, vocab_size: the model's.
      shared_unembedding: the heads share the model's unembedding instead of a linear each: D * D
        instead of D * (D + V) weights per head, which suits small models with large vocabularies.
      draft_vocab_size: N, number of tokens that the heads can guess, V by default. Fewer make heads
        smaller and faster. The model verifies all guesses, so other tokens are merely never
        guessed. Zhao et al. 2025 (FR-Spec, arXiv:2502.14856).
      reads_root: the heads also read the embedding of the token sampled after the hidden state, the
        root of the tree. D * D more weights per head. Ankner et al. 2024 (Hydra, arXiv:2402.05109)
        feed a head all tokens before its own, so that it runs once per path; the root is the same
        for all paths.
    """

    num_heads: int
    hidden_size: int
    vocab_size: int
    shared_unembedding: bool
    draft_vocab_size: int | None = None
    reads_root: bool = False

    def __post_init__(self) -> None:
        require(self.num_heads > 0, f"num_heads must be positive, got {self.num_heads}")
        size = self.draft_vocab_size
        require(
            size is None or 0 < size <= self.vocab_size,
            f"draft_vocab_size must be 1 to the vocabulary's {self.vocab_size}, got {size}",
        )

    @property
    def num_guessable(self) -> int:
        """Number of tokens that a head can guess."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError, naming both shapes, unless the heads fit a model of this shape."""
        for name in ("hidden_size", "vocab_size"):
            ours, theirs = getattr(self, name), getattr(model, name)
            require(
                ours == theirs,
                f"these Medusa heads are made for {name}={ours}, the model ({model.family}) has "
                f"{name}={theirs}: train heads for this model",
            )


def init(
    config: MedusaConfig,
    model: Model,
    params: Params,
    draft_tokens: Int[np.ndarray, "N"] | None = None,
) -> dict[str, Array]:
    """Returns heads whose logits equal those of the model's own head.

    The residual block x + silu(x w + r u + b), with r the root's embedding if the heads read it,
    starts at zero; the linear starts as a copy of the model's.

    Args:
      config: shape of the heads.
      model, params: the model and its weights.
      draft_tokens: the token ids of the draft vocabulary, if `config` names its size.

    Returns:
      f32 w [K, D, D] and b [K, D]; u [K, D, D] if the heads read the root; head [K, D, N] unless
      they share the model's unembedding. With a draft vocabulary also tokens [N] i32 and, if they
      share the unembedding, one head [1, D, N] for all.
    """
    config.check(model.config)
    given = None if draft_tokens is None else len(draft_tokens)
    require(
        given == config.draft_vocab_size,
        f"draft_vocab_size is {config.draft_vocab_size}, and {given} draft_tokens are given",
    )
    k, d = config.num_heads, config.hidden_size
    heads = {"w": jnp.zeros((k, d, d), jnp.float32), "b": jnp.zeros((k, d), jnp.float32)}
    if config.reads_root:
        heads["u"] = jnp.zeros((k, d, d), jnp.float32)
    if config.shared_unembedding and draft_tokens is None:
        return heads
    w = params["embed"]["w"] if model.config.tie_word_embeddings else params["lm_head"]["w"]
    if is_weight(w):
        raise ValueError(
            "the model's head is quantized: train heads with shared_unembedding and without a "
            "draft vocabulary"
        )
    w = w.T if model.config.tie_word_embeddings else w
    if draft_tokens is not None:
        heads["tokens"] = jnp.asarray(draft_tokens, jnp.int32)
        w = w[:, heads["tokens"]]
    copies = 1 if config.shared_unembedding else k
    heads["head"] = jnp.tile(w[None].astype(jnp.float32), (copies, 1, 1))
    return heads


def split(
    config: MedusaConfig, heads: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns (trained arrays, fixed arrays) of heads."""
    trained = ("w", "b", "u") if config.shared_unembedding else ("w", "b", "u", "head")
    return (
        {name: x for name, x in heads.items() if name in trained},
        {name: x for name, x in heads.items() if name not in trained},
    )


def num_guessable(model: Model, heads: Mapping[str, Array]) -> int:
    """Returns N, the number of tokens that each head can guess."""
    return heads["tokens"].shape[0] if "tokens" in heads else model.config.vocab_size


def head_logits(
    model: Model,
    params: Params,
    heads: Mapping[str, Array],
    k: int,
    hidden: Float[Array, "*B D"],
    roots: Int[Array, "*B"],
) -> Float[Array, "*B N"]:
    """Returns head k's f32 logits for the token k + 2 positions after each hidden state's own.

    They cover the draft vocabulary `heads["tokens"]` if there is one, else all tokens.

    Args:
      model: static.
      params: the model's weights.
      heads: see `init`.
      k: 0 .. K - 1.
      hidden: after the final norm.
      roots: the token sampled after each; only heads with `u` read it.
    """
    with jax.named_scope(f"medusa{k}"):
        x = hidden.astype(jnp.float32)
        inner = ops.linear(x, heads["w"][k], heads["b"][k])
        if "u" in heads:
            root = model.embed(params, roots).astype(jnp.float32)
            one = jnp.ones(root.shape[-1:], jnp.float32)
            inner = inner + ops.linear(ops.rms_norm(root, one, _ROOT_EPS), heads["u"][k])
        x = x + jax.nn.silu(inner)
        if "head" not in heads:
            return model.unembed(params, x.astype(hidden.dtype))
        own = heads["head"][min(k, heads["head"].shape[0] - 1)]
        return ops.soft_cap(ops.head(x, own, is_tied=False), model.config.final_soft_cap)


def guess(
    model: Model,
    params: Params,
    heads: Mapping[str, Array],
    hidden: Float[Array, "S D"],
    roots: Int[Array, "S"],
    *,
    num_ranks: int,
) -> Int[Array, "S K R"]:
    """Returns the token ids that each head finds likeliest, best first; see `head_logits`."""
    ranked = [
        jax.lax.top_k(head_logits(model, params, heads, k, hidden, roots), num_ranks)[1]
        for k in range(heads["w"].shape[0])
    ]
    guesses = jnp.stack(ranked, axis=1)
    return heads["tokens"][guesses] if "tokens" in heads else guesses


def save(
    path: str | os.PathLike[str],
    config: MedusaConfig,
    heads: Mapping[str, Array],
    *,
    rank_accuracies: Sequence[Sequence[float]],
    tree: Tree,
) -> None:
    """Writes the folder that `load` reads: weights, shape, measured accuracies and the tree."""
    from safetensors.numpy import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(leaf) for name, leaf in heads.items()}
    with writing(folder / _WEIGHTS_FILE, left="no whole file is left"):
        save_file(arrays, folder / _WEIGHTS_FILE)
    described = {
        **dataclasses.asdict(config),
        "rank_accuracies": [[float(x) for x in row] for row in rank_accuracies],
        "tree": [list(node) for node in tree],
    }
    with writing(folder / _CONFIG_FILE, left="no whole file is left"):
        (folder / _CONFIG_FILE).write_text(json.dumps(described, indent=1) + "\n")


def load(
    path: str | os.PathLike[str], model: ModelConfig
) -> tuple[MedusaConfig, dict[str, Array], Tree]:
    """Reads the heads of `save`, for a model of the given shape.

    Raises:
      FileNotFoundError: there are no heads.
      ValueError: they are made for another model, the tree has more levels than there are heads, or
        the weights do not have the described shapes.
    """
    from safetensors.numpy import load_file

    folder = Path(path)
    if not (folder / _CONFIG_FILE).is_file():
        raise FileNotFoundError(
            one_line(f"no {_CONFIG_FILE} in heads {folder}: make it with jinfer train-medusa")
        )
    described: dict[str, Any] = json.loads((folder / _CONFIG_FILE).read_text())
    names = [field.name for field in dataclasses.fields(MedusaConfig)]
    config = MedusaConfig(**{name: described[name] for name in names if name in described})
    config.check(model)
    tree = tuple(tuple(node) for node in described["tree"])
    check_tree(tree, num_heads=config.num_heads)
    arrays = load_file(folder / _WEIGHTS_FILE)
    got, wanted = {name: x.shape for name, x in arrays.items()}, _shapes(config)
    require(got == wanted, f"{folder / _WEIGHTS_FILE} should have the arrays {wanted}, has {got}")
    if "tokens" in arrays:
        ids = arrays["tokens"]
        require(
            bool((ids >= 0).all() and (ids < config.vocab_size).all()),
            f"{folder / _WEIGHTS_FILE}: its draft vocabulary has ids {ids.min()} to {ids.max()}, "
            f"expected ids of the model, 0 to {config.vocab_size - 1}",
        )
    return config, {name: jnp.asarray(x) for name, x in arrays.items()}, tree


def _shapes(config: MedusaConfig) -> dict[str, tuple[int, ...]]:
    k, d = config.num_heads, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"w": (k, d, d), "b": (k, d)}
    if config.reads_root:
        shapes["u"] = (k, d, d)
    if config.draft_vocab_size is not None:
        shapes["tokens"] = (config.draft_vocab_size,)
    if config.draft_vocab_size is not None or not config.shared_unembedding:
        shapes["head"] = (1 if config.shared_unembedding else k, d, config.num_guessable)
    return shapes
