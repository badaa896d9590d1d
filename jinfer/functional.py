"""`generate` as one pure function of arrays, for research code under any of JAX's transforms.

It keeps a contiguous KV cache inside the function, without an engine or pages. The engine serves
many requests faster; this function can be differentiated, vmapped and sharded, and shares the
trainer's arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jinfer.config.fields import MAX_FLOAT32, read_int, read_token_ids
from jinfer.config.typing import Params
from jinfer.linear import ops
from jinfer.models import inputs
from jinfer.models.model import Model
from jinfer.sampling.args import SampleArgs
from jinfer.sampling.threshold import filter_logits

if TYPE_CHECKING:
    from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """Result of `generate`.

    Attributes:
      tokens: [B, n] new tokens; after an end token, that token repeated.
      logprobs: [B, n] f32 log-probability of each under the model itself (temperature 1, nothing
        cut); 0 after an end token. Differentiable with respect to the weights.
      lengths: [B] new tokens up to and including the end token.
    """

    tokens: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    lengths: Int[Array, "B"]


def generate(
    model: Model,
    params: Params,
    tokens: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    prompt_lens: ArrayLike | Sequence[int] | None = None,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    key: Array | None = None,
    eos_token_ids: Sequence[int] = (),
) -> Generated:
    """Continues B prompts by `max_new_tokens` tokens.

    Pure: jit it with `model` and `max_new_tokens` static, vmap it, differentiate its `logprobs`.
    The token at step i of row b is drawn with fold_in(fold_in(key, b), i).

    Args:
      model: static.
      params: weights.
      tokens: [B, T] prompts, padded on the right.
      max_new_tokens: n, at least 1.
      prompt_lens: [B] tokens of each prompt, 1..T; default T.
      temperature: 0 is greedy; a number or [B], as the next three.
      top_k: keep the k most likely; 0: all.
      top_p: keep the most likely that together have this probability.
      min_p: keep what has at least this share of the most likely one's probability.
      key: random key; needed unless the temperature is the number 0.
      eos_token_ids: tokens that end a row.

    Returns:
      `Generated`.

    Raises:
      ValueError: `tokens` is not [B, T], `prompt_lens` not [B], n is not positive, the key is
        missing, or a value that is not traced is out of range.
      TypeError: an argument is of another kind.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model must be a Model, got {type(model).__name__}")
    params = inputs.examine(model, params)
    tokens, lens = _read_prompts(model, tokens, prompt_lens)
    num_rows, prompt_width = tokens.shape
    max_new_tokens = _read_max_new_tokens(model, max_new_tokens, prompt_width)
    is_greedy = isinstance(temperature, (int, float)) and temperature == 0
    row_keys = _row_keys(key, num_rows, is_greedy)
    eos_token_ids = read_token_ids("eos_token_ids", eos_token_ids)
    args = _sample_args(num_rows, temperature, top_k, top_p, min_p)
    draws = _Draws(args, row_keys, is_greedy)

    hidden, cache = _prefill(model, params, tokens, lens, prompt_width + max_new_tokens - 1)
    last = jnp.take_along_axis(hidden, (lens - 1)[:, None, None], axis=1)[:, 0]  # [B, D]

    def choose(i: Array, hidden: Array, ended: Array, before: Array) -> tuple[Array, Array, Array]:
        logits = model.unembed(params, hidden)
        chosen = _draw(logits, draws, i)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=1)[:, 0]
        chosen = jnp.where(ended, before, chosen)
        is_end = jnp.zeros_like(ended)
        for token in eos_token_ids:
            is_end |= chosen == token
        return chosen, jnp.where(ended, 0.0, logprob), ended | is_end

    def step(carry: Any, i: Array) -> tuple[Any, Any]:
        cache, token, ended = carry
        hidden, cache = _decode(model, params, token, lens + i - 1, lens, cache)
        new_token, logprob, new_ended = choose(i, hidden, ended, token)
        return (cache, new_token, new_ended), (new_token, logprob, ended)

    nothing = jnp.zeros((num_rows,), bool)
    first, first_logprob, ended = choose(
        jnp.zeros((), jnp.int32), last, nothing, jnp.zeros((num_rows,), jnp.int32)
    )
    _, (rest, rest_logprobs, rest_ended) = jax.lax.scan(
        step, (cache, first, ended), jnp.arange(1, max_new_tokens, dtype=jnp.int32)
    )
    was_ended = jnp.concatenate([nothing[None], rest_ended])  # [n, B]
    return Generated(
        tokens=jnp.concatenate([first[None], rest]).T,
        logprobs=jnp.concatenate([first_logprob[None], rest_logprobs]).T,
        lengths=jnp.sum(~was_ended, axis=0, dtype=jnp.int32),
    )


def _read_prompts(model: Model, tokens: Any, prompt_lens: Any) -> tuple[Array, Array]:
    """Returns the checked prompts [B, T] and their lengths [B]."""
    tokens = inputs.read_tokens(tokens, model.config.vocab_size)
    if tokens.ndim != 2 or tokens.size == 0:
        raise ValueError(f"tokens must be [B, T], neither 0, got {list(tokens.shape)}")
    num_rows, width = tokens.shape
    lens = jnp.full((num_rows,), width, jnp.int32)
    if prompt_lens is not None:
        lens = inputs.read_integers(
            "prompt_lens", prompt_lens, "tokens of each prompt", low=1, high=width
        )
    if lens.shape != (num_rows,):
        raise ValueError(f"prompt_lens must be [B] = [{num_rows}], got {list(lens.shape)}")
    return tokens, lens


def _read_max_new_tokens(model: Model, max_new_tokens: Any, prompt_width: int) -> int:
    max_new_tokens = read_int("max_new_tokens", max_new_tokens)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if prompt_width + max_new_tokens > model.config.max_context_len:
        raise ValueError(
            f"tokens and max_new_tokens are {prompt_width} + {max_new_tokens}, more than the "
            f"{model.config.max_context_len} positions the model was made for"
        )
    return max_new_tokens


class _Draws(NamedTuple):
    """How tokens are drawn: sampling fields, one key per row, and whether all rows are greedy."""

    args: SampleArgs
    row_keys: Array
    is_greedy: bool


def _row_keys(key: Array | None, num_rows: int, is_greedy: bool) -> Array:
    if key is None:
        if not is_greedy:
            raise ValueError("sampling needs key=jax.random.key(...); temperature=0 is greedy")
        key = jax.random.key(0)
    inputs.check_key(key)
    return jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(num_rows, dtype=jnp.int32))


def _sample_args(num_rows: int, temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> SampleArgs:
    zeros, ones = jnp.zeros((num_rows,), jnp.float32), jnp.ones((num_rows,), jnp.float32)
    floats = [
        inputs.read_floats("temperature", temperature, num_rows, low=0, high=MAX_FLOAT32),
        inputs.read_floats("top_p", top_p, num_rows, low=0, high=1, above=True),
        inputs.read_floats("min_p", min_p, num_rows, low=0, high=1),
    ]
    ints = [inputs.read_counts("top_k", top_k, num_rows)]
    ints += [jnp.zeros((num_rows,), jnp.uint32)] * 4
    return SampleArgs(
        floats=jnp.stack([*floats, zeros, zeros, ones], axis=1), ints=jnp.stack(ints, axis=1)
    )


def _draw(logits: Array, draws: _Draws, i: Array) -> Array:
    """Draws one token per row at step i; no gradient passes, since tokens are discrete."""
    logits = jax.lax.stop_gradient(logits)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if draws.is_greedy:
        return best
    filtered = filter_logits(logits, draws.args)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(draws.row_keys)
    drawn = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
    return jnp.where(draws.args.is_greedy, best, drawn)


def _prefill(
    model: Model, params: Params, tokens: Array, lens: Array, size: int
) -> tuple[Array, tuple[Array, Array]]:
    """Runs the prompts; returns hidden [B, T, D] and the cache, K and V of [L, B, size, K, H]."""
    config = model.config
    num_rows, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
    shape = (config.num_layers, num_rows, size, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros(shape, params["embed"]["w"].dtype)

    def attend(layer: Any, q: Array, k: Array, v: Array, cache: Any, **window: Any):
        out, _ = model.attend_densely(layer, q, k, v, None, **window)
        return out, (
            cache[0].at[layer, :, :width].set(k.astype(empty.dtype)),
            cache[1].at[layer, :, :width].set(v.astype(empty.dtype)),
        )

    context_lens = jnp.broadcast_to(lens[:, None], tokens.shape)
    return model.apply(params, tokens, positions, attend, (empty, empty), context_lens=context_lens)


def _decode(
    model: Model,
    params: Params,
    tokens: Array,
    positions: Array,
    lens: Array,
    cache: tuple[Array, Array],
) -> tuple[Array, tuple[Array, Array]]:
    """Runs one token a row at `positions` [B]; returns hidden [B, D] and the cache."""
    config = model.config
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)

    def attend(layer: Any, q: Array, k: Array, v: Array, cache: Any, *, window: int | None):
        keys = cache[0].at[layer, rows, positions].set(k[:, 0].astype(cache[0].dtype))
        values = cache[1].at[layer, rows, positions].set(v[:, 0].astype(cache[1].dtype))
        out = ops.dense_attention(
            q,
            keys[layer],
            values[layer],
            sm_scale=config.sm_scale,
            window=window,
            cap=config.attention_soft_cap,
            q_positions=positions[:, None],
        )
        return out, (keys, values)

    context_lens = jnp.maximum(lens, positions + 1)[:, None]
    hidden, cache = model.apply(
        params, tokens[:, None], positions[:, None], attend, cache, context_lens=context_lens
    )
    return hidden[:, 0], cache
