"""`jinfer train-medusa`: trains heads that guess several tokens ahead; the model is not changed."""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from jinfer.checkpoints.files import writing
from jinfer.cli import flags, training
from jinfer.cli.terminal import progress, timed
from jinfer.config.speculative import MAX_TREE_NODES

SUMMARY = "train Medusa heads for a model"
TOP_KS = (1, 2, 3, 5, 10)
NUM_RANKS = 20  # guesses per head that a tree may use
WINDOWS_A_RUN = 8  # windows whose hidden states are computed together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer train-medusa`."""
    training.add_arguments(
        parser, output="the heads", batch_size=1024, example="tokens", learning_rate=1e-3
    )
    parser.add_argument(
        "--num-heads", type=training.positive, default=4, help="number of heads (default: 4)"
    )
    parser.add_argument(
        "--shared-unembedding",
        action=flags.BOOL,
        default=None,
        help=(
            "heads use the model's output layer instead of their own (default: if their "
            "own would add more than a quarter to the model)"
        ),
    )
    parser.add_argument(
        "--draft-vocab-size",
        type=training.positive,
        metavar="N",
        help=(
            "heads guess only among the N most frequent tokens of the data, which is "
            "smaller and faster (default: all tokens)"
        ),
    )
    parser.add_argument(
        "--reads-root",
        action=flags.BOOL,
        default=True,
        help=(
            "heads also read the token sampled after the hidden state, with D * D more "
            "weights each, and are right more often (default: on)"
        ),
    )
    parser.add_argument(
        "--tree-nodes",
        type=training.positive,
        default=16,
        help=f"guesses per step, at most {MAX_TREE_NODES} (default: 16)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains heads that guess the tokens after the next one; the model's weights do not change.

    --data is a JSONL file whose lines have "text" to train on, or a prompt ("prompt", "messages" or
    "prompt_token_ids"), for which the model generates the answer to train on; or any other file,
    read as one text. Without --data the model generates the texts. A tenth of the windows is held
    out to measure each head's accuracy.

    --output gets heads.safetensors and medusa.json, with the accuracies and a tree of guesses
    fitted to them, and "answers.jsonl", "data.npz", "hidden.npz" (the hidden states of all training
    tokens, computed once: 4 bytes times the hidden size each) and "checkpoints", from which the
    same command resumes.
    """
    from jinfer.speculation import medusa
    from jinfer.speculation.medusa_tree import fit_tree, tokens_per_step
    from jinfer.training import medusa as medusa_training

    if args.tree_nodes > MAX_TREE_NODES:
        raise ValueError(f"--tree-nodes must be 1 to {MAX_TREE_NODES}, got {args.tree_nodes}")
    model, params = training.load_model(args)
    shared = args.shared_unembedding
    if shared is None:
        num_guessable = args.draft_vocab_size or model.config.vocab_size
        shared = 4 * args.num_heads * num_guessable * model.config.hidden_size > _size(params)
    config = medusa.MedusaConfig(
        num_heads=args.num_heads,
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        shared_unembedding=shared,
        draft_vocab_size=args.draft_vocab_size,
        reads_root=args.reads_root,
    )
    training.check_same_run(
        args, "num_heads", "shared_unembedding", "draft_vocab_size", "reads_root"
    )
    learnt, held = _examples(args, model, params)
    tokens = None
    if config.draft_vocab_size is not None:
        tokens = medusa_training.draft_tokens(
            learnt.targets, vocab_size=config.vocab_size, size=config.draft_vocab_size
        )
    heads = medusa.init(config, model, params, tokens)
    weights, frozen = medusa.split(config, heads)
    targets = medusa_training.as_ranks(learnt.targets, tokens, config.vocab_size)
    objective = medusa_training.HeadLoss(model)
    weights = training.train(
        args, objective, (params, frozen), weights, learnt._replace(targets=targets)
    )
    heads = {**frozen, **weights}
    ranks = medusa_training.target_ranks(model, params, heads, held, num_ranks=NUM_RANKS)
    accuracies = medusa_training.rank_accuracies(ranks, NUM_RANKS)
    tree = fit_tree(ranks.tolist(), num_nodes=args.tree_nodes, max_rank=NUM_RANKS)
    medusa.save(args.output, config, heads, rank_accuracies=accuracies.tolist(), tree=tree)
    print(f"{len(learnt.hidden)} training tokens, {len(held.hidden)} held out")
    if tokens is not None:
        can = (medusa_training.as_ranks(held.targets, tokens, config.vocab_size) >= 0).sum()
        share = can / max(1, (held.targets >= 0).sum())
        print(f"{100 * share:.1f} % of the held-out tokens are in the draft vocabulary")
    _print_report(accuracies)
    # Fitted on one half and evaluated on the other, for an estimate on new texts.
    half = len(ranks) // 2
    parts = ranks[:half].tolist(), ranks[half:].tolist()
    expected = sum(
        tokens_per_step(fit_tree(a, num_nodes=args.tree_nodes, max_rank=NUM_RANKS), b) / 2
        for a, b in (parts, parts[::-1])
    )
    print(f"tree of {len(tree)} guesses: {expected:.2f} tokens per step expected; in {args.output}")
    return 0


def _examples(args: argparse.Namespace, model: Any, params: Any) -> tuple[Any, Any]:
    """Returns training and held-out examples, from --output if an earlier run saved them there."""
    import numpy as np

    from jinfer.training.medusa import Examples, examples

    file = args.output / "hidden.npz"
    if not file.is_file():
        data = training.read_data(args, model, params)
        parts = args.output / "hidden"
        windows = {
            "learnt": (data.tokens, data.spans),
            "held": (data.held_tokens, data.held_spans),
        }
        found = []
        for name, (tokens, spans) in windows.items():
            with (
                timed(f"hidden states of {len(tokens)} windows"),
                progress(len(tokens), "hidden states", "window") as bar,
                writing(
                    parts,
                    left="the windows done so far are kept: run the same command again to resume",
                ),
            ):
                found += examples(
                    *(model, params, tokens, spans),
                    num_heads=args.num_heads,
                    batch_size=WINDOWS_A_RUN,
                    on_batch=lambda done, bar=bar: bar.update(done - bar.n),
                    folder=parts / name,
                )
        training.save_arrays(file, *found)
        shutil.rmtree(parts)
    with np.load(file) as arrays:
        found = [arrays[f"arr_{i}"] for i in range(2 * len(Examples._fields))]
    half = len(Examples._fields)
    return Examples(*found[:half]), Examples(*found[half:])


def _size(params: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _print_report(accuracies: Any) -> None:
    shown = [k for k in TOP_KS if k <= accuracies.shape[1]]
    print("accuracy on held-out tokens, %")
    print("head  " + "".join(f"{f'top-{k}':>8}" for k in shown))
    for i, row in enumerate(accuracies):
        print(f"{i:<6}" + "".join(f"{100 * row[:k].sum():8.1f}" for k in shown))
