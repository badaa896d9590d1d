"""What a weight is: an array, or an object that multiplies itself. Knows no format and no model.

Any class with a method `matmul` is such an object: a `QTensor`, a `PreparedWeight`, an adapter. It
must be a pytree, because steps take weights as arguments, and have `shape`, `ndim`, `dtype` and
`nbytes` like an array. The functions here treat it as one leaf of a params tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from jinfer.config.quant_format import QFormat


@runtime_checkable
class Weight(Protocol):
    """A weight that is not a plain array.

    It may also have `bind(inputs)`, which returns the weight for one step (see `bind`), and
    `split_axes(names)`, which returns it with a PartitionSpec for each array (`models.axes`).
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [I, O], or [E, I, O] of experts."""
        ...

    @property
    def dtype(self) -> Any:
        """What the weight is worth in float."""
        ...

    def matmul(self, x: Array) -> Array:
        """Returns x [..., I] @ this weight [I, O], in float32."""
        ...


def is_weight(x: Any) -> TypeGuard[Weight]:
    """Whether `x` multiplies itself; also the `is_leaf` of tree functions over params."""
    return hasattr(x, "matmul")


def weights(tree: Any) -> list[Any]:
    """Returns the weights of a params tree: arrays, and objects that multiply themselves."""
    return jax.tree.leaves(tree, is_leaf=is_weight)


def map_weights(change: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Returns a params tree of the same form with `change(weight, ...)` for each weight."""
    return jax.tree.map(change, tree, *rest, is_leaf=is_weight)


def flatten_weights(tree: Any) -> list[tuple[Any, Any]]:
    """Returns (path, weight) for each weight of a params tree."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)[0]


def bind(tree: Any, inputs: Any) -> Any:
    """Returns a params tree whose weights know the inputs of one step; called as the step begins.

    A weight with a method `bind` is replaced by `weight.bind(inputs)`, a pytree with a `matmul`
    of the same shape: an adapter notes there which of its matrices each token is multiplied with.
    In stacked layers it gets a leading axis L in every leaf, since a scan slices them all. All
    other weights stay as they are.

    Args:
      tree: params, or a part of them.
      inputs: what the step computes: a `StepBatch` for the blocks of an engine's steps, whose
        tokens are the rows that `matmul` gets.
    """
    return map_weights(lambda w: w.bind(inputs) if hasattr(w, "bind") else w, tree)


def format_of(w: Any) -> QFormat | None:
    """Returns the number format of a quantized weight; None for floats."""
    return getattr(w, "fmt", None)


def to_dense(w: Any) -> Array:
    """Returns a quantized weight as the float32 array that it stands for; others as they are."""
    return w.dequantize() if format_of(w) is not None else w


def array_bytes(x: Any) -> int:
    """Bytes of an array (or its ShapeDtypeStruct), where dtypes below a byte are packed."""
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else 0
    num_items = 1
    for size in x.shape:
        num_items *= size
    return -(-num_items * (bits or x.dtype.itemsize * 8) // 8)


def num_bytes(tree: Any) -> int:
    """Bytes that the arrays of a tree take on an accelerator, where int4 takes half a byte."""
    return sum(array_bytes(leaf) for leaf in jax.tree.leaves(tree))
