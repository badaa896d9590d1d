"""`jinfer train-medusa`: heads that guess several tokens ahead, for a model that stays as it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinfer.commands import flags
from jinfer.commands.terminal import say

SUMMARY = "train Medusa heads for a model"
TOP_KS = (1, 2, 3, 5, 10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer train-medusa`."""
    parser.add_argument("--model", default=flags.DEFAULT_MODEL, help="as for jinfer generate")
    parser.add_argument("--dtype", default="auto", help="of the model's weights (auto)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="what to learn from; see above")
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="the heads")
    parser.add_argument("--num-heads", type=int, default=4, help="(4)")
    parser.add_argument(
        "--shared-unembedding",
        action=flags.BOOL,
        default=None,
        help="heads without a linear of their own; default: where these would add more than a "
        "quarter to the model",
    )
    parser.add_argument("--steps", type=int, help="default: two epochs")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a step (8)")
    parser.add_argument("--window", type=int, default=256, help="tokens a window (256)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak (0.001)")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="(0)")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps (100)")
    parser.add_argument("--seed", type=int, default=0, help="of data and order (0)")
    parser.add_argument("--max-texts", type=int, default=512, help="read or generate (512)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a generated text (256)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of generated texts (0.7)")
    parser.add_argument("--tree-nodes", type=int, default=16, help="guesses a step (16)")


def run(args: argparse.Namespace) -> int:
    """Trains heads that guess the tokens after the next one; the model's weights stay as they are.

    --data is a JSONL file whose lines have "text", learnt as it is, or a prompt ("prompt",
    "messages" or "prompt_token_ids"), of which the model's own answer is learnt; or any other file,
    learnt as one text.
    Without it the model writes texts of its own. A tenth of the windows is kept apart to measure
    each head on. --output gets heads.safetensors and medusa.json, with the accuracies and a tree of
    guesses fitted to them, and "data.npz" and "checkpoints", from which the same command goes on
    after a cut.
    """
    import numpy as np
    from tqdm import tqdm

    from jinfer import load
    from jinfer.spec import medusa, medusa_training
    from jinfer.spec.medusa_tree import expected_tokens, fit_tree

    model, params = load(args.model, dtype=None if args.dtype == "auto" else args.dtype)
    shared = args.shared_unembedding
    if shared is None:
        linears = args.num_heads * model.config.vocab_size * model.config.hidden_size
        shared = 4 * linears > _size(params)
    config = medusa.MedusaConfig(
        num_heads=args.num_heads,
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        shared_unembedding=shared,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    _check_same_run(args, args.output / "run.json")
    tokens, spans = _data(args, model, params, args.output / "data.npz")
    num_held = max(1, len(tokens) // 10)
    if len(tokens) <= num_held:
        raise ValueError(f"{len(tokens)} windows of {args.window} tokens are too few to learn from")
    num_steps = args.steps or -(-2 * (len(tokens) - num_held) // args.batch_size)
    training = medusa_training.TrainingConfig(
        num_steps=num_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
    )
    heads = medusa.init(config, model, params)
    checkpoints = medusa_training.Checkpoints(args.output / "checkpoints")
    bar = tqdm(total=num_steps, desc="train", unit="step", disable=None)

    def advance(step: int, losses: np.ndarray) -> None:
        bar.set_postfix_str("loss " + " ".join(f"{x:.2f}" for x in losses), refresh=False)
        bar.update(step - bar.n)

    try:
        with bar:
            heads = medusa_training.train(
                model,
                params,
                heads,
                tokens[num_held:],
                spans[num_held:],
                training,
                checkpoints=checkpoints,
                on_step=advance,
            )
    finally:
        checkpoints.close()
    accuracies = medusa_training.rank_accuracies(
        model, params, heads, tokens[:num_held], spans[:num_held], batch_size=args.batch_size
    )
    tree = fit_tree(accuracies.tolist(), num_nodes=args.tree_nodes)
    medusa.save(args.output, config, heads, rank_accuracies=accuracies.tolist(), tree=tree)
    _print_report(accuracies, num_held)
    expected = expected_tokens(tree, accuracies.tolist())
    print(f"tree of {len(tree)} guesses: {expected:.2f} tokens a step expected; in {args.output}")
    return 0


def _size(params: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _check_same_run(args: argparse.Namespace, file: Path) -> None:
    """Refuses to go on in a folder of a run with other settings."""
    names = ("model", "dtype", "data", "num_heads", "shared_unembedding", "steps", "batch_size")
    names += ("window", "learning_rate", "weight_decay", "seed", "max_texts", "max_tokens")
    settings = {name: str(getattr(args, name)) for name in (*names, "temperature")}
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            there, here = ({n: d.get(n) for n in changed} for d in (before, settings))
            raise ValueError(
                f"{file.parent} holds a run with {there}, this one has {here}: give another "
                "--output, or the same settings"
            )
    file.write_text(json.dumps(settings, indent=1) + "\n")


def _data(args: argparse.Namespace, model: Any, params: Any, file: Path) -> tuple[Any, Any]:
    """Returns the windows, from `file` if a run before has left them there."""
    import numpy as np

    from jinfer import LLM
    from jinfer.spec.medusa_training import windows

    if file.is_file():
        with np.load(file) as arrays:
            return arrays["tokens"], arrays["spans"]
    llm = LLM(model, params=params, tokenizer=args.model, generation_config="none")
    tokens, spans = windows(list(_texts(args, llm)), args.window)
    order = np.random.default_rng(args.seed).permutation(len(tokens))
    tokens, spans = tokens[order], spans[order]
    np.savez(file.with_suffix(".tmp.npz"), tokens=tokens, spans=spans)
    file.with_suffix(".tmp.npz").replace(file)
    return tokens, spans


def _texts(args: argparse.Namespace, llm: Any) -> Iterator[tuple[list[int], int]]:
    """The token ids of each text, read or written by the model, and how many are its prompt."""
    tokenizer = llm.get_tokenizer()
    if args.data is None:
        start = tokenizer.bos_token_id
        if start is None:
            start = tokenizer.eos_token_id
        yield from _answers(args, llm, [[start]] * args.max_texts)
        return
    if args.data.suffix != ".jsonl":
        yield tokenizer.encode(args.data.read_text()), 0
        return
    prompts = []
    lines = [line for line in args.data.read_text().splitlines() if line.strip()]
    for number, line in enumerate(lines[: args.max_texts], 1):
        entry = json.loads(line)
        if "text" in entry:
            yield tokenizer.encode(entry["text"]), 0
        elif "messages" in entry:
            text = tokenizer.apply_chat_template(
                entry["messages"], tokenize=False, add_generation_prompt=True
            )
            prompts.append(tokenizer.encode(text, add_special_tokens=False))
        elif "prompt" in entry:
            prompts.append(tokenizer.encode(entry["prompt"]))
        elif "prompt_token_ids" in entry:
            prompts.append(entry["prompt_token_ids"])
        else:
            raise ValueError(
                f'{args.data} line {number} must have "text" or a prompt, got {sorted(entry)}'
            )
    yield from _answers(args, llm, prompts)


def _answers(
    args: argparse.Namespace, llm: Any, prompts: list[list[int]]
) -> Iterator[tuple[list[int], int]]:
    from jinfer import SamplingParams

    if not prompts:
        return
    say(f"the model writes {len(prompts)} texts of at most {args.max_tokens} tokens")
    fields = {"temperature": args.temperature, "max_tokens": args.max_tokens, "detokenize": False}
    params = [SamplingParams(**fields, seed=args.seed + i) for i in range(len(prompts))]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=True)
    for prompt, output in zip(prompts, outputs, strict=True):
        yield [*prompt, *output.outputs[0].token_ids], len(prompt)


def _print_report(accuracies: Any, num_windows: int) -> None:
    shown = [k for k in TOP_KS if k <= accuracies.shape[1]]
    print(f"accuracy on {num_windows} windows kept apart, %")
    print("head  " + "".join(f"{f'top-{k}':>8}" for k in shown))
    for i, row in enumerate(accuracies):
        print(f"{i:<6}" + "".join(f"{100 * row[:k].sum():8.1f}" for k in shown))
