"""Training data, objective and evaluation of Medusa heads.

The backbone is constant, so its hidden states are computed once and stored. An example is the
hidden state of one token, the token after it, and the tokens that the heads should guess.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jinfer.config.typing import Params
from jinfer.models.model import Model
from jinfer.speculation import medusa
from jinfer.training.loop import hidden_states

NO_TARGET, MISSED = -1, -2
_ROUND_TO = 64  # tokens; limits the number of lengths that are compiled


class Examples(NamedTuple):
    """Training examples of heads.

    Attributes:
      hidden: [M, D] f32, hidden states after the final norm.
      roots: [M] the token after each.
      targets: [M, K] token ids; head k's is k + 2 tokens ahead; NO_TARGET for none.
    """

    hidden: Float[np.ndarray, "M D"]
    roots: Int[np.ndarray, "M"]
    targets: Int[np.ndarray, "M K"]


def examples(
    model: Model,
    params: Params,
    tokens: Int[np.ndarray, "N T"],
    spans: Int[np.ndarray, "N 2"],
    *,
    num_heads: int,
    batch_size: int = 8,
    on_batch: Callable[[int], object] | None = None,
    folder: Path | None = None,
) -> Examples:
    """Runs the model over windows and returns an example for each position where heads guess.

    These are the positions from the last token before a window's span on; earlier ones lie in the
    prompt. Windows of similar length run together.

    Args:
      model: static.
      params: its weights.
      tokens, spans: see `training.windows`.
      num_heads: K.
      batch_size: windows per run.
      on_batch: called after each run with the number of windows done.
      folder: where hidden states are stored, and found again when the run is resumed.

    Returns:
      The examples, in the order of the windows.
    """
    parts: dict[int, Examples] = {}
    order = np.argsort(spans[:, 1], kind="stable")
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        length = min(tokens.shape[1], -(-int(spans[rows, 1].max()) // _ROUND_TO) * _ROUND_TO)
        filled: Any = np.zeros((batch_size, length), np.int32)
        filled[: len(rows)] = tokens[rows, :length]
        file = None if folder is None else folder / f"{begin}.npy"
        if file is not None and file.is_file():
            hidden = np.load(file)
        else:
            hidden = np.asarray(_hidden_states(model, params, filled), np.float32)
            if file is not None:
                _save_whole(file, hidden)
        for row, states in zip(rows.tolist(), hidden, strict=False):
            first, end = spans[row].tolist()
            places = np.arange(max(first - 1, 0), end - 2)
            wanted = places[:, None] + 2 + np.arange(num_heads)
            there = tokens[row][np.minimum(wanted, end - 1)]
            targets = np.where(wanted < end, there, NO_TARGET)
            parts[row] = Examples(states[places], tokens[row][places + 1], targets)
        if on_batch is not None:
            on_batch(min(begin + batch_size, len(order)))
    in_order = [parts[row] for row in range(len(order))]
    return Examples(*(np.concatenate(arrays) for arrays in zip(*in_order, strict=True)))


def _save_whole(file: Path, array: np.ndarray) -> None:
    """Writes a file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".tmp.npy")
    np.save(part, array)
    part.replace(file)


@functools.partial(jax.jit, static_argnames=("model",))
def _hidden_states(model: Model, params: Params, tokens: Int[Array, "B T"]) -> Array:
    return hidden_states(model, params, tokens)


def draft_tokens(
    targets: Int[np.ndarray, "M K"], *, vocab_size: int, size: int
) -> Int[np.ndarray, "N"]:
    """Returns the `size` most frequent tokens; ties go to the lower ids.

    In BPE vocabularies lower ids are more frequent in other texts. Zhao et al. 2025
    (arXiv:2502.14856), section 3.2.
    """
    counts = np.bincount(targets[targets >= 0], minlength=vocab_size)
    return np.argsort(-counts, kind="stable")[:size].astype(np.int32)


def as_ranks(
    targets: Int[np.ndarray, "M K"], tokens: Int[np.ndarray, "N"] | None, vocab_size: int
) -> Int[np.ndarray, "M K"]:
    """Returns the index of each target in `tokens`, NO_TARGET if it is not in them.

    Without `tokens`, returns the targets themselves.
    """
    if tokens is None:
        return targets
    places = np.full(vocab_size, NO_TARGET, np.int32)
    places[np.asarray(tokens)] = np.arange(len(tokens))
    return np.where(targets >= 0, places[targets], NO_TARGET)


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """The heads' cross entropies, with more weight on nearer tokens; a `training.Objective`."""

    model: Model
    decay: float = 0.8

    def __call__(
        self,
        params: tuple[Params, Mapping[str, Array]],
        weights: Mapping[str, Array],
        hidden: Float[Array, "B D"],
        roots: Int[Array, "B"],
        targets: Int[Array, "B K"],
    ) -> tuple[Float[Array, ""], Float[Array, "K"]]:
        """Returns the sum of the cross entropies with weights decay ** k, and each in nats.

        Args:
          params: the model's weights, and the constant arrays of the heads.
          weights: the trained arrays of the heads.
          hidden, roots, targets: see `Examples`; targets as indices of the guessable tokens.
        """
        model_params, frozen = params

        @functools.partial(jax.checkpoint, static_argnums=1)  # recomputes the large logits
        def loss(weights: Mapping[str, Array], k: int) -> Array:
            heads = {**frozen, **weights}
            logits = medusa.head_logits(self.model, model_params, heads, k, hidden, roots)
            is_there = targets[:, k] >= 0
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits, jnp.maximum(targets[:, k], 0)
            )
            total = jnp.sum(jnp.where(is_there, each, 0.0))
            return total / jnp.maximum(jnp.sum(is_there, dtype=jnp.float32), 1.0)

        each = jnp.stack([loss(weights, k) for k in range(targets.shape[1])])
        return jnp.sum(each * self.decay ** jnp.arange(each.shape[0], dtype=jnp.float32)), each


@functools.partial(jax.jit, static_argnames=("model", "num_ranks"))
def _ranks(
    model: Model,
    params: Params,
    heads: Mapping[str, Array],
    hidden: Float[Array, "B D"],
    roots: Int[Array, "B"],
    targets: Int[Array, "B K"],
    *,
    num_ranks: int,
) -> Int[Array, "B K"]:
    guesses = medusa.guess(model, params, heads, hidden, roots, num_ranks=num_ranks)  # [B, K, R]
    is_hit = guesses == targets[:, :, None]
    return jnp.where(jnp.any(is_hit, axis=2), jnp.argmax(is_hit, axis=2), MISSED)


def target_ranks(
    model: Model,
    params: Params,
    heads: Mapping[str, Array],
    held: Examples,
    *,
    num_ranks: int = 10,
    batch_size: int = 512,
) -> Int[np.ndarray, "M K"]:
    """Returns the rank of each target among the guesses of its head; MISSED if it is not guessed.

    A target outside the draft vocabulary is MISSED as well; without a target the rank is NO_TARGET.
    """
    num_ranks = min(num_ranks, medusa.num_guessable(model, heads))
    parts = []
    for begin in range(0, len(held.hidden), batch_size):
        hidden: Any = held.hidden[begin : begin + batch_size]
        targets: Any = held.targets[begin : begin + batch_size]
        missing = batch_size - len(hidden)
        hidden = np.pad(hidden, ((0, missing), (0, 0)))
        roots: Any = np.pad(held.roots[begin : begin + batch_size], (0, missing))
        padded = np.pad(targets, ((0, missing), (0, 0)), constant_values=NO_TARGET)
        ranks = np.asarray(_ranks(model, params, heads, hidden, roots, padded, num_ranks=num_ranks))
        parts.append(np.where(targets >= 0, ranks[: len(targets)], NO_TARGET))
    return np.concatenate(parts)


def rank_accuracies(ranks: Int[np.ndarray, "M K"], num_ranks: int) -> Float[np.ndarray, "K R"]:
    """Returns how often the guess of rank r of head k is right; top-k is a row's sum.

    Args:
      ranks: see `target_ranks`.
      num_ranks: R.
    """
    hits = (ranks[:, :, None] == np.arange(num_ranks)).sum(0)
    return hits / np.maximum((ranks != NO_TARGET).sum(0), 1)[:, None]
