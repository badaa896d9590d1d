"""What a draft model of few layers learns of its target, and how often it would be right."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jinfer.config import ModelConfig, require
from jinfer.models.model import Model
from jinfer.typing import Params


def init(params: Params, config: ModelConfig) -> dict[str, Any]:
    """Returns what is trained: layers of the target, evenly spread, as they are, and its last norm.

    Args:
      params: the target's; layers as a tuple.
      config: of the draft model, which has fewer layers. Embeddings and head are the target's own.

    Raises:
      ValueError: it has not fewer, or layers of another make.
    """
    layers, num_layers = params["layers"], config.num_layers
    require(
        0 < num_layers < len(layers),
        f"a draft model of {num_layers} layers for one of {len(layers)}: give 1 to "
        f"{len(layers) - 1}",
    )
    picked = np.linspace(0, len(layers) - 1, num_layers).round().astype(int).tolist()
    weights = {"layers": tuple(layers[i] for i in picked), "final_norm": params["final_norm"]}
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    got = jax.tree.map(jnp.shape, weights["layers"])
    require(
        got == jax.tree.map(jnp.shape, shapes["layers"]),
        f"layers {picked} of the model are not of the make that its draft would have",
    )
    return weights


def _is_there(tokens: Array, spans: Array) -> Bool[Array, "B T"]:
    """Whether a draft is made after a place: from the one before the first token to learn."""
    places = jnp.arange(tokens.shape[1])[None]
    return (places + 1 >= spans[:, :1]) & (places < spans[:, 1:])


@dataclasses.dataclass(frozen=True)
class Distillation:
    """KL(target || draft) at each place; a `training.Objective`."""

    target: Model
    draft: Model

    def __call__(
        self, params: Params, weights: Any, tokens: Int[Array, "B T"], spans: Int[Array, "B 2"]
    ) -> tuple[Float[Array, ""], Float[Array, "1"]]:
        """Returns its mean over what all texts have to learn, in nats, twice."""
        is_there = _is_there(tokens, spans)
        log_p = jax.nn.log_softmax(self.target.logits(params, tokens), axis=-1)

        @jax.checkpoint  # the logits, by far the largest array, are computed twice, not kept
        def divergence(weights: Any) -> Array:
            log_q = jax.nn.log_softmax(self.draft.logits({**params, **weights}, tokens), axis=-1)
            each = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
            return jnp.sum(jnp.where(is_there, each, 0.0))

        loss = divergence(weights) / jnp.maximum(jnp.sum(is_there, dtype=jnp.float32), 1.0)
        return loss, loss[None]


@functools.partial(jax.jit, static_argnames=("target", "draft"))
def _count(
    target: Model, draft: Model, params: Params, weights: Any, tokens: Array, spans: Array
) -> Float[Array, "3"]:
    is_there = _is_there(tokens, spans)
    p = jax.nn.softmax(target.logits(params, tokens), axis=-1)
    q = jax.nn.softmax(draft.logits({**params, **weights}, tokens), axis=-1)
    is_same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    overlap = jnp.sum(jnp.minimum(p, q), axis=-1)
    each = jnp.stack([x.astype(jnp.float32) for x in (is_same, overlap, is_there)])
    return jnp.sum(jnp.where(is_there[None], each, 0.0), axis=(1, 2))


def agreement(
    target: Model,
    draft: Model,
    params: Params,
    weights: Any,
    tokens: Int[np.ndarray, "N T"],
    spans: Int[np.ndarray, "N 2"],
    *,
    batch_size: int = 8,
) -> tuple[float, float]:
    """Returns how often a draft after a text's own tokens would stand.

    Greedy: the share of places where both models' likeliest tokens are the same. Sampled at
    temperature 1: the mean of sum min(p, q), which rejection sampling accepts.
    """
    totals = np.zeros(3)
    for begin in range(0, len(tokens), batch_size):
        rows = np.arange(begin, begin + batch_size)
        part: Any = np.take(tokens, rows, axis=0, mode="clip")
        part_spans: Any = np.take(spans, rows, axis=0, mode="clip")
        part_spans[rows >= len(tokens)] = 0
        totals += np.asarray(_count(target, draft, params, weights, part, part_spans))
    return float(totals[0] / totals[2]), float(totals[1] / totals[2])
