"""scripts/fuzz.py: each door runs some cases, and the oracle sees faults that are put in."""

import importlib
import json
import pathlib
import signal
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def fuzzing():
    """The modules of the driver, by their names."""
    sys.path.insert(0, str(SCRIPTS))
    names = ("loop", "oracle", "python_door", "jax_door", "cli_door")
    yield {name: importlib.import_module(f"fuzzing.{name}") for name in names}
    sys.path.remove(str(SCRIPTS))


class OneCall:
    """A door with one call."""

    name = "test"

    def __init__(self, oracle, call, check=lambda fields, result: None, control=lambda: None):
        self.made = oracle.Case(what="call", fields={"size": 3, "more": 4}, call=call, check=check)
        self.control = control
        self.num_renewed = 0

    def case(self, rng):
        return self.made

    def renew(self):
        self.num_renewed += 1


def judge(fuzzing, call, *, limit_s=30.0, **more):
    door = OneCall(fuzzing["oracle"], call, **more)
    summary = fuzzing["loop"].run(door, seed=0, seconds=60, most=1, limit_s=limit_s, say=str)
    return next(iter(summary["signatures"]), None), summary, door


def refuse(error):
    def call(fields):
        raise error

    return call


@pytest.mark.parametrize(
    "error",
    [
        ValueError("size must be even, got 3"),
        TypeError("SIZE must be a number"),
        FileNotFoundError("no file for size"),
    ],
)
def test_a_refusal_of_one_line_that_names_its_cause_is_none_of_the_findings(fuzzing, error):
    signature, summary, _ = judge(fuzzing, refuse(error))
    assert signature is None and summary["refused"] == 1 and summary["findings"] == 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("size"), "other exception"),
        (UnicodeDecodeError("utf-8", b"", 0, 0, "size"), "other exception"),
        (SystemExit("size"), "other exception"),
        (ValueError("size\nmust be even"), "several lines"),
        (ValueError("it must be even"), "names no cause"),
        (ValueError(""), "no message"),
        (ValueError("size " + "x" * 3000), "endless line"),
    ],
)
def test_any_other_end_of_a_call_is_a_finding(fuzzing, error, kind):
    signature, summary, _ = judge(fuzzing, refuse(error))
    assert signature.startswith(kind) and summary["findings"] == 1


def test_a_hang_a_wrong_result_and_a_spoilt_engine_are_findings(fuzzing):
    expect = fuzzing["oracle"].expect

    def never_ends(fields):
        while True:
            pass

    signature, _, door = judge(fuzzing, never_ends, limit_s=0.5)
    assert signature.startswith("hang call") and door.num_renewed == 1
    signature, _, _ = judge(
        fuzzing,
        lambda fields: sum(fields.values()),
        check=lambda fields, result: expect(result == 8, "a wrong sum", result),
    )
    assert signature == "mismatch: call: a wrong sum"
    signature, _, door = judge(
        fuzzing, lambda fields: 7, control=lambda: expect(False, "the control differs")
    )
    assert signature.startswith("spoilt by call") and door.num_renewed == 1


def test_a_signal_that_comes_after_the_end_of_a_call_changes_nothing(fuzzing):
    with fuzzing["oracle"].limited(30.0):
        pass
    signal.raise_signal(signal.SIGPROF)
    with fuzzing["oracle"].limited(30.0), pytest.raises(fuzzing["oracle"].HangError):
        signal.raise_signal(signal.SIGPROF)


def test_a_finding_is_shown_without_the_arguments_that_do_not_matter(fuzzing):
    def call(fields):
        raise RuntimeError("size") if "size" in fields else ValueError("size is missing")

    _, summary, _ = judge(fuzzing, call)
    [entry] = summary["signatures"].values()
    assert entry["cases"][0]["call"] == "call(size=3)"


@pytest.mark.parametrize("name", ["python", "jax", "cli"])
def test_a_case_is_its_seed_and_number(fuzzing, name):
    door = fuzzing[f"{name}_door"].make()
    pairs = [[fuzzing["loop"].make_case(door, 3, n) for n in range(12)] for _ in range(2)]
    texts = [[case.text(case.fields) for case in cases] for cases in pairs]
    assert len(set(texts[0])) > 7
    assert [t for t in texts[0] if " at 0x" not in t] == [t for t in texts[1] if " at 0x" not in t]


def run_some(fuzzing, name, kinds, most):
    """Runs cases of some kinds of a door alone; returns the summary."""
    door = fuzzing[f"{name}_door"].make()
    door.kinds = [(w, k) for w, k in door.kinds if k.__name__ in kinds]
    return fuzzing["loop"].run(door, seed=3, seconds=300, most=most, say=str)


@pytest.mark.parametrize(
    ("name", "kinds", "most"),
    [
        ("python", ("_request_case",), 2),
        ("jax", ("_format_case", "_init_case"), 12),
        ("cli", ("_words_case", "_bench_case"), 8),
    ],
)
@pytest.mark.thorough
def test_some_cases_of_each_door_find_nothing(fuzzing, name, kinds, most):
    summary = run_some(fuzzing, name, kinds, most)
    assert summary["cases"] == most
    assert not summary["signatures"], json.dumps(summary["signatures"], indent=1)


def test_a_fault_of_the_engine_is_found(fuzzing, monkeypatch):
    """Requests that end early."""
    from jinfer.engine.request import Request

    accept = Request.accept

    def cut(self, *args):
        self.max_output_tokens = 2
        return accept(self, *args)

    monkeypatch.setattr(Request, "accept", cut)
    summary = run_some(fuzzing, "python", ("_request_case",), 1)
    assert any("control is cut" in signature for signature in summary["signatures"])


@pytest.mark.thorough
def test_a_fault_of_a_pure_function_is_found(fuzzing, monkeypatch):
    from jinfer import functional

    monkeypatch.setattr(functional.jnp, "argmax", lambda x, axis: x.argmin(axis=axis))
    summary = run_some(fuzzing, "jax", ("_generate_case",), 6)
    assert any("a token that is not the best" in signature for signature in summary["signatures"])


@pytest.mark.thorough
def test_a_fault_of_a_command_is_found(fuzzing, monkeypatch):
    from jinfer.cli import plan

    def fails(args):
        raise KeyError("context")

    monkeypatch.setattr(plan, "run", fails)
    summary = run_some(fuzzing, "cli", ("_plan_case",), 3)
    assert any("KeyError in" in signature for signature in summary["signatures"]), summary
    monkeypatch.setattr(plan, "run", lambda args: 1)
    summary = run_some(fuzzing, "cli", ("_plan_case",), 3)
    assert any("not one line of error" in signature for signature in summary["signatures"])
