"""`jinfer bench kv`: effect of quantized K and V on perplexity and memory.

A text is cut into windows of the context's length. Each is a prompt whose tokens are scored: every
token attends to the quantized K and V in the cache, as it would if it were generated.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from jinfer.cli.bench.report import Row, finish
from jinfer.cli.flags import DEFAULT_MODEL, input_file
from jinfer.cli.terminal import check

SUMMARY = "perplexity and bytes of quantized K and V"
# Largest accepted relative increases of perplexity.
MOST = {"int8": 0.005, "fp8": 0.01, "int4": 0.05}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer bench kv`."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as in jinfer generate")
    parser.add_argument(
        "--dtype", default="float32", help="dtype of weights and activations (default: float32)"
    )
    parser.add_argument(
        "--text", type=input_file, required=True, metavar="FILE", help="text to score"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=32768,
        help="tokens to score, from the start of the text (default: 32768)",
    )
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens per window (default: 1024)"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        nargs="+",
        default=list(MOST),
        help="formats to compare (default: int8 fp8 int4)",
    )


def run(args: argparse.Namespace) -> int:
    """Compares perplexity with a quantized KV cache to that with the weights' own dtype."""
    from jinfer import load
    from jinfer.checkpoints.tokenizer import load_tokenizer

    model, params = load(args.model, dtype=args.dtype)
    windows = read_windows(load_tokenizer(args.model), args.text, args.tokens, args.context)
    measured = {}
    for dtype in (args.dtype, *args.kv_cache_dtype):
        measured[dtype] = score(model, params, windows, dtype)
    base = measured[args.dtype]
    rows = []
    for dtype in args.kv_cache_dtype:
        got = measured[dtype]
        rise = MOST.get(dtype)
        rows += [
            Row(
                case=f"{dtype} KV",
                metric="perplexity",
                unit="",
                value=got["perplexity"],
                peer=f"{args.dtype} KV",
                peer_value=base["perplexity"],
                ratio=base["perplexity"] / got["perplexity"],
                goal=None if rise is None else 1 / (1 + rise),
                limit=None if rise is None else base["perplexity"] * (1 + rise),
            ),
            Row(
                case=f"{dtype} KV",
                metric="pool bytes a token",
                unit="bytes",
                value=got["pool_bytes_per_token"],
                peer=f"{args.dtype} KV",
                peer_value=base["pool_bytes_per_token"],
                ratio=base["pool_bytes_per_token"] / got["pool_bytes_per_token"],
                limit=got["planned_bytes_per_token"],
            ),
        ]
    finish(
        rows,
        command=f"jinfer bench kv --model {args.model} --dtype {args.dtype} --text "
        f"{args.text.name} --tokens {args.tokens} --context {args.context}",
        json_file=args.json,
        measured=measured,
    )
    return 0


def read_windows(tokenizer: Any, text: Path, num_tokens: int, context: int) -> list[list[int]]:
    """Returns the first `num_tokens` tokens of a file in windows of `context`, the last shorter.

    A last window of a single token is left out: it has no token to score.
    """
    # A token has a few characters: this many suffice, and the whole file may be far too long.
    tokens = tokenizer.encode(text.read_text()[: 16 * num_tokens], add_special_tokens=False)
    if len(tokens) < max(num_tokens, 2):
        raise ValueError(f"{text} has {len(tokens)} tokens, --tokens asks for {num_tokens}")
    starts = range(0, num_tokens, context)
    windows = [tokens[i : min(i + context, num_tokens)] for i in starts]
    return [window for window in windows if len(window) > 1]


def score(model: Any, params: Any, windows: list[list[int]], kv_cache_dtype: str) -> dict[str, Any]:
    """Returns the perplexity of `windows` with a cache of one format, and the cache's bytes."""
    from jinfer import LLM, SamplingParams
    from jinfer.config import memory

    longest = max(map(len, windows))
    llm = LLM(
        model,
        params=params,
        kv_cache_dtype=kv_cache_dtype,
        skip_tokenizer_init=True,
        max_model_len=longest + 1,
        max_num_seqs=1,
        max_logprobs=1,
    )
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    begin = time.perf_counter()
    outputs = check(llm.generate([{"prompt_token_ids": w} for w in windows], asked, use_tqdm=False))
    seconds = time.perf_counter() - begin
    logprobs = []
    for window, output in zip(windows, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            logprobs.append(entry[token].logprob)
    metrics = llm.get_metrics()
    num_slots = metrics["num_pages"] * llm.config.block_size
    return {
        "perplexity": math.exp(-math.fsum(logprobs) / len(logprobs)),
        "num_scored_tokens": len(logprobs),
        "pool_bytes_per_token": metrics["kv_cache_bytes"] / num_slots,
        "planned_bytes_per_token": memory.kv_bytes(model.config, 1, kv_cache_dtype),
        "seconds": seconds,
    }
