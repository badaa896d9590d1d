"""The README is true: its commands, its links, its Python."""

import re
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
