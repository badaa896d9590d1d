"""Quality of a model on text: perplexity, and how far it is from a reference model."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinfer.models.model import Model
from jinfer.typing import Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over the scored tokens of all windows.

    Attributes:
      perplexity: exp of the mean negative log likelihood; a window's first token is not scored.
      nll: that mean, in nats.
      kl: mean KL(reference || model) of next-token distributions in nats, at every position; None
        without a reference.
      kl_se: standard error of `kl` over windows.
      top1: share of positions where both put the same token first.
      num_windows, length, num_scored, seconds: of the run.
    """

    perplexity: float
    nll: float
    kl: float | None
    kl_se: float | None
    top1: float | None
    num_windows: int
    length: int
    num_scored: int
    seconds: float


@functools.partial(jax.jit, static_argnums=0)
def window_logits(model: Model, params: Params, tokens: Array) -> Array:
    """f32 [T, V] logits of one window [T]: what `evaluate` scores."""
    return model.logits(params, tokens[None])[0]


@jax.jit
def _nll(logits: Array, tokens: Array) -> Array:
    """Mean negative log likelihood of tokens 1.. given those before."""
    scores = jax.nn.log_softmax(logits[:-1])
    return -jnp.mean(jnp.take_along_axis(scores, tokens[1:, None], axis=1))


@jax.jit
def _divergence(reference: Array, logits: Array) -> tuple[Array, Array]:
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    kl = jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    same = jnp.mean((jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(jnp.float32))
    return kl, same


def evaluate(
    model: Model,
    params: Params,
    windows: np.ndarray,
    *,
    against: tuple[Model, Params] | np.ndarray | None = None,
    on_window: Callable[[int], None] | None = None,
) -> Evaluation:
    """Scores windows i32 [n, T] one by one, without special tokens.

    Args:
      model: the model.
      params: its parameters, quantized or not.
      windows: token ids.
      against: a reference with the same vocabulary, or its logits or logprobs [n, T, V] of these
        windows, of any float dtype, such as a memory-mapped file.
      on_window: called with the number of windows done.

    Raises:
      ValueError: the vocabularies differ, or scores are not finite.
    """
    vocab_size = model.config.vocab_size
    if isinstance(against, np.ndarray):
        shape = (*windows.shape, vocab_size)
        if against.shape != shape:
            raise ValueError(
                f"the reference's logits must be {list(shape)}, got {list(against.shape)}"
            )
    elif against is not None and against[0].config.vocab_size != vocab_size:
        raise ValueError(
            f"the reference has {against[0].config.vocab_size} tokens, the model "
            f"{vocab_size}: their distributions cannot be compared"
        )
    start = time.perf_counter()
    nll, kl, same = [], [], []
    for i, window in enumerate(windows):
        tokens = jnp.asarray(window, jnp.int32)
        logits = window_logits(model, params, tokens)
        nll.append(float(_nll(logits, tokens)))
        if against is not None:
            if isinstance(against, np.ndarray):
                reference = jnp.asarray(against[i].astype(np.float32))
            else:
                reference = window_logits(*against, tokens)
            pair = _divergence(reference, logits)
            kl.append(float(pair[0]))
            same.append(float(pair[1]))
        if on_window is not None:
            on_window(i + 1)
    mean = float(np.mean(nll))
    if not math.isfinite(mean):
        raise ValueError("the model's logits hold NaN or infinity on this text")
    n = len(windows)
    return Evaluation(
        perplexity=math.exp(mean),
        nll=mean,
        kl=float(np.mean(kl)) if kl else None,
        kl_se=float(np.std(kl, ddof=1) / n**0.5) if len(kl) > 1 else None,
        top1=float(np.mean(same)) if same else None,
        num_windows=n,
        length=windows.shape[1],
        num_scored=n * (windows.shape[1] - 1),
        seconds=time.perf_counter() - start,
    )
