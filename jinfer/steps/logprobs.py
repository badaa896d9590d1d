"""Jitted log probabilities, for requests that ask for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jinfer.config.typing import Params
from jinfer.models.model import Model
from jinfer.sampling import logprobs


@functools.partial(jax.jit, static_argnames=("k",))
def top_logprobs(logits: Float[Array, "*n S V"], tokens: Int[Array, "m S"], *, k: int):
    """Returns the k best of each row of logits, and logprob and rank of the token sampled there.

    The rows of `verify_step`'s logits come one place after the other, [n * S]; where a step has
    logits for one place only, the first row of tokens is meant.
    """
    logits = logits.reshape(-1, logits.shape[-1])
    return logprobs.top_logprobs(logits, tokens.reshape(-1)[: logits.shape[0]], k)


@functools.partial(jax.jit, static_argnames=("model", "k"))
def prompt_logprobs(
    model: Model, params: Params, hidden: Float[Array, "T D"], targets: Int[Array, "T"], *, k: int
):
    """Logprobs of the token that follows each of T positions, 16 rows of logits at a time.

    Returns:
      As `top_logprobs`, for T rows: ids [T, k], logprobs [T, k], target logprob [T], rank [T].
    """
    rows = 16
    size = targets.shape[0]
    pad = -size % rows
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, rows, hidden.shape[-1])
    padded = jnp.pad(targets, (0, pad)).reshape(-1, rows)

    def block(carry):
        x, tokens = carry
        return logprobs.top_logprobs(model.unembed(params, x), tokens, k)

    out = jax.lax.map(block, (hidden, padded))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], out)


@jax.jit
def log_softmax(logits: Float[Array, "*n S V"]) -> Float[Array, "*n S V"]:
    """The whole vocabulary's logprobs, for `logprobs=-1`."""
    return jax.nn.log_softmax(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("model",))
def prompt_log_softmax(
    model: Model, params: Params, hidden: Float[Array, "T D"]
) -> Float[Array, "T V"]:
    """The whole vocabulary's logprobs after each of T positions, for `prompt_logprobs=-1`."""
    return jax.nn.log_softmax(model.unembed(params, hidden), axis=-1)
