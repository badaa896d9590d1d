"""What research code hands to models and to `generate`: arrays of the right kind, shape and range.

Values are checked where they are there; under jit, vmap and grad only kinds and shapes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jinfer.config.fields import require, shown
from jinfer.config.model import ModelConfig
from jinfer.linear.weight import is_weight


def _as_array(name: str, value: Any, what: str) -> Any:
    """A numpy or jax array of `value`, which may hold tracers."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return value
    try:
        return np.asarray(value)
    except Exception:  # ragged rows, objects with ideas of their own; tracers
        try:
            return jnp.asarray(value)
        except Exception:
            raise ValueError(f"{name} must be {what}, got {shown(value)}") from None


def is_concrete(x: Any) -> bool:
    """Whether the values of an array are there to look at."""
    return not isinstance(x, Tracer)


def read_integers(name: str, value: Any, what: str, *, low: int, high: int) -> Array:
    """Returns integers as int32.

    Args:
      name: of what the value was given for.
      value: an array, or nested lists of numbers.
      what: is expected, for the message.
      low, high: the least and the greatest that may be.

    Raises:
      TypeError: no integers.
      ValueError: rows of different lengths, or a value out of range.
    """
    x = _as_array(name, value, what)
    if not jnp.issubdtype(x.dtype, jnp.integer) and x.size:
        raise TypeError(f"{name} must be {what}, got {shown(value)} of {x.dtype}")
    if x.size and is_concrete(x):
        values = np.asarray(x)  # not in the trace of an enclosing jit
        least, most = int(values.min()), int(values.max())
        require(
            low <= least and most <= high,
            f"{name} must be {what} in {low}..{high}, got values in {least}..{most}",
        )
    return jnp.asarray(x).astype(jnp.int32)


def read_tokens(tokens: Any, vocab_size: int) -> Array:
    """Returns token ids as int32; raises as `read_integers`."""
    return read_integers("tokens", tokens, "token ids", low=0, high=vocab_size - 1)


def read_floats(
    name: str, value: Any, num_rows: int, *, low: float, high: float, above: bool = False
) -> Array:
    """Returns [num_rows] float32 of one number or one a row; raises as `read_integers`.

    The greatest is `high`, the least `low`, or with `above` what is greater than that.
    """
    x = _as_array(name, value, "a number")
    if not (jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)):
        raise TypeError(f"{name} must be a number, or one a row, got {shown(value)}")
    _check_rows(name, x, num_rows)
    if is_concrete(x):
        values = np.asarray(x, np.float64)
        is_right = (
            np.isfinite(values) & (values <= high) & (values > low if above else values >= low)
        )
        if not is_right.all():
            raise ValueError(
                f"{name} must be {'above' if above else 'at least'} {low:g} and at most {high:g}, "
                f"got {shown(value)}"
            )
    return jnp.broadcast_to(jnp.asarray(x).astype(jnp.float32), (num_rows,))


def read_counts(name: str, value: Any, num_rows: int) -> Array:
    """Returns [num_rows] uint32 of one number or one a row, not negative; raises likewise."""
    x = read_integers(name, value, "an integer, or one a row,", low=0, high=2**31 - 1)
    _check_rows(name, x, num_rows)
    return jnp.broadcast_to(x.astype(jnp.uint32), (num_rows,))


def _check_rows(name: str, x: Any, num_rows: int) -> None:
    require(
        x.shape in ((), (1,), (num_rows,)),
        f"{name} must be one number or one for each of {num_rows} rows, got {list(x.shape)}",
    )


def read_dtype(dtype: Any) -> jnp.dtype:
    """Returns the dtype of weights; raises ValueError for what is none of floats."""
    try:
        found = None if isinstance(dtype, (jax.Array, np.ndarray)) else jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or dtype is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype must be one of floats, such as float32, got {shown(dtype)}")
    return found


def check_key(key: Any) -> None:
    """Raises TypeError unless `key` is one random key, of either of JAX's forms."""
    is_array = isinstance(key, (jax.Array, np.ndarray))
    is_typed = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    is_raw = is_array and key.dtype == np.uint32 and key.ndim == 1 and key.size in (2, 4)
    if not (is_typed or is_raw):
        raise TypeError(f"key must be one random key, jax.random.key(seed), got {shown(key)}")


def check_uniform(config: ModelConfig) -> None:
    """Raises ValueError, saying why, where the layers are not alike and so cannot be scanned."""
    if len(set(config.layer_types)) > 1:
        raise ValueError(
            f"stacked layers must be alike, but this {config.family} model alternates full and "
            f'sliding attention ({", ".join(config.layer_types)}); keep params["layers"] a tuple'
        )
    kinds = {config.is_moe_layer(i) for i in range(config.num_layers)}
    if len(kinds) > 1:
        raise ValueError(
            f"stacked layers must be alike, but layers {list(config.dense_layers)} of this "
            f'{config.family} model are dense and the others have experts; keep params["layers"] '
            f"a tuple"
        )


def examine(model: Any, params: Any) -> dict[str, Any]:
    """Returns a model's params as plain dicts and a tuple of layers, with the leaves as given.

    Raises:
      TypeError: a part is of another kind than the model's.
      ValueError: names are missing or unknown, or a shape or a dtype is wrong; the message names
        the leaf.
    """
    return _walk(model, model.abstract_params(), params, "params")


def _walk(model: Any, want: Any, got: Any, path: str) -> Any:
    if isinstance(want, tuple):
        if isinstance(got, Mapping):
            check_uniform(model.config)
            shapes = [jnp.shape(x) for x in jax.tree.leaves(got)]
            if shapes and shapes[0][:1] != (len(want),):
                raise ValueError(f"{path} has {[*shapes[0], 0][0]} layers, the model {len(want)}")
            return _walk(model, _stacked(want), got, path)
        if not isinstance(got, (tuple, list)):
            raise TypeError(f"{path} must be a tuple of layers, got {type(got).__name__}")
        if len(got) != len(want):
            raise ValueError(f"{path} has {len(got)} layers, the model {len(want)}")
        return tuple(_walk(model, w, g, f"{path}[{i}]") for i, (w, g) in enumerate(zip(want, got)))
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping):
            raise TypeError(f"{path} must be a dict of {sorted(want)}, got {type(got).__name__}")
        missing, unknown = sorted(want.keys() - got.keys()), got.keys() - want.keys()
        if missing or unknown:
            raise ValueError(
                f"{path} does not fit this {model.config.family} model: missing {missing}, "
                f"unknown {sorted(map(str, unknown))}"
            )
        return {key: _walk(model, want[key], got[key], f"{path}['{key}']") for key in got}
    _check_leaf(want.shape, got, path)
    return got


def _stacked(layers: Sequence[Any]) -> Any:
    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(layers), *leaf.shape), leaf.dtype)

    return jax.tree.map(stack, layers[0])


def _check_leaf(shape: tuple[int, ...], got: Any, path: str) -> None:
    is_object = is_weight(got)
    if not is_object and not isinstance(got, (jax.Array, np.ndarray)):
        raise TypeError(f"{path} must be an array of JAX or numpy, got {type(got).__name__}")
    if got.shape != shape:
        raise ValueError(f"{path} must be of shape {list(shape)}, got {list(got.shape)}")
    if not is_object and not jnp.issubdtype(got.dtype, jnp.floating):
        raise ValueError(f"{path} must hold floats, got {got.dtype}")
    for part in jax.tree.leaves(got):
        if isinstance(part, jax.Array) and is_concrete(part) and part.is_deleted():
            name = path.removeprefix("params")
            raise ValueError(f"weight {name} was donated or deleted: its values are gone")
