"""`jinfer bench prefix`: what the prefix cache gains where prompts share a beginning, and costs.

The peer is the same engine with the cache off. Both live in one process and take turns, so that
what else the machine does falls on both; each run starts with an empty cache.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from typing import Any

from jinfer.commands.bench_report import Row, finish
from jinfer.commands.flags import DEFAULT_MODEL

SUMMARY = "the prefix cache, on and off"
CASES = ("shared", "cold", "tree")
GOALS = {"shared": 3.0, "cold": 0.98}
WORK_GOAL = 5.0
MAX_US_PER_PAGE = 50.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer bench prefix`."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as for jinfer generate")
    parser.add_argument("--dtype", default="auto", help="of weights, activations and KV (auto)")
    parser.add_argument("--max-num-seqs", type=int, help="as for jinfer generate")
    parser.add_argument("--max-num-batched-tokens", type=int, help="as for jinfer generate")
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES, help="(all)")
    parser.add_argument("--requests", type=int, default=64, help="(64)")
    parser.add_argument("--system-tokens", type=int, default=1000, help="shared ones (1000)")
    parser.add_argument("--own-tokens", type=int, default=32, help="others a prompt (32)")
    parser.add_argument("--cold-tokens", type=int, default=256, help="a prompt of `cold` (256)")
    parser.add_argument("--output-tokens", type=int, default=16, help="of each request (16)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of `shared` (1)")
    parser.add_argument("--cold-repeats", type=int, default=5, help="runs of `cold` (5)")
    parser.add_argument("--tree-pages", type=int, default=100_000, help="(100000)")


def run(args: argparse.Namespace) -> int:
    """Measures the prefix cache against the same engine with the cache off.

    shared: requests that begin with one system prompt. cold: requests that share nothing. tree: the
    radix tree alone, without a model.
    """
    rows: list[Row] = []
    times: dict[str, Any] = {}
    if set(args.case) - {"tree"}:
        engines = _make_engines(args)
        draw = random.Random(0)
        if "shared" in args.case:
            system = _draw_tokens(draw, args.system_tokens)
            prompts = [
                system + _draw_tokens(draw, args.own_tokens - 1, first=i)
                for i in range(args.requests)
            ]
            rows += _measure("shared", engines, prompts, args, args.repeats, times)
        if "cold" in args.case:
            prompts = [
                _draw_tokens(draw, args.cold_tokens - 1, first=i) for i in range(args.requests)
            ]
            rows += _measure("cold", engines, prompts, args, args.cold_repeats, times)
    if "tree" in args.case:
        rows += measure_tree(args.tree_pages)
    workload = {
        name: getattr(args, name)
        for name in ("requests", "system_tokens", "own_tokens", "cold_tokens", "output_tokens")
    }
    finish(
        rows,
        command=f"jinfer bench prefix --model {args.model} --case {' '.join(args.case)}",
        json_file=args.json,
        workload=workload,
        times=times,
    )
    return 0


def _make_engines(args: argparse.Namespace) -> dict[str, Any]:
    from jinfer import LLM, load

    model, params = load(args.model, dtype=None if args.dtype == "auto" else args.dtype)
    limits: dict[str, Any] = {
        "max_model_len": _max_model_len(args),
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "skip_tokenizer_init": True,
    }
    engines = {
        name: LLM(model, params=params, enable_prefix_caching=is_on, **limits)
        for name, is_on in (("cache on", True), ("cache off", False))
    }
    for llm in engines.values():
        llm.warmup()
    return engines


def _max_model_len(args: argparse.Namespace) -> int:
    longest = max(args.system_tokens + args.own_tokens, args.cold_tokens)
    return longest + args.output_tokens


def _draw_tokens(draw: random.Random, count: int, first: int | None = None) -> list[int]:
    """Random ids; what they are does not matter to the speed, only which are equal."""
    tokens = [draw.randrange(256, 2048) for _ in range(count)]
    return tokens if first is None else [first, *tokens]


def _measure(
    case: str,
    engines: dict[str, Any],
    prompts: list[list[int]],
    args: argparse.Namespace,
    repeats: int,
    times: dict[str, Any],
) -> list[Row]:
    taken: dict[str, list[float]] = {name: [] for name in engines}
    work: dict[str, float] = {}
    for repeat in range(repeats):
        order = list(engines.items())
        for name, llm in order if repeat % 2 == 0 else reversed(order):
            seconds, work[name] = _serve(llm, prompts, args.output_tokens)
            taken[name].append(seconds)
    times[case] = taken
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    # Each turn against its own neighbour: what slows the machine for a while slows both.
    pairs = zip(taken["cache off"], taken["cache on"], strict=True)
    ratio = statistics.median(off / on for off, on in pairs)
    return [
        Row(
            case=case,
            metric="requests_per_s",
            unit="requests/s",
            value=len(prompts) / median["cache on"],
            peer="cache off",
            peer_value=len(prompts) / median["cache off"],
            ratio=ratio,
            goal=GOALS[case],
        ),
        Row(
            case=case,
            metric="prefilled_tokens",
            unit="tokens",
            value=work["cache on"],
            peer="cache off",
            peer_value=work["cache off"],
            ratio=work["cache off"] / work["cache on"],
            goal=WORK_GOAL if case == "shared" else None,
        ),
    ]


def _serve(llm: Any, prompts: list[list[int]], output_tokens: int) -> tuple[float, float]:
    """Returns seconds for all prompts, from an empty cache, and the prompt tokens computed."""
    from jinfer import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
    )
    llm.reset_prefix_cache()
    before = llm.get_metrics()
    gc.collect()
    begin = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    gained = {name: value - before[name] for name, value in llm.get_metrics().items()}
    # The last chunk of a prompt samples a token as well; every other sampled token is a decode.
    sampled = gained["num_output_tokens"] + gained["num_discarded_tokens"]
    return seconds, gained["num_scheduled_tokens"] - sampled + len(prompts)


def measure_tree(num_pages: int, page_size: int = 16, pages_a_text: int = 64) -> list[Row]:
    """Fills a radix tree with `num_pages` pages, looks all of them up, and evicts all of them.

    Texts share their first half with one in eight others, so that the tree branches.
    """
    from jinfer.engine.pages import PagePool
    from jinfer.engine.prefix import PrefixCache

    draw = random.Random(0)
    cache = PrefixCache(PagePool(num_pages), page_size)
    half = pages_a_text // 2 * page_size
    texts: list[list[int]] = []
    while cache.num_available - cache.num_evictable >= pages_a_text:
        parent = texts[draw.randrange(len(texts))] if texts and draw.random() < 0.125 else None
        rest = pages_a_text * page_size - (half if parent else 0)
        text = (parent[:half] if parent else []) + [draw.randrange(1 << 15) for _ in range(rest)]
        cache.release(0, text, cache.alloc(pages_a_text))
        texts.append(text)
    num_cached = cache.num_cached
    draw.shuffle(texts)
    gc.collect()
    begin = time.perf_counter()
    num_found = sum(len(cache.find(0, text, pages_a_text)) for text in texts)
    lookup_us = (time.perf_counter() - begin) / num_found * 1e6
    held = cache.alloc(cache.pool.num_free)  # whatever is taken now must be evicted
    begin = time.perf_counter()
    for _ in range(num_cached):
        held += cache.alloc(1)
    evict_us = (time.perf_counter() - begin) / num_cached * 1e6
    assert cache.num_evicted == num_cached and cache.num_cached == 0
    return [
        Row(
            case=f"tree of {num_cached} pages",
            metric=f"{name}_us_per_page",
            unit="us",
            value=value,
            limit=MAX_US_PER_PAGE,
        )
        for name, value in (("lookup", lookup_us), ("evict", evict_us))
    ]
