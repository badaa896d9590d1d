"""`jinfer doctor`: what runs on this machine, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

SUMMARY = "print which devices and kernels are used here, and why"
PACKAGES = ("jinfer", "jax", "jaxlib", "flax", "numpy", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares no flags."""


def run(args: argparse.Namespace) -> int:
    """Prints versions, devices, the native CPU kernels, and the backends of each operation.

    Native kernels are compiled if they are not in the cache. Environment variables: JINFER_NATIVE=0
    does without them, JINFER_ISA=avx2 or avx512 chooses the instruction set, CXX the compiler.
    """
    import jax

    from pallas_kernels import target
    from pallas_kernels.native import native

    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    print(f"python {platform.python_version()}, {', '.join(versions)}")
    print(f"devices: {', '.join(str(device) for device in jax.devices())}")
    print(f"target of kernels: {target.current().name}")
    found = native()
    if found.why_not is None:
        print(f"native CPU kernels: {found.isa}, {found.path}")
    else:
        print(f"native CPU kernels: none, {found.why_not}")
    print(explain())
    return 0


def explain() -> str:
    """Returns which backend would run each operation of a decode step, and why not the others."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import dispatch
    from pallas_kernels.page_write import page_write
    from pallas_kernels.paged_attention import PagedKV, ragged_paged_attention

    def step(q, pages, rows, table, lens, starts):
        pages = page_write(pages, rows, lens, lens)
        kv = PagedKV(pages, pages)
        return ragged_paged_attention(q, kv, lens, table, starts, sm_scale=1.0, max_q_len=1)

    def shape(*sizes: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    bf16 = jnp.bfloat16
    return str(
        dispatch.explain(
            step,
            shape(8, 32, 128, dtype=bf16),
            shape(64, 8, 64, 128, dtype=bf16),
            shape(8, 8, 128, dtype=bf16),
            shape(8, 8),
            shape(8),
            shape(9),
        )
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
