"""`jinfer bench latency`: time between tokens of running requests while a long prompt arrives.

Some requests decode; then one with a long prompt arrives. The peer is the same engine without
chunked prefill, where one step takes the whole prompt and all other requests wait for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
import time
from typing import Any

from jinfer.cli.bench.report import Row, finish
from jinfer.cli.flags import DEFAULT_MODEL
from jinfer.cli.terminal import check

SUMMARY = "time between tokens while a long prompt arrives, with chunked prefill and without"
GOAL = 3.0


@dataclasses.dataclass(frozen=True)
class Served:
    """One run: `gaps` between tokens of the running requests, and the long one's first token.

    All in milliseconds.
    """

    gaps: list[float]
    first_token: float

    def percentile(self, share: float) -> float:
        """Returns the gap that `share` of all gaps do not exceed."""
        ordered = sorted(self.gaps)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer bench latency`."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as in jinfer generate")
    parser.add_argument(
        "--dtype", default="auto", help="dtype of weights, activations and KV (default: auto)"
    )
    parser.add_argument("--decodes", type=int, default=8, help="running requests (default: 8)")
    parser.add_argument(
        "--short-tokens", type=int, default=32, help="tokens of their prompts (default: 32)"
    )
    parser.add_argument(
        "--output-tokens", type=int, default=64, help="output tokens of each (default: 64)"
    )
    parser.add_argument(
        "--long-tokens", type=int, default=4000, help="tokens of the long prompt (default: 4000)"
    )
    parser.add_argument(
        "--arrives-after",
        type=int,
        default=16,
        help="decode steps before the long prompt arrives (default: 16)",
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        help="most tokens in one step of the engine with chunked prefill",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs, after one to warm up (default: 3)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures the time between tokens of running decodes while a long prompt arrives.

    A token's time is when the engine returns it.
    """
    from jinfer import LLM, load

    model, params = load(args.model, dtype=None if args.dtype == "auto" else args.dtype)
    limits: dict[str, Any] = {
        "max_model_len": args.long_tokens + args.short_tokens + args.output_tokens,
        "max_num_seqs": args.decodes + 1,
        "num_decode_steps": 1,  # one token per step, so that each gap is between two tokens
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    runs: dict[str, list[Served]] = {}
    for name in ("chunked", "whole"):
        own: dict[str, Any] = {"enable_chunked_prefill": False}
        if name == "chunked":
            own = {"max_num_batched_tokens": args.max_num_batched_tokens}
        llm = LLM(model, params=params, **limits, **own)
        serve(llm, args)
        runs[name] = [serve(llm, args) for _ in range(args.repeats)]
    rows = [
        _row(f"p{round(100 * share)} time between tokens", runs, args, goal, share=share)
        for share, goal in ((0.5, None), (0.99, GOAL))
    ]
    rows.append(_row("time to the long prompt's first token", runs, args, None, share=None))
    finish(
        rows,
        command=f"jinfer bench latency --model {args.model} --decodes {args.decodes} "
        f"--long-tokens {args.long_tokens} --output-tokens {args.output_tokens} "
        f"--repeats {args.repeats}",
        json_file=args.json,
        gaps_ms={name: [served.gaps for served in all_of] for name, all_of in runs.items()},
    )
    return 0


def _row(
    metric: str,
    runs: dict[str, list[Served]],
    args: argparse.Namespace,
    goal: float | None,
    *,
    share: float | None,
) -> Row:
    """Returns the median over the repeats of a percentile of the gaps, or of the first token."""
    medians = {
        name: statistics.median(
            served.first_token if share is None else served.percentile(share) for served in all_of
        )
        for name, all_of in runs.items()
    }
    return Row(
        case=f"{args.long_tokens} prompt tokens among {args.decodes} decodes",
        metric=metric,
        unit="ms",
        value=medians["chunked"],
        peer="whole prefill",
        peer_value=medians["whole"],
        ratio=medians["whole"] / medians["chunked"],
        goal=goal,
    )


def serve(llm: Any, args: argparse.Namespace) -> Served:
    """Runs the decodes, adds the long prompt after some steps, and times every token."""
    from jinfer import SamplingParams

    draw = random.Random(0)

    def add(request_id: str, num_tokens: int, max_tokens: int) -> None:
        prompt = [draw.randrange(256, 2048) for _ in range(num_tokens)]
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        llm.add_request(request_id, {"prompt_token_ids": prompt}, params)

    for i in range(args.decodes):
        add(f"decode-{i}", args.short_tokens, args.output_tokens)
    came: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    arrived = 0.0
    while llm.has_unfinished_requests():
        fewest = min((counts.get(f"decode-{i}", 0) for i in range(args.decodes)), default=0)
        if not arrived and fewest >= args.arrives_after:
            arrived = time.perf_counter()
            add("long", args.long_tokens, 1)
        for output in check(llm.step()):
            now, count = time.perf_counter(), len(output.outputs[0].token_ids)
            if count > counts.get(output.request_id, 0):
                counts[output.request_id] = count
                came.setdefault(output.request_id, []).append(now)
    if not arrived:
        raise ValueError("the decodes ended before the prompt came: lower --arrives-after")
    [first] = came.pop("long")
    gaps = [1e3 * (b - a) for times in came.values() for a, b in itertools.pairwise(times)]
    return Served(gaps, 1e3 * (first - arrived))
