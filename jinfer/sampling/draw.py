"""Draws a token from processed logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jinfer.config.sampling_params import NO_TOKEN
from jinfer.sampling.args import SampleArgs
from jinfer.sampling.threshold import NEG_INF


def sample(
    processed: Float[Array, "S V"], args: SampleArgs, positions: Int[Array, "S"]
) -> Int[Array, "S"]:
    """Draws one token per sequence from `process_logits`' result.

    Greedy rows take the most likely token, the lowest id in a tie. Others take the argmax of the
    logits plus Gumbel noise, whose key is fold_in(key(seed), position), so that a token is a
    function of the distribution, the seed and the position alone.

    Returns:
      [S] i32. A row without tokens (all -inf) gives NO_TOKEN.
    """

    def draw(x: Array) -> Array:
        def noise(seed: Array, position: Array) -> Array:
            key = jax.random.wrap_key_data(seed, impl="threefry2x32")
            return jax.random.gumbel(jax.random.fold_in(key, position), (x.shape[1],), jnp.float32)

        gumbel = jax.vmap(noise)(args.seed, positions.astype(jnp.uint32))
        return _argmax(jnp.where(args.is_greedy[:, None], x, x + gumbel))

    return lax.cond(jnp.any(~args.is_greedy), draw, _argmax, processed)


def _argmax(x: Array) -> Array:
    """Returns the first index of each row's maximum, [S] i32; NO_TOKEN where that is -inf.

    Two reductions instead of `jnp.argmax`, whose pair reduction XLA does not vectorize on CPUs
    (ten times slower there). f32 represents indices up to 2^24 exactly.
    """
    top = jnp.max(x, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.float32, x.shape, 1)
    first = jnp.min(jnp.where(x == top, index, float(x.shape[1] - 1)), axis=-1).astype(jnp.int32)
    return jnp.where(top[:, 0] > NEG_INF, first, NO_TOKEN)
