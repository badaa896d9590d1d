"""`jinfer quantize`: quantizes a float model into a folder and reports the loss of quality."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from typing import Any

from jinfer.cli.flags import DEFAULT_MODEL, fit_positions, path
from jinfer.cli.terminal import progress, say

SUMMARY = "quantize a model and report the loss of quality"
METHODS = ("gptq", "awq", "smoothquant", "fp8", "int8", "nf4", "hqq", "rtn")
EXPORTS = ("native", "gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes", "gguf")
_LENGTH = 512  # tokens per sequence, unless the model has fewer positions
_MEASURED_TOKENS = 1024  # tokens of the calibration text that --target-bits measures on
_TEXT_FLAGS = {"calibration": "self", "num_sequences": 128, "length": None, "seed": 0}
_OPTIONS = ("scales", "order", "damp", "alpha", "clip", "correct")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer quantize`."""
    parser.add_argument("--model", help="folder, GGUF file, hub name, or smollm2 (default)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=path, help="folder to create")
    target.add_argument(
        "--check",
        type=path,
        metavar="DIR",
        help=("check a quantized folder instead; --model names the float model it was made from"),
    )
    parser.add_argument(
        "--method",
        default="gptq",
        choices=METHODS,
        help="method of all layers that no rule of --recipe names (default: gptq)",
    )
    parser.add_argument(
        "--format", help="number format, such as int4-g64, int4-g64-asym, int8-channel:dyn"
    )
    parser.add_argument(
        "--recipe",
        type=path,
        metavar="FILE",
        help="JSON file that assigns methods to layers by name patterns",
    )
    parser.add_argument(
        "--target-bits",
        type=float,
        metavar="BITS",
        help=(
            "choose 3, 4, 5, 6 or 8 bits for each group of linear layers by its "
            "sensitivity, so that weights and scales take BITS per weight on average; "
            "the rest of --format is kept"
        ),
    )
    parser.add_argument(
        "--export",
        default="native",
        choices=EXPORTS,
        help="file format of the output (default: native)",
    )
    _add_method_arguments(parser)
    _add_text_arguments(parser)


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("method")
    options.add_argument(
        "--scales",
        choices=("extremes", "mse", "hessian"),
        default=argparse.SUPPRESS,
        help=(
            "how the range of each group is chosen: its extremes, the least squared "
            "error of the weights, or the least error weighted by GPTQ's Hessian "
            "(default: hessian for gptq, else extremes)"
        ),
    )
    options.add_argument(
        "--order",
        choices=("none", "act", "group"),
        default=argparse.SUPPRESS,
        help="order in which GPTQ rounds inputs (default: act)",
    )
    options.add_argument(
        "--damp", type=float, default=argparse.SUPPRESS, help="damping of GPTQ (default: 0.01)"
    )
    options.add_argument(
        "--correct",
        type=float,
        default=argparse.SUPPRESS,
        metavar="STRENGTH",
        help=(
            "how far GPTQ first moves the weights to compensate for quantized inputs, 0 "
            "to 1 (default: 0)"
        ),
    )
    options.add_argument(
        "--alpha", type=float, default=argparse.SUPPRESS, help="alpha of SmoothQuant (default: 0.5)"
    )
    options.add_argument(
        "--clip",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="AWQ's search for clipping ranges (default: on)",
    )
    options.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=(
            "calibrate each block on outputs of the quantized blocks before it "
            "(default: on; off for awq, as in the paper)"
        ),
    )


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("calibration")
    text.add_argument(
        "--calibration",
        metavar="FILE",
        help=("text or JSONL file, plain or .gz; self (default): text that the model generates"),
    )
    text.add_argument("--num-sequences", type=int, help="calibration sequences (default: 128)")
    text.add_argument(
        "--length", type=int, help="tokens per sequence (default: 512, or the model's limit)"
    )
    text.add_argument("--seed", type=int, help="seed of the choice of sequences (default: 0)")
    text.add_argument(
        "--held-out",
        type=int,
        default=8,
        metavar="N",
        help="further sequences to evaluate the result on; 0: none (default: 8)",
    )


def run(args: argparse.Namespace) -> int:
    """Quantizes a model block by block, evaluates it on held-out text and writes a folder.

    The folder holds the weights, the tokenizer and quantization.json, .md and .svg. A run that was
    killed resumes when the same command is given again.

    With --check it examines a quantized folder of any origin for values that are not finite,
    inverted scales, zero points of the wrong GPTQ version, and weights that differ from the float
    model's. The exit status is 1 if something is wrong.
    """
    if args.check is not None:
        return _check(args)
    args.model = args.model or DEFAULT_MODEL
    from jinfer.checkpoints.fill import fill, resolve_dtype
    from jinfer.quant.run.job import run_job

    task = _prepare(args)
    params = fill(task.checkpoint, resolve_dtype(None, task.checkpoint.dtype))
    tokens, held_out = sequences(args, task.model, params, task.needs_text)
    choices = []
    if args.target_bits is not None:
        task.recipe, choices = _choose_widths(args, task, params, tokens)
    job = _make_job(args, task, tokens, held_out, choices)
    num_layers = task.model.config.num_layers
    with progress(num_layers, "quantizing", "layer", seconds=0) as bar:

        def resume(num_done: int, folder: pathlib.Path) -> None:
            say(f"{num_done} of {num_layers} layers were done by an earlier run, in {folder}")
            bar.update(num_done)

        report = run_job(
            job,
            task.checkpoint,
            task.model,
            params,
            on_layer=lambda i, rows: bar.update(),
            on_resume=resume,
        )
    for line in report.summary():
        say(line)
    say(f"wrote {args.output}")
    return 0


@dataclasses.dataclass
class _Task:
    """The task that the flags describe; with --target-bits, `recipe` is preliminary at first.

    Attributes:
      method: the method of every linear layer that no rule names.
      recipe, label: see `Job`.
      checkpoint, model: the float model.
      needs_text: whether calibration text is read.
    """

    method: Any
    recipe: Any
    label: str
    checkpoint: Any
    model: Any
    needs_text: bool


def _prepare(args: argparse.Namespace) -> _Task:
    """Checks the flags against each other and the model before reading weights or text."""
    from jinfer.checkpoints.load import open_checkpoint
    from jinfer.checkpoints.save import check_free
    from jinfer.models.model import Model
    from jinfer.quant import sensitivity
    from jinfer.quant.recipe import Recipe, make_method
    from jinfer.quant.run.job import Job, check_job, check_source
    from jinfer.setup.options import enable_compilation_cache

    check_free(args.output)
    enable_compilation_cache()
    if args.target_bits is not None and args.recipe is not None:
        raise ValueError("--target-bits and --recipe exclude each other: use one of them")
    options = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
    method = make_method(args.method, args.format, **options)
    recipe, label = Recipe.uniform(method), f"{args.method} {method.format}"
    if args.recipe is not None:
        recipe, label = Recipe.read(args.recipe, method), f"recipe {args.recipe.name}, else {label}"
    checkpoint = open_checkpoint(args.model, revision=args.revision)
    check_source(checkpoint)
    model = Model(checkpoint.config)
    reads_text = args.held_out != 0 or recipe.needs_calibration or args.target_bits is not None
    _set_text_flags(args, reads_text)
    check_sequences(args, model.config if reads_text else None)
    if args.target_bits is not None:
        sensitivity.check(model, method, args.target_bits)
        recipe = sensitivity.mixed(method)
        label = f"{args.method} {method.format} at {args.target_bits:g} bits"
    check_job(Job(output=args.output, recipe=recipe, label=label, export=args.export), model)
    needs_text = recipe.needs_calibration or args.target_bits is not None
    return _Task(method, recipe, label, checkpoint, model, needs_text)


def _choose_widths(args: argparse.Namespace, task: _Task, params: Any, tokens: Any) -> Any:
    """Returns the recipe and the chosen widths of --target-bits."""
    from jinfer.quant import sensitivity

    with progress(4 * task.model.config.num_layers, "measuring", "group") as bar:
        return sensitivity.choose(
            task.model,
            params,
            task.method,
            args.target_bits,
            tokens[: -(-_MEASURED_TOKENS // args.length)],
            on_unit=lambda _: bar.update(),
        )


def _make_job(
    args: argparse.Namespace, task: _Task, tokens: Any, held_out: Any, choices: Any
) -> Any:
    import jax

    import jinfer
    from jinfer.checkpoints.hf import generation_files
    from jinfer.checkpoints.tokenizer import tokenizer_files
    from jinfer.quant.run.job import Job

    needs_calibration = task.recipe.needs_calibration
    calibration = {}
    if needs_calibration:
        calibration = {"source": args.calibration, "sequences": len(tokens)}
        calibration |= {"tokens each": args.length, "seed": args.seed}
    files = tokenizer_files(args.model, args.revision) | generation_files(task.checkpoint.path)
    return Job(
        output=args.output,
        recipe=task.recipe,
        label=task.label,
        export=args.export,
        tokens=tokens if needs_calibration else None,
        calibration=calibration,
        held_out=held_out,
        held_out_source=f"{args.calibration}, not used for calibration",
        is_sequential=args.method != "awq" if args.sequential is None else args.sequential,
        files=files,
        vocabulary=vocabulary(args, task.model) if args.export == "gguf" else None,
        choices=choices,
        versions={"jinfer": jinfer.__version__, "jax": jax.__version__},
    )


def _check(args: argparse.Namespace) -> int:
    from jinfer.quant.run.doctor import examine

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    unset = vars(parser.parse_args(["--check", str(args.check)]))
    for name, value in vars(args).items():
        if name not in ("model", "debug", "run") and value != unset.get(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --check: drop it")
    diagnosis = examine(args.check, args.model)
    for fact in diagnosis.facts:
        say(fact)
    for module, problem in diagnosis.problems:
        say(f"{module}: {problem}")
    if diagnosis.problems:
        say(f"error: {len(diagnosis.problems)} problems in {args.check}")
        return 1
    say(f"{args.check} has no problems")
    return 0


def _set_text_flags(args: argparse.Namespace, reads_text: bool) -> None:
    """Sets the defaults of the calibration text; refuses its flags if no text is read."""
    for name, value in _TEXT_FLAGS.items():
        if getattr(args, name) is not None and not reads_text:
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect: --method {args.method} with "
                "--held-out 0 reads no text; drop it"
            )
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_sequences(args: argparse.Namespace, config: Any) -> None:
    """Sets the default of --length, and checks the flags of the sequences.

    Raises:
      ValueError: they are out of range, or `config` is not None and has fewer positions.
    """
    if config is not None:
        args.length = fit_positions(args.length, _LENGTH, config, "length")
    elif args.length is None:
        args.length = _LENGTH
    if args.num_sequences < 1 or args.held_out < 0 or args.length < 2:
        raise ValueError(
            "--num-sequences must be positive, --held-out not negative, --length at least 2"
        )


def sequences(args: argparse.Namespace, model: Any, params: Any, calibrates: bool) -> Any:
    """Returns calibration and held-out sequences, i32 [n, T] and [m, T], or None.

    The held-out ones depend only on the text, --held-out, --length and --seed, so that methods with
    and without calibration are evaluated on the same tokens.
    """
    wanted = args.num_sequences if calibrates else 0
    total = wanted + args.held_out
    if total == 0:
        return None, None
    if args.calibration == "self":
        import numpy as np

        start = time.perf_counter()
        parts = [
            _own_text(model, params, num, args.length, (args.seed, i))
            for i, num in enumerate((args.held_out, wanted))
            if num
        ]
        tokens = np.concatenate(parts)
        say(f"the model generated {tokens.size} tokens in {time.perf_counter() - start:.0f} s")
    else:
        from jinfer.checkpoints.tokenizer import load_tokenizer
        from jinfer.quant.texts import pack, read_texts

        tokenizer = load_tokenizer(args.model, revision=args.revision)
        tokens = pack(
            read_texts(args.calibration),
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            num_sequences=total,
            length=args.length,
            seed=args.seed,
        )
    held_out, calibration = tokens[: args.held_out], tokens[args.held_out :]
    return calibration if wanted else None, held_out if args.held_out else None


def _own_text(model: Any, params: Any, num: int, length: int, seed: tuple[int, int]) -> Any:
    """Samples sequences [num, length] from the model itself, from the first token on.

    `seed` is (the run's seed, a number for this use of it).
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jinfer.steps.texts import sample_texts

    config = model.config
    ends = config.eos_token_ids
    first = config.bos_token_id if config.bos_token_id is not None else (*ends, 0)[0]
    batch = min(num, 32)
    start = jnp.full((batch, 1), first, jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
    keys = jax.random.split(key, -(-num // batch))
    texts = []
    with progress(num, "the model writes", "text") as bar:
        for i, key in enumerate(keys):
            texts.append(np.asarray(sample_texts(model, params, start, key, length)))
            bar.update(min(batch, num - i * batch))
    return np.concatenate(texts)[:num]


def vocabulary(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Returns the tokenizer as metadata of a GGUF file."""
    from jinfer.checkpoints.gguf.vocabulary import tokenizer_metadata
    from jinfer.checkpoints.gguf.write import architecture_of
    from jinfer.checkpoints.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.model, revision=args.revision)
    architecture = architecture_of(model.config)
    return tokenizer_metadata(tokenizer, model.config.vocab_size, architecture=architecture)
