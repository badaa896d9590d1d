"""The chips that kernels run on, and their properties.

The current `Target` is that of JAX's default device, or the one that a context sets.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The properties of a chip that kernels and heuristics use.

    Attributes:
      name: "h100", "v5e", "v6e", "tpu7x", "cpu", or the device's own name.
      kind: "gpu" (CUDA), "tpu", "cpu", or another platform's own name.
      arch: "sm_90a" and the like for CUDA, the generation for a TPU, "cpu".
      num_cores: streaming multiprocessors of a GPU, TensorCores of a TPU device, 1 for a CPU.
      smem_bytes: shared memory one GPU block may take; VMEM of a TPU core; 0 for a CPU.
    """

    name: str
    kind: str
    arch: str
    num_cores: int
    smem_bytes: int

    @property
    def is_hopper(self) -> bool:
        return self.arch == "sm_90a"


TARGETS = {
    "h100": Target(name="h100", kind="gpu", arch="sm_90a", num_cores=132, smem_bytes=232448),
    "v5e": Target(name="v5e", kind="tpu", arch="v5e", num_cores=1, smem_bytes=128 << 20),
    "v6e": Target(name="v6e", kind="tpu", arch="v6e", num_cores=1, smem_bytes=128 << 20),
    "tpu7x": Target(name="tpu7x", kind="tpu", arch="tpu7x", num_cores=1, smem_bytes=64 << 20),
    "cpu": Target(name="cpu", kind="cpu", arch="cpu", num_cores=1, smem_bytes=0),
}


_TPU_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


# Set by contexts; part of jit's cache key, so that a program is never reused for another target.
_stated: Any = jax.make_user_context(default_value=None)


def current() -> Target:
    """Returns the target set by a context if there is one, else that of JAX's default device."""
    return _stated.value or of_device(_default_device())


def of_device(device: jax.Device) -> Target:  # pyright: ignore[reportInvalidTypeForm]
    """Returns the target of an existing device."""
    if device.platform == "cpu":
        return TARGETS["cpu"]
    if device.platform in ("gpu", "cuda"):
        major, minor = str(getattr(device, "compute_capability", "0.0")).split(".")[:2]
        arch = f"sm_{major}{minor}" + ("a" if int(major) >= 9 else "")
        name = "h100" if arch == "sm_90a" and "H100" in device.device_kind else device.device_kind
        return Target(
            name=name,
            kind="gpu",
            arch=arch,
            num_cores=int(getattr(device, "core_count", TARGETS["h100"].num_cores)),
            smem_bytes=TARGETS["h100"].smem_bytes if int(major) >= 9 else 99 << 10,
        )
    if device.platform == "tpu":
        if known := _TPU_KINDS.get(device.device_kind):
            return TARGETS[known]
        # For a generation that is not listed, assume the smallest VMEM of the listed ones.
        kind = device.device_kind
        return Target(name=kind, kind="tpu", arch=kind, num_cores=1, smem_bytes=64 << 20)
    kind = device.platform
    return Target(name=device.device_kind, kind=kind, arch=kind, num_cores=1, smem_bytes=0)


def _default_device() -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    stated: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if stated is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=stated)[0] if isinstance(stated, str) else stated


@contextlib.contextmanager
def state(target: Target | str) -> Iterator[Target]:
    """Sets the target that backend choices and heuristics assume inside the context.

    It does not move computation: use `compile_target` to compile for a chip that is not present.
    """
    if isinstance(target, str):
        target = named(target)
    with _stated(target):
        yield target


def named(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"target must be one of {sorted(TARGETS)}, got {name!r}")
    return TARGETS[name]
