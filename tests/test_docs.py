"""The pages of docs/: links, commands and the map agree with the code."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest

from jinfer.cli.main import COMMANDS, build_parser

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
