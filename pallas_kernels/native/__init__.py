"""Kernels in C++ for CPUs, called by XLA through its foreign function interface.

`build` compiles and registers them; the sources lie in the folder of their op.
"""

from pallas_kernels.native.build import Native as Native
from pallas_kernels.native.build import native as native
from pallas_kernels.target import Target


def why_not(target: Target) -> str | None:
    """Returns why no native kernel runs on `target`, or None."""
    if target.kind != "cpu":
        return f"needs a CPU, the target is {target.name}"
    return native().why_not
