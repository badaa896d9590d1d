"""Work distribution and tile sizes of the Hopper kernels of the two matmuls.

The sizes come from a model of one k-tile's time. Its rates are estimates from the H100's datasheet,
not measurements; `scripts/autotune.py` measures tiles that replace it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.target import Target
from pallas_kernels.tiles import QuantMatmulGpuTiles

# Per second and multiprocessor (132 of them), at 1.7 GHz.
_HBM_BYTES = 3.0e12 / 132
_L2_BYTES = 5.5e12 / 132
_BF16_PRODUCTS = 2048 * 1.7e9
_INSTRUCTIONS = 4 * 1.7e9  # warp instructions
_LAUNCH = 2e-6

_SMEM_RESERVE = 2 << 10  # barriers, alignment


def num_bits(dtype: Any) -> int:
    """Returns the bits that an element takes in an accelerator's memory."""
    is_4_bit = jnp.dtype(dtype) in (jnp.dtype(jnp.int4), jnp.dtype(jnp.uint4))
    return 4 if is_4_bit else jnp.dtype(dtype).itemsize * 8


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Equal shares of all k-tiles for persistent blocks ("stream-K").

    The k-tiles of output tile 0 come first, then those of tile 1, ...; block b takes `per_block` of
    them from b * per_block on. A tile that n blocks share has n parts. Example with 3 tiles of 4
    k-tiles on 2 blocks, per_block = 6:

        tile    0 0 0 0 1 1 1 1 2 2 2 2
        block   0 0 0 0 0 0 1 1 1 1 1 1
        part    0 0 0 0 0 0 1 1 0 0 0 0
    """

    num_tiles: int
    k_tiles: int
    per_block: int

    @classmethod
    def make(cls, num_tiles: int, k_tiles: int, num_cores: int, splits: int) -> Schedule:
        """Returns the schedule of `num_tiles` where at most about `splits` blocks share a tile."""
        if splits == 1:
            return cls(num_tiles, k_tiles, k_tiles * -(-num_tiles // num_cores))
        even = -(-num_tiles * k_tiles // num_cores)
        return cls(num_tiles, k_tiles, max(even, -(-k_tiles // splits)))

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tiles * self.k_tiles // self.per_block)

    @property
    def max_parts(self) -> int:
        return max(self.last_part(t) for t in range(self.num_tiles)) + 1

    def last_part(self, tile: Any) -> Any:
        """Returns the index of the last part of `tile` (an int or an array)."""
        first = tile * self.k_tiles
        return (first + self.k_tiles - 1) // self.per_block - first // self.per_block


def sum_parts(
    parts: jax.Array, schedule: Schedule, m_tiles: int, block: tuple[int, int]
) -> jax.Array:
    """Sums partial products [P, M, N] over the written parts; the others are uninitialized."""
    num_parts, num_rows, num_outputs = parts.shape
    tile_m = np.arange(m_tiles)[:, None]
    tile_n = np.arange(num_outputs)[None, :] // block[1]
    # A constant, [m_tiles, N]: computing it on the device would launch another kernel each call.
    last = jnp.asarray(schedule.last_part(tile_n * m_tiles + tile_m), jnp.int32)
    last = jnp.repeat(last, block[0], axis=0)[:num_rows]  # [M, N]
    part = lax.iota(jnp.int32, num_parts)[:, None, None]
    return jnp.where(part <= last[None], parts, jnp.float32(0)).sum(axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A product x [M, K] . w [K, N], described for the model of its time.

    Attributes:
      num_rows, num_inputs, num_outputs: M, K, N.
      w_bits, x_bits: bits of an element in memory.
      group: inputs that share a scale; K: per channel.
      instructions: warp instructions that convert 32 codes to a `wgmma` operand; 0: no conversion.
      speed: rate of products relative to bf16.
    """

    num_rows: int
    num_inputs: int
    num_outputs: int
    w_bits: int
    x_bits: int = 16
    group: int
    instructions: float
    speed: float = 1.0

    def tiles(self, t: QuantMatmulGpuTiles) -> tuple[int, int, int]:
        """Returns the number of tiles along M, N and K."""
        return (
            -(-self.num_rows // t.block_m),
            -(-self.num_outputs // t.block_n),
            -(-self.num_inputs // t.block_k),
        )

    def stage_bytes(self, t: QuantMatmulGpuTiles) -> int:
        """Returns the shared memory of one stage: codes, rows of x, scales and zero points."""
        num_scales = -(-t.block_k // self.group)
        codes = t.block_n * t.block_k * self.w_bits // 8
        rows = t.block_m * t.block_k * self.x_bits // 8
        return -(-(codes + rows + 2 * num_scales * t.block_n * 4) // 1024) * 1024

    def max_stages(self, t: QuantMatmulGpuTiles, target: Target) -> int:
        """Returns how many stages fit beside an f32 output tile."""
        free = target.smem_bytes - _SMEM_RESERVE - t.block_n * t.block_m * 4
        return max(0, free // self.stage_bytes(t))

    def seconds(self, t: QuantMatmulGpuTiles, target: Target) -> float:
        """Returns the modelled time with these tiles on `target`."""
        m_tiles, n_tiles, k_tiles = self.tiles(t)
        schedule = Schedule.make(m_tiles * n_tiles, k_tiles, target.num_cores, t.splits)
        codes = t.block_n * t.block_k
        w_bytes, x_bytes = codes * self.w_bits / 8, t.block_m * t.block_k * self.x_bits / 8
        # wgmma with A in registers is bound by reading A below 16 columns.
        products = codes * max(t.block_m, 16) / (_BF16_PRODUCTS * self.speed)
        instructions = t.warpgroups * 4 * 100 + codes / 32 * self.instructions
        if t.scale_weights:
            instructions += codes / 64
        else:
            num_scales = -(-t.block_k // self.group)
            instructions += num_scales * t.block_n * t.block_m / 32
        arithmetic = (products / 0.85, instructions / _INSTRUCTIONS)
        k_tile = max(
            w_bytes / m_tiles / _HBM_BYTES,
            (w_bytes + x_bytes) / _L2_BYTES,
            max(arithmetic) + 0.3 * min(arithmetic),  # the warpgroups overlap the two, not fully
        )
        total = _LAUNCH + schedule.per_block * k_tile
        if schedule.max_parts > 1:
            bytes_moved = 8 * schedule.max_parts * self.num_rows * self.num_outputs
            total += _LAUNCH + bytes_moved / (target.num_cores * _HBM_BYTES)
        return total

    def ranked(
        self, candidates: Iterable[QuantMatmulGpuTiles], target: Target
    ) -> list[QuantMatmulGpuTiles]:
        """Returns the candidates that fit, with the most stages each; fastest by model first."""
        fitting = []
        for t in candidates:
            stages = min(8, self.max_stages(t, target))
            if stages >= 3:
                fitting.append(dataclasses.replace(t, stages=stages))
        return sorted(fitting, key=lambda t: self.seconds(t, target))
