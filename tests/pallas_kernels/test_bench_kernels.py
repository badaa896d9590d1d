"""The benches, without a device: cases at tiny sizes, wrong results not timed, rows that add up."""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compile_only, target, tiles, timing
from pallas_kernels.fp8_matmul import tuning as fp8_tuning
from pallas_kernels.paged_attention import AttentionSpec, mosaic_gpu, mosaic_tpu
from pallas_kernels.quant_matmul import tuning as quant_tuning
from pallas_kernels.tiles import QuantMatmulGpuTiles, Tunable

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return load("bench_kernels")


@pytest.fixture(scope="module")
def autotune():
    return load("autotune")


@pytest.fixture
def quick_timing(monkeypatch):
    fixed = timing.Timing(2e-6, 1e-6, 3e-6, 2)
    monkeypatch.setattr(timing, "measure", lambda f, sets, **kwargs: fixed)


TINY = [
    {"kind": "decode", "batch": 2, "context": 128, "kv": "bfloat16"},
    {"kind": "decode", "batch": 2, "context": 128, "kv": "int8"},
    {"kind": "prefill", "tokens": 64},
    {"kind": "tree", "batch": 2, "context": 128, "nodes": 16},
    {"kind": "w4a16", "linear": "qkv", "m": 4, "k": 256, "n": 128},
    {"kind": "fp8", "m": 8, "k": 256, "n": 128, "scales": "channel"},
    {"kind": "fp8", "m": 8, "k": 256, "n": 128, "scales": "block"},
]


@pytest.mark.parametrize("case", TINY, ids=lambda c: f"{c['kind']}-{c.get('kv', c.get('scales'))}")
@pytest.mark.thorough
def test_every_kind_of_case_runs_and_agrees_with_its_reference(bench, case, quick_timing):
    result = bench.measure_case(case)
    assert result.get("failure") is None, result
    assert result["error"] < bench.MAX_RELATIVE_ERROR
    assert result["seconds"] == 2e-6 and result["bytes"] > 0 and result["operations"] > 0


def test_a_wrong_result_is_not_timed(bench, monkeypatch, quick_timing):
    make = bench.make_w4a16

    def wrong(case):
        inputs, f, reference, work = make(case)
        return inputs, f, lambda *a: reference(*a) * 1.1, work

    monkeypatch.setattr(bench, "make_w4a16", wrong)
    case = {"kind": "w4a16", "linear": "qkv", "m": 4, "k": 256, "n": 128}
    result = bench.measure_case(case)
    assert "seconds" not in result and "relative error" in result["failure"]


def test_rows_hold_times_limits_peers_and_goals(bench):
    cases = [c for c in bench.all_cases() if c["kind"] in ("decode", "tree", "w4a16")]
    ours = {
        "device": "X",
        "ceilings": {"bytes": 1e12, "operations": 1e15},
        "results": {
            c["name"]: {
                "seconds": 1e-5,
                "low": 9e-6,
                "high": 2e-5,
                "bytes": 5e6,
                "operations": 1e9,
                "impl": "k",
            }
            for c in cases
        },
    }
    name = next(c["name"] for c in cases if c["kind"] == "w4a16" and c["m"] == 16)
    theirs = {"results": {name: {"torch mm bf16": 30.0, "other": 20.0}}, "versions": {"torch": "2"}}
    report = bench.make_report(cases, ours, theirs)
    form = {"case", "metric", "unit", "value", "peer", "peer_value", "ratio", "limit"}
    assert all(form <= set(row) for row in report["rows"])
    assert {"device", "versions", "command", "date", "rows"} == set(report)
    mine = [r for r in report["rows"] if r["case"].startswith(name)]
    assert [(r["peer"], r["ratio"]) for r in mine] == [("torch mm bf16", 3.0), ("other", 2.0)]
    assert mine[0]["goal"] == 2.3 and mine[0]["limit"] == pytest.approx(5.0)
    goals = {r["peer"]: r.get("goal") for r in report["rows"]}
    assert goals["own bf16 KV"] == 1.5 and goals["own decode step"] == pytest.approx(
        0.769, abs=1e-3
    )
    json.dumps(report)


@pytest.mark.parametrize("works", [True, False])
def test_after_a_failed_case_it_goes_on_unless_the_device_is_lost(
    bench, monkeypatch, tmp_path, quick_timing, works
):
    monkeypatch.setattr(timing, "describe_accelerator", lambda: "NVIDIA H200")
    monkeypatch.setattr(timing, "device_works", lambda: works)
    monkeypatch.setattr(bench, "measure_ceilings", lambda: {"bytes": 4e12, "operations": 8e14})
    fine = {**TINY[0], "name": "fine"}
    cases = [{**fine, "batch": "two", "name": "fails"}, fine]
    listing, out = tmp_path / "cases.json", tmp_path / "out.json"
    listing.write_text(json.dumps({"cases": cases, "found": {}}))
    assert bench.measure_here(listing, out) == (0 if works else bench.DEVICE_LOST)
    found = json.loads(out.read_text())
    assert found["device"] == "NVIDIA H200" and "TypeError" in found["results"]["fails"]["failure"]
    assert ("seconds" in found["results"].get("fine", {})) == works
    args = bench.parse(["--device", "--json", str(tmp_path / "report.json")])
    report = json.loads(bench.write_report(args, cases, found).read_text())
    assert len([r for r in report["rows"] if r["case"].startswith("fine")]) == (2 if works else 0)


CHILD = """
import json, os, pathlib, sys, time
listing, out = map(pathlib.Path, sys.argv[1:])
work = json.loads(listing.read_text())
found = work["found"] or {"device": "X", "results": {}}
for case in work["cases"]:
    name = case["name"]
    if name == "hangs":
        time.sleep(600)
    if name == "dies":
        os._exit(9)
    found["results"][name] = {"failure": "a fault"} if name == "faults" else {"seconds": 1.0}
    out.with_suffix(".mine").write_text(json.dumps(found))
    out.with_suffix(".mine").replace(out)
    if name == "faults":
        sys.exit(3)
"""


def run_fake(bench, tmp_path, names, seconds=None, patience=60.0):
    script, out = tmp_path / "child.py", tmp_path / "out.json"
    script.write_text(CHILD)
    reports = []
    command = [sys.executable, str(script)]
    cases = [{"name": name} for name in names]
    found = bench.run_apart(
        command, cases, out, seconds, patience, lambda found: reports.append(len(found["results"]))
    )
    return {name: r.get("failure", "fine") for name, r in found["results"].items()}, reports


def test_a_case_that_kills_its_process_or_the_device_costs_only_itself(bench, tmp_path):
    found, reports = run_fake(bench, tmp_path, ["a", "dies", "b", "faults", "c"])
    dead = "its process ended with status 9"
    assert found == {"a": "fine", "dies": dead, "b": "fine", "faults": "a fault", "c": "fine"}
    assert max(reports) == 5  # what is known is passed on as it comes


def test_a_case_that_hangs_costs_only_itself(bench, tmp_path):
    found, _ = run_fake(bench, tmp_path, ["a", "hangs", "b"], patience=3.0)
    assert found == {"a": "fine", "hangs": "it hung", "b": "fine"}


def test_what_was_measured_when_the_time_is_up_is_kept(bench, tmp_path):
    found, _ = run_fake(bench, tmp_path, ["a", "hangs", "b"], seconds=3.0)
    assert found == {"a": "fine"}


@pytest.mark.parametrize(
    "command", [("bench_kernels", "--device"), ("autotune",)], ids=lambda c: c[0]
)
def test_without_an_accelerator_the_scripts_say_so_and_write_nothing(command, tmp_path):
    name, *options = command
    out = tmp_path / "out.json"
    flag = "--json" if name == "bench_kernels" else "--out"
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), *options, flag, str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "no accelerator here: nothing was measured" in done.stdout
    assert not out.exists()


def tunable(candidates, run):
    return Tunable(
        op="op",
        case="case",
        candidates=candidates,
        inputs=lambda seed: (jnp.full((4, 4), 1.0 + seed),),
        run=run,
        reference=lambda x: x * 2.0,
    )


def test_autotune_leaves_out_wrong_candidates_and_takes_the_fastest(autotune, monkeypatch, capsys):
    wrong, slow, fast = (QuantMatmulGpuTiles(block_m=m) for m in (8, 16, 32))
    seconds = iter([3e-6, 2e-6])
    monkeypatch.setattr(
        timing, "measure", lambda f, sets, **kwargs: timing.Timing(next(seconds), 0, 0, 1)
    )
    call = tunable((wrong, slow, fast), lambda t, x: x * (3.0 if t.block_m == 8 else 2.0))
    best, num_wrong = autotune.tune([call], 12)
    assert best == fast and num_wrong == 1
    assert "WRONG case" in capsys.readouterr().out


@pytest.mark.parametrize("works", [True, False])
def test_autotune_survives_a_candidate_that_fails_but_not_a_lost_device(
    autotune, monkeypatch, quick_timing, capsys, works
):
    def run(tiles, x):
        if tiles.block_m == 8:
            raise RuntimeError("a fault")
        return x * 2.0

    monkeypatch.setattr(timing, "device_works", lambda: works)
    fails, fine = (QuantMatmulGpuTiles(block_m=m) for m in (8, 16))
    if works:
        assert autotune.tune([tunable((fails, fine), run)], 12) == (fine, 1)
        assert "RuntimeError: a fault" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="the device was lost"):
            autotune.tune([tunable((fails, fine), run)], 12)


def test_calls_that_share_a_key_are_weighed_together(autotune, monkeypatch):
    one, two, only_first = (QuantMatmulGpuTiles(block_m=m) for m in (8, 16, 32))
    seconds = iter([1e-6, 2e-6, 90e-6, 30e-6])  # one is faster at the first call, two by far more
    monkeypatch.setattr(
        timing, "measure", lambda f, sets, **kwargs: timing.Timing(next(seconds), 0, 0, 1)
    )
    calls = [tunable(c, lambda t, x: x * 2.0) for c in ((one, only_first, two), (one, two))]
    assert autotune.tune(calls, 12) == (two, 0)


@pytest.mark.parametrize("name", ["h100", "v6e"])
def test_what_is_tuned_is_what_the_kernels_look_up(name, autotune, monkeypatch, tmp_path):
    chip = target.TARGETS[name]
    args = argparse.Namespace(op=list(autotune.OPS), codes="int4", group=128)
    found = list(autotune.enumerate_tunables(args, chip))
    assert len(found) > 50
    assert {t.op.split(".")[0] for t in found} >= {"paged_attention", "quant_matmul"}
    assert all(len(t.candidates) >= 2 for t in found if t.op == "quant_matmul.mosaic_gpu")
    for call in (t for t in found if t.op.startswith("paged_attention")):
        kernel = (mosaic_tpu if name == "v6e" else mosaic_gpu).IMPL
        spec = AttentionSpec(
            sm_scale=1.0, soft_cap=None, sliding_window=None, max_q_len=1, return_lse=False,
            config=None,
        )  # fmt: skip
        args = jax.eval_shape(call.inputs, 0)
        for tiles_of_it in call.candidates:
            config = dataclasses.replace(spec, config=tiles_of_it)
            assert kernel.why_not(chip, *args, None, config) is None, (call.case, tiles_of_it)
    first = next(t for t in found if "quant_matmul" in t.op)
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles.read_table.cache_clear()
    best = first.candidates[-1]
    tiles.write_table(chip, {first.op: {first.case: best}}, tmp_path / tiles.table_name(chip))
    chosen = tiles.choose(first.op, chip, first.case, type(best), None, lambda: None)
    tiles.read_table.cache_clear()
    assert chosen == best


def test_tuning_enumerates_nothing_where_no_kernel_runs():
    assert list(fp8_tuning.tunables(target.TARGETS["v5e"])) == []
    assert list(quant_tuning.tunables(target.TARGETS["h100"], codes=jnp.int4, group=7)) == []


@pytest.mark.slow
def test_every_program_that_it_times_compiles_for_an_h100(bench):
    """So that its first run on a card measures, and does not find out what cannot be built."""
    if reason := compile_only.why_not_compile("h100"):
        pytest.skip(reason)
    makers = {"w4a16": bench.make_w4a16, "fp8": bench.make_fp8}
    failures = []
    with compile_only.compile_target("h100") as compiler:
        for case in bench.all_cases():
            inputs, f, reference, _ = makers.get(case["kind"], bench.make_attention)(case)
            args = jax.eval_shape(lambda inputs=inputs: inputs(0))
            try:
                compiler.compile(timing.chain(f, 2), (args, args))
                used = compiler.compile(reference, *args).temp_bytes
            except Exception as e:  # all of them, by name, rather than the first
                failures.append(f"{case['name']}: {type(e).__name__}: {str(e)[:200]}")
            else:
                if used > 40e9:
                    failures.append(f"{case['name']}: the reference needs {used / 1e9:.0f} GB")
    assert not failures, "\n".join(failures)
