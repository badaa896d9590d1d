"""Examines a quantized folder of any origin, since a folder that loads may still be wrong.

Signs that need no other model: values that are not finite, scales that the reader refuses (see
`interop.check_scales`) or that are zero over codes that are not, inverted scales, zero points of
the other GPTQ version. With the float model that it came from: that each weight is its float times
the scale that was folded into its norm, up to rounding.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jinfer.checkpoints.families import Path, expected_shapes, is_linear
from jinfer.checkpoints.fill import Checkpoint, Pieces, fill, plan_of
from jinfer.checkpoints.formats.expert_stack import common_format, describe_forms
from jinfer.checkpoints.formats.interop import Dense, Weight
from jinfer.checkpoints.hf import HFCheckpoint
from jinfer.checkpoints.hf_files import read_json
from jinfer.checkpoints.load import open_checkpoint
from jinfer.config.fields import require
from jinfer.config.quant_format import QFormat
from jinfer.config.typing import Params
from jinfer.linear.qtensor import DoubleScale, QTensor, dequantize
from jinfer.linear.weight import to_dense
from jinfer.models.model import Model

REPORT = "quantization.json"
FOLD_TOLERANCE = 1e-4  # of float outputs: sums in another order in f32 move them by 1e-6
# Root mean square of a linear's weights: language models have 0.005 to 0.5.
LARGEST_RMS = 8.0
SMALLEST_RMS = 1e-5
# Weights average zero, and so do codes less zero points, within a few hundredths of a step.
LARGEST_MEAN_STEPS = 0.5
# Relative difference of a weight from its float: rounding gives 0.01 (8 bits) to 0.7 (2 bits).
LARGEST_DISTANCE = {2: 1.2, 3: 0.7}
LARGEST_DISTANCE_ELSE = 0.4


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Result of an examination.

    Attributes:
      problems: (module, problem).
      facts: lines about what was examined.
    """

    problems: list[tuple[str, str]]
    facts: list[str]


def examine(
    folder: str | os.PathLike[str], source: str | os.PathLike[str] | None = None
) -> Diagnosis:
    """Examines every tensor of a folder.

    Args:
      folder: with config.json and safetensors in any format that `load` reads.
      source: the float model that it was made from; default: the one that the folder's own report
        names, if it is still there.

    Raises:
      FileNotFoundError, ValueError: it cannot be opened: truncated, mislabelled, not quantized.
    """
    checkpoint = open_checkpoint(folder)
    require(
        isinstance(checkpoint, HFCheckpoint) and checkpoint.is_quantized,
        f"{folder} is not a quantized folder: its config.json has no quantization_config",
    )
    plan = plan_of(checkpoint)
    problems: list[tuple[str, str]] = []
    weights: dict[str, _Form] = {}
    num_quantized = num_dense = num_floats = 0
    formats: dict[str, int] = {}
    for name in checkpoint.shapes:
        try:
            weight = checkpoint.read_quantized(name)
        except ValueError as error:
            module = name.removesuffix(".weight")
            text = str(error).removeprefix(f"{checkpoint.path}: ").removeprefix(f"{module}: ")
            problems.append((module, text))
            continue
        if weight is None:
            num_floats += 1
            tensor = np.asarray(checkpoint.read(name, np.dtype(np.float32)), np.float32)
            bad = int(np.sum(~np.isfinite(tensor)))
            if bad:
                problems.append((name, f"{bad} of {tensor.size} values are NaN or infinite"))
            continue
        num_quantized += 1
        if isinstance(weight, Dense):
            num_dense += 1
            weights[name] = _Form(None, weight.bits)
        else:
            weights[name] = _Form(weight.fmt, weight.fmt.bits)
            formats[str(weight.fmt)] = formats.get(str(weight.fmt), 0) + 1
        problems += [(name.removesuffix(".weight"), p) for p in signs(weight)]
    kinds = ", ".join(f"{count} {fmt}" for fmt, count in sorted(formats.items()))
    facts = [f"{num_quantized} quantized weights ({kinds}) and {num_floats} float tensors read"]
    if num_dense:
        facts.append(f"{num_dense} quantized weights can be held in float only")
    if not problems:  # else weights may be missing here
        facts += _mixed_experts(checkpoint, plan, weights)
    report = pathlib.Path(folder) / REPORT
    if report.is_file():
        source = _examine_report(read_json(report), source, problems, facts)
    if source is None:
        facts.append("no float model to compare with: name it with --model")
    elif not problems:  # what is broken already needs no comparison
        _compare(checkpoint, source, _bits(plan, weights), problems, facts)
    return Diagnosis(problems, facts)


@dataclasses.dataclass(frozen=True)
class _Form:
    """Format of a weight (None if it is kept in float), and its stored bits."""

    format: QFormat | None
    bits: int


def _mixed_experts(
    checkpoint: Checkpoint, plan: Mapping[Path, Pieces], weights: Mapping[str, _Form]
) -> list[str]:
    """Returns a line on stacks of experts with quantized members but no common format."""
    found = []
    for path, pieces in plan.items():
        forms = {place.expert or 0: weights.get(name, _Form(None, 16)) for name, place in pieces}
        formats = {expert: form.format for expert, form in forms.items()}
        if len(formats) == 1 or not any(formats.values()):
            continue
        num_inputs = expected_shapes(checkpoint.config)[path][-2]
        if common_format(list(formats.values()), num_inputs) is None:
            found.append(f"{'.'.join(map(str, path[:-1]))} ({describe_forms(formats)})")
    if not found:
        return []
    return [
        f"{len(found)} stacks of experts have no quantized form in common and are held in float, "
        f"the first {found[0]}"
    ]


def _bits(plan: Mapping[Path, Pieces], weights: Mapping[str, _Form]) -> dict[Path, dict[int, int]]:
    """Stored bits of each parameter's quantized pieces, by expert."""
    return {
        path: {place.expert or 0: weights[name].bits for name, place in pieces if name in weights}
        for path, pieces in plan.items()
    }


def signs(weight: Weight) -> list[str]:
    """Returns the problems of one weight by itself."""
    found = []
    if isinstance(weight, QTensor):
        stored = weight.scale.absmax if isinstance(weight.scale, DoubleScale) else weight.scale
        arrays = {"scales": stored, "zero points": weight.zero, "input scale": weight.act_scale}
        for what, array in arrays.items():
            if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
                continue
            bad = int(jnp.sum(~jnp.isfinite(array.astype(jnp.float32))))
            if bad:
                found.append(f"{bad} of {array.size} {what} are NaN or infinite")
        scale = weight.scales()
        bad = _num_lost(weight, scale)
        if bad:
            found.append(f"{bad} of {weight.size} codes are not zero, but their scales are")
        w = dequantize(weight)
    else:
        w = jnp.asarray(weight.w)
    if found:
        return found
    bad = int(jnp.sum(~jnp.isfinite(w)))
    if bad:
        return [f"{bad} of {w.size} weights are NaN or infinite"]
    rms = float(jnp.sqrt(jnp.mean(jnp.square(w))))
    if rms > LARGEST_RMS or 0 < rms < SMALLEST_RMS:
        found.append(f"weights of size {rms:.3g} (root mean square): scales look inverted")
    if rms == 0:
        found.append("all weights are zero")
    if isinstance(weight, QTensor) and weight.fmt.kind == "int" and weight.zero is not None:
        steps = float(jnp.mean(w) / jnp.mean(weight.scales()))
        if abs(steps) > LARGEST_MEAN_STEPS:
            found.append(
                f"weights average {steps:+.2f} steps: zero points look like those of the other "
                f"GPTQ version (v1 stores one less)"
            )
    return found


def _num_lost(weight: QTensor, scale: jax.Array) -> int:
    """Returns the number of nonzero codes whose scale is zero."""
    if bool(jnp.all(scale != 0)):
        return 0
    fmt = dataclasses.replace(weight.fmt, double_quant=False)
    ones = (scale == 0).astype(jnp.float32)
    return int(jnp.sum(dequantize(dataclasses.replace(weight, scale=ones, fmt=fmt)) != 0))


def _examine_report(
    report: dict[str, Any],
    source: str | os.PathLike[str] | None,
    problems: list[tuple[str, str]],
    facts: list[str],
) -> str | os.PathLike[str] | None:
    """Reads the measurements of the folder's run; returns its float model, if present."""
    rows = [row for row in report.get("rows", []) if row.get("fold_error") is not None]
    if rows:
        worst = max(row["fold_error"] for row in rows)
        facts.append(
            f"folding was checked when the folder was made: float outputs of blocks moved by at "
            f"most {worst:.1e}"
        )
    for row in rows:
        if not row["fold_error"] <= FOLD_TOLERANCE:
            problems.append(
                (row["module"], f"folding moved float outputs of its block by {row['fold_error']}")
            )
    named = str(report.get("model", ""))
    return named if source is None and named and pathlib.Path(named).exists() else source


def _compare(
    checkpoint: Checkpoint,
    source: str | os.PathLike[str],
    bits: Mapping[Path, Mapping[int, int]],
    problems: list[tuple[str, str]],
    facts: list[str],
) -> None:
    """Compares every linear with the float model's, scaled as folded into the norm before it."""
    original = open_checkpoint(source)
    shapes, others = (expected_shapes(c.config) for c in (checkpoint, original))
    require(
        all(others.get(path) == shape for path, shape in shapes.items()),
        f"{source} is another model than {checkpoint.path}: their shapes differ",
    )
    dtype = np.dtype(np.float32)
    new, old = fill(checkpoint, dtype), fill(original, dtype)
    worst, num = 0.0, 0
    for module, distance, width in distances(Model(checkpoint.config), new, old, bits):
        num, worst = num + 1, max(worst, distance)
        if not distance <= LARGEST_DISTANCE.get(width, LARGEST_DISTANCE_ELSE):
            problems.append((module, f"differs from its float weight by {distance:.0%}"))
    facts.append(f"{num} weights compared with {source}: they differ by at most {worst:.1%}")


def distances(
    model: Model, new: Params, old: Params, bits: Mapping[Path, Mapping[int, int]]
) -> Iterator[tuple[str, float, int]]:
    """For each linear, and each expert of one: name, ||W' - s W|| / ||s W||, and bits.

    s is what was folded into the norm before it, read off the norms. Where AWQ folds into another
    linear, whose scales are not to be seen any more (v and o, up and down), the best s is taken
    for each input of o and down, and for each output of v and up.
    """
    plus_one = 1.0 if model.config.norm_plus_one else 0.0
    for path in expected_shapes(model.config):
        if not is_linear(path):
            continue
        _, layer, block, part, _ = path
        here, before = new["layers"][layer], old["layers"][layer]
        weight = here[block][part]["w"]
        w = to_dense(weight)
        reference = before[block][part]["w"]
        if part not in ("o", "down"):
            norms = [p[f"{block}_norm"]["scale"] + plus_one for p in (before, here)]
            s = jnp.where(norms[0] == norms[1], 1.0, norms[0] / norms[1])  # 0 / 0: not folded
            reference = reference * s.reshape(*[1] * (reference.ndim - 2), -1, 1)
        axis = {"o": -1, "down": -1, "v": -2, "up": -2}.get(str(part))
        if axis is not None:
            dot = jnp.sum(w * reference, axis=axis, keepdims=True)
            square = jnp.sum(reference * reference, axis=axis, keepdims=True)
            reference = reference * (dot / jnp.maximum(square, 1e-30))
        sizes = [jnp.linalg.norm(m, axis=(-2, -1)).reshape(-1) for m in (w - reference, reference)]
        name = f"layers.{layer}.{block}.{part}"
        for i, distance in enumerate((sizes[0] / jnp.maximum(sizes[1], 1e-30)).tolist()):
            label = f"{name}, expert {i}" if w.ndim == 3 else name
            yield label, distance, bits.get(path, {}).get(i, 16)
