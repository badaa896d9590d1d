"""Trains weights on tokens for a given objective, with checkpoints.

Randomness depends only on the seed and the step's number, so that a run that is resumed from a
checkpoint ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jinfer.config.fields import require, shown
from jinfer.config.typing import Params
from jinfer.models.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a training of heads or a draft model.

    Attributes:
      num_steps: optimizer steps.
      batch_size: examples per step.
      learning_rate: peak value; cosine decay to zero after a linear warm-up.
      warmup: share of the steps.
      weight_decay: weight decay of AdamW.
      seed: seed of the order of examples.
      checkpoint_every: steps between checkpoints.
    """

    num_steps: int
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "checkpoint_every"):
            value = getattr(self, name)
            require(0 < value < 2**31, f"{name} must lie in 1..2**31-1, got {shown(value)}")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            require(0 <= value <= 1e6, f"{name} must lie in 0..1e6, got {shown(value)}")
        require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        require(0 <= self.seed < 2**63, f"seed must lie in [0, 2**63), got {shown(self.seed)}")
        require(0 <= self.warmup < 1, f"warmup must be in [0, 1), got {self.warmup}")

    def optimizer(self) -> optax.GradientTransformation:
        """Returns AdamW with this schedule."""
        num_warmup = round(self.warmup * self.num_steps)
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if num_warmup else self.learning_rate,
            peak_value=self.learning_rate,
            warmup_steps=num_warmup,
            decay_steps=max(self.num_steps, num_warmup + 1),
        )
        return optax.adamw(schedule, weight_decay=self.weight_decay)


def windows(
    texts: Sequence[tuple[Sequence[int], int]], length: int
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N 2"]]:
    """Cuts texts into rows of at most `length` tokens.

    Rows with fewer than 3 tokens to learn are left out: they are too short for any head.

    Args:
      texts: token ids, and the number of leading ones that are not learnt (the prompt).
      length: T.

    Returns:
      tokens [N, T] i32, zeros after a row's end, and the rows' spans to learn: first token, end.
    """
    tokens, spans = [], []
    for text, num_read in texts:
        for i in range(0, len(text), length):
            piece = text[i : i + length]
            span = max(0, num_read - i), len(piece)
            if span[1] - span[0] >= 3:
                tokens.append([*piece, *[0] * (length - len(piece))])
                spans.append(span)
    require(bool(tokens), "there is nothing to learn from: no text has 3 tokens or more")
    return np.array(tokens, np.int32), np.array(spans, np.int32)


def batch_rows(step: int, num_rows: int, config: TrainingConfig) -> np.ndarray:
    """Returns the examples of step `step`: each is used once before any is used again."""
    start = step * config.batch_size
    places = np.arange(start, start + config.batch_size)
    orders = {
        epoch: np.random.default_rng((config.seed, epoch)).permutation(num_rows)
        for epoch in set((places // num_rows).tolist())
    }
    return np.array([orders[p // num_rows][p % num_rows] for p in places.tolist()])


def hidden_states(model: Model, params: Params, tokens: Int[Array, "B T"]) -> Array:
    """Returns the hidden states [B, T, D] of texts."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    context_lens = jnp.full_like(positions, tokens.shape[1])
    hidden, _ = model.apply(
        params, tokens, positions, model.attend_densely, None, context_lens=context_lens
    )
    return hidden


class Objective(Protocol):
    """A loss to minimize; hashable, since it is a static argument of the jitted step."""

    def __call__(
        self, params: Any, weights: Any, *batch: Array
    ) -> tuple[Float[Array, ""], Float[Array, "K"]]:
        """Returns the loss of `weights`, and the values to display; `params` are constant.

        The batch has a row of each data array for each of B examples.
        """
        ...


@functools.partial(jax.jit, static_argnames=("objective", "config"), donate_argnames=("state",))
def train_step(
    objective: Objective,
    config: TrainingConfig,
    params: Any,
    state: tuple[Any, Any],
    *batch: Array,
) -> tuple[tuple[Any, Any], Float[Array, "K"]]:
    """Returns (weights, optimizer state), donated, after one AdamW step, and the losses before."""
    weights, opt_state = state
    loss = functools.partial(objective, params)
    grads, each = jax.grad(loss, has_aux=True)(weights, *batch)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, opt_state = config.optimizer().update(grads, opt_state, weights)
        weights = optax.apply_updates(weights, updates)
    return (weights, opt_state), each


class Checkpoints:
    """The newest state of a run, in an Orbax folder.

    Args:
      folder: where checkpoints are stored; created if absent.
    """

    def __init__(self, folder: Path) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Saves the state before step `step`, and removes older ones."""
        self._manager.save(step, args=self._ocp.args.StandardSave(state))

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Returns (step, state) of the newest checkpoint, or None; `like` has its tree."""
        step = self._manager.latest_step()
        if step is None:
            return None
        return step, self._manager.restore(step, args=self._ocp.args.StandardRestore(like))

    def close(self) -> None:
        """Waits for pending writes."""
        self._manager.close()


def train(
    objective: Objective,
    params: Any,
    weights: Any,
    data: Sequence[np.ndarray],
    config: TrainingConfig,
    *,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> Any:
    """Trains `weights`, resuming from the newest checkpoint if there is one, and returns them.

    Args:
      objective: the loss.
      params: constant inputs of the objective.
      weights: initial weights, a pytree; copied.
      data: arrays with a row for each example, such as those of `windows`.
      config: settings.
      checkpoints: where states are saved and restored from.
      on_step: called after each step with the number of steps done and the losses before it.

    Raises:
      ValueError: a loss is not finite.
    """
    weights = jax.tree.map(jnp.copy, weights)
    state = weights, config.optimizer().init(weights)
    found = checkpoints.restore(state) if checkpoints is not None else None
    start, state = found if found is not None else (0, state)
    for step in range(start, config.num_steps):
        rows = batch_rows(step, len(data[0]), config)
        batch: Any = [array[rows] for array in data]
        state, each = train_step(objective, config, params, state, *batch)
        losses = np.asarray(each)
        require(
            bool(np.isfinite(losses).all()),
            f"the loss at step {step + 1} is {losses.tolist()}: lower the learning rate, or look "
            f"for NaN and infinities in the weights",
        )
        if on_step is not None:
            on_step(step + 1, losses)
        is_last = step + 1 == config.num_steps
        if checkpoints is not None and (is_last or (step + 1) % config.checkpoint_every == 0):
            checkpoints.save(step + 1, state)
    return state[0]
