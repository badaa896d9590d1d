"""Dense weights in the layouts that a device's loops read them in; knows no model and no request.

In the decode loop XLA for tpu7x reads a 16-bit matrix in tiles of 16 rows; JAX's arrays lie in
tiles of 8. It would copy every such weight before the loop, in each call. Weights that lie in those
tiles already are copied once, when they are loaded; steps are compiled for the layouts they find.
The table of embeddings, of which rows are gathered, stays as it is.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from jinfer.config.typing import Params
from jinfer.linear.weight import is_weight
from pallas_kernels.target import Target

_TILE_ROWS = {"tpu7x": 16}  # what loops read 16-bit matrices in, where it isn't what JAX has


def layouts(params: Params, target: Target) -> Any:
    """Returns for each array the layout in which loops of `target` read it, None: as it is.

    A quantized weight has one None for all its arrays: kernels read them as they are.
    """
    rows = _TILE_ROWS.get(target.name)
    tiles = None if rows is None else Layout((0, 1), tiling=((rows, 128), (2, 1)))

    def choose(path: Any, x: Any) -> Layout | None:
        is_matrix = not is_weight(x) and x.ndim == 2 and x.dtype.name == "bfloat16"
        is_table = path[0] == jax.tree_util.DictKey("embed")
        return tiles if is_matrix and not is_table else None

    return jax.tree_util.tree_map_with_path(choose, params, is_leaf=is_weight)


def place(params: Params, layouts: Any, *, is_owner: bool = False) -> Any:
    """Returns params with every array in its layout; values do not change.

    Args:
      params: a tree of arrays.
      layouts: as `layouts` returns them.
      is_owner: free each array as soon as it lies elsewhere, so that no more than one lies there
        twice. Nobody else may use `params` then.
    """
    done: dict[int, Any] = {}  # an array that stands in two places stays one

    def put(layout: Layout | None, x: Any) -> Any:
        if layout is None or x.format.layout == layout:
            return x
        if id(x) not in done:
            done[id(x)] = jax.block_until_ready(jax.device_put(x, Format(layout, x.sharding)))
            if is_owner:
                x.delete()
        return done[id(x)]

    return jax.tree.map(put, layouts, params, is_leaf=lambda x: x is None)


def of(params: Params) -> Any:
    """Returns the format of each array, which one that was donated or deleted no longer tells."""
    return jax.tree.map(lambda x: x.format, params)


def like(params: Params, formats: Any) -> Any:
    """Returns params in the formats of others of the same shapes on the same device."""
    return jax.tree.map(lambda x, f: x if x.format == f else jax.device_put(x, f), params, formats)
