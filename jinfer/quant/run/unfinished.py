"""Stores finished layers of a quantization run, so that a killed run can be resumed.

<output>.unfinished/key.json            what the run is: another run starts anew
<output>.unfinished/layer-0003.safetensors  leaves of one finished layer
<output>.unfinished/layer-0003.json     their formats, and the layer's rows; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jinfer.checkpoints.files import writing
from jinfer.checkpoints.fill import Checkpoint
from jinfer.checkpoints.hf_files import read_json, read_safetensors_header
from jinfer.config.quant_format import QFormat
from jinfer.linear.qtensor import DoubleScale, QTensor
from jinfer.quant.recipe import Recipe
from jinfer.quant.solve import Row


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """The folder of one run."""

    folder: pathlib.Path

    @classmethod
    def open(
        cls,
        output: pathlib.Path,
        checkpoint: Checkpoint,
        recipe: Recipe,
        tokens: np.ndarray | None,
        is_sequential: bool,
        versions: Mapping[str, str],
    ) -> Unfinished:
        """Opens the folder of an earlier try of the same run, or creates a new one.

        Layers made by other `versions` of the software are not reused, so that one file does not
        mix the bits of both.
        """
        folder = output.with_name(output.name + ".unfinished")
        path = checkpoint.path
        # Files alone: the output may be a folder among them.
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
        key = {
            "model": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
            "recipe": repr(recipe),
            "tokens": None if tokens is None else hashlib.sha256(tokens.tobytes()).hexdigest(),
            "sequential": is_sequential,
            "versions": dict(versions),
        }
        if not (folder / "key.json").is_file() or read_json(folder / "key.json") != key:
            shutil.rmtree(folder, ignore_errors=True)
            with writing(folder / "key.json", left="nothing is left"):
                folder.mkdir(parents=True)
                try:
                    (folder / "key.json").write_text(json.dumps(key))
                except OSError:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return cls(folder)

    def add(self, index: int, layer: Mapping[str, Any], rows: list[Row]) -> None:
        """Stores a finished layer."""
        from safetensors.numpy import save_file

        tensors, formats = {}, {}
        for path, leaf in _flatten(layer):
            if isinstance(leaf, QTensor):
                formats[path] = [str(leaf.fmt), leaf.pad]
                parts = _parts(leaf)
                tensors |= {f"{path}/{name}": _storable(a) for name, a in parts.items()}
            else:
                tensors[path] = np.asarray(leaf)
        stem = self.folder / f"layer-{index:04}"
        data = {"formats": formats, "rows": [dataclasses.asdict(row) for row in rows]}
        partial = stem.with_suffix(".writing")
        left = f"{index} finished layers are kept there: run the same command again to go on"
        with writing(self.folder, left=left):
            save_file(tensors, stem.with_suffix(".safetensors"))
            partial.write_text(json.dumps(data))
            os.replace(partial, stem.with_suffix(".json"))

    def load(self) -> tuple[dict[int, dict[str, Any]], list[Row]]:
        """Returns the finished layers by index, and their rows."""
        layers, rows = {}, []
        for file in sorted(self.folder.glob("layer-*.json")):
            data = read_json(file)
            header = read_safetensors_header(file.with_suffix(".safetensors"))
            tensors = {name: jnp.asarray(np.array(t.read())) for name, t in header.items()}
            flat: dict[str, Any] = {n: a for n, a in tensors.items() if "/" not in n}
            for path, (fmt, pad) in data["formats"].items():
                prefix = path + "/"
                parts = {
                    n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)
                }
                flat[path] = _restore(parts, QFormat.parse(fmt), pad)
            layers[int(file.stem.removeprefix("layer-"))] = _unflatten(flat)
            rows += [
                Row(**{**row, "shape": tuple(row["shape"]), "notes": tuple(row["notes"])})
                for row in data["rows"]
            ]
        return layers, rows

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out = []
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        out += _flatten(value, f"{prefix}{key}.") if inner else [(prefix + key, value)]
    return out


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        *keys, last = path.split(".")
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _parts(x: QTensor) -> dict[str, Any]:
    parts = {"q": x.q, "scale": x.scale, "zero": x.zero}
    parts |= {"act_scale": x.act_scale, "perm": x.perm}
    if isinstance(x.scale, DoubleScale):
        del parts["scale"]
        parts |= {f"scale_{f}": getattr(x.scale, f) for f in ("codes", "absmax", "offset")}
    return {name: part for name, part in parts.items() if part is not None}


def _storable(a: Any) -> np.ndarray:
    return np.asarray(a.astype(jnp.int8) if a.dtype == jnp.int4 else a)


def _restore(parts: dict[str, Any], fmt: QFormat, pad: int) -> QTensor:
    if fmt.double_quant:
        scale: Any = DoubleScale(*(parts[f"scale_{f}"] for f in ("codes", "absmax", "offset")))
    else:
        scale = parts["scale"]
    q, zero = parts["q"], parts.get("zero")
    if fmt.bits == 4:
        q = q.astype(jnp.int4)
        zero = zero if zero is None or fmt.float_zero else zero.astype(jnp.int4)
    return QTensor(q, scale, zero, parts.get("act_scale"), parts.get("perm"), fmt, pad)
