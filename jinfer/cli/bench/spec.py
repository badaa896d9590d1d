"""`jinfer bench spec`: tokens per step, acceptance and speed of speculation vs. plain decoding.

Both engines have the same weights and chats. They run each batch alternately, several times, and
the median counts. All prompts are in their prefix caches, so that almost only decoding is timed; a
run in which anything compiled is repeated. Adaptive methods first run an untimed pass, in which
they measure.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinfer.cli.bench.report import Row, finish
from jinfer.cli.flags import DEFAULT_MODEL, path
from jinfer.cli.terminal import check, say
from jinfer.jobs import jsonl

SUMMARY = "speculative decoding against plain decoding"
METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "adaptive": False},
    "ngram-adaptive": {"method": "ngram", "adaptive": True},
    "medusa": {"method": "medusa", "adaptive": False},
    "medusa-adaptive": {"method": "medusa", "adaptive": True},
    "lookahead": {"method": "lookahead", "adaptive": False},
    "lookahead-adaptive": {"method": "lookahead", "adaptive": True},
    "self": {"method": "self", "adaptive": False},
    "self-adaptive": {"method": "self", "adaptive": True},
    "draft": {"method": "draft", "adaptive": False},
    "draft-adaptive": {"method": "draft", "adaptive": True},
}
# Least speedup that an adaptive method must reach.
LEAST_SPEEDUP = 0.95
MAX_TURNS = 4  # most runs of a batch until one compiles nothing
# Goals for tokens per step.
GOALS = {
    ("ngram", "overall"): 1.3,
    ("ngram", "summarization"): 1.8,
    ("medusa", "overall"): 1.6,
    ("self", "overall"): 3.0,  # with 4 drafts
}
# The categories of MT-Bench, which Spec-Bench reports as one.
_CHAT = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]


@dataclasses.dataclass
class _Counts:
    """Counts and times of one engine for some prompts."""

    seconds: float = 0.0
    tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    drafted_at: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    accepted_at: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: _Counts) -> None:
        for field in dataclasses.fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + getattr(other, name))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer bench spec`."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as in jinfer generate")
    parser.add_argument(
        "--dtype", default="auto", help="dtype of weights, activations and KV (default: auto)"
    )
    parser.add_argument(
        "--prompts",
        type=path,
        required=True,
        metavar="FILE",
        help='JSONL of {"category": ..., "turns": [...]}; only first turns are used',
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        help="default: all, as far as --heads and --draft-model are given",
    )
    parser.add_argument("--heads", metavar="DIR", help="Medusa heads, see jinfer train-medusa")
    parser.add_argument(
        "--draft-model", metavar="MODEL", help="draft model of the methods draft and draft-adaptive"
    )
    parser.add_argument(
        "--self-format",
        default="int4-g64",
        help="format of the methods self and self-adaptive (default: int4-g64)",
    )
    parser.add_argument(
        "--num-speculative-tokens",
        type=int,
        default=4,
        help="drafts per step without trees (default: 4)",
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    parser.add_argument("--limit", type=int, default=8, help="prompts per category (default: 8)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs of each batch (default: 3)"
    )
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--output-tokens", type=int, default=64, help="tokens per answer (default: 64)"
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        default=2048,
        help="context length; longer chats are left out (default: 2048)",
    )


def run(args: argparse.Namespace) -> int:
    """Measures each method on chats of several categories, at each batch size."""
    from jinfer import LLM, load
    from jinfer.checkpoints.tokenizer import load_tokenizer

    for flag in ("repeats", "limit"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    methods = {
        name: _config(name, args)
        for name in args.methods or METHODS
        if args.methods
        or {"medusa": args.heads, "draft": args.draft_model}.get(METHODS[name]["method"], True)
    }
    tokenizer = load_tokenizer(args.model)
    chats = read_chats(args.prompts, tokenizer, args.limit, args.max_model_len - args.output_tokens)
    unknown = set(args.categories or ()) - chats.keys()
    if unknown:
        raise ValueError(f"no category {sorted(unknown)} in {args.prompts}: it has {list(chats)}")
    chats = {name: chats[name] for name in args.categories or chats}
    model, params = load(args.model, dtype=None if args.dtype == "auto" else args.dtype)
    rows: list[Row] = []
    for batch_size in args.batch_sizes:
        common: dict[str, Any] = {
            "params": params,
            "max_model_len": args.max_model_len,
            "max_num_seqs": batch_size,
            "num_gpu_blocks_override": _num_pages(chats, args.output_tokens, args.max_model_len),
            "skip_tokenizer_init": True,
        }
        plain = LLM(model, **common)
        for method, config in methods.items():
            llm = LLM(model, speculative_config=config, **common)
            for prompts in chats.values():
                _generate(plain, prompts, batch_size, 1)
                _generate(llm, prompts, batch_size, args.output_tokens if config["adaptive"] else 1)
            measured = {}
            for category, prompts in chats.items():
                counts = _measure(plain, llm, prompts, batch_size, args.output_tokens, args.repeats)
                measured[category] = counts
                say(f"{method}/{category}/b{batch_size}: {_in_short(counts[0], counts[1])}")
                if args.json is not None and len(args.batch_sizes) == len(methods) == 1:
                    part = _rows(
                        method, batch_size, measured
                    )  # what is left if the bench is interrupted
                    _finish(args, part, [method], {n: chats[n] for n in measured}, is_printed=False)
            rows += _rows(method, batch_size, measured)
            del llm
            gc.collect()
        del plain
        gc.collect()
    _finish(args, rows, methods, chats)
    return 0


def _finish(
    args: argparse.Namespace,
    rows: list[Row],
    methods: Iterable[str],
    chats: dict[str, list[list[int]]],
    *,
    is_printed: bool = True,
) -> None:
    categories = chats if args.categories or not is_printed else ()
    finish(
        rows,
        command=f"jinfer bench spec --model {args.model} --prompts {args.prompts.name} --methods "
        f"{' '.join(methods)} --num-speculative-tokens {args.num_speculative_tokens} "
        f"--batch-sizes {' '.join(map(str, args.batch_sizes))} --limit {args.limit} "
        f"--output-tokens {args.output_tokens} --repeats {args.repeats}"
        + (f" --categories {' '.join(categories)}" if categories else "")
        + (f" --dtype {args.dtype}" if args.dtype != "auto" else "")
        + (f" --heads {Path(args.heads).name}" if args.heads else "")
        + (f" --draft-model {args.draft_model}" if args.draft_model else "")
        + (f" --self-format {args.self_format}" if args.self_format != "int4-g64" else ""),
        json_file=args.json,
        is_printed=is_printed,
        workload={name: [len(p) for p in prompts] for name, prompts in chats.items()},
    )


def _config(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the `speculative_config` of a method."""
    config = dict(METHODS[name])
    if config["method"] not in ("medusa", "lookahead"):
        config["num_speculative_tokens"] = args.num_speculative_tokens
    if config["method"] == "medusa":
        if args.heads is None:
            raise ValueError(f"method {name} needs --heads DIR, see jinfer train-medusa")
        config["heads"] = args.heads
    if config["method"] == "self":
        config["format"] = args.self_format
    if config["method"] == "draft":
        if args.draft_model is None:
            raise ValueError(f"method {name} needs a --draft-model")
        config["model"] = args.draft_model
    return config


def read_chats(path: Path, tokenizer: Any, limit: int, longest: int) -> dict[str, list[list[int]]]:
    """Returns up to `limit` prompts of each category, as token ids in the model's chat format.

    Raises:
      ValueError: a line has another form, or no prompt is short enough.
    """
    from jinfer.text.prompts import apply_chat_template

    chats: dict[str, list[list[int]]] = collections.defaultdict(list)
    for number, raw in jsonl.read_lines(path):
        try:
            row = json.loads(raw)
            category, question = row["category"], row["turns"][0]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"category": ..., "turns": [...]}} ({error!r})'
            ) from None
        group = chats["mt_bench" if category in _CHAT else category]
        if len(group) < limit:
            message = {"role": "user", "content": question}
            tokens = apply_chat_template(tokenizer, [message], add_generation_prompt=True)
            if len(tokens) <= longest:
                group.append(list(tokens))
    chats = {name: prompts for name, prompts in chats.items() if prompts}
    if not chats:
        raise ValueError(f"{path} has no prompt of at most {longest} tokens")
    return chats


def _num_pages(
    chats: dict[str, list[list[int]]], num_outputs: int, longest: int, page_size: int = 64
) -> int:
    """Returns enough pages for all chats, so that none is evicted, rounded to few distinct sizes.

    Each size compiles anew.
    """
    lengths = [len(prompt) + num_outputs for prompts in chats.values() for prompt in prompts]
    num_pages = sum(-(-n // page_size) for n in lengths)
    return 1 << max(num_pages, -(-longest // page_size)).bit_length()


def _generate(llm: Any, prompts: list[list[int]], batch_size: int, num_tokens: int) -> Any:
    """Returns counts, and the outputs in order."""
    from jinfer import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, detokenize=False)
    counts, tokens = _Counts(), []
    for i in range(0, len(prompts), batch_size):
        batch = [{"prompt_token_ids": prompt} for prompt in prompts[i : i + batch_size]]
        begin = time.perf_counter()
        outputs = check(llm.generate(batch, params, use_tqdm=False))
        counts.seconds += time.perf_counter() - begin
        for output in outputs:
            tokens.append(output.outputs[0].token_ids)
            counts.tokens += len(tokens[-1])
            counts.decode_steps += output.metrics.num_decode_steps
            counts.decode_tokens += output.metrics.num_decode_tokens
            counts.drafted_at.update(dict(enumerate(output.metrics.num_drafted_at)))
            counts.accepted_at.update(dict(enumerate(output.metrics.num_accepted_at)))
    return counts, tokens


def _measure(
    plain: Any, llm: Any, prompts: list[list[int]], batch_size: int, num_tokens: int, repeats: int
) -> tuple[_Counts, _Counts, int]:
    """Returns plain and speculative counts, and how many prompts have the same tokens in both.

    Counts sum all repeats; a batch's seconds are its median times the number of repeats.
    """
    engines, num_same = (plain, llm), 0
    totals = _Counts(), _Counts()
    for i in range(0, len(prompts), batch_size):
        part = prompts[i : i + batch_size]
        seconds: tuple[list[float], list[float]] = [], []
        texts: tuple[list[Any], list[Any]] = [], []
        for repeat in range(repeats):
            order = (0, 1) if (i // batch_size + repeat) % 2 == 0 else (1, 0)
            found: dict[int, Any] = {}
            for _ in range(MAX_TURNS):
                num_compiled = llm.num_compilations
                found = {e: _generate(engines[e], part, batch_size, num_tokens) for e in order}
                if llm.num_compilations == num_compiled:
                    break
            for e, (counts, outputs) in found.items():
                seconds[e].append(counts.seconds)
                texts[e].append(outputs)
                totals[e].add(dataclasses.replace(counts, seconds=0.0))
        for e in (0, 1):
            totals[e].seconds += statistics.median(seconds[e]) * repeats
        num_same += sum(
            all(a[j] == b[j] for a, b in zip(*texts, strict=True)) for j in range(len(part))
        )
    return *totals, num_same


def _in_short(slow: _Counts, fast: _Counts) -> str:
    per_step = fast.decode_tokens / max(1, fast.decode_steps)
    speedup = fast.tokens / fast.seconds / (slow.tokens / slow.seconds)
    return f"{per_step:.2f} tokens per step, {speedup:.2f}x in {slow.seconds + fast.seconds:.0f} s"


def _rows(
    method: str, batch_size: int, measured: dict[str, tuple[_Counts, _Counts, int]]
) -> list[Row]:
    slow, fast, num_same = _Counts(), _Counts(), 0
    for counts in measured.values():
        slow.add(counts[0])
        fast.add(counts[1])
        num_same += counts[2]
    rows = []
    for category, (a, b, same) in {**measured, "overall": (slow, fast, num_same)}.items():
        case = f"{method}/{category}/b{batch_size}"
        per_step = b.decode_tokens / max(1, b.decode_steps)
        plain_rate, rate = a.tokens / a.seconds, b.tokens / b.seconds
        rows += [
            Row(
                case=case,
                metric="tokens_per_step",
                unit="tokens",
                value=per_step,
                peer="plain decoding",
                peer_value=1.0,
                ratio=per_step,
                goal=GOALS.get((method, category)),
            ),
            Row(
                case=case,
                metric="acceptance",
                unit="of the drafts",
                value=b.accepted_at.total() / max(1, b.drafted_at.total()),
                parts=tuple(b.accepted_at[i] / n for i, n in sorted(b.drafted_at.items()) if n),
            ),
            Row(
                case=case,
                metric="speedup",
                unit="tokens/s",
                value=rate,
                peer="plain decoding",
                peer_value=plain_rate,
                ratio=rate / plain_rate,
                goal=LEAST_SPEEDUP if METHODS[method].get("adaptive") else None,
            ),
            Row(case=case, metric="prompts with the same tokens", unit="", value=float(same)),
        ]
    return rows
