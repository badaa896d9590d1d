"""`jinfer eval`: perplexity of a model on a text, and KL divergence from another model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
from typing import Any

from jinfer.cli.flags import (
    DEFAULT_MODEL,
    check_positions,
    check_result_file,
    fit_positions,
    input_file,
    result_file,
)
from jinfer.cli.terminal import progress, say

SUMMARY = "measure a model's perplexity on a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer eval`."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as in jinfer generate")
    parser.add_argument(
        "--dtype", default="float32", help="dtype of float weights (default: float32)"
    )
    parser.add_argument(
        "--text", type=input_file, required=True, metavar="FILE", help="text in UTF-8, plain or .gz"
    )
    parser.add_argument(
        "--context", type=int, help="tokens per window (default: 1024, or the model's limit)"
    )
    parser.add_argument("--windows", type=int, metavar="N", help="number of windows (default: all)")
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="reference model: prints KL divergence and top-1 agreement",
    )
    parser.add_argument(
        "--json", type=result_file, metavar="FILE", help="write the results to this file"
    )


def run(args: argparse.Namespace) -> int:
    """Measures a model's perplexity on consecutive windows of a text, without special tokens.

    The first token of each window is not scored. With --against it also prints the mean KL
    divergence of the model's next-token distributions from the reference's, and how often both
    have the same most likely token.
    """
    from jinfer import load
    from jinfer.checkpoints.load import load_config
    from jinfer.checkpoints.tokenizer import load_tokenizer
    from jinfer.quant import texts
    from jinfer.quant.evaluate import evaluate
    from jinfer.setup.options import enable_compilation_cache

    if args.context is not None and args.context < 2:
        raise ValueError(f"--context must be at least 2 tokens, got {args.context}")
    if args.windows is not None and args.windows < 1:
        raise ValueError(f"--windows must be positive, got {args.windows}")
    check_result_file(args.json)
    enable_compilation_cache()
    args.context = fit_positions(args.context, 1024, load_config(args.model), "context")
    text = "\n\n".join(texts.read_texts(args.text))
    tokenizer = load_tokenizer(args.model)
    windows = texts.windows(
        text,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        length=args.context,
        num_windows=args.windows,
    )
    if args.against is not None:
        _check_tokenizers(args.model, tokenizer, args.against, load_tokenizer(args.against), text)
    model, params = load(args.model, dtype=args.dtype)
    reference = None if args.against is None else load(args.against, dtype=args.dtype)
    if reference is not None:
        other = reference[0].config
        check_positions(other, args.context, "context")
        if other.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"{args.model} has a vocabulary of {model.config.vocab_size} tokens and --against "
                f"{args.against} of {other.vocab_size}: their distributions cannot be compared"
            )
    with progress(len(windows), "eval", "window") as bar:

        def on_window(_: int) -> None:
            bar.update()

        result = evaluate(model, params, windows, against=reference, on_window=on_window)
    say(
        f"perplexity {result.perplexity:.4f} ({result.num_windows} windows of {result.length} "
        f"tokens, {result.num_scored} scored, {result.seconds:.1f} s)"
    )
    if result.kl is not None and result.top1 is not None:
        error = "" if result.kl_se is None else f" +- {result.kl_se:.2g}"
        say(f"against {args.against}: KL {result.kl:.6f}{error} nats, top-1 {result.top1:.2%}")
    if args.json is not None:
        report = {
            "model": args.model,
            "against": args.against,
            "text": args.text.name,
            "dtype": args.dtype,
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("jax", "jinfer")},
            **dataclasses.asdict(result),
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _check_tokenizers(name: str, own: Any, other_name: str, other: Any, text: str) -> None:
    """Raises ValueError, naming both models, unless each token id means the same in both."""
    strings = [
        {i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (own, other)
    ]
    different = sorted(strings[0].items() ^ strings[1].items())
    if different:
        ours, theirs = (table.get(different[0][0], "no token") for table in strings)
        reason = f"token {different[0][0]} is {ours!r} in one and {theirs!r} in the other"
    elif own.encode(text, add_special_tokens=False) != other.encode(text, add_special_tokens=False):
        reason = "the same vocabulary, but this text gives different tokens"
    else:
        return
    raise ValueError(
        f"{name} and --against {other_name} have different tokenizers ({reason}): KL and agreement "
        f"compare distributions over the same tokens"
    )
