"""Picks the backend of an op from its list of `Impl`s, by name or by what can run.

A named backend is used, or refused with the reason; `"auto"` takes the first that can run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import compat
from pallas_kernels import target as target_lib

AUTO = "auto"

OPS = (
    "paged_attention",
    "page_write",
    "packed_matmul",
    "quant_matmul",
    "fp8_matmul",
    "int8_matmul",
)


@dataclasses.dataclass(frozen=True)
class Impl:
    """One backend of an op.

    Attributes:
      name: what users call it: "xla", "mosaic_gpu", "mosaic_tpu", ...
      why_not: `why_not(target, *args, **kwargs) -> str | None`, the reason why this backend cannot
        run these arguments on `target`, or None if it can. It depends on shapes and dtypes only.
        Used by `pick`, the error of a named choice, tests' skip reasons, and `explain`.
      run: the computation, called with the same `*args, **kwargs`.
    """

    name: str
    why_not: Callable[..., str | None]
    run: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Decision:
    """The result of `pick` for one call of an op: the chosen name, and each backend's reason."""

    op: str
    choice: str
    chosen: str | None
    reasons: tuple[tuple[str, str | None], ...]
    shapes: str

    def __str__(self) -> str:
        lines = [f"{self.op}({self.shapes}), impl={self.choice!r}"]
        for name, reason in self.reasons:
            if name == self.chosen:
                state = "chosen"
            elif reason is None:
                state = (
                    "could run, not preferred" if self.choice == AUTO else "could run, not named"
                )
            else:
                state = f"cannot run: {reason}"
            lines.append(f"  {name:<16} {state}")
        return "\n".join(lines)


class Decisions(tuple[Decision, ...]):
    """Distinct decisions in the order of their calls; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(str(d) for d in self) or "no dispatched op was called"


# Both are part of jit's cache key, so that a cached program is never used for another choice.
_forced = jax.make_user_context(default_value=())
_recording = jax.make_user_context(default_value=None)
_recorders: dict[object, list[Decision]] = {}

# This package's contexts of a thread: see `compat.capture_contexts`.
CONTEXTS = (_forced, target_lib._stated, compat._interpreted)


@contextlib.contextmanager
def use_impl(default: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Sets the backend of ops called with `impl="auto"` inside the context.

    `use_impl("xla")` sets it for every op, `use_impl(quant_matmul="mosaic_gpu")` for one. The
    innermost context wins, and an op's own `impl=` argument wins over all. A backend that cannot
    run raises, as with `impl=`. Part of jit's cache key: jitted functions are traced anew under it.

    Raises:
      ValueError: an op of that name does not exist.
    """
    if unknown := sorted(set(by_op) - set(OPS)):
        raise ValueError(f"use_impl: expected ops among {list(OPS)}, got {unknown}")
    forced: dict[str, str] = dict(_forced.value)
    if default is not None:
        forced.update({op: default for op in OPS})
    forced.update(by_op)
    with _forced(tuple(sorted(forced.items()))):
        yield


def pick(op: str, impls: Sequence[Impl], choice: str, /, *args: Any, **kwargs: Any) -> Impl:
    """Returns the backend that runs `op` on these arguments.

    Args:
      op: name of the op, one of `OPS`.
      impls: its backends, the preferred first.
      choice: "auto", or the name of a backend.
      *args: arguments of `run`.
      **kwargs: keyword arguments of `run`.

    Raises:
      ValueError: no backend is called `choice`.
      NotImplementedError: the named backend cannot run, with the reason; or none can.
    """
    if choice == AUTO:
        choice = dict(_forced.value).get(op, AUTO)
    names = [i.name for i in impls]
    if choice != AUTO and choice not in names:
        raise ValueError(f"{op}: impl must be one of {[AUTO, *names]}, got {choice!r}")
    where = target_lib.current()
    recorder = _recorders.get(_recording.value)
    reasons: dict[str, str | None] = {}
    chosen = None
    for impl in impls:
        is_candidate = chosen is None and choice in (AUTO, impl.name)
        if is_candidate or recorder is not None:
            reasons[impl.name] = impl.why_not(where, *args, **kwargs)
            if is_candidate and reasons[impl.name] is None:
                chosen = impl
    if recorder is not None:
        decision = Decision(
            op=op,
            choice=choice,
            chosen=None if chosen is None else chosen.name,
            reasons=tuple(reasons.items()),
            shapes=_shapes((args, kwargs)),
        )
        if decision not in recorder:
            recorder.append(decision)
    if chosen is not None:
        return chosen
    if choice != AUTO:
        raise NotImplementedError(f"{op}: impl {choice!r} cannot run here: {reasons[choice]}")
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"{op}: no backend can run here: {why}")


def whole_number(name: str, value: Any) -> int:
    """Returns a static argument of an op as an int.

    Raises:
      ValueError: it is not a whole number.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} must be a whole number that is known when a program is traced, got {value!r}"
        ) from None


def explain(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Decisions:
    """Returns the backend of each dispatched op in `f(*args, **kwargs)`, and why not the others.

    `f` is an op or any function that calls ops, such as a whole model step. It is only traced, so
    nothing runs and arguments may be `jax.ShapeDtypeStruct`s. Print the result:

        paged_attention(bf16[8,32,128] ...), impl='auto'
          mosaic_gpu       cannot run: needs a Hopper GPU, the target is cpu
          mosaic_tpu       cannot run: needs a TPU, the target is cpu
          xla              chosen

    If a named backend cannot run, the decision has no chosen backend; no error is raised.
    """
    token = object()
    found = _recorders[token] = []
    try:
        with _recording(token):
            arrays, rest = _split((args, kwargs))

            def call(arrays: list[Any]) -> Any:
                a, k = rest(arrays)
                return f(*a, **k)

            try:
                jax.eval_shape(call, arrays)
            except NotImplementedError:
                if not any(d.chosen is None for d in found):
                    raise
    finally:
        del _recorders[token]
    return Decisions(found)


def _split(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Splits a tree into its arrays and a function that restores it from them."""
    leaves, structure = jax.tree.flatten(tree)
    # Numpy scalars stay static: 1 / np.sqrt(64) may be a static argument.
    is_array = [
        hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, np.generic)
        for x in leaves
    ]

    def rebuild(arrays: list[Any]) -> Any:
        it = iter(arrays)
        return jax.tree.unflatten(
            structure, [next(it) if dynamic else x for x, dynamic in zip(leaves, is_array)]
        )

    return [x for x, dynamic in zip(leaves, is_array) if dynamic], rebuild


def _shapes(tree: Any) -> str:
    """Returns the distinct array types of `tree`, in order: "bfloat16[8,32,128] int32[8]"."""
    arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape") and hasattr(x, "dtype")]
    return " ".join(f"{x.dtype}[{','.join(map(str, x.shape))}]" for x in arrays)
