"""Compiles every kernel at real model shapes for accelerators that this host does not have.

    python scripts/compile_kernels.py [--target h100 v5e v6e tpu7x] [--op quant_matmul] [--quick]
    python scripts/compile_kernels.py --model-step [--jobs 2]

Prints a row per kernel, shape and target: seconds, registers and spill bytes (ptxas), shared memory
or VMEM, temporaries, and whether the PTX uses wgmma and TMA. Exits non-zero if anything fails to
compile, spills, needs more temporaries than its bound, or lacks the instructions it should use.
With --model-step whole steps of a Llama-3-8B (bf16; int4; fp8 with fp8 KV) are compiled instead of
single kernels: no dense copy of a quantized weight may be written there, and the KV pool must stay
in place.
At the end a Markdown table holds the worst of each op and target. Cases are dealt to `--jobs`
processes at a time. Needs `pip install 'jinfer[compile]'`; no accelerator.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

TARGETS = ("h100", "v5e", "v6e", "tpu7x")
OPS = {
    "paged_attention": "pallas_kernels.paged_attention.cases",
    "quant_matmul": "pallas_kernels.quant_matmul.cases",
    "fp8_matmul": "pallas_kernels.fp8_matmul.cases",
    "kv_write": "kv_write_cases",
}
MARK = "@row "  # what a child prints before its JSON; compilers print to stdout as they like

COLUMNS = (
    ("case", "kernel and shape", 78),
    ("target", "target", 7),
    ("seconds", "sec", 6),
    ("registers", "regs", 5),
    ("spill_bytes", "spill B", 8),
    ("smem_kib", "smem/VMEM KiB", 14),
    ("temp_mb", "temp MB", 8),
    ("args_mb", "args MB", 8),
    ("wgmma", "wgmma", 6),
    ("tma", "TMA", 4),
    ("failure", "verdict", 0),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--quick", action="store_true", help="one shape per kernel, for CI")
    parser.add_argument("--model-step", action="store_true", help="whole steps of a model instead")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=pathlib.Path, help="write the table to this file too")
    parser.add_argument("--hlo", type=pathlib.Path, metavar="DIR", help="write compiled programs")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at a time")
    parser.add_argument("--child", metavar="SHARD/SHARDS", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.child:
        return compile_here(args)
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from pallas_kernels import compile_only

    if missing := {t: why for t in args.target if (why := compile_only.why_not_compile(t))}:
        print(f"cannot compile for {', '.join(missing)}: {next(iter(missing.values()))}")
        return 1
    print("".join(title.ljust(width + 1) for _, title, width in COLUMNS))
    start = time.perf_counter()
    # One shard a job and target: the shards of a target end at about the same time.
    shards = [(name, f"{i}/{args.jobs}") for name in args.target for i in range(args.jobs)]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda shard: compile_apart(*shard, args), shards)
        rows = [row for shard_rows in found for row in shard_rows]
    wall = time.perf_counter() - start
    failures = [r for r in rows if r["failure"]]
    print("\n" + summary(rows))
    seconds = sum(r["seconds"] for r in rows)
    print(
        f"\n{len(rows)} compiled, {len(failures)} failed: {seconds:.0f} s of compile time in "
        f"{wall:.0f} s by {args.jobs} processes"
    )
    if args.json:
        write_json(args.json, rows, wall)
    if not rows:
        print(f"no case matches --op {' '.join(args.op)} --only {args.only!r}")
    return 1 if failures or not rows else 0


def compile_apart(name: str, shard: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compiles a shard of a target's cases in a process of its own; a crash is a row that failed.

    The shard "i/n" is cases i, i + n, i + 2 n and so on.
    """
    command = [sys.executable, __file__, "--child", shard, "--target", name, "--op", *args.op]
    command += ["--quick"] if args.quick else []
    command += ["--model-step"] if args.model_step else []
    command += ["--only", args.only] if args.only else []
    command += ["--hlo", str(args.hlo)] if args.hlo else []
    # libtpu locks out a second process, which matters for a TPU that is there, not for compiling.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    rows, started = [], None
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace"
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if not line.startswith(MARK):
                    continue
                row = json.loads(line.removeprefix(MARK))
                if "started" in row:
                    started = row["started"]
                    continue
                started = None
                rows.append(row)
                show(row)
        status = child.returncode
        if status != 0 or started is not None:
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            row = empty_row(started or "start of the compiler", name)
            rows.append(row | {"failure": f"the compiling process ended with {how}"})
            show(rows[-1])
    return rows


def compile_here(args: argparse.Namespace) -> int:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from pallas_kernels import compile_only

    [name] = args.target
    shard, num_shards = map(int, args.child.split("/"))
    modules = ["model_step_cases"] if args.model_step else [OPS[op] for op in args.op]
    with compile_only.compile_target(name) as compiler:
        cases = [
            case
            for module in map(importlib.import_module, modules)
            for case in module.compile_cases(compiler.target, quick=args.quick)
            if args.only in case.name
        ]
        for case in cases[shard::num_shards]:
            emit({"started": case.name})
            emit(compile_case(case, compiler, args.hlo))
    return 0


def compile_case(case: Any, compiler: Any, hlo_folder: pathlib.Path | None) -> dict[str, Any]:
    row = empty_row(case.name, compiler.target.name)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            done = compiler.compile(case.fn, *case.abstract_args, layouts=case.layouts)
    except (
        Exception
    ) as e:  # whatever a compiler raises is this case's verdict, not the script's end
        message = " ".join(str(e).split())
        return row | {"failure": f"{type(e).__name__}: {message[:300]}"}
    if hlo_folder is not None:
        hlo_folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "-", f"{compiler.target.name} {case.name}")
        (hlo_folder / f"{name}.hlo").write_text(done.executable.as_text())
    memory = done.executable.memory_analysis()
    row |= {
        "seconds": done.seconds,
        "temp_mb": done.temp_bytes / 1e6,
        "args_mb": memory.argument_size_in_bytes / 1e6,
    }
    kernels = done.kernels
    if kernels:
        row |= {
            "registers": max(k.registers for k in kernels),
            "spill_bytes": sum(k.spill_bytes for k in kernels),
            "smem_kib": max(k.smem_bytes for k in kernels) / 1024,
            "wgmma": any(k.has_wgmma for k in kernels),
            "tma": any(k.has_tma for k in kernels),
        }
    elif vmem := vmem_bytes(done.executable.as_text()):
        row["smem_kib"] = vmem / 1024
    found = faults(case, done, compiler.target.kind)
    if case.min_alias_bytes > memory.alias_size_in_bytes:
        found.append(
            f"only {memory.alias_size_in_bytes / 1e6:.1f} MB of arguments are updated in place"
        )
    if case.never_written and (names := written(done.executable.as_text(), case.never_written)):
        found.append(f"dense copies of quantized arrays: {', '.join(names)}")
    if case.never_copied and (names := copied(done.executable.as_text(), case.never_copied)):
        found.append(f"copies of what must stay in place: {', '.join(names)}")
    return row | {"failure": "; ".join(found)}


def faults(case: Any, done: Any, kind: str) -> list[str]:
    found = []
    kernels = done.kernels
    if kind == "gpu" and (case.expects_wgmma or case.expects_tma) and not kernels:
        found.append("no kernel was compiled (XLA ran it, or another case has the same kernel)")
    elif case.expects_wgmma and kind == "gpu" and not any(k.has_wgmma for k in kernels):
        found.append("no wgmma in the PTX")
    elif case.expects_tma and kind == "gpu" and not any(k.has_tma for k in kernels):
        found.append("no TMA in the PTX")
    if spilled := sum(k.spill_bytes for k in kernels):
        found.append(f"spills {spilled} bytes")
    if case.max_temp_bytes is not None and done.temp_bytes > case.max_temp_bytes:
        found.append(f"temporaries above the bound of {case.max_temp_bytes / 1e6:.1f} MB")
    return found


def written(hlo: str, types: tuple[str, ...]) -> list[str]:
    """Returns which of `types` instructions outside fusions make: what is written to memory."""
    made = (re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (\w+\[[\d,]*\])", i) for i in unfused(hlo))
    return sorted({m[1] for m in made if m and m[1] in types})


def copied(hlo: str, types: tuple[str, ...]) -> list[str]:
    """Returns which of `types` instructions outside fusions copy or transpose, and how often."""
    form = re.compile(
        r"\s+(?:ROOT )?%?([\w.-]+) = \(*(\w+\[[\d,]*\]).*?[\s}](copy|copy-start|transpose|fusion)\("
    )
    made = [m for m in map(form.match, unfused(hlo)) if m and m[2] in types]
    copies = [m[2] for m in made if m[3] != "fusion" or re.search("copy|transpose", m[1])]
    return [f"{copies.count(kind)} x {kind}" for kind in sorted(set(copies))]


def unfused(hlo: str) -> Iterator[str]:
    """Yields the lines of a compiled program but for the insides of fusions."""
    fused = set(re.findall(r"\bcalls=%?([\w.-]+)", hlo))
    is_fused = False
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            is_fused = header[1] in fused
        if not is_fused:
            yield line


def vmem_bytes(hlo: str) -> int:
    """Returns the largest VMEM that a Pallas TPU kernel of the program takes."""
    configs = re.findall(r'"used_scoped_memory_configs":\[([^\]]*)\]', hlo)
    return max((int(s) for c in configs for s in re.findall(r'"size":"(\d+)"', c)), default=0)


def empty_row(case: str, target: str) -> dict[str, Any]:
    return {name: None for name, *_ in COLUMNS} | {
        "case": case,
        "target": target,
        "seconds": 0.0,
        "failure": "",
    }


def emit(row: dict[str, Any]) -> None:
    print("\n" + MARK + json.dumps(row), flush=True)


def show(row: dict[str, Any]) -> None:
    cells = []
    for name, _, width in COLUMNS:
        value = row[name]
        if name == "failure":
            text = f"FAILED: {value}" if value else "ok"
        elif value is None:
            text = "-"
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        elif isinstance(value, float):
            text = f"{value:.1f}"
        else:
            text = str(value)
        cells.append(text.ljust(width + 1))
    print("".join(cells).rstrip(), flush=True)


def summary(rows: list[dict[str, Any]]) -> str:
    """Returns the worst numbers of each op and target as a Markdown table."""
    titles = ("op", "target", "programs", "failed", "compile s", "most registers", "spill bytes",
              "most smem / VMEM KiB", "most temporaries MB", "with wgmma", "with TMA")  # fmt: skip
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"].split(" ")[0], row["target"]), []).append(row)
    lines = [titles, ("---",) * len(titles)]
    for (op, target), group in sorted(groups.items()):
        known = {n: [r[n] for r in group if r[n] is not None] for n, *_ in COLUMNS}
        is_gpu = bool(known["registers"])
        lines.append(
            (
                op,
                target,
                len(group),
                sum(bool(r["failure"]) for r in group),
                f"{sum(known['seconds']):.0f}",
                max(known["registers"]) if is_gpu else "",
                sum(known["spill_bytes"]) if is_gpu else "",
                f"{max(known['smem_kib']):.0f}" if known["smem_kib"] else "",
                f"{max(known['temp_mb']):.1f}" if known["temp_mb"] else "",
                sum(known["wgmma"]) if is_gpu else "",
                sum(known["tma"]) if is_gpu else "",
            )
        )
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_json(path: pathlib.Path, rows: list[dict[str, Any]], wall: float) -> None:
    import jax

    names = (
        ("seconds", "s"),
        ("registers", "registers"),
        ("spill_bytes", "bytes"),
        ("smem_kib", "KiB"),
        ("temp_mb", "MB"),
    )
    table = [
        {"case": f"{row['case']} [{row['target']}]", "metric": metric, "unit": unit,
         "value": row[metric], "peer": None, "peer_value": None, "ratio": None, "limit": None}
        for row in rows
        for metric, unit in names
        if row[metric] is not None
    ]  # fmt: skip
    table.append(
        {"case": "all", "metric": "wall clock", "unit": "s", "value": wall, "peer": None,
         "peer_value": None, "ratio": None, "limit": None}
    )  # fmt: skip
    document = {
        "device": "none: compiled only",
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]} | wheels(),
        "command": "python scripts/compile_kernels.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "rows": table,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def wheels() -> dict[str, str]:
    """Returns the versions of the compilers' wheels that are installed."""
    found = {}
    for name in ("jax-cuda13-plugin", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
