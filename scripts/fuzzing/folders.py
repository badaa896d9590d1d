"""Tiny model folders and files on disk, and copies of them that are damaged somewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_models import byte_tokenizer, hf_llama

from fuzzing.values import json_strange

VOCAB = 300
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def llama_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random weights of a Llama by their Hugging Face names."""
    rng = np.random.default_rng(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h = config["head_dim"]
    q, kv = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    shapes = {
        "model.embed_tokens.weight": (v, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (v, d),
    }
    for i in range(config["num_hidden_layers"]):
        parts = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": s for n, s in parts.items()}
        parts = {"gate": (f, d), "up": (f, d), "down": (d, f)}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": s for n, s in parts.items()}
        shapes |= {f"{layer}.{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
    return {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else (rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_folder(
    folder: Path, *, seed: int = 0, template: str | None = TEMPLATE, shards: int = 1, **changes: Any
) -> Path:
    """Writes a Llama of two layers with a tokenizer of bytes."""
    folder.mkdir(parents=True)
    config = hf_llama(vocab_size=VOCAB, eos_token_id=7, bos_token_id=65, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7], "top_k": 40}))
    tokenizer = byte_tokenizer(VOCAB)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    tensors = llama_tensors(config, seed)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, index = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def write_gguf_of(folder: Path, file: Path, kind: str | None) -> Path:
    """Writes a folder's model as a GGUF file."""
    more = [] if kind is None else ["--type", kind]
    _command(["convert", "--model", str(folder), "--export", "gguf", "--output", str(file), *more])
    return file


def _command(argv: list[str]) -> None:
    from jinfer.cli.main import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(argv)
    if status:
        raise RuntimeError(f"jinfer {argv[0]} gave status {status}: {printed.getvalue()}")


def quantize_folder(folder: Path, output: Path, *more: str) -> Path:
    """Writes a folder's model quantized."""
    command = ["quantize", "--model", str(folder), "--output", str(output), "--held-out", "0"]
    _command([*command, *more])
    return output


def temporary_folder(owner: Any) -> Path:
    """Makes a folder that goes when its owner does."""
    folder = tempfile.mkdtemp(prefix="jinfer-fuzz-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class Shelf:
    """The sound models, each written when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._num_damaged = 0
        base = root / "plain"
        self._makers: dict[str, Callable[[], Path]] = {
            "plain": lambda: write_folder(base),
            "other": lambda: write_folder(root / "other", seed=1, template=None),
            "sharded": lambda: write_folder(root / "sharded", shards=3),
            "plain.gguf": lambda: write_gguf_of(self["plain"], root / "plain.gguf", None),
            "q8.gguf": lambda: write_gguf_of(self["plain"], root / "q8.gguf", "Q8_0"),
            "native": lambda: quantize_folder(
                self["plain"], root / "native", *["--method", "rtn", "--format", "int4-g32"]
            ),
            "gptq": lambda: quantize_folder(
                self["plain"],
                root / "gptq",
                *["--method", "rtn", "--format", "int4-g32", "--export", "gptq"],
            ),
            "ct": lambda: quantize_folder(
                self["plain"],
                root / "ct",
                *[
                    "--method",
                    "rtn",
                    "--format",
                    "int8-channel:dyn",
                    "--export",
                    "compressed-tensors",
                ],
            ),
            "fp8": lambda: quantize_folder(
                self["plain"],
                root / "fp8",
                "--method",
                "fp8",
                "--format",
                "fp8-e4m3-tensor:dyn",
                "--export",
                "fp8",
            ),
        }

    @property
    def names(self) -> list[str]:
        """Names of all models."""
        return list(self._makers)

    def __getitem__(self, name: str) -> Path:
        path = self.root / name
        return path if path.exists() else self._makers[name]()

    def damaged(self, rng: random.Random, name: str) -> Damage:
        """Returns what to do to a copy of a model; `Damage.make` does it."""
        is_file = name.endswith(".gguf")
        kinds: list[Callable[..., Damage]] = (
            [_bytes] if is_file else [_json, _json, _bytes, _header, _gone]
        )
        return rng.choice(kinds)(rng, self[name])

    def copy(self, name: str) -> Path:
        """Returns the place of a fresh copy."""
        self._num_damaged += 1
        target = self.root / f"damaged-{self._num_damaged % 4}"
        for old in (target, target.with_suffix(".gguf")):
            if old.is_dir():
                shutil.rmtree(old)
            old.unlink(missing_ok=True)
        source = self[name]
        if source.is_file():
            target = target.with_suffix(source.suffix)
            shutil.copyfile(source, target)
        else:
            shutil.copytree(source, target)
        return target


@dataclasses.dataclass(frozen=True)
class Damage:
    """A change of a copied model.

    Attributes:
      text: what is changed, for a report.
      names: what a refusal may name.
      apply: does it to the copy at a path.
      keeps_meaning: whether the model is as good as before, if it is taken at all.
    """

    text: str
    names: tuple[str, ...]
    apply: Callable[[Path], None]
    keeps_meaning: bool = False


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    """All places of a JSON value, but few of long lists and of vocabularies."""
    found = [path] if path else []
    if isinstance(value, dict):
        items = list(value.items())
        for key, child in items[:40]:
            found += _paths(child, (*path, key))
    elif isinstance(value, list):
        for i, child in enumerate(value[:3]):
            found += _paths(child, (*path, i))
    return found


def _json(rng: random.Random, source: Path) -> Damage:
    files = sorted(f.name for f in source.glob("*.json"))
    weights = [4 if f in ("config.json", "model.safetensors.index.json") else 1 for f in files]
    file = rng.choices(files, weights)[0]
    value = json.loads((source / file).read_text())
    if rng.random() < 0.1:
        text = rng.choice(["", "{", "[]", "null", "7", '"a"', "[" * 5000, '{"a": NaN}', "\ufeff{}"])
        return Damage(f"{file} := {text[:20]!r}", (file,), lambda p: _write(p / file, text))
    places = _paths(value)
    path = rng.choice(places) if places else ()
    does_drop = rng.random() < 0.25
    new = json_strange(rng)

    def apply(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if path:
            if does_drop:
                del holder[path[-1]]
            else:
                holder[path[-1]] = new
        _write(folder / file, json.dumps(value))

    where = ".".join(map(str, path))
    names = (file, *(str(key) for key in path if isinstance(key, str)), file.split(".")[0])
    more = ("tokenizer",) if "token" in file else ("layers.", "lm_head", "tensor", "weight")
    change = "dropped" if does_drop else f":= {repr(new)[:60]}"
    return Damage(f"{file}: {where} {change}", (*names, *more), apply)


def _write(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def _bytes(rng: random.Random, source: Path) -> Damage:
    files = [source] if source.is_file() else sorted(f for f in source.iterdir() if f.is_file())
    file = rng.choice(files)
    size = file.stat().st_size
    head = min(size, rng.choice([16, 400, 4000, size]))
    kind = rng.choice(["cut", "flip", "flip", "append", "zero", "splice"])
    at, bit, count = rng.randrange(max(1, head)), rng.randrange(8), rng.choice([1, 8, 100])

    def apply(path: Path) -> None:
        target = path if path.is_file() else path / file.name
        data = bytearray(target.read_bytes())
        if kind == "cut":
            del data[at:]
        elif kind == "append":
            data += b"\xff" * count
        elif kind == "zero":
            data[at : at + count] = bytes(len(data[at : at + count]))
        elif kind == "splice":
            del data[at : at + count]
        elif data:
            data[at] ^= 1 << bit
        target.write_bytes(bytes(data))

    text = f"{file.name}: {kind} at {at}" + (f" bit {bit}" if kind == "flip" else f" x {count}")
    return Damage(text, _names_of(file), apply)


def _names_of(file: Path) -> tuple[str, ...]:
    """What speaks of a file: its name, or that the tokenizer or the weights are wrong."""
    if "token" in file.name or file.suffix == ".jinja":
        return (file.name, "tokenizer", "template")
    return (file.name, file.suffix, "config", "tensor", "weight", "damaged")


def _header(rng: random.Random, source: Path) -> Damage:
    """Changes an entry of a safetensors header."""
    file = rng.choice(sorted(source.glob("*.safetensors")))
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    key = rng.choice(["dtype", "shape", "data_offsets", "shape", "data_offsets"])
    new: Any = rng.choice([json_strange(rng), header[other][key]])
    if key == "dtype":
        new = rng.choice(["F64", "F16", "I8", "F4", "BF16", new])
    kind = rng.choice(["set", "set", "drop", "rename", "twice"])

    def apply(folder: Path) -> None:
        target = folder / file.name
        data = target.read_bytes()
        rows = dict(header)
        if kind == "set":
            rows[name] = {**rows[name], key: new}
        elif kind == "drop":
            rows[name] = {k: v for k, v in rows[name].items() if k != key}
        elif kind == "rename":
            rows = {(f"{k}.x" if k == name else k): v for k, v in rows.items()}
        text = json.dumps(rows)
        if kind == "twice":
            text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(rows[name])}}}"
        raw = text.encode("utf-8", "surrogatepass")
        target.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    text = f"{file.name}: {kind} {name}"
    if kind in ("set", "drop"):
        text += f" {key}" + (f" := {repr(new)[:60]}" if kind == "set" else "")
    return Damage(text, (name.rpartition(".")[0], file.name, "safetensors"), apply)


def _gone(rng: random.Random, source: Path) -> Damage:
    """Removes a file, makes a folder of it, or drops or bends a tensor."""
    file = rng.choice(sorted(f.name for f in source.iterdir() if f.is_file()))
    kind = rng.choice(["remove", "folder", "tensor", "shape", "nan"])
    if kind in ("remove", "folder"):

        def apply(folder: Path) -> None:
            (folder / file).unlink()
            if kind == "folder":
                (folder / file).mkdir()

        names = (*_names_of(Path(file)), "shard", "folder")
        return Damage(f"{file}: {kind}", names, apply)
    shard = rng.choice(sorted(source.glob("*.safetensors"))).name
    names = sorted(load_file(source / shard)) if "fp8" not in str(source) else []
    if not names:
        return _json(rng, source)
    name = rng.choice(names)

    def bend(folder: Path) -> None:
        tensors = load_file(folder / shard)
        if kind == "tensor":
            del tensors[name]
        elif kind == "shape":
            tensors[name] = np.ascontiguousarray(tensors[name][:-1])
        elif tensors[name].dtype.kind == "f":
            value = np.array(tensors[name])
            value.flat[0] = np.nan
            tensors[name] = value
        save_file(tensors, folder / shard)

    return Damage(f"{shard}: {kind} {name}", (name, shard, "tensor", name.rpartition(".")[0]), bend)
