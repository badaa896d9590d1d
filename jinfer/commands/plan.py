"""`jinfer plan`: the memory that a model needs."""

from __future__ import annotations

import argparse

from jinfer import memory
from jinfer.commands.flags import DEFAULT_MODEL, size
from jinfer.config import ModelConfig

SUMMARY = "print how much memory a model needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer plan`."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"folder, GGUF file, hub name, or offline {', '.join(memory.PRESETS)}",
    )
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--context", type=int, default=4096, help="tokens a sequence (4096)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (1)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (bfloat16)")
    parser.add_argument("--kv-dtype", help="of the KV cache, such as fp8 (as --dtype)")
    parser.add_argument("--quantization", help="of the linears, such as int4-g128")
    parser.add_argument("--page-size", type=int, default=16, help="tokens a KV page (16)")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="such as 80GiB")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share (0.9)")


def run(args: argparse.Namespace) -> int:
    """Prints the memory of weights, KV cache and one decode step."""
    config = memory.PRESETS.get(args.model) or _read_config(args.model, args.revision)
    plan = memory.plan(
        config,
        context=args.context,
        batch=args.batch,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        quantization=args.quantization,
    )
    kv_dtype = args.kv_dtype or args.dtype
    rows: list[tuple[str, str, int]] = [("weights", args.dtype, plan.weight_bytes)]
    for part, num_bytes in plan.part_bytes.items():
        is_quantized = args.quantization and part in ("attention", "mlp")
        rows.append((f"  {part}", args.quantization if is_quantized else "", num_bytes))
    rows += [
        ("KV cache, 1 token", kv_dtype, plan.kv_bytes_per_token),
        (f"KV cache, {args.context} tokens", "", plan.kv_bytes_per_sequence),
        (f"KV cache, {args.batch} x {args.context} tokens", "", plan.kv_bytes),
        ("decode step, at most (estimate)", "float32", plan.temp_bytes),
        ("total", "", plan.total_bytes),
    ]
    print(
        f"{args.model}: {plan.num_params:,} parameters, {config.num_layers} layers, "
        f"{config.num_kv_heads} KV heads of {config.head_dim}"
    )
    width = max(len(label) for label, _, _ in rows)
    for label, dtype, num_bytes in rows:
        print(f"{label:<{width}}  {dtype:<14}{memory.format_size(num_bytes):>12}")
    if args.memory is not None:
        budget = memory.kv_budget_bytes(
            device_bytes=args.memory,
            used_bytes=plan.weight_bytes,
            gpu_memory_utilization=args.gpu_memory_utilization,
            reserved_bytes=plan.temp_bytes,
        )
        pages = memory.num_pages(
            config, page_size=args.page_size, dtype=kv_dtype, budget_bytes=budget
        )
        num_sequences = pages // -(-args.context // args.page_size)
        print(
            f"{memory.format_size(args.memory)} at {args.gpu_memory_utilization:g} holds the "
            f"weights and {pages} pages of {args.page_size} tokens: {num_sequences} sequences of "
            f"{args.context}"
            if budget > 0
            else f"{memory.format_size(args.memory)} at {args.gpu_memory_utilization:g} does not "
            f"hold the weights"
        )
    return 0


def _read_config(model: str, revision: str | None) -> ModelConfig:
    from jinfer.weights.load import load_config

    return load_config(model, revision=revision)
