"""Measures what each quantization method costs, and whether it wins what its paper promises.

    python scripts/quant_quality.py --text wiki.test.raw --calibration prompts.jsonl.gz

Every case quantizes the float model in this process, block by block, and is judged on consecutive
windows of a text that calibration has never seen: perplexity, KL divergence to the float model,
how often both put the same token first, and two relative output errors on the text's first
windows, with the float model's own inputs: of the linears (weights only; empty where scales are
folded, as inputs then differ) and of the blocks (with quantized inputs too). Calibrated cases
are repeated with each seed, which draws the calibration texts. A cell is one JSON line in
<work>/cells.jsonl: a run that was killed goes on after the last one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jinfer import load  # noqa: E402
from jinfer.checkpoints.tokenizer import load_tokenizer  # noqa: E402
from jinfer.cli.bench.report import Row, add_json_argument, finish  # noqa: E402
from jinfer.linear.placement import widen_on_cpu  # noqa: E402
from jinfer.models.model import Model  # noqa: E402
from jinfer.quant import calibrate, texts  # noqa: E402
from jinfer.quant.evaluate import evaluate, window_logits  # noqa: E402
from jinfer.quant.layer import GROUPS, LayerQuantizer  # noqa: E402
from jinfer.quant.pipeline import quantize_model  # noqa: E402
from jinfer.quant.recipe import Method, Recipe, make_method  # noqa: E402
from jinfer.quant.solve import output_error  # noqa: E402
from jinfer.setup.options import enable_compilation_cache  # noqa: E402

# The GPTQ of its authors' code: inputs in their order, each group's scale found when it is reached.
PLAIN = {"order": "none", "static_groups": False, "scales": "extremes"}


def make_cases() -> dict[str, Method]:
    """Returns {name: method}, in the order in which they are measured."""
    cases = {"fp8 dynamic": make_method("fp8", "fp8-e4m3-channel:dyn")}
    w8a8 = {"grid": "restricted", "scale_dtype": "float32"}
    cases["W8A8 rtn"] = make_method("rtn", "int8-channel:dyn", **w8a8)
    cases["W8A8 smoothquant 0.5"] = make_method("smoothquant", alpha=0.5)
    cases["W8A8 smoothquant 0.8"] = make_method("smoothquant", alpha=0.8)
    for bits in (4, 3):
        fmt = f"int{bits}-g64"
        cases[f"int{bits} rtn"] = make_method("rtn", fmt)
        cases[f"int{bits} rtn asym"] = make_method("rtn", f"{fmt}-asym")
        cases[f"int{bits} gptq"] = make_method("gptq", fmt, **PLAIN)
        cases[f"int{bits} gptq act-order"] = make_method("gptq", fmt, scales="extremes")
        cases[f"int{bits} gptq act-order correct 0.5"] = make_method(
            "gptq", fmt, scales="extremes", correct=0.5
        )
        cases[f"int{bits} gptq act-order hessian"] = make_method("gptq", fmt)
        cases[f"int{bits} gptq asym mse"] = make_method("gptq", f"{fmt}-asym", scales="mse")
        cases[f"int{bits} gptq asym hessian"] = make_method("gptq", f"{fmt}-asym")
        cases[f"int{bits} awq asym"] = make_method("awq", f"{fmt}-asym")
    return cases


@dataclasses.dataclass(frozen=True)
class Goal:
    """`metric` of `case` must be at most `most` times that of `peer`."""

    case: str
    peer: str
    metric: str
    most: float


GOALS = (
    Goal("int4 gptq act-order", "int4 rtn", "kl", 0.40),
    Goal("int3 gptq act-order", "int3 rtn", "kl", 0.55),
    Goal("int4 gptq act-order hessian", "int4 rtn", "kl", 0.40),
    Goal("int3 gptq act-order hessian", "int3 rtn", "kl", 0.55),
    Goal("int4 gptq act-order correct 0.5", "int4 rtn", "kl", 0.40),
    Goal("int3 gptq act-order correct 0.5", "int3 rtn", "kl", 0.55),
    Goal("int4 gptq asym mse", "int4 gptq", "linear_error", 0.80),
    Goal("int3 gptq asym mse", "int3 gptq", "linear_error", 0.80),
    Goal("int4 gptq asym hessian", "int4 gptq", "linear_error", 0.80),
    Goal("int3 gptq asym hessian", "int3 gptq", "linear_error", 0.80),
    Goal("int4 awq asym", "int4 rtn asym", "kl", 0.60),
    Goal("W8A8 smoothquant 0.5", "W8A8 rtn", "kl", 0.80),
    Goal("W8A8 smoothquant 0.8", "W8A8 rtn", "kl", 0.80),
    Goal("fp8 dynamic", "int4 rtn", "kl", 0.10),
)
METRICS = {
    "perplexity": "",
    "kl": "nats",
    "top1": "share",
    "linear_error": "relative",
    "block_error": "relative",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="folder, GGUF file or smollm2 (default)")
    parser.add_argument("--text", type=Path, required=True, help="to judge on: UTF-8, or .gz")
    parser.add_argument("--calibration", type=Path, required=True, help="text or JSONL, or .gz")
    parser.add_argument("--num-sequences", type=int, default=128, help="of calibration (128)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them (512)")
    parser.add_argument("--windows", type=int, default=32, help="of the text (32)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each of them (1024)")
    parser.add_argument("--held-out", type=int, default=8192, help="tokens for the errors (8192)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="NAME",
        help="only these; what is no case's whole name stands for all whose names hold it",
    )
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; print what has been measured"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "quant-quality", help="cells, float logits"
    )
    add_json_argument(parser)
    args = parser.parse_args()
    sizes = {
        "model": args.model,
        "text": digest(args.text),
        "calibration": digest(args.calibration),
        "num_sequences": args.num_sequences,
        "length": args.length,
        "windows": args.windows,
        "context": args.context,
        "held_out": args.held_out,
    }
    cases = chosen(args.cases)
    wanted = [
        (name, seed)
        for seed in args.seeds
        for name, method in cases.items()
        if seed == args.seeds[0] or method.needs_calibration
    ]
    enable_compilation_cache()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "cells.jsonl"
    done = read_cells(file, sizes)
    if args.report:
        if ("float", None) not in done:
            parser.error(f"{file} has no cells of these sizes")
        wanted = [key for key in wanted if key in done]
    elif any(key not in done for key in [("float", None), *wanted]):
        done = measure(args, sizes, cases, wanted, file)
    report(args, done, wanted)
    return 0


def chosen(wanted: list[str] | None) -> dict[str, Method]:
    """Returns the cases that --cases asks for, all of them for None."""
    cases = make_cases()
    if wanted is None:
        return cases
    found = {n for n in cases for want in wanted if n == want or (want not in cases and want in n)}
    if not found:
        raise SystemExit(f"no case is called so: {', '.join(cases)}")
    return {name: method for name, method in cases.items() if name in found}


def digest(path: Path) -> str:
    """Returns the first digits of a file's sha256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_cells(file: Path, sizes: dict[str, Any]) -> dict[tuple[str, int | None], dict[str, Any]]:
    """Returns {(case, seed): cell} measured with these sizes; skips an incomplete last line."""
    cells = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            cell = json.loads(line)
        except ValueError:
            continue
        if cell["sizes"] == sizes:
            cells[cell["case"], cell["seed"]] = cell
    return cells


class Judge:
    """The float model, what it says to the text, and its blocks' inputs on the first windows."""

    def __init__(self, args: argparse.Namespace, sizes: dict[str, Any]) -> None:
        self.model, self.params = load(args.model, dtype="float32")
        self.tokenizer = load_tokenizer(args.model)
        self.windows = texts.windows(
            "\n\n".join(texts.read_texts(args.text)),
            self.encode,
            length=args.context,
            num_windows=args.windows,
        )
        key = hashlib.sha256(
            json.dumps([sizes[k] for k in ("model", "text", "windows", "context")]).encode()
        ).hexdigest()[:16]
        self.reference = float_logprobs(
            args.work / f"float-{key}.npy", self.model, self.params, self.windows
        )
        count = max(1, min(len(self.windows), args.held_out // args.context))
        self.blocks = list(float_blocks(self.model, self.params, self.windows[:count]))

    def encode(self, text: str) -> list[int]:
        """Returns token ids without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def errors(self, index: int, method: Method, layer: Any) -> tuple[float | None, float]:
        """Returns mean relative output error of a block's linears, and that of the block."""
        x, out, stats = self.blocks[index]
        floats = self.params["layers"][index]
        linear = [
            output_error(
                floats[block][part]["w"], layer[block][part]["w"], stats[block, parts].gram
            )
            for block, parts in GROUPS
            for part in parts
        ]
        worker = LayerQuantizer(self.model, index, Recipe.uniform(method))
        got = worker.forward(widen_on_cpu(layer), x)
        block = float(jnp.linalg.norm((got - out).ravel()) / jnp.linalg.norm((out - x).ravel()))
        return (statistics.mean(linear) if method.fold == "none" else None), block


def float_logprobs(file: Path, model: Model, params: Any, windows: np.ndarray) -> np.ndarray:
    """Returns log probabilities f16 [n, T, V] from disk; computes them the first time.

    Where probabilities count, log probabilities are small, and half precision keeps them to 1e-3.
    """
    if not file.exists():
        partial = file.with_suffix(".writing")
        shape = (*windows.shape, model.config.vocab_size)
        kept = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        for i, window in enumerate(windows):
            logits = window_logits(model, params, jnp.asarray(window, jnp.int32))
            kept[i] = np.asarray(jax.nn.log_softmax(logits).astype(jnp.float16))
        kept.flush()
        partial.rename(file)
    return np.load(file, mmap_mode="r")


def float_blocks(model: Model, params: Any, tokens: np.ndarray) -> Any:
    """Yields each float block's inputs, outputs and statistics of its linears' inputs."""
    x = calibrate.embed(model, params, calibrate.chunks_of(jnp.asarray(tokens, jnp.int32)))
    # A recipe of GPTQ makes the Gram matrices take every token.
    recipe = Recipe.uniform(make_method("gptq"))
    for i, layer in enumerate(params["layers"]):
        worker = LayerQuantizer(model, i, recipe)
        stats, out = worker.float_statistics(layer, x, True)
        yield x, out, stats
        x = out


def measure(
    args: argparse.Namespace,
    sizes: dict[str, Any],
    cases: dict[str, Method],
    wanted: list[tuple[str, int]],
    file: Path,
) -> dict[tuple[str, int | None], dict[str, Any]]:
    """Measures the cells that are missing, appends each to the file, and returns all."""
    done = read_cells(file, sizes)
    judge = Judge(args, sizes)
    if ("float", None) not in done:
        result = evaluate(judge.model, judge.params, judge.windows, against=judge.reference)
        keep(file, done, sizes, "float", None, result, {})
    documents = texts.read_texts(args.calibration)
    for name, seed in wanted:
        if (name, seed) in done:
            continue
        method = cases[name]
        tokens = None
        if method.needs_calibration:
            packed = texts.pack(
                documents,
                judge.encode,
                num_sequences=args.num_sequences,
                length=args.length,
                seed=seed,
            )
            tokens = jnp.asarray(packed)
        start = time.perf_counter()
        quantized, rows = quantize_model(
            judge.model,
            judge.params,
            Recipe.uniform(method),
            tokens,
            is_sequential=method.fold != "awq",  # as `jinfer quantize` does
        )
        seconds = time.perf_counter() - start
        pairs = [judge.errors(i, method, layer) for i, layer in enumerate(quantized["layers"])]
        linear = [pair[0] for pair in pairs if pair[0] is not None]
        more = {
            "linear_error": statistics.mean(linear) if linear else None,
            "block_error": statistics.mean(pair[1] for pair in pairs),
            "bits": statistics.mean(row.bits for row in rows),
            "fallbacks": sum("->" in row.method for row in rows),
            "quantize_seconds": round(seconds, 1),
        }
        result = evaluate(
            judge.model, widen_on_cpu(quantized), judge.windows, against=judge.reference
        )
        keep(file, done, sizes, name, seed, result, more)
        jax.clear_caches()
    return done


def keep(
    file: Path,
    done: dict[tuple[str, int | None], dict[str, Any]],
    sizes: dict[str, Any],
    name: str,
    seed: int | None,
    result: Any,
    more: dict[str, Any],
) -> None:
    """Appends one cell to the file and prints it."""
    cell = {"case": name, "seed": seed, "sizes": sizes, **dataclasses.asdict(result), **more}
    with file.open("a") as out:
        out.write(json.dumps(cell) + "\n")
    done[name, seed] = cell
    shown = {k: cell[k] for k in (*METRICS, "quantize_seconds", "seconds") if cell.get(k)}
    print(name, seed, " ".join(f"{k} {v:.4g}" for k, v in shown.items()), flush=True)


def report(
    args: argparse.Namespace,
    done: dict[tuple[str, int | None], dict[str, Any]],
    wanted: list[tuple[str, int]],
) -> None:
    """Prints a Markdown table and the goals; writes the JSON."""
    cells: dict[str, list[dict[str, Any]]] = {"float": [done["float", None]]}
    for name, seed in wanted:
        cells.setdefault(name, []).append(done[name, seed])
    print("\n| | bits | perplexity | KL | same top token | error of linears | of blocks | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for name, group in cells.items():
        bits = f"{group[0]['bits']:.2f}" if "bits" in group[0] else ""
        shown = [spread(group, m, d) for m, d in zip(METRICS, (3, 5, 4, 4, 4))]
        print(f"| {name} | {bits} | {' | '.join(shown)} | {len(group)} |")
    print()
    rows = []
    for goal in GOALS:
        if goal.case in cells and goal.peer in cells:
            rows.append(goal_row(goal, cells))
    for name, group in cells.items():
        for metric, unit in METRICS.items():
            values = [c[metric] for c in group if c.get(metric) is not None]
            if values:
                row = Row(case=name, metric=metric, unit=unit, value=statistics.mean(values))
                rows.append(row)
    seeds = " ".join(map(str, args.seeds))
    command = (
        f"python scripts/quant_quality.py --model {args.model} --text {args.text.name} "
        f"--calibration {args.calibration.name} --num-sequences {args.num_sequences} --length "
        f"{args.length} --windows {args.windows} --context {args.context} --held-out "
        f"{args.held_out} --seeds {seeds}"
    )
    if args.cases is not None:
        command += " --cases " + " ".join(f'"{name}"' for name in args.cases)
    measured = [cell for group in cells.values() for cell in group]
    finish(rows, command=command, json_file=args.json, cells=measured)


def spread(group: list[dict[str, Any]], metric: str, digits: int) -> str:
    """Returns the mean over seeds, and the standard deviation where there are several."""
    values = [cell[metric] for cell in group if cell.get(metric) is not None]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def goal_row(goal: Goal, cells: dict[str, list[dict[str, Any]]]) -> Row:
    """Returns one goal as a row: how many times smaller than the peer's, and should be."""
    value, peer = (
        statistics.mean(cell[goal.metric] for cell in cells[name])
        for name in (goal.case, goal.peer)
    )
    return Row(
        case="goals",
        metric=f"{goal.case}: {goal.metric}",
        unit=METRICS[goal.metric],
        value=value,
        peer=goal.peer,
        peer_value=peer,
        ratio=peer / value,
        goal=1 / goal.most,
    )


if __name__ == "__main__":
    sys.exit(main())
