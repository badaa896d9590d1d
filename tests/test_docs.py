"""The pages of docs/: links, commands and the map agree with the code, and shown code runs.

Every block of README, docs/start and docs/how-to runs as it stands, in the order of its page and in
one folder a page. A block that cannot run here names a reason of `pages.REASONS`.
"""

import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest

from jinfer.cli.main import COMMANDS, build_parser
from jinfer.cli.main import main as jinfer

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
                run_command(command, where, monkeypatch)
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


@pytest.mark.parametrize("page", SHOWN, ids=name_of)
def test_what_cannot_run_says_why(page):
    for block in pages.blocks(page):
        assert block.reason is None or block.reason in pages.REASONS, f"{page}:{block.line}"
    marks = len(re.findall("<!-- not run", page.read_text()))
    assert marks == sum(block.reason is not None for block in pages.blocks(page))
