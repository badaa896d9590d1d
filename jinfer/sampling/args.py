"""The sampling fields of a step, one row per sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jinfer.config.sampling_params import SamplingParams

# Bits of SampleArgs.flags: the parts of SamplerState that a sequence needs.
PENALTIES = 1
BIAS = 2
ALLOWED = 4
BAD_WORDS = 8
MIN_TOKENS = 16
STATE = PENALTIES | BIAS | ALLOWED | BAD_WORDS | MIN_TOKENS
SEEDED = 32  # the request has a seed of its own, which decides every token; no part of the state

# Columns of SampleArgs.floats and .ints.
_FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
_NEUTRAL_FLOATS = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32)
_INTS = ("top_k", "min_position", "seed_high", "seed_low", "flags")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """The sampling fields of a step's S sequences, as only two arrays to copy to the device.

    A padding sequence has the neutral row that `pack_args` writes: greedy, no state needed.

    Attributes:
      floats: [S, 6] f32, columns temperature (0 = greedy), top_p, min_p, presence, frequency,
        repetition.
      ints: [S, 5] u32, columns top_k (0 = all), min_position (stop tokens are banned at smaller
        positions), seed_high, seed_low, flags (the bits PENALTIES to SEEDED).
    """

    floats: Float[Array, "S 6"]
    ints: UInt[Array, "S 5"]

    @property
    def temperature(self) -> Float[Array, "S"]:
        return self.floats[:, 0]

    @property
    def top_p(self) -> Float[Array, "S"]:
        return self.floats[:, 1]

    @property
    def min_p(self) -> Float[Array, "S"]:
        return self.floats[:, 2]

    @property
    def presence(self) -> Float[Array, "S"]:
        return self.floats[:, 3]

    @property
    def frequency(self) -> Float[Array, "S"]:
        return self.floats[:, 4]

    @property
    def repetition(self) -> Float[Array, "S"]:
        return self.floats[:, 5]

    @property
    def top_k(self) -> Int[Array, "S"]:
        return self.ints[:, 0].astype(jnp.int32)

    @property
    def min_position(self) -> Int[Array, "S"]:
        return self.ints[:, 1].astype(jnp.int32)

    @property
    def seed(self) -> UInt[Array, "S 2"]:
        """The 64-bit seed as the two words of a threefry key: equal to `jax.random.key(seed)`."""
        return self.ints[:, 2:4]

    @property
    def is_greedy(self) -> Bool[Array, "S"]:
        return self.floats[:, 0] == 0.0

    def has(self, bit: int) -> Bool[Array, "S"]:
        """Whether each sequence has one of the flags `bit`."""
        return (self.ints[:, 4] & jnp.uint32(bit)) != jnp.uint32(0)


class ArgRow(NamedTuple):
    """One sequence's row of `SampleArgs`; made once per request, stacked in every step."""

    floats: np.ndarray  # [6] f32
    ints: np.ndarray  # [5] u32


def arg_row(params: SamplingParams, *, seed: int, prompt_len: int) -> ArgRow:
    """Packs a request's sampling fields.

    Args:
      params: the request's parameters.
      seed: in [0, 2**64); `child_seed(params.seed, index)`, or a random one if params.seed is None.
      prompt_len: tokens of the prompt; the first output token takes this position.
    """
    floats = (
        params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
    )
    min_position = prompt_len + params.min_tokens if params.min_tokens else 0
    min_position = min(min_position, np.iinfo(np.int32).max)  # beyond any context
    flags = state_flags(params) | SEEDED * (params.seed is not None)
    ints = (params.top_k, min_position, seed >> 32, seed & 0xFFFFFFFF, flags)
    return ArgRow(np.array(floats, np.float32), np.array(ints, np.uint32))


def pack_args(rows: Sequence[ArgRow], size: int) -> SampleArgs:
    """Stacks `rows` into numpy-backed `SampleArgs` of `size` >= len(rows) sequences."""
    floats = np.tile(_NEUTRAL_FLOATS, (size, 1))
    ints = np.zeros((size, len(_INTS)), np.uint32)
    for i, row in enumerate(rows):
        floats[i], ints[i] = row
    return SampleArgs(floats=floats, ints=ints)  # pyright: ignore[reportArgumentType]


def state_flags(params: SamplingParams) -> int:
    """Returns which parts of the sampler state `params` need; 0: `reset_row` may be skipped."""
    has_penalty = (
        params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.repetition_penalty != 1.0
    )
    return (
        PENALTIES * has_penalty
        | BIAS * bool(params.logit_bias)
        | ALLOWED * (params.allowed_token_ids is not None or bool(params.bad_words))
        | BAD_WORDS * bool(params.bad_words)
        | MIN_TOKENS * (params.min_tokens > 0)
    )
