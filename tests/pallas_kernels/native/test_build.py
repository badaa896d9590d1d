"""Building native kernels: where it cannot be done, one line says why and XLA computes."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pallas_kernels.native import native

ROOT = Path(__file__).resolve().parents[3]
SMALL = """
    import logging, sys
    import jax.numpy as jnp
    from pallas_kernels import dispatch
    from pallas_kernels.native import build, native
    build.SOURCES = {"page_write": "page_write/native.cc"}  # the quickest
    from pallas_kernels.page_write import page_write
    pool = page_write(jnp.zeros((2, 1, 4, 8)), jnp.ones((1, 1, 8)), jnp.array([1]), jnp.array([2]))
    assert pool.sum() == pool[1, 0, 2].sum() == 8
    print(native().isa or native().why_not)
"""
needs_native = pytest.mark.skipif(native().why_not is not None, reason=str(native().why_not))


def start(cache, *, code=SMALL, **environment):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "JINFER_CACHE": str(cache), **environment}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """Returns what a process printed, and its complaints."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


def test_without_native_kernels_by_choice(tmp_path):
    out, err = finish(start(tmp_path, JINFER_NATIVE="0"))
    assert (out, err) == ("JINFER_NATIVE=0", "")
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(tmp_path):
    out, err = finish(start(tmp_path, CXX="no-such-compiler"))
    assert out == "no C++ compiler (no-such-compiler)"
    assert err == f"no native CPU kernels, XLA computes instead: {out}"


def test_with_a_broken_compiler(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo 1 && exit 0\necho no luck >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    out, err = finish(start(tmp_path / "cache", CXX=str(broken)))
    assert out.endswith("failed: no luck") and len(err.splitlines()) == 1


def test_with_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    out, err = finish(start(tmp_path / "file"))
    assert "Not a directory" in out and len(err.splitlines()) == 1


def test_an_unknown_instruction_set_is_named(tmp_path):
    out, _ = finish(start(tmp_path, JINFER_ISA="mmx"))
    assert out == "JINFER_ISA must be one of avx2, avx512, got 'mmx'"


@needs_native
def test_two_processes_build_at_once_and_the_next_builds_nothing(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    found = [finish(process) for process in both]
    assert [out for out, _ in found] == [native().isa] * 2
    assert any("compil" in err for _, err in found) or native().path is not None
    libraries = sorted(path.name for path in (tmp_path / "native").iterdir())
    assert [re.sub("-[0-9a-f]+", "", name) for name in libraries] == [
        f"{native().isa}.so",
        "isa.so",
    ]
    out, err = finish(start(tmp_path))
    assert (out, err) == (native().isa, "")


@needs_native
@pytest.mark.thorough
def test_the_smaller_instruction_set_passes_the_same_tests(tmp_path):
    code = f"""
        import sys, pytest
        from pallas_kernels.native import native
        assert native().isa == "avx2"
        folder = {str(ROOT / "tests/pallas_kernels")!r}
        files = ["paged_attention/test_native.py", "packed_matmul", "page_write"]
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        sys.exit(pytest.main([*options, *(f"{{folder}}/{{name}}" for name in files)]))
    """
    process = start(tmp_path, code=code, JINFER_ISA="avx2", PYTEST_ADDOPTS="")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0 and "[100%]" in out, out + err
