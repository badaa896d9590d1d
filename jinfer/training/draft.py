"""Initialization, training objective and evaluation of draft models with few layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jinfer.config.fields import require
from jinfer.config.model import ModelConfig
from jinfer.config.typing import Params
from jinfer.models.model import Model
from jinfer.training.loop import hidden_states


def init(params: Params, config: ModelConfig) -> dict[str, Any]:
    """Returns the initial weights: evenly spaced layers of the target, and its last norm.

    In f32, since most steps change a weight by less than the resolution of 16 bits.

    Args:
      params: the target's weights; layers as a tuple.
      config: config of the draft model, which shares the target's embeddings and output layer.

    Raises:
      ValueError: it does not have fewer layers than the target, or other kinds of layers.
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
        f"layers {picked} of the model are not of the kinds that its draft would have",
    )
    return jax.tree.map(lambda x: x.astype(jnp.float32), weights)


def most_places(spans: Int[np.ndarray, "N 2"]) -> int:
    """Returns the largest number of positions in a window after which drafts are made.

    They go from the one before the first token to learn to the window's end.
    """
    return int((spans[:, 1] - np.maximum(spans[:, 0] - 1, 0)).max())


def _places(spans: Array, most: int) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """Returns the positions after which drafts are made, padded, and a mask of the real ones."""
    places = jnp.maximum(spans[:, :1] - 1, 0) + jnp.arange(most, dtype=jnp.int32)[None]
    is_there = places < spans[:, 1:]
    return jnp.where(is_there, places, 0), is_there


def _log_probs(model: Model, params: Params, tokens: Array, places: Array) -> Array:
    """Returns log probabilities [B, M, V] at `places` only: they are by far the largest arrays."""
    hidden = hidden_states(model, params, tokens)
    there = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    return jax.nn.log_softmax(model.unembed(params, there), axis=-1)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """KL(target || draft) at each position; a `training.Objective`.

    Attributes:
      target, draft: the models.
      most: see `most_places`.
    """

    target: Model
    draft: Model
    most: int

    def __call__(
        self, params: Params, weights: Any, tokens: Int[Array, "B T"], spans: Int[Array, "B 2"]
    ) -> tuple[Float[Array, ""], Float[Array, "1"]]:
        """Returns the mean over all tokens to learn, in nats: as the loss and for display."""
        places, is_there = _places(spans, self.most)
        log_p = _log_probs(self.target, params, tokens, places)

        @jax.checkpoint  # recomputes the logits instead of storing them
        def divergence(weights: Any) -> Array:
            log_q = _log_probs(self.draft, {**params, **weights}, tokens, places)
            each = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
            return jnp.sum(jnp.where(is_there, each, 0.0))

        loss = divergence(weights) / jnp.maximum(jnp.sum(is_there, dtype=jnp.float32), 1.0)
        return loss, loss[None]


@functools.partial(jax.jit, static_argnames=("target", "draft", "most"))
def _count(
    target: Model,
    draft: Model,
    params: Params,
    weights: Any,
    tokens: Array,
    spans: Array,
    *,
    most: int,
) -> Float[Array, "3"]:
    places, is_there = _places(spans, most)
    p = jnp.exp(_log_probs(target, params, tokens, places))
    q = jnp.exp(_log_probs(draft, {**params, **weights}, tokens, places))
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
    """Returns how often a draft after the text's own tokens would be accepted.

    Greedy: the share of positions where both models' most likely tokens are equal. Sampled at
    temperature 1: the mean of sum min(p, q), the acceptance probability of rejection sampling.
    """
    totals, most = np.zeros(3), most_places(spans)
    for begin in range(0, len(tokens), batch_size):
        rows = np.arange(begin, begin + batch_size)
        part: Any = np.take(tokens, rows, axis=0, mode="clip")
        part_spans: Any = np.take(spans, rows, axis=0, mode="clip")
        part_spans[rows >= len(tokens)] = 0
        totals += np.asarray(_count(target, draft, params, weights, part, part_spans, most=most))
    return float(totals[0] / totals[2]), float(totals[1] / totals[2])
