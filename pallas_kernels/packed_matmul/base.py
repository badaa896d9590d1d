"""Weights of 4 or 8 bits as CPU kernels read them, and how inputs are rounded for them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

IN = 32  # inputs that share a scale when rows are rounded; groups are multiples of it
OUTS = 16  # outputs of a strip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight w[i, o] = scale[i // group, o] * code[i, o] + low[i // group, o], code unsigned.

    Attributes:
      data: u8 [strips of 16 outputs, groups, bytes]. A group's bytes: its codes, 16 scales and 16
        lows. Codes are in vectors of 64 bytes, for 16 outputs 4 inputs ("quads") each; of 4 bits,
        vector j of 32 inputs has quad j in its low halves and quad j + 4 in its high ones.
      num_outputs: static; the last strip is padded with zeros.
      bits: static, 4 or 8.
      group: static, inputs that share a scale, a multiple of 32.
      is_wide: static, whether scales and lows are f32; else they are f16.
    """

    data: jax.Array
    num_outputs: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    is_wide: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_inputs(self) -> int:
        return self.data.shape[1] * self.group


def pack(codes: jax.Array, scale: jax.Array, low: jax.Array, *, bits: int) -> PackedWeight:
    """Lays a weight out.

    Scales and lows become f16 where all of them are f16 numbers up to the rounding of f32, as those
    of GGUF, GPTQ and AWQ files are; else they stay f32.

    Args:
      codes: u8 [I, O], in 0 .. 2^bits - 1; I a multiple of 32.
      scale, low: f32 [G, O], G groups of I / G inputs, a multiple of 32.
      bits: 4 or 8.
    """
    num_inputs, num_outputs = codes.shape
    group = num_inputs // scale.shape[0]
    is_wide = not all(_fits_f16(x) for x in (scale, low))
    data = _pack(codes, scale, low, bits=bits, is_wide=is_wide)
    return PackedWeight(data, num_outputs, bits, group, is_wide)


def _fits_f16(x: jax.Array) -> bool:
    given = np.asarray(x, np.float32)
    with np.errstate(over="ignore"):
        rounded = given.astype(np.float16).astype(np.float32)
    return bool((np.abs(rounded - given) <= 2.0**-22 * np.abs(given)).all())


@functools.partial(jax.jit, static_argnames=("bits", "is_wide"))
def _pack(
    codes: jax.Array, scale: jax.Array, low: jax.Array, *, bits: int, is_wide: bool
) -> jax.Array:
    num_groups, padding = scale.shape[0], -codes.shape[1] % OUTS
    codes, scale, low = (jnp.pad(x, ((0, 0), (0, padding))) for x in (codes, scale, low))
    num_strips = codes.shape[1] // OUTS
    # [groups, 32s, quads, 4, strips, outputs] -> [strips, groups, 32s, quads, outputs, 4]
    quads = codes.reshape(num_groups, -1, IN // 4, 4, num_strips, OUTS)
    quads = quads.transpose(4, 0, 1, 2, 5, 3)
    if bits == 4:
        quads = quads[:, :, :, :4] | (quads[:, :, :, 4:] << 4)
    parts = [quads.reshape(num_strips, num_groups, -1)]
    for x in (scale, low):
        x = x.astype(jnp.float32 if is_wide else jnp.float16)
        x = x.reshape(num_groups, num_strips, OUTS).transpose(1, 0, 2)
        parts.append(jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(num_strips, num_groups, -1))
    return jnp.concatenate(parts, axis=-1)


def unpack(w: PackedWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns codes u8 [I, O], scale and low f32 [G, O]; undoes `pack`."""
    num_strips, num_groups, _ = w.data.shape
    size = w.group * OUTS * w.bits // 8
    quads = w.data[:, :, :size].reshape(num_strips, num_groups, w.group // IN, w.bits, OUTS, 4)
    if w.bits == 4:
        quads = jnp.concatenate([quads & 15, quads >> 4], axis=3)
    codes = quads.transpose(1, 2, 3, 5, 0, 4).reshape(w.num_inputs, -1)
    width = 4 if w.is_wide else 2
    numbers = w.data[:, :, size:].reshape(num_strips, num_groups, 2, OUTS, width)
    kind = jnp.float32 if w.is_wide else jnp.float16
    numbers = jax.lax.bitcast_convert_type(numbers, kind).astype(jnp.float32)
    scale, low = (numbers[:, :, i].transpose(1, 0, 2).reshape(num_groups, -1) for i in range(2))
    n = w.num_outputs
    return codes[:, :n], scale[:, :n], low[:, :n]


def round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds rows [M, I] to int8; returns codes [M, I / 32, 32] and scales f32 [M, I / 32, 1].

    Numbers that are not finite make the scale of their 32 inputs NaN.
    """
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, IN)
    top = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    inverse = jnp.where(top > 1e-30, 127.0 / jnp.where(top > 1e-30, top, 1.0), 0.0)
    codes = jnp.round(blocks * inverse)
    poison = jnp.sum(blocks * 0.0, axis=-1, keepdims=True)
    codes = jnp.where(poison == 0.0, codes, 0.0).astype(jnp.int8)
    return codes, top / 127.0 + poison
