"""Compiles the native kernels of a CPU at their first use, and registers them with XLA.

The sources lie in this package. The shared library goes to the cache, named by the digest of all
that it is made of, so that a change of sources, flags, compiler or XLA's headers makes another one;
it is written under a temporary name and renamed, so that processes may build at the same time.

Environment:
  JINFER_NATIVE=0: no native kernels.
  JINFER_ISA: "avx2" or "avx512", not the best that the machine runs.
  CXX: the compiler; default g++, clang++ or c++, whichever is there first.
  JINFER_CACHE: the cache; default $XDG_CACHE_HOME/jinfer or ~/.cache/jinfer.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "paged_attention": "paged_attention/native.cc",
    "page_write": "page_write/native.cc",
    "packed_matmul": "packed_matmul/native.cc",
}
_HEADERS = ("native/simd.h", "native/parallel.h")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wno-psabi")
_ISA_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mavx512vnni", "-mprefer-vector-width=512"),
    ),
}
_LEVELS = ("", "avx2", "avx512")  # of isa.cc


@dataclasses.dataclass(frozen=True)
class Native:
    """The native kernels of this process.

    Attributes:
      isa: "avx2" or "avx512"; "" if there are none.
      why_not: why there are none, in one line; None if there are.
      path: the library.
    """

    isa: str = ""
    why_not: str | None = None
    path: Path | None = None

    def target(self, op: str) -> str:
        """The name under which XLA knows an op's kernel.

        It has the digest of the library: a program that was compiled for another one, and is found
        in JAX's cache of programs, never calls this one.
        """
        assert self.path is not None
        return f"jinfer_{op}_{self.path.stem.rpartition('-')[2]}"


@functools.cache
def native() -> Native:
    """Compiles the kernels if they are not in the cache, and registers them; once a process.

    If that fails, one line of the log says why.
    """
    if os.environ.get("JINFER_NATIVE") == "0":
        return Native(why_not="JINFER_NATIVE=0")
    try:
        return _load()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("no native CPU kernels, XLA computes instead: %s", reason)
        return Native(why_not=reason)


def _load() -> Native:
    cache = cache_folder()
    compiler = find_compiler()
    isa_library = _library(cache, compiler, "isa", ("native/isa.cc",), ())
    level = ctypes.CDLL(str(isa_library)).jinfer_isa_level()
    isa = os.environ.get("JINFER_ISA") or _LEVELS[level]
    if isa not in _LEVELS:
        raise RuntimeError(f"JINFER_ISA must be one of {', '.join(_LEVELS[1:])}, got {isa!r}")
    if not isa or _LEVELS.index(isa) > level:
        raise RuntimeError(f"the processor does not run {isa or 'AVX2'}")
    path = _library(cache, compiler, isa, tuple(SOURCES.values()), _ISA_FLAGS[isa])
    library, found = ctypes.CDLL(str(path)), Native(isa, None, path)
    for op in SOURCES:
        handler = jax.ffi.pycapsule(getattr(library, f"jinfer_{op}"))
        jax.ffi.register_ffi_target(found.target(op), handler, platform="cpu")
    return found


def cache_folder() -> Path:
    """Returns the folder of libraries."""
    if stated := os.environ.get("JINFER_CACHE"):
        return Path(stated).expanduser() / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jinfer" / "native"


def find_compiler() -> str:
    """Returns the C++ compiler.

    Raises:
      RuntimeError: there is none.
    """
    names = [stated] if (stated := os.environ.get("CXX")) else ["g++", "clang++", "c++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise RuntimeError(f"no C++ compiler ({', '.join(names)})")


def _library(
    cache: Path, compiler: str, name: str, sources: tuple[str, ...], flags: tuple[str, ...]
) -> Path:
    """Returns a shared library of `sources`, from the cache or compiled now."""
    include = Path(jax.ffi.include_dir())
    digest = hashlib.sha256(repr((_FLAGS, flags, _version(compiler))).encode())
    headers = [_ROOT / header for header in _HEADERS] + sorted(include.rglob("*.h"))
    for path in [*(_ROOT / source for source in sources), *headers]:
        digest.update(path.read_bytes())
    library = cache / f"{name}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    if len(sources) > 1:
        logger.warning("compiling native CPU kernels for %s (once) ...", name)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects = [f"{folder}/{i}.o" for i in range(len(sources))]
        running = []
        for source, out in zip(sources, objects):
            op = Path(source).parent.name
            command = [compiler, *_FLAGS, *flags, f"-DNAME=jinfer_{op}", "-isystem", str(include)]
            command += ["-c", str(_ROOT / source), "-o", out]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate()[1] for process in running]
        for process, error in zip(running, errors):
            if process.returncode:
                raise RuntimeError(f"{compiler} failed: {error.strip()[:300]}")
        made = f"{folder}/library.so"
        subprocess.run([compiler, "-shared", "-o", made, *objects], check=True, capture_output=True)
        os.replace(made, library)
    if len(sources) > 1:
        logger.warning("compiled in %.0f s", time.perf_counter() - begin)
    return library


@functools.cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return done.stdout
