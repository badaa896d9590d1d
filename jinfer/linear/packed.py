"""Integer weights as the native kernels of a CPU read them.

Their products round each input row to int8, 32 inputs with one scale, which the format of the
weight does not say: the relative rms error of a product is 0.5 %. `linear_impl="xla"` multiplies
with inputs as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jinfer.config.quant_format import QFormat
from jinfer.linear.qtensor import QTensor
from jinfer.linear.quantized import QuantizedWeight
from pallas_kernels import native
from pallas_kernels.packed_matmul import PackedWeight, pack, packed_matmul
from pallas_kernels.packed_matmul.base import IN
from pallas_kernels.target import Target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedLinear(QuantizedWeight):
    """A QTensor [I, O] of integers in the layout of `packed_matmul`.

    Attributes:
      packed: codes, scales and zero points.
      perm: as in QTensor.
      fmt: the format (static).
    """

    packed: PackedWeight
    perm: Array | None
    fmt: QFormat = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [I, O]."""
        return self.packed.num_inputs, self.packed.num_outputs

    @property
    def ndim(self) -> int:
        """Logical rank."""
        return 2

    @property
    def dtype(self) -> Any:
        """What the weight is worth in float."""
        return jnp.dtype(jnp.float32)

    def multiply_floats(self, x: Array) -> Array:
        """See `QuantizedWeight`."""
        return packed_matmul(x, self.packed)

    def split_axes(self, names: Any) -> Any:
        """See `QuantizedWeight`: strips lie along the outputs, groups along the inputs."""
        inputs, outputs = names
        packed = dataclasses.replace(self.packed, data=PartitionSpec(outputs, inputs, None))
        perm = None if self.perm is None else PartitionSpec(inputs)
        return dataclasses.replace(self, packed=packed, perm=perm)


def why_not_packed(w: QTensor, target: Target) -> str | None:
    """Returns why a weight cannot be packed for `target`, or None if it can."""
    if reason := native.why_not(target):
        return reason
    fmt, num_inputs = w.fmt, w.shape[-2]
    if w.ndim != 2:
        return f"weights of experts {list(w.shape)} are multiplied by XLA"
    if fmt.kind != "int" or fmt.act is not None:
        return f"{fmt}: integers with float inputs only are packed"
    if fmt.block != 1 or fmt.group == 0:
        return f"{fmt}: outputs share scales"
    group = fmt.group_size(num_inputs)
    if group % IN or num_inputs % group:
        return f"{fmt}: groups must be multiples of {IN} and divide the {num_inputs} inputs"
    return None


def pack_weight(w: QTensor) -> PackedLinear:
    """Lays out a weight that `why_not_packed` has nothing against; values do not change."""
    bits = 4 if w.fmt.bits <= 4 else 8
    half = 2 ** (bits - 1)
    scale = w.scales()
    zero = jnp.zeros_like(scale) if w.zero is None else w.zero.astype(jnp.float32)
    codes = (w.codes().astype(jnp.int16) + jnp.int16(half)).astype(jnp.uint8)
    packed = pack(codes, scale, -(zero + half) * scale, bits=bits)
    return PackedLinear(packed, w.perm, w.fmt)
