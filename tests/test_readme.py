"""The two commands of the README that .ci/run runs; tests/test_docs.py runs the others."""

import re
from pathlib import Path

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
