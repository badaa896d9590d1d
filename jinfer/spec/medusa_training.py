"""What Medusa heads learn, the backbone frozen, and how often they are right; see `training`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jinfer.models.model import Model
from jinfer.spec import medusa
from jinfer.spec.training import hidden_states
from jinfer.typing import Params


def _targets(tokens: Array, spans: Array, k: int) -> tuple[Array, Array]:
    """Returns what head k should say at each place, and whether there is such a token, [B, T]."""
    places = jnp.arange(tokens.shape[1])[None] + k + 2
    is_there = (places >= spans[:, :1]) & (places < spans[:, 1:])
    return jnp.roll(tokens, -(k + 2), axis=1), is_there


def losses(
    model: Model,
    params: Params,
    heads: dict[str, Array],
    tokens: Int[Array, "B T"],
    spans: Int[Array, "B 2"],
) -> Float[Array, "K"]:
    """Returns each head's mean cross entropy over the places that have a target, in nats."""
    hidden = jax.lax.stop_gradient(hidden_states(model, params, tokens))

    def loss(k: int) -> Array:
        targets, is_there = _targets(tokens, spans, k)

        @jax.checkpoint  # the logits, by far the largest array, are computed twice, not kept
        def total(heads: dict[str, Array]) -> Array:
            logits = medusa.head_logits(model, params, heads, k, hidden)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return jnp.sum(jnp.where(is_there, each, 0.0))

        return total(heads) / jnp.maximum(jnp.sum(is_there, dtype=jnp.float32), 1.0)

    return jnp.stack([loss(k) for k in range(heads["w"].shape[0])])


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """The heads' losses, the nearer token's counting more; a `training.Objective`."""

    model: Model
    decay: float = 0.8

    def __call__(
        self,
        params: Params,
        weights: dict[str, Array],
        tokens: Int[Array, "B T"],
        spans: Int[Array, "B 2"],
    ) -> tuple[Float[Array, ""], Float[Array, "K"]]:
        """Returns their sum with weights decay ** k, and each."""
        each = losses(self.model, params, weights, tokens, spans)
        return jnp.sum(each * self.decay ** jnp.arange(each.shape[0], dtype=jnp.float32)), each


@functools.partial(jax.jit, static_argnames=("model", "num_ranks"))
def count_ranks(
    model: Model,
    params: Params,
    heads: dict[str, Array],
    tokens: Int[Array, "B T"],
    spans: Int[Array, "B 2"],
    *,
    num_ranks: int,
) -> tuple[Int[Array, "K R"], Int[Array, "K"]]:
    """Counts how often the guess of each rank of each head is right, and the places looked at."""
    hidden = hidden_states(model, params, tokens)
    hits, places = [], []
    for k in range(heads["w"].shape[0]):
        targets, is_there = _targets(tokens, spans, k)
        logits = medusa.head_logits(model, params, heads, k, hidden)
        _, guesses = jax.lax.top_k(logits, num_ranks)
        is_hit = (guesses == targets[:, :, None]) & is_there[:, :, None]
        hits.append(jnp.sum(is_hit, axis=(0, 1), dtype=jnp.int32))
        places.append(jnp.sum(is_there, dtype=jnp.int32))
    return jnp.stack(hits), jnp.stack(places)


def rank_accuracies(
    model: Model,
    params: Params,
    heads: dict[str, Array],
    tokens: Int[np.ndarray, "N T"],
    spans: Int[np.ndarray, "N 2"],
    *,
    num_ranks: int = 10,
    batch_size: int = 8,
) -> Float[np.ndarray, "K R"]:
    """Returns how often the guess of rank r of head k is the text's token; top-k is a row's sum."""
    hits, places = 0, 0
    num_ranks = min(num_ranks, model.config.vocab_size)
    for begin in range(0, len(tokens), batch_size):
        rows = np.arange(begin, begin + batch_size)
        part: Any = np.take(tokens, rows, axis=0, mode="clip")
        part_spans: Any = np.take(spans, rows, axis=0, mode="clip")
        part_spans[rows >= len(tokens)] = 0
        found = count_ranks(model, params, heads, part, part_spans, num_ranks=num_ranks)
        hits, places = hits + np.asarray(found[0]), places + np.asarray(found[1])
    return hits / np.maximum(places, 1)[:, None]
