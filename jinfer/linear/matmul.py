"""x @ w: a weight that is an object multiplies itself, arrays are multiplied here."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jinfer.linear.weight import Weight, is_weight


def matmul(
    x: Float[Array, "*B I"], w: Float[Array, "..."] | Weight, *, is_table: bool = False
) -> Float[Array, "*B O"]:
    """Returns x @ w in float32: the only place where the type of a weight picks the maths.

    Args:
      x: any float dtype.
      w: an array [I, O], or an object that multiplies itself.
      is_table: an array `w` is [O, I], the table of a tied embedding.
    """
    if is_weight(w):
        return w.matmul(x)
    return _product("...i,oi->...o" if is_table else "...i,io->...o", x, w)


def _product(equation: str, x: Array, w: Any) -> Array:
    """x times a dense w, accumulated in float32.

    They are multiplied in their own dtype, so that nothing is cast, or in float32 if theirs differ.
    A single 16-bit row gets a second one: XLA on CPUs multiplies two rows or more in a library, and
    one row ten times slower in a loop of its own. Accelerators pad the rows in any case.
    """
    dtype = x.dtype if x.dtype == w.dtype else jnp.dtype(jnp.float32)
    is_padded = dtype.itemsize == 2 and x.size == x.shape[-1]
    shape = x.shape[:-1]
    if is_padded:
        x = jnp.concatenate([x.reshape(1, -1), jnp.zeros((1, x.shape[-1]), x.dtype)])
    y = jnp.einsum(equation, x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
    return y[:1].reshape(*shape, -1) if is_padded else y
