"""Finds a model: a folder or file on disk, the default model, or a name on the hub."""

from __future__ import annotations

import os
import pathlib
import reprlib
from collections.abc import Sequence

from jinfer.checkpoints.default_model import DEFAULT_MODEL, default_model_path
from jinfer.config.fields import one_line


def locate(
    path_or_name: str | os.PathLike[str], revision: str | None = None
) -> pathlib.Path | None:
    """Returns the local Hugging Face folder or .gguf file; None for a name on the hub.

    A folder with exactly one .gguf file and no safetensors means that file. Paths that exist take
    precedence over names.

    Raises:
      FileNotFoundError: it is spelled like a path and not there, or the default cannot be had.
      ValueError: a file of another kind, an ambiguous folder, or a `revision` for something local.
    """
    name = os.fspath(path_or_name)
    path = expanded(name)
    if name and (path.exists() or name == DEFAULT_MODEL):
        if revision is not None:
            raise ValueError(
                one_line(f"revision={revision!r} is for names on the hub, {name!r} is local")
            )
        return _local(path) if path.exists() else default_model_path()
    looks_like_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if looks_like_path or path.suffix in (".gguf", ".safetensors") or not name:
        raise FileNotFoundError(f"no model at {name!r}: there is no such file or folder")
    return None


def expanded(name: str | os.PathLike[str]) -> pathlib.Path:
    """Returns `name` as a path, with "~" expanded.

    Raises:
      FileNotFoundError: the name is too long for a file, or "~" is of an unknown user.
    """
    try:
        path = pathlib.Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # the latter: "~nobody"
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileNotFoundError(
            f"no model at {reprlib.repr(os.fspath(name))}: no file can be there ({reason})"
        ) from error
    return path


def _local(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"{path} is not a .gguf file; give the folder of a Hugging Face model instead"
            )
        return path
    has_safetensors = any(path.glob("*.safetensors*"))
    ggufs = sorted(path.glob("*.gguf"))
    if has_safetensors or not ggufs:
        return path
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs)
        raise ValueError(f"{path} has several GGUF files; give the path of one of them: {names}")
    return ggufs[0]


def fetch_from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> pathlib.Path:
    """Returns the local copy of a hub repository; fetches the files that match.

    Subfolders and "consolidated" weights (Mistral's own copy of the others) are not fetched, since
    nothing reads them.

    Raises:
      FileNotFoundError: there is no such repository, or it cannot be reached.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # offline, unknown, gated, ill-formed names
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise FileNotFoundError(
            f"no local model {name!r}, and the hub did not give one ({type(error).__name__}: "
            f"{reason}); give a folder, a .gguf file, or {DEFAULT_MODEL!r}"
        ) from error
    return pathlib.Path(folder)
