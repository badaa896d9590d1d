"""Times a computation on its device.

Two programs make few and many calls; the difference of their times leaves out the host's overhead.
Calls cycle through several sets of inputs, so that weights are not in a cache.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of `samples`, the first and the third quartile."""

    seconds: float
    low: float
    high: float
    samples: int


def chain(f: Callable[..., Any], count: int) -> Callable[[Sequence[tuple[Any, ...]]], list[Any]]:
    """Returns a program that calls `f` `count` times, cycling through its sets of inputs.

    Each call waits for the one before, through an optimization barrier that also keeps XLA from
    merging equal calls on GPUs and TPUs (on CPUs XLA still merges calls on the same inputs). `f` is
    jitted, so that its kernels are lowered and compiled once, not `count` times.
    """
    f = jax.jit(f)

    def run(sets: Sequence[tuple[Any, ...]]) -> list[Any]:
        outs: list[Any] = []
        for i in range(count):
            first, *rest = sets[i % len(sets)]
            if outs:
                first, outs[-1] = lax.optimization_barrier((first, outs[-1]))
            outs.append(f(first, *rest))
        return outs

    return jax.jit(run)


def measure(
    f: Callable[..., Any],
    arg_sets: Sequence[tuple[Any, ...]],
    *,
    calls: int | None = None,
    samples: int = 20,
) -> Timing:
    """Returns the time of one call of `f` in a compiled chain of calls over `arg_sets`.

    All results stay in memory until the end. Use random inputs: a GPU draws less power on zeros
    and runs faster.

    Args:
      f: a pure function of arrays; the first argument must be one array.
      arg_sets: inputs of equal shapes, at least one; together larger than the caches.
      calls: calls in the short program; the long one has four times as many. None: as many as take
        3 ms, from 4 to 16, with results of at most 1 GB. More calls compile more slowly.
      samples: pairs of runs.
    """

    def clock(program: Callable[..., Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(arg_sets))
        return time.perf_counter() - start

    if calls is None:
        probe = chain(f, 1)
        clock(probe)  # compiles
        seconds = min(clock(probe) for _ in range(5))
        out_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(probe(arg_sets)))
        calls = max(4, min(16, int(3e-3 / seconds), int(1e9 / 4 / out_bytes)))
    few, many = chain(f, calls), chain(f, 4 * calls)
    for program in (few, many, few, many):  # compiles, then warms up
        clock(program)
    times = [(clock(many) - clock(few)) / (3 * calls) for _ in range(samples)]
    low, middle, high = statistics.quantiles(times, n=4)
    return Timing(middle, low, high, samples)


def jit_untuned(f: Callable[..., Any]) -> Callable[..., Any]:
    """Jits a reference that runs once, without XLA's autotuning of products on GPUs."""
    is_gpu = jax.devices()[0].platform in ("gpu", "cuda")
    return jax.jit(f, compiler_options={"xla_gpu_autotune_level": 0} if is_gpu else None)


def describe_accelerator() -> str | None:
    """Returns the name of the default device, or None if it is a CPU."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else device.device_kind


def device_works() -> bool:
    """Tells whether the default device still computes, which it does not after a kernel fault."""
    try:
        return bool(jax.block_until_ready(jnp.ones(()) + 1.0) == 2.0)
    except Exception:
        return False
