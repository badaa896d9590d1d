"""Compiles for a chip that is not present, with the pip wheels of its compiler.

Inside `compile_target("h100")` kernels are compiled as they would be on that chip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.layout import Format

from pallas_kernels.target import TARGETS, Target, named, state

# Compiling for a chip that is not present.


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileCase:
    """A call at a real model's shape, to compile for a target; each op enumerates its cases.

    Attributes:
      name: op, backend and shape; unique among an op's cases.
      fn: the function to compile.
      abstract_args: its arguments, trees of `jax.ShapeDtypeStruct`.
      max_temp_bytes: bound on the program's temporaries; None: no bound.
      expects_wgmma: the PTX must use Hopper's tensor cores through `wgmma`.
      expects_tma: the PTX must use the copy engine.
      never_written: types ("bf16[4096,14336]") of arrays that may exist inside fusions only: dense
        copies of quantized weights or pages, see `hlo.dense_types`.
      min_alias_bytes: bytes of outputs that must reuse the memory of donated arguments.
      never_copied: types of arrays that no instruction may copy or transpose: the KV pool.
      layouts: layouts of the first argument's arrays, a tree; None: JAX's default.
    """

    name: str
    fn: Callable[..., Any]
    abstract_args: tuple[Any, ...]
    max_temp_bytes: int | None = None
    expects_wgmma: bool = False
    expects_tma: bool = False
    never_written: tuple[str, ...] = ()
    min_alias_bytes: int = 0
    never_copied: tuple[str, ...] = ()
    layouts: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
    """ptxas's report on one Mosaic GPU kernel, and its PTX."""

    name: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    has_wgmma: bool
    has_tma: bool
    ptx: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program compiled for a target.

    Attributes:
      executable: the `jax.stages.Compiled`; it cannot run on this host.
      seconds: time of tracing, lowering and compilation.
      temp_bytes: device memory for temporaries.
      kernels: reports of the Mosaic GPU kernels in it. Mosaic caches kernels for the life of the
        process: a kernel that was compiled before gives no report.
    """

    executable: Any
    seconds: float
    temp_bytes: int
    kernels: tuple[KernelReport, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiler:
    """Compiles for one target; made by `compile_target`.

    Attributes:
      target: the chip to compile for.
      mesh: one compile-only device.
      sharding: replicated on that mesh.
    """

    target: Target
    mesh: jax.sharding.Mesh
    sharding: jax.sharding.Sharding

    def abstract(self, tree: Any) -> Any:
        """Returns `tree` with each array replaced by its shape, placed on the target."""
        return jax.tree.map(self._placed, tree)

    def laid_out(self, tree: Any, layouts: Any) -> Any:
        """Returns `abstract(tree)` with a layout for each array; None: JAX's default."""

        def place(layout: Any, x: Any) -> Any:
            return self.abstract(x) if layout is None else self._placed(x, layout)

        return jax.tree.map(place, layouts, tree, is_leaf=lambda x: x is None)

    def _placed(self, x: Any, layout: Any = None) -> jax.ShapeDtypeStruct:
        where: Any = self.sharding if layout is None else Format(layout, self.sharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def compile(self, f: Callable[..., Any], *abstract_args: Any, layouts: Any = None) -> Compiled:
        """Compiles `f` for arguments of these shapes.

        Args:
          f: a function, jitted or not.
          abstract_args: its arguments' shapes.
          layouts: layouts of the first argument's arrays, as in `laid_out`.
        """
        jitted: Any = f if hasattr(f, "lower") else jax.jit(f)
        start = time.perf_counter()
        with _without_persistent_cache(), _mosaic_gpu_dump(self.target) as reports:
            args = self.abstract(abstract_args)
            if layouts is not None:
                args = (self.laid_out(abstract_args[0], layouts), *args[1:])
            lowered = jitted.lower(*args)
            options = {"xla_gpu_autotune_level": 0} if self.target.kind == "gpu" else None
            executable = lowered.compile(compiler_options=options)
        return Compiled(
            executable=executable,
            seconds=time.perf_counter() - start,
            temp_bytes=int(executable.memory_analysis().temp_size_in_bytes),
            kernels=tuple(reports),
        )


@contextlib.contextmanager
def compile_target(name: str) -> Iterator[Compiler]:
    """Compiles for "h100", "v5e", "v6e" or "tpu7x" on a host without that chip.

    Inside the context `current()` is that target, so that `impl="auto"` chooses as it would there.
    Run with `JAX_PLATFORMS=cpu`.

        with compile_target("h100") as compiler:
            compiled = compiler.compile(f, jax.ShapeDtypeStruct((64, 128), jnp.bfloat16))

    Raises:
      ValueError: there is no such target.
      NotImplementedError: the wheels of its compiler are not installed.
    """
    target = named(name)
    if reason := why_not_compile(name):
        raise NotImplementedError(f"compile_target({name!r}): {reason}")
    device = _compile_only_device(name)
    mesh = jax.sharding.Mesh([device], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with state(target), jax.set_mesh(mesh):
        yield Compiler(target=target, mesh=mesh, sharding=sharding)


def why_not_compile(name: str) -> str | None:
    """Returns why this host cannot compile for the named target, or None."""
    kind = named(name).kind
    if kind == "cpu":
        return "jax.jit itself compiles for the CPU"
    wheels = ["jax-cuda13-plugin", "jax-cuda13-pjrt"] if kind == "gpu" else ["libtpu"]
    missing = [w for w in wheels if not _is_installed(w)]
    if missing:
        return f"{' and '.join(missing)} not installed; pip install 'jinfer[compile]'"
    return None


def _is_installed(wheel: str) -> bool:
    try:
        importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# A description of the H100 SXM for XLA, which otherwise asks the driver (openxla/xla PR 25919).
_H100_CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132
  fpus_per_core: 128  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  clock_rate_ghz: 1.98  device_memory_size: 84929347584  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


_TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@functools.cache
def _compile_only_device(name: str) -> Any:
    from jax.experimental import topologies

    if TARGETS[name].kind == "gpu":
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_H100_CONFIG, topology="1x1x1"
        )
    else:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu else asks a metadata server
        topology = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGIES[name])
    return topology.devices[0]


@contextlib.contextmanager
def _without_persistent_cache() -> Iterator[None]:
    """Switches off JAX's compilation cache on disk inside the context.

    A program for an absent chip could be written to it, but not loaded again.
    """
    from jax.experimental.compilation_cache import compilation_cache

    key = "jax_enable_compilation_cache"
    before = jax.config.values[key]
    jax.config.update(key, False)
    compilation_cache.reset_cache()  # JAX reads the setting only once
    try:
        yield
    finally:
        jax.config.update(key, before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _mosaic_gpu_dump(target: Target) -> Iterator[list[KernelReport]]:
    """Collects Mosaic GPU's reports on the kernels compiled inside the context."""
    reports: list[KernelReport] = []
    if target.kind != "gpu":
        yield reports
        return
    key = "MOSAIC_GPU_DUMP_TO"
    before = os.environ.get(key)
    with tempfile.TemporaryDirectory(prefix="mosaic_gpu_") as folder:
        os.environ[key] = folder  # it must exist, or the dump goes to stdout
        try:
            yield reports
        finally:
            if before is None:
                del os.environ[key]
            else:
                os.environ[key] = before
            reports.extend(_read_report(p) for p in sorted(pathlib.Path(folder).glob("*.ptxas")))


def _read_report(ptxas: pathlib.Path) -> KernelReport:
    """Reads one kernel's ptxas report and the PTX beside it."""
    report = ptxas.read_text()
    ptx_file = ptxas.with_suffix(".ptx")
    ptx = ptx_file.read_text() if ptx_file.exists() else ""
    name = re.search(r"entry function '([^']+)'", report)
    registers = re.search(r"Used (\d+) registers", report)
    resources = ptxas.with_suffix(".resources.txt")
    smem = re.search(r"smem\D*(\d+)", resources.read_text()) if resources.exists() else None
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return KernelReport(
        name=name.group(1) if name else ptxas.stem,
        registers=int(registers.group(1)) if registers else 0,
        spill_bytes=sum(map(int, spills)),
        smem_bytes=int(smem.group(1)) if smem else 0,
        has_wgmma="wgmma.mma_async" in ptx,
        has_tma="cp.async.bulk.tensor" in ptx,
        ptx=ptx,
    )
