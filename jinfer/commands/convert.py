"""`jinfer convert`: a quantized folder in another format, codes and scales unchanged."""

from __future__ import annotations

import argparse
import pathlib

from jinfer.commands.quantize import EXPORTS
from jinfer.commands.terminal import say

SUMMARY = "write quantized weights in another format, without loss"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer convert`."""
    parser.add_argument("--model", required=True, help="folder of quantized weights, or hub name")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--export", required=True, choices=EXPORTS, help="format to write")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to be made")


def run(args: argparse.Namespace) -> int:
    """Writes the weights of a quantized folder in another format.

    Codes, scales and zero points keep their bits, other tensors their bytes; what the format cannot
    hold so is refused by name. The result is read back and compared before it gets its name.
    """
    from tqdm import tqdm

    from jinfer.weights.convert import convert_folder
    from jinfer.weights.hf import HFCheckpoint
    from jinfer.weights.load import open_checkpoint
    from jinfer.weights.save import check_free

    check_free(args.output)
    checkpoint = open_checkpoint(args.model, revision=args.revision)
    if not isinstance(checkpoint, HFCheckpoint):
        raise ValueError(
            f"{checkpoint.path} is a GGUF file; convert takes folders of quantized safetensors"
        )
    total = len(checkpoint.quantized_names)
    with tqdm(total=total, desc="converting", unit="module", disable=None) as bar:
        done = convert_folder(
            checkpoint, args.output, args.export, on_module=lambda _: bar.update()
        )
    say(
        f"{done.num_modules} modules of {', '.join(done.formats)} and {done.num_tensors} other "
        f"tensors, read back and found the same"
    )
    say(f"wrote {args.output} ({done.num_bytes / 2**20:.1f} MiB)")
    return 0
