"""`jinfer train-medusa`: heads that guess several tokens ahead, for a model that stays as it is."""

from __future__ import annotations

import argparse
from typing import Any

from jinfer.commands import flags, training

SUMMARY = "train Medusa heads for a model"
TOP_KS = (1, 2, 3, 5, 10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer train-medusa`."""
    training.add_arguments(parser, output="the heads", batch_size=8, learning_rate=1e-3)
    parser.add_argument("--num-heads", type=int, default=4, help="(4)")
    parser.add_argument(
        "--shared-unembedding",
        action=flags.BOOL,
        default=None,
        help="heads without a linear of their own; default: where these would add more than a "
        "quarter to the model",
    )
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
    from jinfer.spec import medusa, medusa_training
    from jinfer.spec.medusa_tree import expected_tokens, fit_tree

    model, params = training.load_model(args)
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
    training.check_same_run(args, "num_heads", "shared_unembedding")
    data = training.read_data(args, model, params)
    heads = medusa.init(config, model, params)
    objective = medusa_training.HeadLoss(model)
    heads = training.train(args, objective, params, heads, data)
    accuracies = medusa_training.rank_accuracies(
        model, params, heads, data.held_tokens, data.held_spans, batch_size=args.batch_size
    )
    tree = fit_tree(accuracies.tolist(), num_nodes=args.tree_nodes)
    medusa.save(args.output, config, heads, rank_accuracies=accuracies.tolist(), tree=tree)
    _print_report(accuracies, len(data.held_tokens))
    expected = expected_tokens(tree, accuracies.tolist())
    print(f"tree of {len(tree)} guesses: {expected:.2f} tokens a step expected; in {args.output}")
    return 0


def _size(params: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _print_report(accuracies: Any, num_windows: int) -> None:
    shown = [k for k in TOP_KS if k <= accuracies.shape[1]]
    print(f"accuracy on {num_windows} windows kept apart, %")
    print("head  " + "".join(f"{f'top-{k}':>8}" for k in shown))
    for i, row in enumerate(accuracies):
        print(f"{i:<6}" + "".join(f"{100 * row[:k].sum():8.1f}" for k in shown))
