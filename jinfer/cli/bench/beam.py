"""`jinfer bench beam`: beam search on forked pages against a loop of one-token requests.

The peer searches as one would on an engine without beams: each step requests one token and the best
log probabilities for every beam, all beams in one call, and chooses among them on the host. It runs
on the same engine with the prefix cache on, so that only the newest page of each beam is computed
again. Both run alternately.
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

SUMMARY = "beam search against a loop of one-token requests"
GOAL = 3.0
BLOCK_SIZE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer bench beam`."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as in jinfer generate")
    parser.add_argument(
        "--dtype", default="auto", help="dtype of weights, activations and KV (default: auto)"
    )
    parser.add_argument("--num-beams", type=int, default=4, help="beam width (default: 4)")
    parser.add_argument(
        "--prompts",
        type=int,
        nargs="+",
        default=[1],
        help="numbers of prompts at a time (default: 1)",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=100, help="tokens per prompt (default: 100)"
    )
    parser.add_argument(
        "--output-tokens", type=int, default=12, help="output tokens per prompt (default: 12)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs (default: 3)")


def run(args: argparse.Namespace) -> int:
    """Measures beam search against a loop of one-token requests on the same engine."""
    from jinfer import LLM, load

    pages_a_beam = -(-(args.prompt_tokens + args.output_tokens) // BLOCK_SIZE)
    num_beams = args.num_beams * max(args.prompts)
    model, params = load(args.model, dtype=None if args.dtype == "auto" else args.dtype)
    llm = LLM(
        model,
        params=params,
        max_model_len=args.prompt_tokens + args.output_tokens,
        max_num_seqs=num_beams,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=num_beams * pages_a_beam,
        max_logprobs=2 * args.num_beams,
        skip_tokenizer_init=True,
    )
    times: dict[str, Any] = {}
    rows = [_measure(llm, num_prompts, args, times) for num_prompts in args.prompts]
    finish(
        rows,
        command=f"jinfer bench beam --model {args.model} --num-beams {args.num_beams} --prompts "
        f"{' '.join(map(str, args.prompts))} --output-tokens {args.output_tokens} "
        f"--repeats {args.repeats}",
        json_file=args.json,
        workload={"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens},
        times=times,
    )
    return 0


def _measure(llm: Any, num_prompts: int, args: argparse.Namespace, times: dict[str, Any]) -> Row:
    case = f"prompts {num_prompts}, beams {args.num_beams}"
    draw = random.Random(0)
    prompts = [
        [draw.randrange(256, 2048) for _ in range(args.prompt_tokens)] for _ in range(num_prompts)
    ]
    searches = {"beam search": search_on_pages, "one-token requests": search_by_requests}
    found = {  # also compiles everything
        name: search(llm, prompts, args.num_beams, args.output_tokens)
        for name, search in searches.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in searches}
    for repeat in range(args.repeats):
        order = list(searches.items())
        for name, search in order if repeat % 2 == 0 else reversed(order):
            llm.reset_prefix_cache()
            gc.collect()
            begin = time.perf_counter()
            search(llm, prompts, args.num_beams, args.output_tokens)
            taken[name].append(time.perf_counter() - begin)
    ours, theirs = found.values()
    num_same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    times[case] = {**taken, "prompts_with_the_same_best_text": num_same}
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    num_tokens = num_prompts * args.output_tokens
    return Row(
        case=case,
        metric="steps_per_s",
        unit="tokens of the best text/s",
        value=num_tokens / seconds["beam search"],
        peer="one-token requests",
        peer_value=num_tokens / seconds["one-token requests"],
        ratio=statistics.median(b / a for a, b in zip(*taken.values(), strict=True)),
        goal=GOAL,
    )


def search_on_pages(
    llm: Any, prompts: list[list[int]], num_beams: int, num_tokens: int
) -> list[list[int]]:
    """Returns the best text of each prompt."""
    from jinfer import BeamSearchParams

    params = BeamSearchParams(beam_width=num_beams, max_tokens=num_tokens, ignore_eos=True)
    outputs = check(llm.beam_search([{"prompt_token_ids": p} for p in prompts], params))
    return [output.sequences[0].output_token_ids for output in outputs]


def search_by_requests(
    llm: Any, prompts: list[list[int]], num_beams: int, num_tokens: int
) -> list[list[int]]:
    """Returns the best text of each prompt, found by `num_tokens` calls of `generate`."""
    from jinfer import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=1, logprobs=2 * num_beams, ignore_eos=True, detokenize=False
    )
    beams: list[list[tuple[float, list[int]]]] = [[(0.0, prompt)] for prompt in prompts]
    for _ in range(num_tokens):
        texts = [{"prompt_token_ids": text} for group in beams for _, text in group]
        outputs = iter(check(llm.generate(texts, params, use_tqdm=False)))
        for i, group in enumerate(beams):
            longer = [
                (total + entry.logprob, [*text, token])
                for total, text in group
                for token, entry in next(outputs).outputs[0].logprobs[0].items()
            ]
            beams[i] = sorted(longer, key=lambda beam: -beam[0])[:num_beams]
    return [group[0][1][len(prompt) :] for group, prompt in zip(beams, prompts, strict=True)]
