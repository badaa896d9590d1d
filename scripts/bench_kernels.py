"""Measures the kernels on the accelerator of this machine, and torch beside them if it has CUDA.

    python scripts/bench_kernels.py --device [--only decode w4a16] [--quick] [--json FILE]
                                    [--seconds 300] [--patience 120]

First the ceilings (a device copy, a bf16 8192^3 product), then per case: the result is checked
against the plain XLA form on fresh random inputs, then timed over rotated inputs. JAX and torch run
in processes of their own, one after the other. Times are medians, limits come from the ceilings.
Writes benchmarks/results/<device>/kernels.json anew after each case: a run that is cut short loses
the case it is at. A case that hangs or takes its process along is a failure; the rest goes on in a
new process. Without an accelerator it says so and exits 0.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure_apart import DEVICE_LOST, run_apart, write_whole

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3-8B
MAX_RELATIVE_ERROR = 2e-2
CACHE_BYTES = 150 << 20
LINEARS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
# The least ratio to torch's bf16 product that was aimed at, by rows.
W4A16_GOALS = {1: 2.5, 16: 2.3, 64: 1.6, 256: 0.7}


def all_cases() -> list[dict[str, Any]]:
    """Lists what is measured; torch reads the same list."""
    cases: list[dict[str, Any]] = []
    for batch, context in ((64, 4096), (8, 4096), (1, 16384)):
        cases.append({"kind": "decode", "batch": batch, "context": context, "kv": "bfloat16"})
    cases += [
        {"kind": "decode", "batch": 64, "context": 4096, "kv": "float8_e4m3fn"},
        {"kind": "decode", "batch": 64, "context": 4096, "kv": "int8"},
        {"kind": "prefill", "tokens": 8192},
        {"kind": "tree", "batch": 8, "context": 4096, "nodes": 16},
    ]
    for (name, (k, n)), m in ((item, m) for item in LINEARS.items() for m in W4A16_GOALS):
        cases.append({"kind": "w4a16", "linear": name, "m": m, "k": k, "n": n})
    for m, k, n in ((16, 4096, 28672), (4096, 4096, 4096), (8192, 8192, 8192)):
        for scales in ("tensor", "channel", "block"):
            cases.append({"kind": "fp8", "m": m, "k": k, "n": n, "scales": scales})
    for case in cases:
        case["name"] = name_of(case)
    return cases


def name_of(case: dict[str, Any]) -> str:
    return " ".join([case["kind"], *(f"{k}={v}" for k, v in case.items() if k != "kind")])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ("decode", "prefill", "tree", "w4a16", "fp8")
    parser.add_argument("--device", action="store_true", help="run on the accelerator (required)")
    parser.add_argument("--only", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--quick", action="store_true", help="the first case of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of benchmarks/results/")
    parser.add_argument("--seconds", type=float, help="for JAX, and again for torch: stop then")
    parser.add_argument("--patience", type=float, default=120, help="seconds a case may take (120)")
    parser.add_argument("--child", nargs=2, metavar=("CASES", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.device:
        parser.error("say --device: this measures the accelerator of this machine")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.child:
        return measure_here(*map(Path, args.child))
    cases = [c for c in all_cases() if c["kind"] in args.only]
    if args.quick:
        cases = [c for i, c in enumerate(cases) if c["kind"] not in {d["kind"] for d in cases[:i]}]
    with tempfile.TemporaryDirectory() as folder:
        me = [sys.executable, __file__, "--device", "--child"]
        write = functools.partial(write_report, args, cases)
        limits = (args.seconds, args.patience)
        ours = run_apart(me, cases, Path(folder) / "jax.json", *limits, write)
        if ours.get("device") is None:
            if "device" in ours:
                print("no accelerator here: nothing was measured, nothing was written")
                return 0
            print("the measuring process failed: see above")
            return 1
        script = [sys.executable, str(ROOT / "scripts" / "bench_kernels_torch.py")]
        write = functools.partial(write_report, args, cases, ours)
        theirs = run_apart(script, cases, Path(folder) / "torch.json", *limits, write)
    out = write(theirs)
    print_report(json.loads(out.read_text()))
    print(f"written to {out}")
    wrong = [name for name, r in ours["results"].items() if "failure" in r]
    for name in wrong:
        print(f"FAILED {name}: {ours['results'][name]['failure']}")
    missing = [c["name"] for c in cases if c["name"] not in ours["results"]]
    if missing:
        print(f"not measured for lack of time: {', '.join(missing)}")
    return 1 if wrong else 0


def write_report(
    args: argparse.Namespace,
    cases: list[dict[str, Any]],
    ours: dict[str, Any],
    theirs: dict[str, Any] | None = None,
) -> Path | None:
    """Writes what is known by now; returns where, or None while there are no ceilings."""
    if not ours.get("ceilings"):
        return None
    report = make_report(cases, ours, theirs or {})
    out = args.json or (ROOT / "benchmarks" / "results" / slug(report["device"]) / "kernels.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    return out


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


# --- the JAX side --------------------------------------------------------------------------------


def measure_here(listing: Path, out: Path) -> int:
    from pallas_kernels import timing

    work = json.loads(listing.read_text())
    device = timing.describe_accelerator()
    found: dict[str, Any] = work["found"] or {"device": device, "results": {}, "ceilings": {}}
    if device is None:
        write_whole(out, found)
        return 0
    if not found["ceilings"]:
        found["ceilings"] = measure_ceilings()
        print(f"{device}: {found['ceilings']}", flush=True)
    write_whole(out, found)
    for case in work["cases"]:
        try:
            found["results"][case["name"]] = measure_case(case)
        except Exception as e:  # one case's failure is a row of the table
            failure = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            found["results"][case["name"]] = {"failure": failure}
        print(case["name"], found["results"][case["name"]], flush=True)
        write_whole(out, found)
        if "failure" in found["results"][case["name"]] and not timing.device_works():
            return DEVICE_LOST
    return 0


def measure_ceilings() -> dict[str, float]:
    """Returns bytes per second of a copy (read + write) and bf16 operations per second."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import timing

    big = [(jax.random.normal(jax.random.key(i), (1 << 28,), jnp.bfloat16),) for i in range(3)]
    copy = timing.measure(lambda x: -x, big, calls=4, samples=10).seconds
    del big
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(k, (8192, 8192), jnp.bfloat16) for k in keys)
    product = timing.measure(functools.partial(jnp.matmul), [(a, b)], calls=4, samples=10).seconds
    return {"bytes": 2 * 2 * (1 << 28) / copy, "operations": 2 * 8192**3 / product}


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    """Checks, then times one case; returns its seconds, error, backend and work."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import dispatch, timing

    make = {
        "decode": make_attention,
        "prefill": make_attention,
        "tree": make_attention,
        "w4a16": make_w4a16,
        "fp8": make_fp8,
    }[case["kind"]]
    inputs, f, reference, work = make(case)
    inputs = jax.jit(inputs)  # one program to compile, not one for each random array
    sets = [inputs(0)]
    size = sum(x.nbytes for x in jax.tree.leaves(sets[0]))
    sets += [inputs(seed) for seed in range(1, min(24, max(3, CACHE_BYTES // size + 1)))]
    [decision, *_] = dispatch.explain(f, *sets[0])
    compiled = (jax.jit(f), timing.jit_untuned(reference))
    y, expected = (g(*sets[-1]).astype(jnp.float32) for g in compiled)
    error = float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))
    del y, expected
    if not error < MAX_RELATIVE_ERROR:  # NaN is wrong too
        return {"failure": f"relative error {error:.3g} of {decision.chosen}: not timed"}
    timed = timing.measure(f, sets)
    return {
        "seconds": timed.seconds,
        "low": timed.low,
        "high": timed.high,
        "error": error,
        "impl": decision.chosen,
        **work,
    }


Made = tuple[Callable[[int], tuple[Any, ...]], Callable[..., Any], Callable[..., Any], dict]


def make_attention(case: dict[str, Any]) -> Made:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.paged_attention import PagedKV, ragged_paged_attention

    kind = case["kind"]
    batch = case.get("batch", 1)
    per_seq = {"decode": 1, "prefill": case.get("tokens"), "tree": case.get("nodes")}[kind]
    context = case.get("context", per_seq)
    dtype = jnp.dtype(case.get("kv", "bfloat16"))
    page = 64 if dtype == jnp.bfloat16 else 128
    pages = -(-context // page)
    shape = (batch * pages, NUM_KV_HEADS, page, HEAD_DIM)

    def inputs(seed: int) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(seed), 6)
        q = jax.random.normal(keys[0], (batch * per_seq, NUM_HEADS, HEAD_DIM), jnp.bfloat16)
        k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:3])
        scales = (None, None)
        if dtype != jnp.bfloat16:
            k, v = (x * 40 if dtype == jnp.int8 else x for x in (k, v))
            k, v = (jnp.clip(x, -127, 127).astype(dtype) for x in (k, v))
            size = 1 / 40 if dtype == jnp.int8 else 1
            scales = tuple(jax.random.uniform(key, shape[:3], jnp.float32, 0.5, 1.5) * size
                           for key in keys[3:5])  # fmt: skip
        table = jax.random.permutation(keys[5], batch * pages).reshape(batch, pages)
        args = (
            q,
            PagedKV(k, v, *scales),
            jnp.full((batch,), context, jnp.int32),
            table.astype(jnp.int32),
            jnp.arange(batch + 1, dtype=jnp.int32) * per_seq,
        )
        if kind != "tree":
            return args
        bits = [1]  # a binary tree: node i's parent is (i - 1) // 2
        for i in range(1, per_seq):
            bits.append(bits[(i - 1) // 2] | 1 << i)
        return (*args, jnp.tile(jnp.asarray(bits, jnp.uint32), batch)[:, None])

    def attend(impl: str, q: Any, kv: Any, lens: Any, table: Any, starts: Any, tree: Any = None):
        return ragged_paged_attention(
            q, kv, lens, table, starts, sm_scale=HEAD_DIM**-0.5, max_q_len=per_seq,
            tree_mask=tree, impl=impl,
        )  # fmt: skip

    scales_bytes = 0 if dtype == jnp.bfloat16 else 4
    kv_bytes = 2 * batch * context * NUM_KV_HEADS * (HEAD_DIM * dtype.itemsize + scales_bytes)
    operations = 4 * NUM_HEADS * HEAD_DIM * batch * per_seq * context
    operations /= 2 if kind == "prefill" else 1
    work = {"bytes": kv_bytes, "operations": operations}
    return inputs, functools.partial(attend, "auto"), functools.partial(attend, "xla"), work


def make_w4a16(case: dict[str, Any]) -> Made:
    import jax.numpy as jnp

    from pallas_kernels.quant_matmul import preferred_layout, quant_matmul
    from pallas_kernels.quant_matmul.cases import Case

    m, k, n = case["m"], case["k"], case["n"]
    layout = preferred_layout()
    shapes = Case(
        model="llama-3-8b", linear=case["linear"], num_rows=m, num_inputs=k, num_outputs=n
    )

    def exact(x: Any, q: Any, scale: Any, zero: Any) -> Any:
        w = (q if layout == "kn" else q.T).astype(jnp.float32)
        w = w * jnp.repeat(scale.astype(jnp.float32), 128, axis=0)
        return jnp.matmul(x.astype(jnp.float32), w, precision="highest")

    call = functools.partial(quant_matmul, group=128, layout=layout)
    work = {"bytes": k * n // 2 + 2 * (k // 128) * n + 2 * m * (k + n), "operations": 2 * m * k * n}
    return functools.partial(shapes.random_args, layout), call, exact, work


def make_fp8(case: dict[str, Any]) -> Made:
    from pallas_kernels import target
    from pallas_kernels.fp8_matmul import fp8_matmul
    from pallas_kernels.fp8_matmul.cases import Case

    m, k, n = case["m"], case["k"], case["n"]
    layout = "nk" if target.current().kind == "gpu" else "kn"
    shapes = Case(
        model="", linear="", num_rows=m, num_inputs=k, num_outputs=n, scales=case["scales"]
    )
    call = functools.partial(fp8_matmul, block=shapes.block, layout=layout)

    def dequantized(x: Any, w: Any, x_scale: Any, w_scale: Any) -> Any:
        import jax.numpy as jnp

        def spread(scale: Any, size: int) -> Any:
            return scale if shapes.block is None else jnp.repeat(scale, 128, axis=-1)[..., :size]

        w = (w if layout == "kn" else w.T).astype(jnp.float32)
        w = w * (w_scale if shapes.block is None else jnp.repeat(w_scale, 128, axis=0)[:k])
        x = x.astype(jnp.float32) * spread(x_scale, k)
        return jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16),
                          preferred_element_type=jnp.float32)  # fmt: skip

    # fp8 products run at twice the rate of bf16 ones: half as many operations against the ceiling.
    work = {"bytes": k * n + m * k + 2 * m * n, "operations": m * k * n}
    return functools.partial(shapes.random_args, layout), call, dequantized, work


# --- the table -----------------------------------------------------------------------------------


def make_report(
    cases: list[dict[str, Any]], ours: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, Any]:
    """Returns the JSON form of the project's benches: a row per case and peer."""
    copy, product = ours["ceilings"]["bytes"], ours["ceilings"]["operations"]
    rows = [
        plain_row("ceiling: device copy", "bandwidth", "TB/s", copy / 1e12),
        plain_row("ceiling: bf16 8192^3", "rate", "TFLOP/s", product / 1e12),
    ]
    times = {n: r["seconds"] * 1e6 for n, r in ours["results"].items() if "seconds" in r}
    for case in cases:
        name, result = case["name"], ours["results"].get(case["name"], {})
        if "seconds" not in result:
            continue
        micros = times[name]
        limit = 1e6 * max(result["bytes"] / copy, result["operations"] / product)
        label = f"{name} ({result['impl']})"
        quartiles = {q: result[q] * 1e6 for q in ("low", "high")}
        peers = theirs.get("results", {}).get(name, {}) | own_peers(case, times)
        peers.pop("failure", None)
        for peer, value in peers.items() or [(None, None)]:
            row = plain_row(label, "time", "us", micros) | {"limit": limit} | quartiles
            if peer is not None:
                row |= {"peer": peer, "peer_value": value, "ratio": value / micros}
                goal = goal_of(case, peer)
                row |= {} if goal is None else {"goal": goal}
            rows.append(row)
        if case["kind"] == "decode":
            share = 100 * result["bytes"] / result["seconds"] / copy
            rows.append(plain_row(label, "share of the copy's bandwidth", "%", share))
        if case["kind"] in ("prefill", "fp8"):
            scale = 2 if case["kind"] == "fp8" else 1
            rate = scale * result["operations"] / result["seconds"] / 1e12
            rows.append(plain_row(label, "rate", "TFLOP/s", rate))
    packages = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib")}
    versions = {"python": platform.python_version(), **packages, **theirs.get("versions", {})}
    return {
        "device": ours["device"],
        "versions": versions,
        "command": "python scripts/bench_kernels.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def goal_of(case: dict[str, Any], peer: str) -> float | None:
    """Returns the least ratio to a peer that was aimed at, if there was one."""
    goals = {
        "torch mm bf16": W4A16_GOALS.get(case.get("m", 0)),
        "own bf16 KV": 1.5,
        "own decode step": 1 / 1.3,  # a step that verifies 16 nodes takes at most 1.3 times as long
        "torch SDPA CUDNN_ATTENTION": 0.5 if case["kind"] == "prefill" else None,
    }
    return 0.9 if peer.startswith("torch _scaled_mm") else goals.get(peer)


def own_peers(case: dict[str, Any], times: dict[str, float]) -> dict[str, float]:
    """Returns this project's other kernels that a case is held against."""
    if case["kind"] == "decode" and case["kv"] != "bfloat16":
        label = "own bf16 KV"
    elif case["kind"] == "tree":
        label = "own decode step"
    else:
        return {}
    same = {"batch": case["batch"], "context": case["context"], "kv": "bfloat16"}
    name = name_of({"kind": "decode"} | same)
    return {label: times[name]} if name in times else {}


def plain_row(case: str, metric: str, unit: str, value: float) -> dict[str, Any]:
    return {"case": case, "metric": metric, "unit": unit, "value": value, "peer": None,
            "peer_value": None, "ratio": None, "limit": None}  # fmt: skip


def print_report(report: dict[str, Any]) -> None:
    print(f"\n{report['device']}, {report['versions']}")
    for row in report["rows"]:
        line = f"{row['case']:<70} {row['metric']:<30} {row['value']:>10.1f} {row['unit']:<8}"
        line += "" if row["limit"] is None else f" limit {row['limit']:.1f}"
        if row["peer"]:
            line += f"  {row['peer']} {row['peer_value']:.1f}: {row['ratio']:.2f}x"
        print(line)


if __name__ == "__main__":
    sys.exit(main())
