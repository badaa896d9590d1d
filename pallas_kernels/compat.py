"""Differences between JAX versions, and the simulators of GPU and TPU kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

_interpreted: Any = jax.make_user_context(default_value=None)


# Interpret modes: kernels simulated on the CPU, for checking numbers.


@contextlib.contextmanager
def interpret(*, detect_races: bool = False) -> Iterator[None]:
    """Simulates Pallas kernels on the CPU inside the context: slow, for tests on tiny shapes.

    Args:
      detect_races: also look for unsynchronised accesses. A race is reported on stdout and in
        `races_found(kind)`.
    """
    with _interpreted((detect_races,)):
        yield


def is_interpreting() -> bool:
    """Tells whether Pallas kernels are simulated in this context."""
    return _interpreted.value is not None


def why_not_interpret(kind: str) -> str | None:
    """Returns why kernels for `kind` ("gpu", "tpu") cannot be simulated here, or None."""
    if jax.default_backend() != "cpu":
        return (
            f"kernels are simulated on the CPU only, the default backend is {jax.default_backend()}"
        )
    if kind == "gpu" and jax.__version_info__ < (0, 11):
        return (
            "JAX's simulator of GPU kernels is complete enough from jax 0.11 (Python 3.12), "
            f"this is jax {jax.__version__}"
        )
    return None


def gpu_interpret_params() -> Any:
    """Returns the `interpret=` argument of a `plgpu.kernel` call: False outside `interpret()`."""
    if not is_interpreting():
        return False
    try:
        from jax.experimental.pallas.mosaic_gpu import (
            InterpretGPUParams,  # pyright: ignore[reportAttributeAccessIssue]  # 0.11 on
        )
    except ImportError:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    return InterpretGPUParams(detect_races=_interpreted.value[0])


def tpu_interpret_params() -> Any:
    """Returns the `interpret=` argument of a TPU `pallas_call`: False outside `interpret()`."""
    if not is_interpreting():
        return False
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=_interpreted.value[0])


def reset_interpreter() -> None:
    """Resets the simulator's state; needed after a simulated kernel failed, harmless otherwise."""
    from jax.experimental.pallas import tpu as pltpu

    pltpu.reset_tpu_interpret_mode_state()
    try:
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    except ImportError:
        return
    interpreter.reset_gpu_interpret_mode_state()


def races_found(kind: str = "tpu") -> bool:
    """Tells whether the last kernel simulated for `kind`, with `detect_races`, had a race."""
    if kind == "gpu":
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        races: Any = gpu_callbacks._races
    else:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

        races = interpreter.races
    return races is not None and bool(races.races_found)


# Contexts of a thread.


def capture_contexts(user_contexts: Iterable[Any] = ()) -> Callable[[], None]:
    """Returns a function that copies this thread's JAX contexts to the thread that calls it.

    These are the options that context managers have set here (`jax.default_device`,
    `jax.enable_x64`, `jax.default_matmul_precision`, `jax.set_mesh`, `jax.debug_nans`, ...). What
    `jax.config.update` sets applies to all threads already.

    Args:
      user_contexts: further contexts, made by `jax.make_user_context`.
    """
    from jax._src import config, mesh  # jax 0.12 keeps the mesh in context in the second

    kind = config.config_ext.Config
    found_in = (*vars(config).values(), *vars(mesh).values())
    states = [state for state in found_in if isinstance(state, kind)]
    states += [state for state in config.config_states.values() if isinstance(state, kind)]
    states += [context._obj for context in user_contexts]
    found = {id(state): (state, state.get_local()) for state in states}
    values = [pair for pair in found.values() if pair[1] is not config.config_ext.unset]

    def enter() -> None:
        for state, value in values:
            state.set_local(value)
            hook = getattr(state, "_update_thread_local_hook", None)
            if hook is not None:
                hook(value)

    return enter


# Differences between JAX versions.


def gpu_compiler_params(**kwargs: Any) -> Any:
    """Returns Mosaic GPU compiler parameters that set warpgroup semantics explicitly.

    The default is Lane in jax 0.10 and Warpgroup from 0.11.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kwargs.setdefault("lowering_semantics", plgpu.LoweringSemantics.Warpgroup)
    return plgpu.CompilerParams(**kwargs)


def gpu_load(ref: Any, *, layout: Any = None, optimized: bool = True) -> jax.Array:
    """Loads a whole (sliced) reference into registers in a given layout.

    `plgpu.load` requires an index in jax 0.10, deprecates it in 0.11 and has none in 0.12.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Any = plgpu.load
    if jax.__version_info__ < (0, 11):
        return load(ref, (), layout=layout, optimized=optimized)
    return load(ref, layout=layout, optimized=optimized)
