"""Names of the axes of every parameter: what a mesh of several devices can split them by.

"vocab" V, "embed" D, "heads" N * H, "kv_heads" K * H, "head_dim" H, "mlp" F, "experts" E, "layers"
L. A name stands for the same dimension of the model wherever it occurs.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from jinfer.config.typing import Params
from jinfer.linear.weight import is_weight

_TOP = {
    "embed.w": ("vocab", "embed"),
    "lm_head.w": ("embed", "vocab"),
    "final_norm.scale": ("embed",),
}
_BLOCK = {
    "attn_norm.scale": ("embed",),
    "attn_post_norm.scale": ("embed",),
    "mlp_norm.scale": ("embed",),
    "mlp_post_norm.scale": ("embed",),
    "attn.q_norm.scale": ("head_dim",),
    "attn.k_norm.scale": ("head_dim",),
    "mlp.router.w": ("embed", "experts"),
}
_LINEARS = {
    "attn.q": ("embed", "heads"),
    "attn.k": ("embed", "kv_heads"),
    "attn.v": ("embed", "kv_heads"),
    "attn.o": ("heads", "embed"),
    "mlp.gate": ("embed", "mlp"),
    "mlp.up": ("embed", "mlp"),
    "mlp.down": ("mlp", "embed"),
}
for _name, (_inputs, _outputs) in _LINEARS.items():
    _BLOCK |= {f"{_name}.w": (_inputs, _outputs), f"{_name}.b": (_outputs,)}


def logical_axes(params: Params) -> Any:
    """Returns a tree like `params` with the names of each array's axes in its place.

    They are PartitionSpecs of names, one name an axis. The arrays of a weight that is an object,
    such as a QTensor's codes and scales, have their own, see `QuantizedWeight.split_axes`; None
    stands for an axis that belongs to no dimension of the model, and for all axes of an object
    that has no `split_axes`.

    Args:
      params: of any model, layers as a tuple or stacked; arrays or their shapes.

    Raises:
      ValueError: there is no parameter of that name, or it is of another rank.
    """
    return jax.tree_util.tree_map_with_path(_axes_of, params, is_leaf=is_weight)


def _axes_of(path: Any, weight: Any) -> Any:
    keys = [getattr(key, "key", getattr(key, "idx", None)) for key in path]
    is_block = keys[0] == "layers"
    is_stacked = is_block and not isinstance(keys[1], int)
    name = ".".join(map(str, keys[1 + (not is_stacked) :] if is_block else keys))
    names = (_BLOCK if is_block else _TOP).get(name)
    lead = ("layers",) if is_stacked else ()
    if names is not None and weight.ndim == len(lead) + len(names) + 1:
        lead += ("experts",)
    if names is None or weight.ndim != len(lead) + len(names):
        shape = list(weight.shape)
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} of shape {shape} has no named axes; add it to "
            "jinfer/models/axes.py"
        )
    names = (*lead, *names)
    if not is_weight(weight):
        return PartitionSpec(*names)
    if split := getattr(weight, "split_axes", None):
        return split(names)
    return jax.tree.map(lambda x: PartitionSpec(*[None] * x.ndim), weight)
