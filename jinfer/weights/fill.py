"""Tensors of an open checkpoint -> params on the device, one parameter in host memory at a time.

Knows no file format: a checkpoint is anything with the members of `Checkpoint`, its tensors under
Hugging Face names and in Hugging Face layout ([O, I]).
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jinfer.config import ModelConfig
from jinfer.fields import shown
from jinfer.models.families import (
    Path,
    Placement,
    expected_shapes,
    is_linear,
    placements,
    unflatten,
)
from jinfer.qtensor import QTensor, dequantize, split_outputs
from jinfer.weights.interop import Dense, Weight

DTYPES = ("float32", "bfloat16", "float16")


class Checkpoint(Protocol):
    """What `fill` needs to know of a checkpoint.

    Attributes:
      path: named in messages.
      config: with `tie_word_embeddings` and the bias flags as the tensors say.
      hf: the same as a config.json, for those who write one.
      dtype: one of `DTYPES`: what the weights are meant to be computed in.
      shapes: Hugging Face name -> shape, for every tensor that is not to be skipped.
    """

    path: pathlib.Path
    config: ModelConfig
    hf: dict[str, Any]
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """Returns a tensor, in `dtype` if it must be converted anyway, else as stored."""
        ...

    def read_quantized(self, name: str) -> Weight | None:
        """Returns a weight that is stored quantized, [I, O]; None: the tensor is a plain one."""
        ...

    def label(self, name: str) -> str:
        """Returns what the file itself calls a tensor of `shapes`, for messages."""
        ...

    def spell(self, path: Path, expert: int = 0) -> str:
        """Returns the name that the tensor for a parameter (of that expert) has in such files."""
        ...


def resolve_dtype(dtype: Any, stored: str) -> np.dtype[Any]:
    """Returns the dtype to load weights in.

    Args:
      dtype: a name or dtype among `DTYPES`; None or "auto" for `stored` on accelerators and float32
        on CPUs, whose bfloat16 dots are ten times slower.
      stored: the checkpoint's own dtype.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        dtype = "float32" if jax.default_backend() == "cpu" else stored
    try:
        # An array is no dtype, though numpy would take its own for one.
        found = (
            None if hasattr(dtype, "shape") and not isinstance(dtype, type) else jnp.dtype(dtype)
        )
    except (TypeError, ValueError):
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"dtype must be 'auto', {', '.join(DTYPES)}, got {shown(dtype)}")
    return found


Quantizer: TypeAlias = Callable[[str, jax.Array | QTensor], QTensor]
"""What is done to each linear of a block while loading; gets its name, "layers.0.attn.q"."""


def fill(
    checkpoint: Checkpoint, dtype: np.dtype[Any], *, quantize: Quantizer | None = None
) -> dict[str, Any]:
    """Returns the params of `checkpoint.config`, every leaf on the default device in `dtype`.

    Weights that the checkpoint keeps quantized become QTensor leaves, whose scales stay as stored.
    Those that `quantize` makes are made one by one, from f32: no two are there in float at once.

    All names and shapes are checked before the first tensor is read.

    Raises:
      ValueError: a tensor is unknown, missing, there twice, or not of the shape of the config.
    """
    plan = _plan(checkpoint)
    shapes = expected_shapes(checkpoint.config)
    leaves = {}
    for path, pieces in plan.items():
        if quantize is not None and is_linear(path):
            leaf = _load(checkpoint, pieces, shapes[path], np.dtype(np.float32))
            leaves[path] = quantize(".".join(map(str, path[:-1])), leaf)
        else:
            leaves[path] = _load(checkpoint, pieces, shapes[path], dtype)
    return unflatten(leaves, checkpoint.config)


_Pieces = list[tuple[str, Placement]]


def _plan(checkpoint: Checkpoint) -> dict[Path, _Pieces]:
    """Returns the pieces of each parameter, in the order of `expected_shapes`."""
    config, where = checkpoint.config, f"checkpoint {checkpoint.path}"
    expected = expected_shapes(config)
    plan: dict[Path, _Pieces] = {path: [] for path in expected}
    for name, shape in checkpoint.shapes.items():
        places, label = placements(config, name), checkpoint.label(name)
        for place in places:
            _check_shape(config, label, shape, place, where)
            taken = plan[place.path]
            if any(place.expert == other.expert or other.expert is None for _, other in taken):
                raise ValueError(f"{where} holds {checkpoint.spell(place.path)} twice")
            taken.append((name, place))
        stops = [place.rows[1] for place in places if place.rows is not None]
        if stops and max(stops) != shape[-2 if len(shape) > 1 else 0]:
            raise ValueError(
                f"{where}: {label} is {list(shape)}, but the config makes it {max(stops)} rows"
            )
    missing = []
    for path, pieces in plan.items():
        experts = {place.expert for _, place in pieces}
        needed = {None} if experts <= {None} else set(range(expected[path][0]))
        missing += [checkpoint.spell(path, expert or 0) for expert in needed - experts]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{where} lacks {missing[0]}{more}; a {config.family} model of "
            f"{config.num_layers} layers needs it"
        )
    return plan


def _check_shape(
    config: ModelConfig, label: str, shape: tuple[int, ...], place: Placement, where: str
) -> None:
    want = expected_shapes(config)[place.path]
    if place.expert is not None:
        want = want[1:]
    if place.transpose:
        want = (*want[:-2], want[-1], want[-2])
    part = f"rows {place.rows[0]} to {place.rows[1]} of " if place.rows else ""
    if len(want) == len(shape):
        got = place.take(np.broadcast_to(np.zeros((), bool), shape)).shape
        if (got if not place.transpose else (*got[:-2], got[-1], got[-2])) == want:
            return
    raise ValueError(
        f"{where}: {label} is {list(shape)}, but the config asks for {part}{list(want)} there"
    )


def _load(
    checkpoint: Checkpoint, pieces: _Pieces, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> jax.Array | QTensor:
    name, place = pieces[0]
    first = checkpoint.read_quantized(name)
    if first is not None:
        return _load_quantized(checkpoint, pieces, first, dtype)
    transpose = place.transpose
    if place.expert is None:
        tensor = _cut(checkpoint.read(name, dtype), place)
    else:  # a stack is filled in the checkpoint's layout and transposed as a whole
        stack_shape = (shape[0], shape[2], shape[1]) if transpose else shape
        tensor = np.empty(stack_shape, dtype)
        for name, place in pieces:
            tensor[place.expert] = _cut(checkpoint.read(name, dtype), place)
    is_view_of_file = not tensor.flags.writeable
    if is_view_of_file and not transpose and tensor.dtype == dtype:
        tensor = np.array(tensor)  # on CPUs jax may keep the very buffer that it is given
    # The device transposes and converts: on accelerators that is far faster than numpy.
    array = jax.device_put(np.ascontiguousarray(tensor))
    if transpose:
        array = jnp.swapaxes(array, -1, -2)
    return array.astype(dtype)


def _load_quantized(
    checkpoint: Checkpoint, pieces: _Pieces, first: Weight, dtype: np.dtype[Any]
) -> jax.Array | QTensor:
    weights = {pieces[0][1].expert or 0: _cut_outputs(first, pieces[0][1])}
    for name, place in pieces[1:]:
        weight = checkpoint.read_quantized(name)
        if weight is None:
            raise ValueError(
                f"checkpoint {checkpoint.path}: {checkpoint.label(name)} is not quantized, but "
                f"other experts of its layer are"
            )
        weights[place.expert or 0] = _cut_outputs(weight, place)
    stack = [weights[expert] for expert in sorted(weights)]
    place = pieces[0][1]
    alike = len({jax.tree.structure(w) for w in stack if isinstance(w, QTensor)}) == 1
    if place.transpose and alike and all(isinstance(w, QTensor) for w in stack):
        if place.expert is None:
            return stack[0]  # pyright: ignore[reportReturnType]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    dense = [dequantize(w) if isinstance(w, QTensor) else jnp.asarray(w.w) for w in stack]
    array = jnp.stack(dense) if place.expert is not None else dense[0]
    return (array if place.transpose else jnp.swapaxes(array, -1, -2)).astype(dtype)


def _cut_outputs(weight: Weight, place: Placement) -> Weight:
    """The outputs of a fused projection that belong to one parameter."""
    if place.rows is None:
        return weight
    start, stop = place.rows
    if isinstance(weight, Dense):
        return Dense(weight.w[:, start:stop], weight.reason)
    widths = (start, stop - start, weight.shape[-1] - stop)
    return split_outputs(weight, widths)[1]


def _cut(tensor: np.ndarray, place: Placement) -> np.ndarray:
    """Like `place.take`, before any transposition."""
    taken = place.take(tensor)
    return taken.swapaxes(-1, -2) if place.transpose else taken
