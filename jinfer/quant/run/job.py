"""Runs a quantization from an open checkpoint to a finished folder; resumable and atomic."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import SequenceKey

from jinfer.checkpoints.families import is_linear, names_of
from jinfer.checkpoints.fill import Checkpoint, places_of
from jinfer.checkpoints.hf import HFCheckpoint
from jinfer.checkpoints.hf_files import read_safetensors_header
from jinfer.checkpoints.save import Extras, check_export, check_free, save_folder
from jinfer.config.fields import require
from jinfer.config.quant_format import QFormat
from jinfer.config.typing import Params
from jinfer.linear.placement import widen_on_cpu
from jinfer.linear.qtensor import QTensor
from jinfer.linear.weight import array_bytes, format_of, weights
from jinfer.models.model import Model
from jinfer.quant.evaluate import Evaluation, evaluate_both
from jinfer.quant.layer import Layer
from jinfer.quant.pipeline import linear_names, quantize_model
from jinfer.quant.recipe import Recipe
from jinfer.quant.run.report import Report
from jinfer.quant.run.unfinished import Unfinished
from jinfer.quant.sensitivity import Choice
from jinfer.quant.solve import Row, stand_in

_log = logging.getLogger(__name__)

REPORT_NAMES = ("quantization.json", "quantization.md", "quantization.svg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A quantization run.

    Attributes:
      output: folder to create.
      recipe: methods by module.
      label: description of the recipe, for the report.
      export: file format of the result.
      tokens: calibration sequences i32 [n, T], or None.
      calibration: their source, for the report.
      held_out: sequences i32 [m, T] for the evaluation, or None.
      held_out_source: their source.
      is_sequential: see `pipeline.quantize_model`.
      files: other files to write into the folder, such as the tokenizer's.
      versions: of the software, for the report; a run resumes layers of the same versions only.
      choices: widths chosen by `sensitivity.choose`.
      vocabulary: the tokenizer as metadata, for a GGUF file.
    """

    output: pathlib.Path
    recipe: Recipe
    label: str
    export: str = "native"
    tokens: np.ndarray | None = None
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    held_out: np.ndarray | None = None
    held_out_source: str = "held-out text"
    is_sequential: bool = True
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choices: Sequence[Choice] = ()
    vocabulary: Mapping[str, Any] | None = None


def run_job(
    job: Job,
    checkpoint: Checkpoint,
    model: Model,
    params: Params,
    *,
    on_layer: Callable[[int, list[Row]], None] | None = None,
    on_resume: Callable[[int, pathlib.Path], None] | None = None,
) -> Report:
    """Quantizes, evaluates, writes the folder and its report.

    Finished layers are kept in `<output>.unfinished` until the end; a second run with the same
    model, recipe, tokens and versions resumes from there.

    Args:
      job: the run.
      checkpoint: of the float model.
      model: the model.
      params: its parameters.
      on_layer: called with the index and rows of each finished layer.
      on_resume: called first, with the number of layers of an earlier run and their folder, if
        there are any.

    Raises:
      FileExistsError: the output is there already.
      OSError: the disk is full or fails; the message says what is left.
      ValueError: see `check_source`, `check_job`, `quantize_model` and `save_folder`.
    """
    check_source(checkpoint)
    check_job(job, model)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    unfinished = Unfinished.open(
        job.output, checkpoint, job.recipe, job.tokens, job.is_sequential, job.versions
    )
    done, old_rows = unfinished.load()
    if done and on_resume is not None:
        on_resume(len(done), unfinished.folder)
    quantized, new_rows = _quantize(job, model, params, done, unfinished, on_layer)
    rows = [*old_rows, *new_rows]
    seconds["quantize"] = time.perf_counter() - start

    start = time.perf_counter()
    quality: dict[str, Evaluation] = {}
    if job.held_out is not None:
        found = evaluate_both(model, widen_on_cpu(quantized), params, job.held_out)
        quality = {"float": found[1], "quantized": found[0]}
        seconds["evaluate"] = time.perf_counter() - start

    start = time.perf_counter()
    report = _report(job, checkpoint, quantized, rows, quality, seconds)
    size = _save(job, checkpoint, model, quantized, report)
    seconds["save"] = time.perf_counter() - start
    report = dataclasses.replace(
        report,
        disk_bytes=size,
        quantized_disk_bytes=_quantized_disk_bytes(job.output, model, rows),
        seconds=seconds,
    )
    for name, text in zip(REPORT_NAMES, (report.to_json(), report.to_markdown())):
        (job.output / name).write_text(text, encoding="utf-8")
    unfinished.remove()
    return report


def _quantize(
    job: Job,
    model: Model,
    params: Params,
    done: Mapping[int, Layer],
    unfinished: Unfinished,
    on_layer: Callable[[int, list[Row]], None] | None,
) -> tuple[dict[str, Any], list[Row]]:
    """Quantizes the layers that are not `done`, and stores each finished one in `unfinished`."""

    def keep(index: int, layer: dict[str, Any], rows: list[Row]) -> None:
        unfinished.add(index, layer, rows)
        if on_layer is not None:
            on_layer(index, rows)

    tokens = None if job.tokens is None else jnp.asarray(job.tokens, jnp.int32)
    try:
        return quantize_model(
            model,
            params,
            job.recipe,
            tokens,
            is_sequential=job.is_sequential,
            done=done,
            on_layer=keep,
        )
    except ValueError:  # a second run would end the same way, so there is nothing to resume
        unfinished.remove()
        raise


def _report(
    job: Job,
    checkpoint: Checkpoint,
    quantized: Params,
    rows: list[Row],
    quality: Mapping[str, Evaluation],
    seconds: Mapping[str, float],
) -> Report:
    """Returns the report of a run whose files are not written yet: their sizes are 0."""
    linears = [x for x in weights(quantized) if format_of(x) is not None]
    others = [x for x in weights(quantized) if format_of(x) is None]
    return Report(
        model=str(checkpoint.path),
        recipe=job.label,
        export=job.export,
        calibration=job.calibration,
        rows=rows,
        quantized_params=sum(x.size for x in linears),
        quantized_bytes=sum(x.nbytes for x in linears),
        other_params=sum(x.size for x in others),
        other_bytes=sum(array_bytes(x) for x in others),
        disk_bytes=0,
        quantized_disk_bytes=0,
        seconds=seconds,
        peak_bytes=peak_memory(),
        quality=quality,
        held_out=job.held_out_source,
        versions=job.versions,
        choices=job.choices,
        rules=job.recipe.to_rows(),
    )


def _save(job: Job, checkpoint: Checkpoint, model: Model, quantized: Params, report: Report) -> int:
    """Writes the output folder with a first report; returns the bytes written."""
    if getattr(checkpoint, "kv_scales", None):
        _log.warning("%s: its scales of a KV cache are left out: weights change", checkpoint.path)
    # A GGUF file's float matrices were 8-bit blocks, which f16 represents better than bf16.
    stored = "float16" if checkpoint.path.is_file() else checkpoint.dtype
    texts = dict(zip(REPORT_NAMES, (report.to_json(), report.to_markdown(), report.to_svg())))
    return save_folder(
        job.output,
        model,
        quantized,
        checkpoint.hf,
        export=job.export,
        dtype=stored,
        extras=Extras(files={**job.files, **texts}, vocabulary=job.vocabulary),
    )


def check_source(checkpoint: Checkpoint) -> None:
    """Raises ValueError if a linear is stored quantized, since it would be rounded twice."""
    for name in checkpoint.quantized_names if isinstance(checkpoint, HFCheckpoint) else ():
        if any(
            is_linear(place.path)
            for place in places_of(checkpoint.config, name, f"checkpoint {checkpoint.path}")
        ):
            raise ValueError(
                f"{checkpoint.path}: {name.removesuffix('.weight')} is quantized already; quantize "
                f"the float model, or write the folder in another format with `jinfer convert`"
            )


def check_job(job: Job, model: Model) -> None:
    """Checks in about a second what would otherwise fail at the end of a run.

    Raises:
      FileExistsError: the output is there already.
      ValueError: the recipe fits no linear, or the export cannot hold what the recipe makes.
    """
    check_free(job.output)
    job.recipe.check(linear_names(model))
    _check_groups(model, job.recipe)
    check_export(model, _stand_ins(model, job.recipe), job.export)


def _check_groups(model: Model, recipe: Recipe) -> None:
    """Raises ValueError for a group longer than all its linears, whose padding would take memory.

    The usual length 128 is always allowed, since the padding of a tiny model is small.
    """
    widest: dict[QFormat, int] = {}
    layers = model.abstract_params()["layers"]
    for name in linear_names(model):
        if (method := recipe.of(name)) is not None:
            _, i, block, part = name.split(".")
            width = layers[int(i)][block][part]["w"].shape[-2]
            widest[method.format] = max(width, widest.get(method.format, 0))
    for fmt, width in widest.items():
        require(
            fmt.group <= max(width, 128),
            f"{fmt}: a group of {fmt.group} inputs is longer than any linear it is for, which have "
            f"at most {width}; use a smaller group, or channel",
        )


def _stand_ins(model: Model, recipe: Recipe) -> dict[str, Any]:
    """Returns params whose quantized linears have some values, one shared object per kind."""
    made: dict[tuple[Any, ...], QTensor] = {}

    def make(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = tuple(key.idx if isinstance(key, SequenceKey) else key.key for key in path)
        method = recipe.of(".".join(map(str, keys[:-1]))) if is_linear(keys) else None
        if method is None:
            return leaf
        key = (leaf.shape, method)
        if key not in made:
            made[key] = stand_in(leaf.shape, method)
        return made[key]

    return jax.tree.map_with_path(make, model.abstract_params())


def _quantized_disk_bytes(folder: pathlib.Path, model: Model, rows: list[Row]) -> int:
    """Returns the bytes of the quantized linears in a folder's safetensors files; 0 without any."""
    modules = set()
    for row in rows:
        _, index, block, part = row.module.split(".")
        names = names_of(model.config, ("layers", int(index), block, part, "w"))
        modules |= {name.removesuffix(".weight") for name in names}
    total = 0
    for file in folder.glob("*.safetensors"):
        for name, tensor in read_safetensors_header(file).items():
            if name.endswith(".bias"):
                continue
            while name and name not in modules:
                name = name.rpartition(".")[0]
            total += tensor.read().nbytes if name else 0
    return total


def peak_memory() -> int:
    """Returns the largest resident memory of this process in bytes; 0 where it is not known."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
