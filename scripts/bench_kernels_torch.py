"""The torch side of bench_kernels.py: the same cases through torch's own kernels; needs CUDA.

Started by it (measure_apart.py), writes {"device", "versions", "results": {case: {peer:
microseconds}}}. What torch cannot run is left out and its reason printed. Times are medians over
replays of a CUDA graph that holds many calls on rotated inputs.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure_apart import DEVICE_LOST, write_whole

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3-8B
CACHE_BYTES = 150 << 20
CALLS, SAMPLES = 32, 20

Peer = tuple[str, Callable[[int], tuple[Any, ...]], Callable[..., Any]]


def main() -> int:
    listing, out = map(Path, sys.argv[1:])
    work = json.loads(listing.read_text())
    found: dict[str, Any] = work["found"] or {"device": None, "versions": {}, "results": {}}
    try:
        import torch

        has_cuda = torch.cuda.is_available()
    except ImportError:
        has_cuda = False
    if not has_cuda:
        print("no torch with CUDA here: no peers")
        write_whole(out, found)
        return 0
    found["device"] = torch.cuda.get_device_name()
    found["versions"] = {"torch": torch.__version__}
    write_whole(out, found)
    for case in work["cases"]:
        times: dict[str, float] = found["results"].setdefault(case["name"], {})
        for peer, inputs, f in peers_of(case):
            try:
                times[peer] = measure(inputs, f) * 1e6
                print(f"{case['name']}  {peer}: {times[peer]:.1f} us", flush=True)
            except Exception as e:  # a peer that cannot run here is no peer
                print(f"{case['name']}  {peer}: {type(e).__name__}: {str(e)[:200]}", flush=True)
                if not device_works():
                    write_whole(out, found)
                    return DEVICE_LOST
            torch.cuda.empty_cache()
        write_whole(out, found)
    return 0


def device_works() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def measure(inputs: Callable[[int], tuple[Any, ...]], f: Callable[..., Any]) -> float:
    """Returns the seconds of one call."""
    import torch

    sets = [inputs(0)]
    size = sum(x.nbytes for x in sets[0] if isinstance(x, torch.Tensor))
    sets += [inputs(seed) for seed in range(1, min(24, max(3, CACHE_BYTES // size + 1)))]
    for args in sets:
        f(*args)  # compiles, picks kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            f(*sets[i % len(sets)])
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(times)


def peers_of(case: dict[str, Any]) -> Iterator[Peer]:
    if case["kind"] == "decode" and case["kv"] == "bfloat16":
        yield from decode_peers(case["batch"], case["context"])
    elif case["kind"] == "prefill":
        yield from prefill_peers(case["tokens"])
    elif case["kind"] == "w4a16":
        yield from w4a16_peers(case["m"], case["k"], case["n"])
    elif case["kind"] == "fp8" and case["scales"] in ("tensor", "channel"):
        yield from fp8_peers(case["m"], case["k"], case["n"], case["scales"])


def randn(seed: int, *shape: int) -> Any:
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)


def decode_peers(batch: int, context: int) -> Iterator[Peer]:
    """One query token each over contiguous keys; flex_attention over pages of 128 tokens."""

    def inputs(seed: int) -> tuple[Any, ...]:
        q = randn(seed, batch, NUM_HEADS, 1, HEAD_DIM)
        kv = (batch, NUM_KV_HEADS, context, HEAD_DIM)
        return q, randn(seed + 100, *kv), randn(seed + 200, *kv)

    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        yield f"torch SDPA {name}", inputs, sdpa(name, is_causal=False)
    yield flex_paged(batch, context)


def sdpa(name: str, is_causal: bool) -> Callable[..., Any]:
    def run(q: Any, k: Any, v: Any) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        with sdpa_kernel([getattr(SDPBackend, name)]):
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    return run


def flex_paged(batch: int, context: int) -> Peer:
    page = 128
    pool = batch * context  # tokens

    def inputs(seed: int) -> tuple[Any, ...]:
        import torch
        from torch.nn.attention.experimental._paged_attention import PagedAttention
        from torch.nn.attention.flex_attention import create_block_mask

        paged = PagedAttention(pool // page, page, batch, device="cuda")
        ids = torch.arange(batch, device="cuda")
        for i in range(batch):
            paged.reserve(ids[i : i + 1], torch.tensor([context], device="cuda"))
        logical = create_block_mask(
            lambda b, h, q, kv: kv < context, batch, 1, 1, context, device="cuda"
        )
        mask = paged.convert_logical_block_mask(logical, ids)
        q = randn(seed, batch, NUM_HEADS, 1, HEAD_DIM)
        kv = (1, NUM_KV_HEADS, pool, HEAD_DIM)
        return q, randn(seed + 100, *kv), randn(seed + 200, *kv), mask

    compiled: list[Any] = []

    def run(q: Any, k: Any, v: Any, mask: Any) -> Any:
        import torch
        from torch.nn.attention.flex_attention import flex_attention

        if not compiled:
            compiled.append(torch.compile(flex_attention))
        return compiled[0](q, k, v, block_mask=mask, enable_gqa=True)

    return "torch flex_attention paged", inputs, run


def prefill_peers(tokens: int) -> Iterator[Peer]:
    def inputs(seed: int) -> tuple[Any, ...]:
        q = randn(seed, 1, NUM_HEADS, tokens, HEAD_DIM)
        kv = (1, NUM_KV_HEADS, tokens, HEAD_DIM)
        return q, randn(seed + 100, *kv), randn(seed + 200, *kv)

    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        yield f"torch SDPA {name}", inputs, sdpa(name, is_causal=True)


def w4a16_peers(m: int, k: int, n: int) -> Iterator[Peer]:
    def dense(seed: int) -> tuple[Any, ...]:
        return randn(seed, m, k), randn(seed + 100, n, k)

    def packed(seed: int) -> tuple[Any, ...]:
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)
        codes = torch.randint(
            0, 256, (n, k // 2), device="cuda", dtype=torch.uint8, generator=generator
        )
        scales = randn(seed + 200, k // 128, n, 2)
        return randn(seed, m, k), torch._convert_weight_to_int4pack(codes, 8), scales

    def int4pack(x: Any, w: Any, scales: Any) -> Any:
        import torch

        return torch._weight_int4pack_mm(x, w, 128, scales)

    yield "torch mm bf16", dense, lambda x, w: x @ w.t()
    yield "torch _weight_int4pack_mm", packed, int4pack


def fp8_peers(m: int, k: int, n: int, scales: str) -> Iterator[Peer]:
    def inputs(seed: int) -> tuple[Any, ...]:
        import torch

        x, w = (a.to(torch.float8_e4m3fn) for a in (randn(seed, m, k), randn(seed + 100, n, k)))
        shapes = ((), ()) if scales == "tensor" else ((m, 1), (1, n))
        x_scale, w_scale = (torch.rand(s, device="cuda") + 0.5 for s in shapes)
        return x, w, x_scale, w_scale

    def run(x: Any, w: Any, x_scale: Any, w_scale: Any) -> Any:
        import torch

        return torch._scaled_mm(
            x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip

    yield f"torch _scaled_mm ({scales}-wise)", inputs, run


if __name__ == "__main__":
    sys.exit(main())
