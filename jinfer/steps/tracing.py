"""Whether JAX is tracing: for code that runs programs and reads their results, which cannot be
traced."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jax.extend.core import get_opaque_trace_state


@functools.cache
def _top_level() -> Any:
    """JAX's state outside of all transforms; each thread starts there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(get_opaque_trace_state).result()


def refuse_tracing() -> None:
    """Raises if a caller of `LLM` is inside a function that JAX transforms.

    Raises:
      ValueError: the caller runs under jit, grad, vmap or their like.
    """
    if get_opaque_trace_state() != _top_level():
        raise ValueError(
            "an LLM has state and cannot be used inside jax.jit, grad, vmap or another transform: "
            "call it outside, or use jinfer.generate, which is pure"
        )
