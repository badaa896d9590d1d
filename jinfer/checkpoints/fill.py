"""Fills params on the device from an open checkpoint, one parameter in host memory at a time.

A checkpoint is anything with the members of `Checkpoint`: tensors under Hugging Face names and in
Hugging Face's layout ([O, I]).
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jinfer.checkpoints.families import (
    Path,
    Placement,
    expected_shapes,
    is_linear,
    placements,
    unflatten,
)
from jinfer.checkpoints.formats.expert_stack import describe_forms, stack_experts
from jinfer.checkpoints.formats.interop import Dense, Weight
from jinfer.config.fields import shown
from jinfer.config.model import ModelConfig
from jinfer.config.quant_format import QFormat
from jinfer.linear.qtensor import QTensor, dequantize, split_outputs
from jinfer.linear.weight import format_of

DTYPES = ("float32", "bfloat16", "float16")
_log = logging.getLogger(__name__)


class Checkpoint(Protocol):
    """Interface of an open checkpoint.

    Attributes:
      path: named in messages.
      config: with `tie_word_embeddings` and the bias flags that match the tensors.
      hf: the same as a config.json, for writers.
      dtype: one of `DTYPES`, the dtype in which the weights are to be computed.
      shapes: Hugging Face name -> shape of every tensor that is loaded.
    """

    path: pathlib.Path
    config: ModelConfig
    hf: dict[str, Any]
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """Returns a tensor as stored, or in `dtype` if reading converts it."""
        ...

    def read_quantized(self, name: str) -> Weight | None:
        """Returns a weight [I, O] that is stored quantized; None for a plain tensor."""
        ...

    def label(self, name: str) -> str:
        """Returns the file's own name of a tensor of `shapes`, for messages."""
        ...

    def spell(self, path: Path, expert: int = 0) -> str:
        """Returns the file's own name of the tensor for a parameter (of that expert)."""
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
        # An array is not a dtype, though numpy would take its own for one.
        found = None if isinstance(dtype, jax.Array | np.ndarray) else jnp.dtype(dtype)
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        found = None  # numpy reads texts as Python
    if found is None or found.name not in DTYPES:
        raise ValueError(f"dtype must be 'auto', {', '.join(DTYPES)}, got {shown(dtype)}")
    return found


Quantizer: TypeAlias = Callable[[str, jax.Array | QTensor], QTensor]
"""Called with the name ("layers.0.attn.q") and weight of each linear while loading."""


def fill(
    checkpoint: Checkpoint, dtype: np.dtype[Any], *, quantize: Quantizer | None = None
) -> dict[str, Any]:
    """Returns the params of `checkpoint.config`, every leaf on the default device in `dtype`.

    Quantized weights of the checkpoint become QTensor leaves with their stored scales. `quantize`
    gets one f32 weight at a time, so that no two are in memory in float.

    All names and shapes are checked before the first tensor is read.

    Raises:
      ValueError: a tensor is unknown, missing, there twice, or not of the shape of the config.
    """
    plan = plan_of(checkpoint)
    shapes = expected_shapes(checkpoint.config)
    leaves: dict[Path, jax.Array | QTensor] = {}
    mixed: list[str] = []  # stacks that have no quantized form
    for path, pieces in plan.items():
        name = ".".join(map(str, path[:-1]))
        is_rounded = quantize is not None and is_linear(path)
        wanted = np.dtype(np.float32) if is_rounded else dtype
        leaf, forms = _load(checkpoint, pieces, shapes[path], wanted)
        if len(forms) > 1 and format_of(leaf) is None and any(forms.values()):
            mixed.append(f"{name} ({describe_forms(forms)})")
        if is_rounded and forms and format_of(leaf) is None:
            raise ValueError(
                f"checkpoint {checkpoint.path}: {name} is stored quantized, and quantization "
                f"while loading needs float weights: leave quantization out"
            )
        leaves[path] = quantize(name, leaf) if quantize is not None and is_rounded else leaf
    if mixed:
        _log.warning(
            "%s: experts of a layer whose formats cannot be stacked are kept in float, which takes "
            "more memory: %d stacks, the first %s",
            checkpoint.path,
            len(mixed),
            mixed[0],
        )
    return unflatten(leaves, checkpoint.config)


Pieces: TypeAlias = list[tuple[str, Placement]]
"""The tensors that fill one parameter: several for experts."""


def forms_of(pieces: Pieces, weights: Sequence[Weight | None]) -> dict[int, QFormat | None]:
    """Returns the format of each expert; None for float."""
    return {
        place.expert or 0: format_of(weight)
        for (_, place), weight in zip(pieces, weights, strict=True)
    }


def places_of(config: ModelConfig, name: str, where: str) -> tuple[Placement, ...]:
    """Returns the targets of a tensor; raises ValueError, naming the checkpoint, if unknown."""
    try:
        return placements(config, name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def plan_of(checkpoint: Checkpoint) -> dict[Path, Pieces]:
    """Returns the pieces of each parameter, in the order of `expected_shapes`.

    Raises:
      ValueError: a tensor is unknown, missing, there twice, or not of the shape of the config.
    """
    config, where = checkpoint.config, f"checkpoint {checkpoint.path}"
    expected = expected_shapes(config)
    plan: dict[Path, Pieces] = {path: [] for path in expected}
    for name, shape in checkpoint.shapes.items():
        places, label = places_of(config, name, where), checkpoint.label(name)
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
    checkpoint: Checkpoint, pieces: Pieces, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[jax.Array | QTensor, dict[int, QFormat | None]]:
    """Returns a parameter, and the formats of its pieces; none if all are plain tensors."""
    weights = [checkpoint.read_quantized(name) for name, _ in pieces]
    if all(weight is None for weight in weights):
        return _load_plain(checkpoint, pieces, shape, dtype), {}
    return _load_quantized(checkpoint, pieces, weights, dtype), forms_of(pieces, weights)


def _load_plain(
    checkpoint: Checkpoint, pieces: Pieces, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> jax.Array:
    """Returns a parameter whose pieces are plain tensors."""
    name, place = pieces[0]
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
    checkpoint: Checkpoint,
    pieces: Pieces,
    weights: Sequence[Weight | None],
    dtype: np.dtype[Any],
) -> jax.Array | QTensor:
    """Returns a parameter with quantized pieces; pieces that are None in `weights` are plain.

    Pieces that cannot form one QTensor become float one by one.
    """
    cut = [
        None if weight is None else _cut_outputs(weight, place)
        for (_, place), weight in zip(pieces, weights, strict=True)
    ]
    order = sorted(range(len(pieces)), key=lambda i: pieces[i][1].expert or 0)
    place = pieces[0][1]
    quantized = [weight for i in order if isinstance(weight := cut[i], QTensor)]
    if place.transpose and len(quantized) == len(pieces):
        stacked = quantized[0] if place.expert is None else stack_experts(quantized)
        if stacked is not None:
            return stacked
    dense = [_dense(checkpoint, pieces[i], cut[i], dtype) for i in order]
    array = jnp.stack(dense) if place.expert is not None else dense[0]
    return array if place.transpose else jnp.swapaxes(array, -1, -2)


def _dense(
    checkpoint: Checkpoint,
    piece: tuple[str, Placement],
    weight: Weight | None,
    dtype: np.dtype[Any],
) -> jax.Array:
    """Returns one piece [I, O]."""
    if isinstance(weight, QTensor):
        return dequantize(weight).astype(dtype)
    if isinstance(weight, Dense):
        return jnp.asarray(weight.w).astype(dtype)
    name, place = piece
    rows = _cut(checkpoint.read(name, dtype), place)  # [O, I]
    return jnp.swapaxes(jax.device_put(np.ascontiguousarray(rows)), -1, -2).astype(dtype)


def _cut_outputs(weight: Weight, place: Placement) -> Weight:
    """Returns the outputs of a fused projection that belong to one parameter."""
    if place.rows is None:
        return weight
    start, stop = place.rows
    if isinstance(weight, Dense):
        return dataclasses.replace(weight, w=weight.w[:, start:stop])
    if any(edge % weight.fmt.block for edge in {start, stop} - {weight.shape[-1]}):
        values = np.asarray(dequantize(weight))[:, start:stop]
        return Dense(values, f"a cut at output {start} or {stop} divides a block", weight.fmt.bits)
    widths = [start, stop - start]
    if stop < weight.shape[-1]:
        widths.append(weight.shape[-1] - stop)
    return split_outputs(weight, widths)[1]


def _cut(tensor: np.ndarray, place: Placement) -> np.ndarray:
    """Like `place.take`, before any transposition."""
    taken = place.take(tensor)
    return taken.swapaxes(-1, -2) if place.transpose else taken
