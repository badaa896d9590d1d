"""`jinfer bench prefix`: gains and costs of the prefix cache.

The peer is the same engine without the cache or, for `host`, without the host tier. Both run
alternately in one process, so that other load on the machine affects both; each run starts with an
empty cache.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from typing import Any

from jinfer.cli.bench.report import Row, finish
from jinfer.cli.flags import DEFAULT_MODEL
from jinfer.cli.terminal import check

SUMMARY = "the prefix cache, on and off, and its host tier"
CASES = ("shared", "cold", "host", "tree")
GOALS = {"shared": 3.0, "cold": 0.98, "host": 2.0}
WORK_GOALS = {"shared": 5.0, "host": 3.0}
POOL_SHARE = 3  # `host`: the prompts take this many times the pages of the device
PAGE_SIZE = 64
MAX_US_PER_PAGE = 50.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer bench prefix`."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as in jinfer generate")
    parser.add_argument(
        "--dtype", default="auto", help="dtype of weights, activations and KV (default: auto)"
    )
    parser.add_argument("--max-num-seqs", type=int, help="as in jinfer generate")
    parser.add_argument("--max-num-batched-tokens", type=int, help="as in jinfer generate")
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES, help="default: all")
    parser.add_argument(
        "--requests", type=int, default=64, help="requests of `shared` and `cold` (default: 64)"
    )
    parser.add_argument(
        "--system-tokens",
        type=int,
        default=1000,
        help="shared tokens per prompt of `shared` (default: 1000)",
    )
    parser.add_argument(
        "--own-tokens",
        type=int,
        default=32,
        help="further tokens per prompt of `shared` (default: 32)",
    )
    parser.add_argument(
        "--cold-tokens", type=int, default=256, help="tokens per prompt of `cold` (default: 256)"
    )
    parser.add_argument(
        "--output-tokens", type=int, default=16, help="output tokens per request (default: 16)"
    )
    parser.add_argument(
        "--host-prompts", type=int, default=12, help="prompts of `host` (default: 12)"
    )
    parser.add_argument(
        "--host-tokens", type=int, default=512, help="tokens per prompt of `host` (default: 512)"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of `shared` and `host` (default: 1)"
    )
    parser.add_argument("--cold-repeats", type=int, default=5, help="runs of `cold` (default: 5)")
    parser.add_argument(
        "--tree-pages", type=int, default=100_000, help="pages of `tree` (default: 100000)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures the prefix cache against the same engine with the cache off.

    shared: requests that begin with the same system prompt. cold: requests that share nothing.
    host: prompts that are repeated and take three times the pages of the device. tree: the radix
    tree alone, without a model.
    """
    rows: list[Row] = []
    times: dict[str, Any] = {}
    if set(args.case) & {"shared", "cold"}:
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
    if "host" in args.case:
        draw = random.Random(1)
        prompts = [
            _draw_tokens(draw, args.host_tokens - 1, first=i) for i in range(args.host_prompts)
        ]
        engines = _make_host_engines(args)
        rows += _measure("host", engines, prompts, args, args.repeats, times, num_passes=2)
    if "tree" in args.case:
        rows += measure_tree(args.tree_pages)
        rows += measure_parts(args.tree_pages)
    workload = {
        name: getattr(args, name)
        for name in (
            *("requests", "system_tokens", "own_tokens", "cold_tokens", "output_tokens"),
            *("host_prompts", "host_tokens"),
        )
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


def _make_host_engines(args: argparse.Namespace) -> dict[str, Any]:
    """Returns engines whose pool holds a third of the prompts, with and without a host tier."""
    from jinfer import LLM, load

    model, params = load(args.model, dtype=None if args.dtype == "auto" else args.dtype)
    longest = args.host_tokens + args.output_tokens
    num_pages = args.host_prompts * -(-longest // PAGE_SIZE)
    limits: dict[str, Any] = {
        "max_model_len": longest,
        "max_num_seqs": args.max_num_seqs or max(1, args.host_prompts // POOL_SHARE),
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "block_size": PAGE_SIZE,
        "num_gpu_blocks_override": -(-num_pages // POOL_SHARE),
        "skip_tokenizer_init": True,
    }
    without = LLM(model, params=params, **limits)
    metrics = without.get_metrics()
    gib = num_pages * metrics["kv_cache_bytes"] / metrics["num_pages"] / 2**30
    engines = {
        "host tier": LLM(model, params=params, cpu_offload_gb=gib, **limits),
        "no host tier": without,
    }
    for llm in engines.values():
        llm.warmup()
    return engines


def _max_model_len(args: argparse.Namespace) -> int:
    longest = max(args.system_tokens + args.own_tokens, args.cold_tokens)
    return longest + args.output_tokens


def _draw_tokens(draw: random.Random, count: int, first: int | None = None) -> list[int]:
    """Returns random ids: only which of them are equal matters for the speed."""
    tokens = [draw.randrange(256, 2048) for _ in range(count)]
    return tokens if first is None else [first, *tokens]


def _measure(
    case: str,
    engines: dict[str, Any],
    prompts: list[list[int]],
    args: argparse.Namespace,
    repeats: int,
    times: dict[str, Any],
    num_passes: int = 1,
) -> list[Row]:
    ours, peer = engines
    taken: dict[str, list[float]] = {name: [] for name in engines}
    work: dict[str, float] = {}
    for repeat in range(repeats):
        order = list(engines.items())
        for name, llm in order if repeat % 2 == 0 else reversed(order):
            seconds, work[name] = _serve(llm, prompts, args.output_tokens, num_passes)
            taken[name].append(seconds)
    times[case] = taken
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    # Compares neighbouring runs, since a slow phase of the machine affects both.
    pairs = zip(taken[peer], taken[ours], strict=True)
    ratio = statistics.median(off / on for off, on in pairs)
    return [
        Row(
            case=case,
            metric="requests_per_s",
            unit="requests/s",
            value=len(prompts) / median[ours],
            peer=peer,
            peer_value=len(prompts) / median[peer],
            ratio=ratio,
            goal=GOALS[case],
        ),
        Row(
            case=case,
            metric="prefilled_tokens",
            unit="tokens",
            value=work[ours],
            peer=peer,
            peer_value=work[peer],
            ratio=work[peer] / work[ours],
            goal=WORK_GOALS.get(case),
        ),
    ]


def _serve(
    llm: Any, prompts: list[list[int]], output_tokens: int, num_passes: int = 1
) -> tuple[float, float]:
    """Returns seconds of the last pass over all prompts, and the prompt tokens it computed.

    The first pass begins with an empty cache.
    """
    from jinfer import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
    )
    texts = [{"prompt_token_ids": p} for p in prompts]
    llm.reset_prefix_cache()
    for _ in range(num_passes - 1):
        check(llm.generate(texts, params, use_tqdm=False))
    before = llm.get_metrics()
    gc.collect()
    begin = time.perf_counter()
    check(llm.generate(texts, params, use_tqdm=False))
    seconds = time.perf_counter() - begin
    gained = {name: value - before[name] for name, value in llm.get_metrics().items()}
    # A prompt's last chunk samples a token as well; every other sampled token is a decode step.
    sampled = gained["num_output_tokens"] + gained["num_discarded_tokens"]
    return seconds, gained["num_scheduled_tokens"] - sampled + len(prompts)


def measure_tree(num_pages: int, page_size: int = 16, pages_a_text: int = 64) -> list[Row]:
    """Fills a radix tree with `num_pages` pages, looks all of them up, and evicts all of them.

    Texts share their first half with one in eight others, so that the tree branches.
    """
    from jinfer.engine.pages.pool import PagePool
    from jinfer.engine.pages.prefix import PrefixCache

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
    held = cache.alloc(cache.pool.num_free)  # so that further allocations must evict
    begin = time.perf_counter()
    for _ in range(num_cached):
        held += cache.alloc(1)
    evict_us = (time.perf_counter() - begin) / num_cached * 1e6
    assert cache.num_evicted == num_cached and cache.num_cached == 0
    return _tree_rows(f"tree of {num_cached} pages", lookup=lookup_us, evict=evict_us)


def measure_parts(num_pages: int, page_size: int = 16) -> list[Row]:
    """Fills a tree with partly filled pages below one node, finds and evicts all of them.

    They begin with the same four tokens; each is looked up by all of its tokens.
    """
    from jinfer.engine.pages.pool import PagePool
    from jinfer.engine.pages.prefix import PrefixCache

    draw = random.Random(0)
    cache = PrefixCache(PagePool(num_pages), page_size)
    count = page_size * 3 // 4
    texts = [
        [7] * 4 + [draw.randrange(1 << 15) for _ in range(count - 4)] for _ in range(num_pages)
    ]
    gc.collect()
    begin = time.perf_counter()
    for text in texts:
        cache.release(0, text, cache.alloc(1))
    insert_us = (time.perf_counter() - begin) / num_pages * 1e6
    draw.shuffle(texts)
    begin = time.perf_counter()
    num_found = sum(cache.find_part(0, [*text, -1], [])[1] == count for text in texts)
    lookup_us = (time.perf_counter() - begin) / num_pages * 1e6
    begin = time.perf_counter()
    for _ in range(num_pages):
        cache.alloc(1)
    evict_us = (time.perf_counter() - begin) / num_pages * 1e6
    assert num_found == cache.num_evicted == num_pages
    case = f"{num_pages} parts of pages below one node"
    return _tree_rows(case, insert=insert_us, lookup=lookup_us, evict=evict_us)


def _tree_rows(case: str, **taken_us: float) -> list[Row]:
    return [
        Row(
            case=case,
            metric=f"{name}_us_per_page",
            unit="us",
            value=value,
            limit=MAX_US_PER_PAGE,
        )
        for name, value in taken_us.items()
    ]
