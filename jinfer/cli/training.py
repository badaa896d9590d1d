"""Flags, data and training loop shared by the commands that train."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinfer.checkpoints.files import writing
from jinfer.cli import flags
from jinfer.cli.terminal import check, progress, say, timed
from jinfer.config.fields import shown
from jinfer.jobs import jsonl
from jinfer.quant.texts import read_texts
from jinfer.text.prompts import apply_chat_template, read_prompt

_WINDOW = 256  # tokens of a window, unless the model has fewer positions
# Flags of the engine that generates texts.
_WRITING_FLAGS = ("max-model-len", "max-num-seqs", "max-num-batched-tokens")
# Keys of a line of --data; the first one that a line has is used.
_KINDS = ("text", "messages", "prompt", "prompt_token_ids")


class Data(NamedTuple):
    """Training windows, and a tenth held out: tokens [N, T] and spans [N, 2] of each."""

    tokens: Any
    spans: Any
    held_tokens: Any
    held_spans: Any


def positive(text: str) -> int:
    """Parses a positive count for argparse."""
    if not (text.isdecimal() and len(text) < 20 and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"expected an integer in 1..2**31-1, got {shown(text)}")
    return int(text)


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    output: str,
    batch_size: int,
    example: str,
    learning_rate: float,
) -> None:
    """Declares the flags; `output` is the help text of --output, `example` what batches contain."""
    parser.add_argument("--model", default=flags.DEFAULT_MODEL, help="as in jinfer generate")
    parser.add_argument(
        "--dtype", default="auto", help="dtype of the model's weights (default: auto)"
    )
    parser.add_argument(
        "--data", type=flags.input_file, metavar="FILE", help="training data, see above"
    )
    parser.add_argument("--output", type=flags.path, metavar="DIR", required=True, help=output)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help="optimizer steps, instead of --epochs")
    length.add_argument("--epochs", type=positive, help="passes over the data (default: 2)")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=batch_size,
        help=f"{example} per step (default: {batch_size})",
    )
    parser.add_argument(
        "--window",
        type=positive,
        help=f"tokens per window (default: {_WINDOW}, or the model's limit)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=learning_rate,
        help=f"peak learning rate (default: {learning_rate:g})",
    )
    parser.add_argument(
        "--weight-decay", type=float, default=0.0, help="weight decay of AdamW (default: 0)"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=positive,
        default=100,
        help="steps between checkpoints (default: 100)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of generated texts and of the order of examples (default: 0)",
    )
    _add_text_arguments(parser)


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-texts",
        type=positive,
        default=512,
        help="most texts to read or generate (default: 512)",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=256,
        help="most tokens per generated text (default: 256)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        help="temperature of generated texts (default: 0.7)",
    )
    for name, options in flags.ENGINE_FLAGS:
        if name in _WRITING_FLAGS:
            parser.add_argument(f"--{name}", **options)


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the model and its weights."""
    from jinfer import load

    model, params = load(args.model, dtype=None if args.dtype == "auto" else args.dtype)
    args.window = flags.fit_positions(args.window, _WINDOW, model.config, "window")
    return model, params


def train(
    args: argparse.Namespace, objective: Any, params: Any, weights: Any, data: Sequence[Any]
) -> Any:
    """Runs or resumes a training with a progress bar, and returns the weights.

    The arrays of `data` have the examples along their first axis.
    """
    import numpy as np

    from jinfer.training import loop as training

    num_steps = args.steps or -(-args.epochs * len(data[0]) // args.batch_size)
    config = _config(args, num_steps)
    checkpoints = training.Checkpoints(args.output / "checkpoints")
    left = "the newest checkpoint is kept: run the same command again to resume from it"
    try:
        with (
            timed("training"),
            progress(num_steps, "train", "step") as bar,
            writing(args.output / "checkpoints", left=left),
        ):

            def advance(step: int, losses: np.ndarray) -> None:
                bar.set_postfix_str("loss " + " ".join(f"{x:.2f}" for x in losses), refresh=False)
                bar.update(step - bar.n)

            return training.train(
                objective,
                params,
                weights,
                data,
                config,
                checkpoints=checkpoints,
                on_step=advance,
            )
    finally:
        checkpoints.close()


def _config(args: argparse.Namespace, num_steps: int) -> Any:
    from jinfer.training import loop as training

    return training.TrainingConfig(
        num_steps=num_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
    )


def check_same_run(args: argparse.Namespace, *own: str) -> None:
    """Creates --output, and refuses a folder of a run with other settings.

    `own` are the names of the command's own settings, besides those of all training commands. No
    folder is made if --data cannot be read or a setting is invalid.
    """
    from jinfer.config.sampling_params import SamplingParams

    args.epochs = args.epochs or 2  # no default of argparse, which takes a given 2 for not given
    _config(args, num_steps=args.steps or 1)
    SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    if args.data is not None and not (args.output / "data.npz").is_file():
        try:
            args.data.open("rb").close()
        except NotADirectoryError as error:
            raise ValueError(f"--data {str(args.data)!r}: {error.strerror}") from error
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "run.json"
    names = ("model", "dtype", "data", *own, "steps", "epochs", "batch_size")
    names += ("window", "learning_rate", "weight_decay", "seed", "max_texts", "max_tokens")
    names += tuple(name.replace("-", "_") for name in _WRITING_FLAGS)
    settings = {name: str(getattr(args, name)) for name in (*names, "temperature")}
    if args.data is not None and args.data.is_file():
        settings["data_sha256"] = hashlib.sha256(args.data.read_bytes()).hexdigest()
    if file.is_file():
        before = json.loads(file.read_text())
        has_texts = any((args.output / name).is_file() for name in ("answers.jsonl", "data.npz"))
        if "data_sha256" not in before or not has_texts:  # of an earlier version; nothing was kept
            before["data_sha256"] = settings.get("data_sha256")
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            there, here = ({n: d.get(n) for n in changed} for d in (before, settings))
            raise ValueError(
                f"{file.parent} holds a run with {there}, this one has {here}: give another "
                "--output, or the same settings"
            )
    file.with_suffix(".tmp").write_text(json.dumps(settings, indent=1) + "\n")
    file.with_suffix(".tmp").replace(file)


def read_data(args: argparse.Namespace, model: Any, params: Any) -> Data:
    """Returns the windows, from --output if an earlier run saved them there."""
    import numpy as np

    from jinfer import LLM
    from jinfer.training.loop import windows

    file = args.output / "data.npz"
    if file.is_file():
        with np.load(file) as arrays:
            return _split(args, arrays["tokens"], arrays["spans"])
    given = {
        name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _WRITING_FLAGS
    }
    llm = LLM(model, params=params, tokenizer=args.model, generation_config="none", **given)
    with timed("texts"):
        tokens, spans = windows(list(_texts(args, llm)), args.window)
    order = np.random.default_rng(args.seed).permutation(len(tokens))
    tokens, spans = tokens[order], spans[order]
    save_arrays(file, tokens=tokens, spans=spans)
    return _split(args, tokens, spans)


def save_arrays(file: Path, *arrays: Any, **named: Any) -> None:
    """Writes an .npz file atomically."""
    import numpy as np

    partial = file.with_suffix(".tmp.npz")
    left = "the texts written so far are kept: run the same command again to resume"
    try:
        with writing(file, left=left):
            np.savez(partial, *arrays, **named)
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _split(args: argparse.Namespace, tokens: Any, spans: Any) -> Data:
    num_held = max(1, len(tokens) // 10)
    if len(tokens) <= num_held:
        raise ValueError(f"{len(tokens)} windows of {args.window} tokens are too few to train on")
    return Data(tokens[num_held:], spans[num_held:], tokens[:num_held], spans[:num_held])


def _texts(args: argparse.Namespace, llm: Any) -> Iterator[tuple[list[int], int]]:
    """Yields the token ids of each text, read or generated, and how many of them are its prompt."""
    tokenizer = llm.get_tokenizer()
    if args.data is None:
        start = tokenizer.bos_token_id
        if start is None:
            start = tokenizer.eos_token_id
        yield from _answers(args, llm, [[start]] * args.max_texts)
        return
    if ".jsonl" not in args.data.suffixes:
        yield from ((tokenizer.encode(text), 0) for text in read_texts(args.data))
        return
    prompts, numbers = [], []
    for number, raw in itertools.islice(jsonl.read_lines(args.data), args.max_texts):
        try:
            kind, tokens = _read_line(raw, tokenizer)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{args.data} line {number}: {error}") from error
        if kind == "text":
            yield tokens, 0
        else:
            prompts.append(tokens)
            numbers.append(number)
    yield from _answers(args, llm, prompts, numbers)


def _read_line(raw: bytes, tokenizer: Any) -> tuple[str, list[int]]:
    """Returns the key that a line of --data has, and its token ids."""
    entry = jsonl.parse_json(raw)
    kinds = [kind for kind in _KINDS if isinstance(entry, dict) and kind in entry]
    if not kinds:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f'it must have "text" or a prompt, got {got}')
    value = entry[kinds[0]]
    if kinds[0] == "messages":
        return kinds[0], apply_chat_template(tokenizer, value, add_generation_prompt=True)
    if isinstance(value, str) != (kinds[0] != "prompt_token_ids"):
        raise TypeError(f'"{kinds[0]}" cannot be {type(value).__name__}')
    return kinds[0], read_prompt(value, tokenizer).token_ids


def _answers(
    args: argparse.Namespace, llm: Any, prompts: list[list[int]], numbers: Sequence[int] = ()
) -> Iterator[tuple[list[int], int]]:
    """Returns the prompts with the model's answers; `numbers` are their lines in --data."""
    from jinfer import SamplingParams

    if not prompts:
        return
    say(f"the model writes {len(prompts)} texts of at most {args.max_tokens} tokens")
    fields = {"temperature": args.temperature, "max_tokens": args.max_tokens, "detokenize": False}
    file = args.output / "answers.jsonl"
    answers = _read_answers(file)
    left = "the texts written so far are kept: run the same command again to resume"
    with (
        progress(len(prompts), "texts", "text", initial=len(answers)) as bar,
        writing(file, left=left),
        file.open("a") as lines,
    ):
        lines.write("\n")  # ends a line that an interrupted run may have left incomplete
        for i, prompt in enumerate(prompts):
            if i not in answers:
                params = SamplingParams(**fields, seed=args.seed + i)
                try:
                    llm.add_request(str(i), {"prompt_token_ids": prompt}, params)
                except ValueError as error:
                    where = f"{args.data} line {numbers[i]}: " if numbers else ""
                    raise ValueError(f"{where}{error}") from error
        while llm.has_unfinished_requests():
            for output in filter(lambda output: output.finished, check(llm.step())):
                i, token_ids = int(output.request_id), list(output.outputs[0].token_ids)
                answers[i] = token_ids
                lines.write(json.dumps([i, token_ids]) + "\n")
                lines.flush()
                bar.update()
    for i, prompt in enumerate(prompts):
        yield [*prompt, *answers[i]], len(prompt)


def _read_answers(file: Path) -> dict[int, list[int]]:
    """Returns the answers that an interrupted run wrote, by the number of the prompt."""
    answers = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            i, token_ids = json.loads(line)
        except ValueError:  # the run was interrupted in this line
            continue
        answers[i] = token_ids
    return answers
