"""`jinfer convert`: writes quantized folders in another file format, or any model as GGUF."""

from __future__ import annotations

import argparse
from typing import Any

from jinfer.cli import quantize
from jinfer.cli.flags import path
from jinfer.cli.terminal import progress, say

SUMMARY = "write weights in another file format, without loss or as a GGUF type"
_CALIBRATION = {"num_sequences": 32, "length": None, "seed": 0}
TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer convert`."""
    parser.add_argument(
        "--model", required=True, help="quantized folder or hub name; any model for --export gguf"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--export", required=True, choices=quantize.EXPORTS, help="file format to write"
    )
    parser.add_argument(
        "--output", required=True, type=path, help="folder to create; for gguf the file"
    )
    gguf = parser.add_argument_group("gguf")
    gguf.add_argument(
        "--type",
        choices=TYPES,
        help=(
            "round the linear layers to this type (default: no rounding; weights that "
            "do not fit exactly are refused)"
        ),
    )
    gguf.add_argument(
        "--calibration",
        metavar="FILE",
        help=(
            "text or JSONL file, plain or .gz, or self (text that the model generates), "
            "to weight the inputs when rounding (default: all alike)"
        ),
    )
    gguf.add_argument("--num-sequences", type=int, help="calibration sequences (default: 32)")
    gguf.add_argument(
        "--length", type=int, help="tokens per sequence (default: 512, or the model's limit)"
    )
    gguf.add_argument("--seed", type=int, help="seed of the choice of sequences (default: 0)")
    parser.set_defaults(held_out=0)


def run(args: argparse.Namespace) -> int:
    """Writes the weights of a model in another file format.

    A quantized folder is converted without loss: codes, scales, zero points and other tensors keep
    their values. A tensor that the file format cannot hold exactly is refused by name. The result
    is read back and compared before it gets its final name.

    A GGUF file can be made from any model. Without --type, only weights that it holds exactly are
    accepted. With --type, linear layers are rounded; --calibration weights the inputs so that the
    layers' expected outputs change least. Rows whose length is not a multiple of 256 take Q5_0 for
    Q4_K and Q8_0 for Q6_K.
    """
    from jinfer.checkpoints.load import open_checkpoint

    for name, value in _CALIBRATION.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif args.calibration is None:
            raise ValueError(
                f"--{name.replace('_', '-')} goes with --calibration, which is not given"
            )
    if args.export == "gguf":
        return _to_gguf(args, open_checkpoint)
    for flag in ("type", "calibration"):
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--{flag} goes with --export gguf; {args.export} is written without rounding"
            )

    from jinfer.checkpoints.convert import convert_folder
    from jinfer.checkpoints.hf import HFCheckpoint
    from jinfer.checkpoints.save import check_free

    check_free(args.output)
    checkpoint = open_checkpoint(args.model, revision=args.revision)
    if not isinstance(checkpoint, HFCheckpoint):
        raise ValueError(
            f"{checkpoint.path} is a GGUF file; only --export gguf takes those, the others take "
            f"folders of quantized safetensors"
        )
    total = len(checkpoint.quantized_names)
    with progress(total, "converting", "module") as bar:
        done = convert_folder(
            checkpoint, args.output, args.export, on_module=lambda _: bar.update()
        )
    say(
        f"{done.num_modules} modules of {', '.join(done.formats)} and {done.num_tensors} other "
        f"tensors, read back and compared"
    )
    say(f"wrote {args.output} ({done.num_bytes / 2**20:.1f} MiB)")
    return 0


def _to_gguf(args: argparse.Namespace, open_checkpoint: Any) -> int:
    import numpy as np

    from jinfer.checkpoints.fill import fill
    from jinfer.checkpoints.gguf.write import write_gguf
    from jinfer.models.model import Model

    if args.calibration is not None and args.type is None:
        raise ValueError("--calibration is for rounding: give a --type too")
    if args.output.exists():
        raise FileExistsError(f"{args.output} exists: choose another output file")
    checkpoint = open_checkpoint(args.model, revision=args.revision)
    if getattr(checkpoint, "kv_scheme", None) or getattr(checkpoint, "kv_scales", None):
        if args.type is None:
            raise ValueError(
                f"a GGUF file cannot hold the KV cache scales of {checkpoint.path}; give a --type "
                f"(which rounds) to leave them out"
            )
        say("the folder's KV cache scales are left out: a GGUF file cannot hold them")
    model = Model(checkpoint.config)
    if args.calibration is not None:
        quantize.check_sequences(args, model.config)
    params = fill(checkpoint, np.dtype(np.float32))
    importance = None
    if args.calibration is not None:
        from jinfer.quant.importance import measure_importance

        tokens, _ = quantize.sequences(args, model, params, True)
        with progress(model.config.num_layers, "calibrating", "layer", seconds=0) as bar:
            importance = measure_importance(model, params, tokens, on_layer=lambda _: bar.update())
    counts = write_gguf(
        args.output,
        model,
        params,
        kind=args.type,
        importance=importance,
        tokenizer=quantize.vocabulary(args, model),
        name=checkpoint.path.stem,
    )
    say(", ".join(f"{n} tensors of {kind}" for kind, n in sorted(counts.items())))
    say(f"wrote {args.output} ({args.output.stat().st_size / 2**20:.1f} MiB)")
    return 0
