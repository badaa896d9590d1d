"""Measures the engine against transformers' `generate`: same CPU, weights, prompts and run.

    python scripts/bench_engine.py --model smollm2 [--json FILE] [--quick]

Two cases, greedy, end tokens ignored, token ids in and out on both sides: one stream, and 32
requests of mixed lengths. The engine runs in float32 and in bfloat16, with the prefix cache off.
transformers runs in every combination of {float32, bfloat16} x {eager, sdpa} x {batches of 16
sorted by output length, one batch of 32}, padding on the left; its best one is then measured again,
and the best of all is in the table.
The better dtype of the engine stands beside it. Only the tokens that were asked for count. Every
peer runs in a process of its own after a warm-up; rates are medians.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GOALS = {"single": 1.5, "mixed": 2.0}
PEERS = [(dtype, impl) for dtype in ("float32", "bfloat16") for impl in ("eager", "sdpa")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, GGUF file or folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few tokens, one repeat")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each case (3)")
    parser.add_argument(
        "--worker", nargs=3, metavar=("PEER", "SPEC", "OUT"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker)
    spec = make_spec(args)
    with tempfile.TemporaryDirectory() as folder:
        dtypes = ("float32",) if args.quick else ("float32", "bfloat16")
        engines = {f"jinfer {d}": run_worker(f"jinfer {d}", spec, folder) for d in dtypes}
        peers = {}
        for dtype, impl in PEERS[1::2] if args.quick else PEERS:
            name = f"transformers {dtype} {impl}"
            peers[name] = run_worker(name, {**spec, "repeats": 1}, folder)
        best_single, best_mixed, best_batch = best_of(peers)
        if not args.quick:
            again = {**spec, "mixed": []}
            peers[best_single]["single"] = run_worker(best_single, again, folder)["single"]
            again = {**spec, "single": None, "batches": [int(best_batch)]}
            peers[best_mixed]["mixed"] |= run_worker(best_mixed, again, folder)["mixed"]
    report = make_report(spec, engines, peers)
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def best_of(peers: dict[str, Any]) -> tuple[str, str, str]:
    """Returns the fastest peer of one stream, and peer and batch of the mixed load."""
    mixed = {(n, b): r["rate"] for n, peer in peers.items() for b, r in peer["mixed"].items()}
    return max(peers, key=lambda name: peers[name]["single"]["rate"]), *max(
        mixed, key=mixed.__getitem__
    )


# --- the work to do ------------------------------------------------------------------------------


def make_spec(args: argparse.Namespace) -> dict[str, Any]:
    """Cuts prompts from the licence text at random places, of random lengths; the seed is fixed."""
    from jinfer.checkpoints.tokenizer import load_tokenizer

    text = (ROOT / "LICENSE").read_text()
    ids = load_tokenizer(args.model).encode(text, add_special_tokens=False)
    draw = random.Random(0)

    def request(prompt_len: int, max_tokens: int) -> dict[str, Any]:
        start = draw.randrange(len(ids) - prompt_len)
        return {"prompt": ids[start : start + prompt_len], "max_tokens": max_tokens}

    longest = 48 if args.quick else 256
    return {
        "model": args.model,
        "folder": str(export_for_transformers(args.model)),
        "single": request(64, 24 if args.quick else 128),
        "mixed": [
            request(draw.randint(16, longest), draw.randint(16, longest))
            for _ in range(8 if args.quick else 32)
        ],
        "batches": [4, 8] if args.quick else [16, 32],
        "repeats": 1 if args.quick else args.repeats,
    }


def export_for_transformers(model: str) -> Path:
    """Writes our float32 weights once as a Hugging Face folder: both sides have equal ones."""
    import numpy as np
    from safetensors.numpy import save_file

    from jinfer import load
    from jinfer.checkpoints.default_model import cache_dir
    from jinfer.checkpoints.families import assemble, tensor_names

    path = Path(model)
    if path.is_dir() and (path / "config.json").is_file():
        return path
    key = hashlib.sha256(f"{path.resolve()} {path.exists() and path.stat()}".encode()).hexdigest()
    folder = cache_dir() / "bench" / f"{path.stem}-{key[:8]}"
    if folder.is_dir():
        return folder
    loaded, params = load(model, dtype="float32")
    config = loaded.config
    if config.family != "llama" or config.rope.scaling != "none":
        sys.exit(f"{model}: only plain llama models are exported; give a Hugging Face folder")

    def get(keys: tuple[str | int, ...]) -> np.ndarray:
        leaf: Any = params
        for name in keys:
            leaf = leaf[name]
        return np.asarray(leaf)

    tensors = {n: np.ascontiguousarray(assemble(config, n, get)) for n in tensor_names(config)}
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": config.pad_token_id,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "model"
        whole.mkdir()
        save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
        (whole / "config.json").write_text(json.dumps(fields, indent=1))
        shutil.move(whole, folder)
    return folder


# --- the peers, each in its own process ----------------------------------------------------------


def run_worker(peer: str, spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Measures one peer in a fresh process."""
    spec_file, out_file = Path(folder) / "spec.json", Path(folder) / "out.json"
    spec_file.write_text(json.dumps(spec))
    print(f"measuring {peer} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--worker", peer, str(spec_file), str(out_file)]
    subprocess.run(command, check=True)
    return json.loads(out_file.read_text())


def work(peer: str, spec_file: str, out_file: str) -> int:
    """Runs inside the worker process."""
    spec = json.loads(Path(spec_file).read_text())
    work_peer = work_jinfer if peer.startswith("jinfer") else work_transformers
    results = work_peer(peer, spec)
    Path(out_file).write_text(json.dumps(results))
    return 0


def peak_bytes() -> int:
    """Largest resident size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(generate: Any, requests: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Times the work, warmed up before; `generate` returns a token list a request."""
    times = []
    tokens: list[list[int]] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        tokens = generate(requests)
        times.append(time.perf_counter() - begin)
    wanted = [request["max_tokens"] for request in requests]
    assert [len(row) for row in tokens] == wanted, "a peer made another number of tokens"
    rate = sum(wanted) / statistics.median(times)
    return {"rate": rate, "times": times, "tokens": tokens, "peak_bytes": peak_bytes()}


def work_jinfer(peer: str, spec: dict[str, Any]) -> dict[str, Any]:
    from jinfer import LLM, SamplingParams

    # The prefix cache would find the prompts of the run before.
    llm = LLM(spec["model"], dtype=peer.split()[1], enable_prefix_caching=False)
    llm.warmup()

    def generate(requests: list[dict[str, Any]]) -> list[list[int]]:
        params = [
            SamplingParams(
                temperature=0, max_tokens=r["max_tokens"], ignore_eos=True, detokenize=False
            )
            for r in requests
        ]
        prompts = [{"prompt_token_ids": r["prompt"]} for r in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    generate([spec["single"]])
    single = measure(generate, [spec["single"]], spec["repeats"])
    generate(spec["mixed"])
    return {"single": single, "mixed": measure(generate, spec["mixed"], spec["repeats"])}


def work_transformers(peer: str, spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    _, dtype, impl = peer.split()
    model = AutoModelForCausalLM.from_pretrained(
        spec["folder"], dtype=getattr(torch, dtype), attn_implementation=impl
    ).eval()
    model.generation_config.eos_token_id = None  # end tokens are ignored
    pad = model.generation_config.pad_token_id or 0

    @torch.inference_mode()
    def generate_batch(requests: list[dict[str, Any]]) -> list[list[int]]:
        width = max(len(r["prompt"]) for r in requests)
        padded = [[pad] * (width - len(r["prompt"])) + r["prompt"] for r in requests]
        mask = [[0] * (width - len(r["prompt"])) + [1] * len(r["prompt"]) for r in requests]
        rows = model.generate(
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=max(r["max_tokens"] for r in requests),
            pad_token_id=pad,
        )
        return [row[width : width + r["max_tokens"]] for r, row in zip(requests, rows.tolist())]

    def generate(requests: list[dict[str, Any]], batch: int) -> list[list[int]]:
        order = sorted(range(len(requests)), key=lambda i: requests[i]["max_tokens"])
        tokens: list[list[int]] = [[] for _ in requests]
        for start in range(0, len(order), batch):
            chunk = order[start : start + batch]
            for i, row in zip(chunk, generate_batch([requests[i] for i in chunk])):
                tokens[i] = row
        return tokens

    generate([{"prompt": [1] * 64, "max_tokens": 8}] * max(spec["batches"]), max(spec["batches"]))
    results: dict[str, Any] = {"mixed": {}}
    if spec["single"]:
        requests = [spec["single"]]
        results["single"] = measure(lambda r: generate(r, 1), requests, spec["repeats"])
    for batch in spec["batches"] if spec["mixed"] else []:
        results["mixed"][str(batch)] = measure(
            lambda r, b=batch: generate(r, b), spec["mixed"], spec["repeats"]
        )
    return results


# --- the report ----------------------------------------------------------------------------------


def copy_bandwidth() -> float:
    """Bytes a second read and written by the best of five large copies."""
    import numpy as np

    source = np.ones(1 << 26, np.float32)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best


def make_report(
    spec: dict[str, Any], engines: dict[str, Any], peers: dict[str, Any]
) -> dict[str, Any]:
    """Puts the numbers into the form that every bench writes."""
    from jinfer.checkpoints.load import load_config
    from jinfer.config import memory

    requests = spec["mixed"]
    prompt_lens = [len(r["prompt"]) for r in requests]
    output_lens = [r["max_tokens"] for r in requests]
    cases = {
        "single": f"1 stream: {len(spec['single']['prompt'])} prompt tokens, "
        f"{spec['single']['max_tokens']} new",
        "mixed": f"{len(requests)} requests: prompts {min(prompt_lens)}-{max(prompt_lens)}, "
        f"outputs {min(output_lens)}-{max(output_lens)}, {sum(output_lens)} new in all",
    }
    best_single, best_mixed, best_batch = best_of(peers)
    chosen = {
        "single": (best_single, peers[best_single]["single"]),
        "mixed": (f"{best_mixed} batch {best_batch}", peers[best_mixed]["mixed"][best_batch]),
    }
    rows = []
    for name, case in cases.items():
        peer_name, peer = chosen[name]
        own_name = max(engines, key=lambda engine: engines[engine][name]["rate"])
        ours = engines[own_name][name]
        limit = None
        if name == "single":
            # A stream reads every weight once a token: their bytes at the speed of a copy.
            weights = memory.weight_bytes(load_config(spec["model"]), own_name.split()[-1])
            limit = copy_bandwidth() / weights
        for metric, unit, key, scale in (
            ("output rate", "tokens/s", "rate", 1),
            ("peak memory", "MiB", "peak_bytes", 1 / 2**20),
        ):
            is_rate = key == "rate"
            rows.append(
                {
                    "case": case,
                    "metric": metric,
                    "unit": unit,
                    "own": own_name,
                    "value": ours[key] * scale,
                    "peer": peer_name,
                    "peer_value": peer[key] * scale,
                    "ratio": ours[key] / peer[key],
                    "limit": limit if is_rate else None,
                    "goal": GOALS[name] if is_rate else None,
                }
            )
    # The same weights must give the same greedy tokens, ties in float32 arithmetic aside.
    exact = next(peer for name, peer in peers.items() if "float32" in name)
    own_tokens = engines["jinfer float32"]["mixed"]["tokens"]
    same = [a == b for a, b in zip(own_tokens, exact["mixed"][best_batch]["tokens"])]
    rows.append(
        {
            "case": cases["mixed"],
            "metric": "requests with equal greedy tokens",
            "unit": "requests",
            "own": "jinfer float32",
            "value": sum(same),
            "peer": "transformers float32",
            "peer_value": len(same),
            "ratio": sum(same) / len(same),
            "limit": None,
            "goal": None,
        }
    )
    packages = ("jax", "jaxlib", "torch", "transformers", "numpy")
    return {
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "command": "python scripts/bench_engine.py " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": rows,
        "tried": {
            f"{name}{suffix}": rate
            for name, peer in peers.items()
            for suffix, rate in [("", peer["single"]["rate"])]
            + [(f" batch {b}", result["rate"]) for b, result in peer["mixed"].items()]
        }
        | {
            f"{name} {case}": result["rate"]
            for name, engine in engines.items()
            for case, result in engine.items()
        },
    }


def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def print_table(report: dict[str, Any]) -> None:
    """Prints the rows, the peers that were tried, and whether the goals are met."""
    print(f"{report['device']}; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    last = None
    for row in report["rows"]:
        if row["case"] != last:
            print(f"\n{row['case']}")
        last = row["case"]
        line = (
            f"  {row['metric']:<34} {row['own']} {row['value']:8.1f} {row['unit']:<9} "
            f"{row['peer']} {row['peer_value']:.1f}: {row['ratio']:.2f}x"
        )
        if row["goal"]:
            is_met = row["ratio"] >= row["goal"]
            line += f" (goal {row['goal']:g}x {'met' if is_met else 'MISSED'})"
        if row["limit"]:
            line += f", weights at copy speed: {row['limit']:.0f}"
        print(line)
    print("\ntried, tokens/s:")
    for name, rate in report["tried"].items():
        print(f"  {name:<40} {rate:8.1f}")


if __name__ == "__main__":
    sys.exit(main())
