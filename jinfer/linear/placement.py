"""Where arrays lie and in which layout: weights, KV pools, sampler state, pages on the host.

This module alone decides it, whether weights are loaded, quantized, served, used for drafting or
replaced. A weight's way is: quantized weights become floats on a CPU (`widen_on_cpu`) or are laid
out for kernels (`lay_out`); float matrices get the tiles that a TPU's loops read (`layouts`); all
arrays are bound to one device (`Placement.bind`). Values never change.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, SingleDeviceSharding

from jinfer.config import memory
from jinfer.config.typing import Params
from jinfer.linear.grids import FP8_DTYPES
from jinfer.linear.prepared import prepare
from jinfer.linear.qtensor import QTensor
from jinfer.linear.weight import format_of, is_weight, map_weights, weights
from pallas_kernels import dispatch
from pallas_kernels import target as target_lib
from pallas_kernels.target import Target

logger = logging.getLogger(__name__)

_TILE_ROWS = {"tpu7x": 16}  # what loops read 16-bit matrices in, where it isn't what JAX has


def place(
    params: Params,
    target: Target | None = None,
    impl: str = dispatch.AUTO,
    mesh: Mesh | None = None,
    *,
    is_owner: bool = False,
) -> Any:
    """Returns weights laid out for `target` and `impl`, on the device of `mesh`.

    See `Placement.of` and `Placement.place`, which also place what comes later beside them.
    """
    return Placement.of(params, impl, target=target, mesh=mesh).place(params, is_owner=is_owner)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where an engine's arrays lie, and what its weights are laid out for.

    Attributes:
      device: where all of them lie.
      target: the chip that weights are laid out for.
      impl: "auto", or the backend that multiplies quantized weights.
    """

    device: Any
    target: Target
    impl: str = dispatch.AUTO

    @classmethod
    def of(
        cls,
        arrays: Any,
        impl: str = dispatch.AUTO,
        *,
        target: Target | None = None,
        mesh: Mesh | None = None,
    ) -> Placement:
        """Returns the placement of an engine that serves `arrays`.

        Args:
          arrays: where the first bound array lies, else the first array, is the device; JAX's
            default device if there is none.
          impl: see the class.
          target: default: the stated or the current one.
          mesh: of one device, which is taken instead.

        Raises:
          ValueError: `mesh` has more than one device.
        """
        if mesh is None:
            device = _device_of(arrays)
        elif mesh.size == 1:
            device = mesh.devices.flat[0]
        else:
            axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
            raise ValueError(
                f"mesh must have one device, got {mesh.size} ({axes}): weights are not split over "
                "devices; leave mesh out, or give each device an engine of its own"
            )
        return cls(device, target or target_lib.current(), impl)

    def place(self, params: Params, *, is_owner: bool = False) -> Any:
        """Returns weights laid out and bound to the device; those that are already stay the same.

        Args:
          params: a tree of arrays and weights.
          is_owner: nobody else uses `params`. Then float matrices may be laid out anew, too, and
            each array is freed as soon as its copy is there, so that no more than one lies there
            twice.

        Raises:
          NotImplementedError: `impl` is named, and no kernel reads a weight's format; the message
            names the weight.
          ValueError: there is no backend `impl`, or an array was donated or deleted.
        """
        if self.impl == dispatch.AUTO:
            params = widen_on_cpu(params, self.target)
        params = lay_out(params, self.target, self.impl, is_owner=is_owner)
        if is_owner:
            chosen = layouts(params, target_lib.of_device(self.device))
            params = in_formats(params, chosen, is_owner=True)
        return self.bind(params)

    def bind(self, arrays: Any) -> Any:
        """Returns a tree of arrays as JAX's own, bound to the device, in the layout that they have.

        Arrays that lie there already are shared, not copied; those of numpy are copied, so that
        what their owner writes into them later changes nothing. All that an engine keeps is bound,
        since jit has other programs for arrays that are not.

        Raises:
          ValueError: an array was donated or deleted. TypeError: it is a tracer.
        """
        there = SingleDeviceSharding(self.device)
        done: dict[int, Any] = {}  # an array that stands in two places stays one

        def put(path: Any, x: Any) -> Any:
            if isinstance(x, jax.core.Tracer):
                name = jax.tree_util.keystr(path)
                raise TypeError(
                    f"weight {name} must be an array, got a tracer: call it outside of jit"
                )
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

    @property
    def host_memory_kind(self) -> str:
        """Where pages on the host lie: "pinned_host" if the backend has it, else "numpy"."""
        kinds = {memory.kind for memory in self.device.addressable_memories()}
        return "pinned_host" if "pinned_host" in kinds else "numpy"

    def to_host(self, arrays: Any) -> Any:
        """Copies arrays to the host, without waiting where its memory is pinned."""
        if self.host_memory_kind == "numpy":
            return jax.device_get(arrays)
        there = SingleDeviceSharding(self.device, memory_kind=self.host_memory_kind)
        return jax.device_put(arrays, there)

    def from_host(self, arrays: Any) -> Any:
        """Copies arrays of `to_host` back to the device."""
        return jax.device_put(arrays, SingleDeviceSharding(self.device))


def _device_of(arrays: Any) -> Any:
    own = [x for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)]
    own = [x for x in own if not isinstance(x, jax.core.Tracer)]
    own = [x for x in own if x.committed] + own or [jnp.zeros(())]
    return min(own[0].sharding.addressable_devices, key=lambda device: device.id)


def widen_on_cpu(
    params: Params, target: Target | None = None, *, dense_bytes: int | None = None
) -> Any:
    """Returns params whose quantized weights are floats where a CPU multiplies those faster.

    On CPUs XLA would convert codes to floats anew in each step, which takes ten times as long as
    the product. So there, if together they fit `dense_bytes`, weights whose inputs stay in float
    become dense f32, the very values that they stand for, and fp8 codes with fp8 inputs f32
    numbers. Integers with int8 inputs stay, at a byte each. For other targets nothing changes.

    Args:
      params: a tree of arrays and QTensors; may be traced.
      target: default: the current one.
      dense_bytes: default: a quarter of the host's memory.
    """
    if (target or target_lib.current()).kind != "cpu":
        return params
    quantized = [w for w in weights(params) if isinstance(w, QTensor)]
    wanted = sum(4 * w.size for w in quantized if w.fmt.act is None or w.fmt.kind in FP8_DTYPES)
    limit = memory.host_memory_bytes() // 4 if dense_bytes is None else dense_bytes
    if wanted > limit:
        logger.warning(
            "quantized weights stay as they are, which is slow on CPUs: as floats they would take "
            "%s, a quarter of the memory is %s",
            memory.format_size(wanted),
            memory.format_size(limit),
        )
        return params
    return map_weights(_widen, params)


def _widen(w: Any) -> Any:
    if not isinstance(w, QTensor):
        return w
    if w.fmt.act is None:
        return w.dequantize()
    if w.fmt.kind in FP8_DTYPES:
        return dataclasses.replace(w, q=w.q.astype(jnp.float32))
    if w.q.dtype == jnp.int4:
        return dataclasses.replace(w, q=w.q.astype(jnp.int8))
    return w


def lay_out(
    params: Params,
    target: Target | None = None,
    impl: str = dispatch.AUTO,
    *,
    is_owner: bool = False,
) -> Any:
    """Returns params in which each QTensor lies as the kernels of `target` read it, if any does.

    All else stays as it is, weights that were laid out before too.

    Args:
      params: a tree of arrays and weights; may be abstract under `jax.eval_shape`.
      target: default: the current one.
      impl: as for `prepare`.
      is_owner: free the codes of a weight as soon as they are laid out anew.

    Raises:
      NotImplementedError: as for `prepare`; the message names the weight.
    """
    done: dict[int, Any] = {}  # a weight that stands in two places stays one

    def visit(path: Any, w: Any) -> Any:
        if not isinstance(w, QTensor):
            return w
        if id(w) not in done:
            try:
                done[id(w)] = prepare(w, impl=impl, target=target)
            except NotImplementedError as error:
                raise NotImplementedError(f"{jax.tree_util.keystr(path)}: {error}") from None
            prepared = done[id(w)]
            if is_owner and prepared.q is not w.q:
                jax.block_until_ready(prepared.q)
                w.q.delete()
        return done[id(w)]

    return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_weight)


def layouts(params: Params, target: Target) -> Any:
    """Returns for each weight the layout in which loops of `target` read it, None: as it is.

    In the decode loop XLA for tpu7x reads a 16-bit matrix in tiles of 16 rows; JAX's arrays lie in
    tiles of 8. It would copy every such weight before the loop, in each call. The table of
    embeddings, of which rows are gathered, stays as it is, and so do weights that are objects:
    kernels read them as they are.
    """
    rows = _TILE_ROWS.get(target.name)
    tiles = None if rows is None else Layout((0, 1), tiling=((rows, 128), (2, 1)))

    def choose(path: Any, x: Any) -> Layout | None:
        is_matrix = not is_weight(x) and x.ndim == 2 and x.dtype.name == "bfloat16"
        is_table = path[:1] == (jax.tree_util.DictKey("embed"),)
        return tiles if is_matrix and not is_table else None

    return jax.tree_util.tree_map_with_path(choose, params, is_leaf=is_weight)


def formats_of(params: Params) -> Any:
    """Returns the format of each array, which one that was donated or deleted no longer tells."""
    return jax.tree.map(lambda x: x.format, params)


def in_formats(params: Params, wanted: Any, *, is_owner: bool = False) -> Any:
    """Returns params with every array in the format or the layout that is wanted for it.

    Args:
      params: a tree of arrays.
      wanted: as `formats_of` or `layouts` returns them; None: as it is.
      is_owner: free each array as soon as it lies elsewhere.
    """
    done: dict[int, Any] = {}  # an array that stands in two places stays one

    def put(form: Format | Layout | None, x: Any) -> Any:
        if form is None:
            return x
        goal = Format(form, x.sharding) if isinstance(form, Layout) else form
        if x.format == goal:
            return x
        if id(x) not in done:
            done[id(x)] = jax.device_put(x, goal)
            if is_owner:
                jax.block_until_ready(done[id(x)])
                x.delete()
        return done[id(x)]

    return jax.tree.map(put, wanted, params, is_leaf=lambda x: x is None)


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
            f"{_format_names(old)}, got {_format_names(new)}"
        )


def _format_names(params: Params) -> str:
    found = {str(format_of(w)) for w in weights(params) if format_of(w) is not None}
    return ", ".join(sorted(found)) or "floats"
