"""The pages of docs/: links, commands and the map agree with the code, and shown code runs.

Every block of README, docs/start and docs/how-to runs as it stands, in the order of its page and in
one folder a page. A block that cannot run here names a reason of `pages.REASONS`.
"""

import dataclasses
import importlib
import inspect
import io
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest

from jinfer import LLM, SamplingParams
from jinfer.cli.main import COMMANDS, build_parser
from jinfer.cli.main import main as jinfer
from jinfer.config import refusals

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if page.is_file()]


def name_of(page: Path) -> str:
    """Returns the path of a page below the repository, which names it in test ids."""
    return page.relative_to(ROOT).as_posix()


def jinfer_commands(page: Path) -> list[str]:
    """Returns the `jinfer ...` commands that a page shows."""
    lines = [line for block in pages.blocks(page) for line in block.commands]
    return [line[line.index("jinfer ") :] for line in lines if re.search(r"(^|\| )jinfer ", line)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_is_shown_can_be_read(page):
    for line in jinfer_commands(page):
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_every_command_is_shown():
    shown = {line.split()[1] for page in PAGES for line in jinfer_commands(page)}
    assert shown == set(COMMANDS)


TODAYS = [page for page in PAGES if page.name != "log.md"]  # whose rows name what was there then


@pytest.mark.parametrize("page", TODAYS, ids=name_of)
def test_files_and_modules_that_a_page_names_are_there(page):
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for path in re.findall(r"`((?:[a-z_.]+/)+[A-Za-z0-9_.-]*)`", text):
        found = [top / end for top in (ROOT, ROOT / "jinfer") for end in (path, f"{path}.py")]
        is_pattern = any(word in path for word in ("NAME", "OP", "nimbus"))
        assert is_pattern or any(place.exists() for place in found), path
    for dotted in re.findall(r"`((?:jinfer|pallas_kernels)(?:\.\w+)+)(?:\(.*?)?`", text):
        target = pkgutil.resolve_name(dotted.partition(".")[0])
        for name in dotted.split(".")[1:]:
            if not hasattr(target, name):
                importlib.import_module(f"{target.__name__}.{name}")
            target = getattr(target, name)


def test_the_benchmark_page_is_made_from_the_results():
    command = [sys.executable, "scripts/render_benchmarks.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_map_shows_the_floors_of_the_house():
    all_floors = runpy.run_path(str(ROOT / "tests" / "test_house.py"))["FLOORS"]
    text = (DOCS / "explanation" / "architecture.md").read_text()
    floors = re.findall(r'^  F\d+\["<b>(.*?)</b>', text, re.MULTILINE)
    assert [set(floor.split(" · ")) for floor in floors] == [set(floor) for floor in all_floors]
    order = re.search(r"^  (F1 --> .*)$", text, re.MULTILINE)
    assert order and order[1] == " --> ".join(f"F{i + 1}" for i in range(len(all_floors)))


SHOWN = [ROOT / "README.md", *sorted(DOCS.glob("start/*.md")), *sorted(DOCS.glob("how-to/*.md"))]
QUICK = ("README.md", "docs/start/install.md", "docs/start/first-answer.md")
RUNNABLE = [
    pytest.param(page, marks=() if name_of(page) in QUICK else pytest.mark.slow, id=name_of(page))
    for page in SHOWN
]


@pytest.mark.parametrize("page", RUNNABLE)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch, default_model, users_jax):
    monkeypatch.chdir(tmp_path)
    variables: dict = {"__name__": "__main__"}
    for block in pages.blocks(page):
        where = f"{name_of(page)}:{block.line}"
        print(f"--- {where}")
        if block.reason is not None:
            print(f"not run: {pages.REASONS[block.reason]}")
        elif block.title is not None:
            Path(block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), variables)
        elif block.language == "sh":
            for command in block.commands:
                (run_apart if block.is_apart else run_command)(command, where, monkeypatch)
        else:
            assert block.language in ("text", "mermaid"), f"{where}: say which language this is"


def run_command(line: str, where: str, monkeypatch) -> None:
    """Runs one line of a shell block in this process: `jinfer ...`, or `echo ... | jinfer ...`."""
    given, _, command = line.rpartition(" | ")
    name, *words = shlex.split(command, comments=True)
    assert name == "jinfer", f"{where}: {line!r} is no command that this test can run"
    if given:
        echo, text = shlex.split(given)
        assert echo == "echo", f"{where}: {given!r} is no echo"
        monkeypatch.setattr(sys, "stdin", io.StringIO(text + "\n"))
    status = jinfer(words)
    assert status == 0, f"{where}: {line!r} ended with {status}"


def run_apart(line: str, where: str, monkeypatch) -> None:
    """Runs `jinfer ...` in a process of its own, without the flags of conftest.py."""
    name, *words = shlex.split(line, comments=True)
    assert name == "jinfer", f"{where}: {line!r} is no command that this test can run"
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    command = [sys.executable, "-m", "jinfer", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"{where}: {line!r} ended with {done.returncode}: {done.stderr}"


@pytest.mark.parametrize("page", SHOWN, ids=name_of)
def test_what_cannot_run_says_why(page):
    for block in pages.blocks(page):
        assert block.reason is None or block.reason in pages.REASONS, f"{page}:{block.line}"
    marks = len(re.findall("<!-- (?:not run|in its own process)", page.read_text()))
    found = pages.blocks(page)
    assert marks == sum(block.reason is not None or block.is_apart for block in found)


def rows_below(page: Path, heading: str) -> list[tuple[list[str], str]]:
    """Returns (names in the first cell, second cell) of the table below a heading."""
    section = page.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.MULTILINE)
    return [(re.findall(r"`([a-z_]+)`", names), here) for names, here in rows]


def test_the_page_for_users_of_vllm_says_what_is_refused():
    page = DOCS / "how-to" / "from-vllm.md"
    own = {
        "Arguments of `LLM`": set(inspect.signature(LLM.__init__).parameters),
        "Fields of `SamplingParams`": {field.name for field in dataclasses.fields(SamplingParams)},
    }
    refused = {
        "Arguments of `LLM`": refusals.LLM_ARGUMENTS,
        "Fields of `SamplingParams`": refusals.SAMPLING_FIELDS,
    }
    for heading, fields in own.items():
        rows = rows_below(page, heading)
        assert len(rows) >= 8, heading
        for names, here in rows:
            for name in names:
                assert here.startswith("refused") == (name in refused[heading]), (name, here)
                assert here.startswith("the same") == (name in fields), (name, here)
