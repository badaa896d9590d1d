"""The script that compiles for absent accelerators: what it calls a failure, and that it passes."""

import importlib.util
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from pallas_kernels import compile_only

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "compile_kernels.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(temp_bytes=0, **kernel):
    report = {
        "name": "k",
        "registers": 168,
        "spill_bytes": 0,
        "smem_bytes": 0,
        "has_wgmma": True,
        "has_tma": True,
    } | kernel
    kernels = () if kernel.get("name") == "none" else (compile_only.KernelReport(**report),)
    return compile_only.Compiled(
        executable=None, seconds=0.1, temp_bytes=temp_bytes, kernels=kernels
    )


@pytest.mark.parametrize(
    "done, kind, verdict",
    [
        (compiled(), "gpu", ""),
        (compiled(spill_bytes=8), "gpu", "spills 8 bytes"),
        (compiled(has_wgmma=False), "gpu", "no wgmma"),
        (compiled(has_tma=False), "gpu", "no TMA"),
        (compiled(name="none"), "gpu", "no kernel was compiled"),
        (compiled(name="none"), "tpu", ""),
        (compiled(temp_bytes=1001), "gpu", "temporaries above"),
        (compiled(temp_bytes=1000), "gpu", ""),
    ],
)
def test_spills_temporaries_and_missing_instructions_are_failures(script, done, kind, verdict):
    case = compile_only.CompileCase(
        name="c",
        fn=jnp.sin,
        abstract_args=(),
        max_temp_bytes=1000,
        expects_wgmma=True,
        expects_tma=True,
    )
    found = "; ".join(script.faults(case, done, kind))
    assert verdict in found and bool(found) == bool(verdict)


def test_vmem_is_read_from_the_program(script):
    hlo = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"%d"}]'
    assert script.vmem_bytes(f"a {hlo % 100} b {hlo % 300} c {hlo % 200}") == 300
    assert script.vmem_bytes("nothing") == 0


def test_a_dense_copy_counts_where_it_is_written_and_not_inside_a_fusion(script):
    hlo = """HloModule m
%fused_computation.1 (p: s4[64,32]) -> bf16[8,32] {
  %w = bf16[64,32]{1,0} convert(%p)
  ROOT %dot = bf16[8,32]{1,0} dot(%x, %w)
}
%body (p: s4[64,32]) -> f32[8,32] {
  ROOT %r = f32[8,32]{1,0} add(%a, %b)
}
ENTRY %main (p: s4[64,32]) -> bf16[8,32] {
  ROOT %f = bf16[8,32]{1,0} fusion(%p), kind=kLoop, calls=%fused_computation.1
}
"""
    types = ("bf16[64,32]", "f32[64,32]")
    assert script.written(hlo, types) == []
    copied = hlo.replace("ROOT %r = f32[8,32]", "ROOT %r = f32[64,32]")
    assert script.written(copied, types) == ["f32[64,32]"]
    copied = hlo.replace("ROOT %f = bf16[8,32]", "ROOT %f = bf16[64,32]")
    assert script.written(copied, types) == ["bf16[64,32]"]


def test_copies_of_the_pool_are_found_and_writes_in_place_are_none(script):
    hlo = """HloModule m
%fused_computation.1 (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %t = bf16[4,8]{1,0} transpose(%p)
}
ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %scatter_fusion = bf16[4,8]{1,0} fusion(%p, %copy.3), kind=kCustom, calls=%fused_computation.1
  %copy.3 = bf16[2,8]{1,0} copy(%q)
  ROOT %g = bf16[4,8]{1,0} get-tuple-element(%scatter_fusion), index=0
}
"""
    types = ("bf16[4,8]",)
    assert script.copied(hlo, types) == []
    for line in (
        "%copy.5 = bf16[4,8]{0,1:T(8,128)(2,1)} copy(%p)",
        "%copy-start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]) copy-start(%p)",
        "%loop_transpose_fusion.1 = bf16[4,8]{1,0} fusion(%p), kind=kLoop, calls=%other",
    ):
        twice = hlo.replace("  ROOT %g", f"  {line}\n  ROOT %g")
        assert script.copied(twice, types) == ["1 x bf16[4,8]"]


def test_a_compiling_process_that_dies_is_a_failed_row(script, capsys):
    args = script.parse(["--target", "v5e"])
    args.op = ["no_such_op"]
    [row] = script.compile_apart("v5e", "0/1", args)
    assert "ended with" in row["failure"]
    assert "FAILED" in capsys.readouterr().out


def test_shards_are_all_cases_once_and_the_summary_holds_the_worst(script, monkeypatch, capsys):
    def fake(name, shard, args):
        i = int(shard.split("/")[0])
        row = script.empty_row(f"op case {i}", name) | {"registers": 100 + i, "smem_kib": 2.0 * i}
        row |= {"spill_bytes": 0, "wgmma": i == 0, "tma": True, "temp_mb": 1.0, "seconds": 1.5}
        return [row | {"failure": "spills" if (i, name) == (2, "h100") else ""}]

    monkeypatch.setattr(compile_only, "why_not_compile", lambda name: None)
    monkeypatch.setattr(script, "compile_apart", fake)
    assert script.main(["--target", "h100", "--jobs", "3"]) == 1
    assert "| op | h100 | 3 | 1 | 4 | 102 | 0 | 4 | 1.0 | 1 | 3 |" in capsys.readouterr().out
    assert script.main(["--target", "v5e", "v6e", "--jobs", "2"]) == 0
    assert "4 compiled, 0 failed: 6 s" in capsys.readouterr().out


def run(*options):
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.skipif(compile_only.why_not_compile("h100") is None, reason="the wheels are installed")
def test_missing_wheels_are_one_clear_line():
    done = run("--quick")
    assert done.returncode == 1
    [line] = done.stdout.splitlines()
    assert "jinfer[compile]" in line and "h100" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["h100", "v5e"])
@pytest.mark.parametrize(
    "op, only, num",
    [
        ("kv_write", "bfloat16", 1),
        ("quant_matmul", "M16 K4096 N6144 int4 g128", 1),
        ("fp8_matmul", "M16 K4096 N6144", 2),
    ],
)
def test_each_op_compiles_for_a_target_that_is_not_there(name, op, only, num, tmp_path):
    if reason := compile_only.why_not_compile(name):
        pytest.skip(reason)
    file = tmp_path / "out.json"
    done = run("--quick", "--target", name, "--op", op, "--only", only, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " ok" in done.stdout and '"rows"' in file.read_text()
    assert f"{num} compiled, 0 failed" in done.stdout  # each shard its own cases


def test_no_matching_case_is_an_error(script, monkeypatch, capsys):
    monkeypatch.setattr(compile_only, "why_not_compile", lambda name: None)
    monkeypatch.setattr(script, "compile_apart", lambda *shard: [])
    assert script.main(["--target", "h100", "--only", "nothing"]) == 1
    assert "no case matches" in capsys.readouterr().out
