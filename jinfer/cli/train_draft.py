"""`jinfer train-draft`: distils a draft model with few layers from a model."""

from __future__ import annotations

import argparse

from jinfer.cli import training

SUMMARY = "distil a draft model with few layers"
NUM_DRAFTS = 4  # drafts per step for which the report estimates tokens per step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer train-draft`."""
    training.add_arguments(
        parser, output="the draft model", batch_size=4, example="windows", learning_rate=3e-4
    )
    parser.add_argument(
        "--num-layers",
        type=training.positive,
        default=4,
        help="layers of the draft model (default: 4)",
    )


def run(args: argparse.Namespace) -> int:
    """Distils a draft model: some layers of the model, trained to predict what the model predicts.

    Embeddings and output layer are the model's own, unchanged. --data is a JSONL file whose lines
    have "text" to train on, or a prompt ("prompt", "messages" or "prompt_token_ids"), for which the
    model generates the answer to train on; or any other file, read as one text. Without --data the
    model generates the texts. A tenth of the windows is held out for evaluation.

    --output gets "model", a folder for any command and for speculative_config, report.json, and
    "answers.jsonl", "data.npz" and "checkpoints", from which the same command resumes.
    """
    import json

    from jinfer.checkpoints.families import config_from_hf
    from jinfer.checkpoints.load import open_checkpoint
    from jinfer.checkpoints.save import Extras, save_folder
    from jinfer.checkpoints.tokenizer import tokenizer_files
    from jinfer.models.model import Model
    from jinfer.training import draft as draft_training

    target, params = training.load_model(args)
    hf = {**open_checkpoint(args.model).hf, "num_hidden_layers": args.num_layers}
    if hf.get("layer_types"):
        hf["layer_types"] = hf["layer_types"][: args.num_layers]
    draft = Model(config_from_hf(hf))
    weights = draft_training.init(params, draft.config)
    training.check_same_run(args, "num_layers")
    data = training.read_data(args, target, params)
    most = draft_training.most_places(data.spans)
    objective = draft_training.Distillation(target, draft, most)
    weights = training.train(args, objective, params, weights, (data.tokens, data.spans))
    greedy, sampled = draft_training.agreement(
        *(target, draft, params, weights, data.held_tokens, data.held_spans),
        batch_size=args.batch_size,
    )
    folder = args.output / "model"
    if not folder.exists():
        files = tokenizer_files(args.model)
        all_params, extras = {**params, **weights}, Extras(files=files)
        save_folder(folder, draft, all_params, hf, dtype="float32", extras=extras)
    report = {"greedy": greedy, "sampled": sampled, "windows": len(data.held_tokens)}
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"on {report['windows']} held-out windows, with {NUM_DRAFTS} drafts per step:")
    for name, rate in (("greedy", greedy), ("temperature 1", sampled)):
        expected = sum(rate**i for i in range(NUM_DRAFTS + 1))
        print(f"{name:<14} {100 * rate:5.1f} % accepted, {expected:.2f} tokens per step expected")
    print(f'speculative_config={{"method": "draft", "model": "{folder}"}}')
    return 0
