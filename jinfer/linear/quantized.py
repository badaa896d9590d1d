"""What all quantized weights share: how inputs are rounded, and which product they go to.

Inputs are rounded here as the format says, alike for every backend. The classes supply the three
products: a `QTensor` leaves them to XLA, a `PreparedWeight` calls the kernels' ops. The docs of
`QFormat.act` have what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jinfer.config.fields import require
from jinfer.config.quant_format import CODEBOOKS, FP8_MAX, QFormat
from jinfer.linear.grids import FP8_DTYPES, divide
from jinfer.linear.weight import num_bytes

OUTLIER_THRESHOLD = 6.0  # LLM.int8(): Dettmers et al. 2022, section 3.2
# Below this a token counts as zeros: its scale stays a normal number, which no CPU flushes to 0.
_TINY = 1e-30


class QuantizedWeight:
    """A weight [I, O] in a number format, or a stack [E, I, O] of them.

    Attributes:
      q: the codes, in a form that the class chooses.
      zero, act_scale, perm, fmt: as in `QTensor`.
    """

    q: Array
    zero: Array | None
    act_scale: Array | None
    perm: Array | None
    fmt: QFormat

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., I, O]."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Logical rank."""
        return self.q.ndim

    @property
    def size(self) -> int:
        """Logical number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Resident bytes on an accelerator, where int4 takes half a byte; scales and all."""
        return num_bytes(self)

    @property
    def is_blockwise(self) -> bool:
        """Whether inputs of one output have several scales, or outputs share one in blocks."""
        return self.fmt.num_groups(self.shape[-2]) > 1 or self.fmt.block > 1

    def matmul(self, x: Array) -> Array:
        """Returns x @ w with the maths of `fmt`, in float32.

        Sums are in float32 (int32 for int8 x int8).

        Args:
          x: [..., I], any float dtype; for experts [E, ..., I], one product an expert.

        Raises:
          ValueError: the input widths differ.
        """
        num_inputs = self.shape[-2]
        require(
            x.shape[-1] == num_inputs,
            f"x has {x.shape[-1]} features, the weight {list(self.shape)} takes {num_inputs}",
        )
        x = self._permute(x)
        act = self.fmt.act
        if act is None:
            out = self._multiply_floats(x)
        elif act == "outlier":
            # By token, where bitsandbytes takes a feature out for the whole batch: a result must
            # not depend on batch mates.
            outliers = jnp.where(jnp.abs(x) >= jnp.asarray(OUTLIER_THRESHOLD, x.dtype), x, 0)
            out = self._multiply_int8(x - outliers) + self._multiply_floats(outliers)
        elif self.fmt.kind == "int":
            out = self._multiply_int8(x)
        else:
            out = self._multiply_fp8(x)
        return out.astype(jnp.float32)

    def _multiply_floats(self, x: Array) -> Array:
        self.note_backend(x, "quant_matmul")
        return self.multiply_floats(x)

    def _multiply_int8(self, x: Array) -> Array:
        self.note_backend(x, "int8_matmul")
        return self.multiply_int8(*self._round_inputs(x))

    def _multiply_fp8(self, x: Array) -> Array:
        self.note_backend(x, "fp8_matmul")
        q, token_scale = self._round_groups(x) if self.is_blockwise else self._round_inputs(x)
        return self.multiply_fp8(q, token_scale, x.shape)

    def note_backend(self, x: Array, op: str) -> None:
        """Records for `dispatch.explain` what multiplies x; the kernels' ops record it themselves.

        Raises:
          NotImplementedError: `use_impl` names a backend for `op` that cannot run.
        """

    def multiply_floats(self, x: Array) -> Array:
        """x [..., I] float @ w -> f32 [..., O]; x is in the stored order of the inputs."""
        raise NotImplementedError

    def multiply_int8(self, q: Array, token_scale: Array) -> Array:
        """(q int8 [..., I] * token_scale [..., 1]) @ w -> f32 [..., O]."""
        raise NotImplementedError

    def multiply_fp8(self, q: Array, token_scale: Array, shape: Sequence[int]) -> Array:
        """(q fp8 * token_scale) @ w -> f32 [..., O].

        Args:
          q: [..., I]; for a blockwise weight [M, G, g], zeros in a short last group.
          token_scale: [..., 1]; for a blockwise weight [M, G, 1].
          shape: of the inputs, [..., I].
        """
        raise NotImplementedError

    def split_axes(self, names: Sequence[str]) -> Any:
        """Returns this weight with a PartitionSpec of axis names in place of each of its arrays.

        Args:
          names: of the axes of `shape`, as the model names them. Groups of inputs and blocks of
            outputs lie along the axes that they are parts of; None: all share one scale.
        """
        *lead, inputs, outputs = names
        specs = {}
        for path, x in jax.tree_util.tree_flatten_with_path(self)[0]:
            field = path[0].name
            if field == "q":
                own = self._code_axes(inputs, outputs)
            elif field == "perm":
                own = (inputs,)
            elif field == "act_scale" or x.ndim < len(names):  # parts of double scales, too
                own = (None,) * (x.ndim - len(lead))
            else:
                own = tuple(
                    name if size > 1 else None
                    for name, size in zip((inputs, outputs), x.shape[-2:], strict=True)
                )
            specs[path] = PartitionSpec(*lead[: x.ndim - len(own)], *own)
        return jax.tree_util.tree_map_with_path(lambda path, x: specs[path], self)

    def _code_axes(self, inputs: str, outputs: str) -> tuple[str, str]:
        return inputs, outputs

    def why_no_kernel(self) -> str | None:
        """Returns why no kernel reads this weight, so that XLA multiplies it, or None."""
        fmt = self.fmt
        if self.ndim != 2:
            return f"weights of experts {list(self.shape)} are multiplied by XLA, block by block"
        if fmt.is_packed:
            return f"{fmt}: codes of {fmt.bits} bits are a bit stream, which no kernel reads"
        if fmt.kind in CODEBOOKS:
            return f"{fmt}: the codes of {fmt.kind} stand in a table, which no kernel reads"
        if fmt.act is not None and fmt.kind == "int":
            if fmt.bits != 8:
                return f"{fmt}: int8 inputs are multiplied by int8 weights only"
            if fmt.num_groups(self.shape[0]) > 1:
                return f"{fmt}: int8 inputs take scales per channel, groups are left to XLA"
        return None

    def _permute(self, x: Array) -> Array:
        if self.perm is None:
            return x
        if self.ndim == 3:
            perm = self.perm.reshape(self.shape[0], *([1] * (x.ndim - 2)), x.shape[-1])
            return jnp.take_along_axis(x, perm, axis=-1)
        return jnp.take(x, self.perm, axis=-1)

    def _round_inputs(self, x: Array) -> tuple[Array, Array]:
        """Codes of the inputs and f32 scales [..., 1]."""
        fmt = self.fmt
        if fmt.act == "static":
            assert self.act_scale is not None
            scale = self.act_scale.astype(jnp.float32)
            if self.ndim == 3 and scale.ndim:
                scale = scale.reshape(-1, *([1] * (x.ndim - 1)))
            scale = jnp.broadcast_to(scale, (*x.shape[:-1], 1))
            return _cast(divide(x.astype(jnp.float32), scale), fmt.kind), scale
        return quantize_tokens(x, fmt.kind, steps=127.5 if fmt.act == "dyn-full" else None)

    def _round_groups(self, x: Array) -> tuple[Array, Array]:
        """fp8 codes [M, G, g], and one f32 scale a token and group of inputs [M, G, 1].

        DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
        """
        require(
            self.ndim == 2 and self.fmt.act == "dyn",
            f"{self.fmt}: blocks take dynamic inputs, [I, O] only",
        )
        groups = split_features(x.reshape(-1, x.shape[-1]), self.fmt.group)
        return quantize_tokens(groups, self.fmt.kind)


def split_features(x: Array, group: int) -> Array:
    """[M, I] -> [M, G, g], zeros in a short last group."""
    pad = -x.shape[-1] % group
    return jnp.pad(x, ((0, 0), (0, pad))).reshape(x.shape[0], -1, group)


def quantize_tokens(x: Array, kind: str, *, steps: float | None = None) -> tuple[Array, Array]:
    """One scale a token: codes (int8, or the fp8 dtype of `kind`) and f32 scales [..., 1].

    Args:
      x: [..., I].
      kind: "int", "fp8-e4m3" or "fp8-e5m2".
      steps: amax / steps is the scale; 127 or 127.5 for int, 448 or 57344 for fp8.
    """
    x = x.astype(jnp.float32)
    if steps is None:
        steps = 127.0 if kind == "int" else FP8_MAX[kind]
    amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = divide(jnp.where(amax < _TINY, 1.0, amax), steps)
    return _cast(divide(x, scale), kind), scale


def _cast(ratio: Array, kind: str) -> Array:
    if kind == "int":
        return jnp.clip(jnp.round(ratio), -128, 127).astype(jnp.int8)
    return jnp.clip(ratio, -FP8_MAX[kind], FP8_MAX[kind]).astype(FP8_DTYPES[kind])
