"""The README is true: its commands, its links, its Python."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = """\
pip install -e . && python scripts/generate.py --prompt "What is the capital of France?"
pip install -e ".[test]" && pytest
"""


def test_the_two_commands_stand_there_verbatim_and_ci_finds_them():
    assert f"```\n{COMMANDS}```" in README
    pattern = r"^pip install -e .* && .*$"
    assert pattern[:-3] in (ROOT / ".ci" / "run").read_text()
    assert "\n".join(re.findall(pattern, README, re.MULTILINE)) + "\n" == COMMANDS


@pytest.mark.parametrize("page", ["README.md", *sorted(p.name for p in (ROOT / "docs").glob("*"))])
def test_links_lead_somewhere(page):
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_benchmark_page_is_made_from_the_results():
    command = [sys.executable, "scripts/render_benchmarks.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = [
    line
    for page in PAGES
    for block in re.findall(r"^```\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("jinfer ")
]


@pytest.mark.parametrize("line", LINES)
def test_every_command_that_is_shown_can_be_read(line):
    from jinfer.cli.main import build_parser

    build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_every_command_is_shown():
    from jinfer.cli.main import COMMANDS

    assert {line.split()[1] for line in LINES} == set(COMMANDS)


@pytest.mark.slow
def test_the_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "result.tokens" in blocks[1] and done.stdout.strip()
