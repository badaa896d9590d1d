"""Weights that a caller hands in: examined against the model, and brought to an engine's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jinfer.config.typing import Params
from jinfer.linear.weight import flatten_weights, format_of, is_weight, weights
from jinfer.models.inputs import examine
from jinfer.models.model import Model
from jinfer.steps.tracing import refuse_tracing

SERVED_DTYPES = ("float32", "bfloat16", "float16")


def take(model: Model, params: Any, device: Any = None) -> dict[str, Any]:
    """Returns the weights of an engine as JAX's arrays on one device, bound to it.

    Arrays that lie there already are shared, not copied; those of numpy are copied, so that what
    their owner writes into them later changes nothing.

    Args:
      model: whose they are.
      params: a tree as `Model.init` makes it, or quantized.
      device: default: where the first of JAX's arrays lies, else JAX's default.

    Raises:
      ValueError, TypeError: as `examine`; a float is of a dtype that is not served, or an array
        was donated or deleted.
    """
    refuse_tracing()
    if params is None:
        raise ValueError("a Model needs its weights: pass params=")
    params = examine(model, params)
    for path, leaf in flatten_weights(params):
        if not is_weight(leaf) and leaf.dtype.name not in SERVED_DTYPES:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} must be of {', '.join(SERVED_DTYPES)}, got "
                f"{leaf.dtype}: cast it"
            )
    return bind(params, device or device_of(params))


def device_of(arrays: Any) -> Any:
    """Returns where the first bound array lies, else the first array, else JAX's default device."""
    own = [x for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)]
    own = [x for x in own if not isinstance(x, jax.core.Tracer)]
    own = [x for x in own if x.committed] + own or [jnp.zeros(())]
    return min(own[0].sharding.addressable_devices, key=lambda device: device.id)


def bind(arrays: Any, device: Any) -> Any:
    """Returns a tree of arrays as JAX's own, bound to a device; see `take`.

    All that an engine keeps is bound, since jit has other programs for arrays that are not.
    """
    there = jax.sharding.SingleDeviceSharding(device)
    done: dict[int, Any] = {}  # an array that stands in two places stays one

    def put(path: Any, x: Any) -> Any:
        if isinstance(x, jax.core.Tracer):
            name = jax.tree_util.keystr(path)
            raise TypeError(f"weight {name} must be an array, got a tracer: call it outside of jit")
        if isinstance(x, jax.Array):
            _check_alive(path, x)
            return x if x.committed and x.sharding == there else jax.device_put(x, there)
        # A copy of its own: on CPUs JAX's array may be the very memory of numpy's.
        return jax.device_put(np.array(x), there)

    def put_once(path: Any, x: Any) -> Any:
        if id(x) not in done:
            done[id(x)] = put(path, x)
        return done[id(x)]

    return jax.tree_util.tree_map_with_path(put_once, arrays)


def check_alive(arrays: Sequence[tuple[Any, Any]]) -> None:
    """Raises ValueError that names the first of (path, array) whose memory was given away."""
    for path, x in arrays:
        _check_alive(path, x)


def _check_alive(path: Any, x: jax.Array) -> None:
    if x.is_deleted():
        raise ValueError(
            f"weight {jax.tree_util.keystr(path)} was donated or deleted and cannot be served: "
            "give update_weights() arrays that stay"
        )


def check_alike(old: Params, new: Params) -> None:
    """Raises ValueError where a new tree has other names, shapes or dtypes than the present one."""
    before, after = (jax.tree_util.tree_flatten_with_path(tree) for tree in (old, new))
    paths = [{jax.tree_util.keystr(path): x for path, x in side[0]} for side in (before, after)]
    missing, unknown = sorted(paths[0].keys() - paths[1]), sorted(paths[1].keys() - paths[0])
    if missing or unknown:
        raise ValueError(
            f"the new weights are not of the present ones' form: weights missing {missing[:3]}, "
            f"unknown {unknown[:3]}"
        )
    for name, x in paths[0].items():
        y = paths[1][name]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ValueError(
                f"weight {name} must be {x.dtype}{list(x.shape)}, got {y.dtype}{list(y.shape)}"
            )
    if before[1] != after[1]:
        raise ValueError(
            "the new weights are quantized to another format than the present ones: expected "
            f"{_formats(old)}, got {_formats(new)}"
        )


def _formats(params: Params) -> str:
    found = {str(format_of(w)) for w in weights(params) if format_of(w) is not None}
    return ", ".join(sorted(found)) or "floats"
