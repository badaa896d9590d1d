"""Every script of examples/ runs as it stands and prints what it should."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# What each prints, as a regular expression. Two run by default, .ci/run runs the others as well.
PRINTS = {
    "asyncio_serving": r"' Paris.*\n.*\nstopped early: True\nfinish reason: abort",
    "beam_search": r"-0\.\d+ ' Paris",
    "chat": r"Paris.*\n.*\n.*\n.*Seine.*\n\([1-9]\d* of \d+ prompt tokens were cached\)",
    "constrained_choice": r"positive: I loved .*\nnegative: It was boring",
    "jsonl_batch": r"plain -> ' Paris",
    "logprobs": r"' Paris' of \{' Paris': 0\.\d+[\s\S]*-2\.\d+ a token: Paris is .*\n-3\.\d+ a ",
    "offline_batch": r"'The capital of France is' -> ' Paris.*[\s\S]*'Water freezes at' -> ",
    "quantize_then_generate": r"model\.safetensors.*\n Paris",
    "research_gradients": r"loss [\d.]+ -> [\d.]+, lower: True\ncontinued: ",
    "rl_update_loop": r"reward went up: True",
    "shared_prefix": r"\([1-9]\d* of \d+ tokens cached\)",
    "speculation": r"[2-5]\.\d\d tokens a step\nsame tokens as plain decoding: True",
    "streaming": r"stream-\d+: [\s\S]*still running: False",
}
QUICK = ("rl_update_loop", "constrained_choice")


CASES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in PRINTS
]


def test_every_example_is_listed():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", CASES)
def test_an_example_runs(name, capsys, default_model, users_jax):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(PRINTS[name], printed), printed


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_an_example_says_how_it_is_run(name):
    first = (EXAMPLES / f"{name}.py").read_text().splitlines()[0]
    assert f"python examples/{name}.py" in first
