"""Counts the instructions in the inner loops of the Hopper kernels, for estimates without a card.

    python scripts/count_instructions.py --nvdisasm PATH [--op quant_matmul] [--only decode]

Compiles each case for an H100 (no GPU needed), assembles its PTX with `ptxas` and disassembles it
with `nvdisasm` (in the CUDA toolkit, or `pip install nvidia-cuda-nvdisasm`). A row an inner loop
that holds tensor core instructions, i.e. a step over a block of keys or a tile of weights: its
instructions by class, and for one warpgroup the cycles that each of the SM's units needs for it at
the rates of the CUDA C++ programming guide (compute capability 9.0). Those are floors, not times:
waits for memory, barriers and results are not in them.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OPS = ("paged_attention", "quant_matmul", "fp8_matmul")
# Classes of SASS instructions, the first that matches; and cycles that an instruction of all four
# warps of a warpgroup keeps the unit busy: 128 lanes over its results a cycle and SM.
CLASSES = (
    ("tensor", r"[HQIB]GMMA", None),
    ("exp2", r"MUFU", 128 / 16),
    ("f32", r"F(FMA|MUL|ADD|MNMX|SEL|SETP|SET|CHK)", 128 / 128),
    ("f16", r"H(FMA2|MUL2|ADD2|MNMX2|SET)", 128 / 256),
    ("convert", r"(F2F|I2F|F2I|I2I|I2FP|F2FP)", 128 / 64),
    ("shuffle", r"SHFL", 128 / 32),
    ("int", r"(IMAD|IADD|LOP|SHF|ISETP|PRMT|SEL|IMNMX|LEA|VIMNMX|VIADD|PLOP|IABS|SGXT)", 128 / 64),
    ("shared", r"(LDS|STS|LDSM|STSM)", 128 / 32),
    ("global", r"(LDG|STG|LD|ST|LDC)\b", 128 / 32),
    ("sync", r"(BAR|SYNCS|WARPSYNC|WARPGROUP|DEPBAR|FENCE|MEMBAR|ELECT|NANOSLEEP)", None),
    ("move", r"(MOV|R2UR|S2R|CS2R|S2UR|R2P|P2R)", 128 / 128),
    ("uniform", r"U[A-Z]", None),
)  # fmt: skip
TENSOR_FMAS = {"HGMMA": 2048, "QGMMA": 4096, "IGMMA": 4096, "BGMMA": 16384}  # a cycle and SM


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--all", action="store_true", help="all shapes, not one a kernel")
    parser.add_argument("--ptxas", default="ptxas")
    parser.add_argument("--nvdisasm", default="nvdisasm")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    for tool in (args.ptxas, args.nvdisasm):
        if shutil.which(tool) is None:
            print(f"there is no {tool}: name it with --ptxas or --nvdisasm")
            return 1
    from pallas_kernels import compile_only

    if reason := compile_only.why_not_compile("h100"):
        print(f"cannot compile for h100: {reason}")
        return 1
    names = [name for name, *_ in CLASSES]
    titles = ("kernel and shape", "registers", "instructions", *names, "unit: cycles")
    print(line_of(titles))
    print(line_of(["---"] * len(titles)))
    with compile_only.compile_target("h100") as compiler:
        for op in args.op:
            module = importlib.import_module(f"pallas_kernels.{op}.cases")
            for case in module.compile_cases(compiler.target, quick=not args.all):
                if args.only not in case.name or not case.expects_wgmma:
                    continue
                for kernel in compiler.compile(case.fn, *case.abstract_args).kernels:
                    sass = disassemble(kernel.ptx, args.ptxas, args.nvdisasm)
                    for body in tensor_loops(sass):
                        counts = collections.Counter(map(class_of, body))
                        busy = ", ".join(f"{u} {c:.0f}" for u, c in cycles(body).items())
                        cells = (case.name, kernel.registers, len(body))
                        print(line_of((*cells, *(counts[n] for n in names), busy)), flush=True)
    return 0


def line_of(cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"  # pyright: ignore[reportArgumentType]


def disassemble(ptx: str, ptxas: str, nvdisasm: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        source.write_text(ptx)
        subprocess.run([ptxas, "-arch=sm_90a", "-o", str(cubin), str(source)], check=True)
        done = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True)
    return done.stdout.decode()


def tensor_loops(sass: str) -> Iterator[list[str]]:
    """Yields the instructions of each innermost loop with tensor core work, in program order.

    A loop is what lies between a label and a later branch back to it.
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif made := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(\S.*?)\s*;", line):
            code.append(made[1])
    loops = []
    for end, text in enumerate(code):
        branch = re.match(r"(?:@!?U?P\w+\s+)?BRA\S*\s.*?`\((\.L_\w+)\)", text)
        if branch and labels.get(branch[1], end + 1) <= end:
            body = range(labels[branch[1]], end + 1)
            if any(class_of(code[i]) == "tensor" for i in body):
                loops.append(body)
    for body in loops:
        inside = lambda other, body=body: body.start <= other.start and other.stop <= body.stop  # noqa: E731
        if not any(other != body and inside(other) for other in loops):
            yield [code[i] for i in body]


def class_of(instruction: str) -> str:
    name = re.sub(r"^@!?U?P\w+\s+", "", instruction)
    return next((c for c, form, _ in CLASSES if re.match(form, name)), "other")


def cycles(body: list[str]) -> dict[str, float]:
    """Returns cycles of an SM's busiest units for one warpgroup's pass through the loop."""
    busy = {"issue": float(len(body))}  # each of four schedulers issues one warp's instruction
    counts = collections.Counter(map(class_of, body))
    for name, _, cost in CLASSES:
        if cost is not None and name in ("exp2", "f32", "convert", "int", "shared", "shuffle"):
            busy[name] = counts[name] * cost
    busy["tensor"] = 0.0
    for text in body:
        if made := re.search(r"([HQIB]GMMA)\.(\d+)x(\d+)x(\d+)", text):
            m, n, k = (int(made[i]) for i in (2, 3, 4))
            busy["tensor"] += m * n * k / TENSOR_FMAS[made[1]]
    return {name: value for name, value in busy.items() if value}


if __name__ == "__main__":
    sys.exit(main())
