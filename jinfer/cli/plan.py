"""`jinfer plan`: the memory that a model needs."""

from __future__ import annotations

import argparse

from jinfer.cli.flags import DEFAULT_MODEL, size
from jinfer.config import memory
from jinfer.config.cache import kv_format
from jinfer.config.model import ModelConfig

SUMMARY = "print how much memory a model needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer plan`."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"folder, GGUF file, hub name, or without a download {', '.join(memory.PRESETS)}",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--context", type=int, default=4096, help="tokens per sequence (default: 4096)"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (default: 1)")
    parser.add_argument(
        "--dtype", default="bfloat16", help="dtype of the weights (default: bfloat16)"
    )
    parser.add_argument("--kv-dtype", help="dtype of the KV cache, such as fp8 (default: --dtype)")
    parser.add_argument("--quantization", help="format of the linear layers, such as int4-g128")
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="memory of a device, such as 80GiB: prints how many sequences fit",
    )
    parser.add_argument(
        "--page-size", type=int, help="tokens per KV page, with --memory (default: 16)"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, help="share of --memory to use (default: 0.9)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the memory of weights, KV cache and one decode step."""
    for name in ("page_size", "gpu_memory_utilization"):
        if args.memory is None and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --memory")
    page_size = 16 if args.page_size is None else args.page_size
    share = 0.9 if args.gpu_memory_utilization is None else args.gpu_memory_utilization
    if page_size < 1:
        raise ValueError(f"--page-size must be positive, got {page_size}")
    if args.kv_dtype is not None:
        kv_format(args.kv_dtype, "--kv-dtype")
    config = memory.PRESETS.get(args.model) or _read_config(args.model, args.revision)
    plan = memory.plan(
        config,
        context=args.context,
        batch=args.batch,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        quantization=args.quantization,
    )
    kv_dtype = args.dtype if args.kv_dtype is None else args.kv_dtype
    answer = None
    if args.memory is not None:
        answer = _room(
            config,
            plan,
            memory_bytes=args.memory,
            share=share,
            page_size=page_size,
            kv_dtype=kv_dtype,
            context=args.context,
        )
    rows: list[tuple[str, str, int]] = [("weights", args.dtype, plan.weight_bytes)]
    for part, num_bytes in plan.part_bytes.items():
        is_quantized = args.quantization is not None and part in ("attention", "mlp")
        rows.append((f"  {part}", str(args.quantization) if is_quantized else "", num_bytes))
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
    if answer is not None:
        print(answer)
    return 0


def _room(
    config: ModelConfig,
    plan: memory.Plan,
    *,
    memory_bytes: int,
    share: float,
    page_size: int,
    kv_dtype: str,
    context: int,
) -> str:
    """Returns a line that says what fits into a device's memory."""
    budget = memory.kv_budget_bytes(
        device_bytes=memory_bytes,
        used_bytes=plan.weight_bytes,
        gpu_memory_utilization=share,
        reserved_bytes=plan.temp_bytes,
    )
    of = f"{memory.format_size(memory_bytes)} at {share:g}"
    if budget <= 0:
        return f"{of} does not hold the weights"
    pages = memory.num_pages(config, page_size=page_size, dtype=kv_dtype, budget_bytes=budget)
    num_sequences = pages // -(-context // page_size)
    return (
        f"{of} holds the weights and {pages} pages of {page_size} tokens: {num_sequences} "
        f"sequences of {context}"
    )


def _read_config(model: str, revision: str | None) -> ModelConfig:
    from jinfer.checkpoints.load import load_config

    return load_config(model, revision=revision)
