"""The sampler's state: one row per running sequence with its seen tokens, biases and masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jinfer.config.fields import require
from jinfer.config.sampling_params import SamplingParams

_ANY_TOKEN = -2  # in bad-word prefixes: matches any token, or none
_NO_TOKEN = -1  # in the history: no output token yet, matched by _ANY_TOKEN alone
_MAX_COUNT = 65535  # output counts saturate here (u16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerLimits:
    """Static sizes of a row of the sampler state; requests that need more are refused.

    Attributes:
      max_logit_bias: entries of logit_bias.
      max_bad_words: sequences of two or more tokens that bad_words are tokenized into (those of one
        token need no space and have no limit).
      max_bad_word_tokens: tokens of the longest of them.
    """

    max_logit_bias: int = 1024
    max_bad_words: int = 128
    max_bad_word_tokens: int = 16

    def __post_init__(self) -> None:
        require(self.max_logit_bias > 0, f"max_logit_bias must be > 0, got {self.max_logit_bias}")
        require(self.max_bad_words > 0, f"max_bad_words must be > 0, got {self.max_bad_words}")
        require(
            self.max_bad_word_tokens > 1,
            f"max_bad_word_tokens must be > 1, got {self.max_bad_word_tokens}",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """R rows of the sampler, one for each running sequence; donated in every step.

    Bit v % 32 of word v // 32 of a u32 bit row is for token v.

    Attributes:
      last_tokens: [R] the token sampled last.
      history: [R, H] the last H output tokens, newest last; -1 where there are none yet.
      output_counts: [R, V] u16, how often each token was sampled; saturates at 65535.
      prompt_bits: [R, W] tokens of the prompt.
      allowed_bits: [R, W] tokens that may be sampled: allowed_token_ids without the bad words of
        one token.
      stop_bits: [R, W] tokens banned below min_position.
      bias_ids, bias_values: [R, A] logit_bias; unused places have id V, which is dropped.
      bad_prefixes: [R, C, H] the preceding tokens of a bad word, right-aligned; -2 matches any.
      bad_tokens: [R, C] the token that would complete a bad word; unused places have id V.
    """

    last_tokens: Int[Array, "R"]
    history: Int[Array, "R H"]
    output_counts: UInt[Array, "R V"]
    prompt_bits: UInt[Array, "R W"]
    allowed_bits: UInt[Array, "R W"]
    stop_bits: UInt[Array, "R W"]
    bias_ids: Int[Array, "R A"]
    bias_values: Float[Array, "R A"]
    bad_prefixes: Int[Array, "R C H"]
    bad_tokens: Int[Array, "R C"]

    @property
    def num_rows(self) -> int:
        return self.last_tokens.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.output_counts.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSetup:
    """One row of `SamplerState`, made on the host by `pack_row`: the same fields without R."""

    last_tokens: Int[Array, ""]
    history: Int[Array, "H"]
    output_counts: UInt[Array, "V"]
    prompt_bits: UInt[Array, "W"]
    allowed_bits: UInt[Array, "W"]
    stop_bits: UInt[Array, "W"]
    bias_ids: Int[Array, "A"]
    bias_values: Float[Array, "A"]
    bad_prefixes: Int[Array, "C H"]
    bad_tokens: Int[Array, "C"]


def _row_shapes(vocab_size: int, limits: SamplerLimits) -> dict[str, tuple[tuple[int, ...], type]]:
    words = -(-vocab_size // 32)
    history = limits.max_bad_word_tokens - 1
    return {
        "last_tokens": ((), np.int32),
        "history": ((history,), np.int32),
        "output_counts": ((vocab_size,), np.uint16),
        "prompt_bits": ((words,), np.uint32),
        "allowed_bits": ((words,), np.uint32),
        "stop_bits": ((words,), np.uint32),
        "bias_ids": ((limits.max_logit_bias,), np.int32),
        "bias_values": ((limits.max_logit_bias,), np.float32),
        "bad_prefixes": ((limits.max_bad_words, history), np.int32),
        "bad_tokens": ((limits.max_bad_words,), np.int32),
    }


def state_bytes(max_rows: int, vocab_size: int, limits: SamplerLimits | None = None) -> int:
    """Returns the bytes of a `SamplerState`: about 2.4 V + 17 KiB per row.

    With the default limits: 4.2 MiB for 32 rows of 49,152 tokens, 156 MiB for 256 rows of 262,144.
    """
    shapes = _row_shapes(vocab_size, limits or SamplerLimits())
    row = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
    return max_rows * row


def init_state(max_rows: int, vocab_size: int, limits: SamplerLimits | None = None) -> SamplerState:
    """Returns a state of zeros; `reset_row` must write a row before it is used."""
    shapes = _row_shapes(vocab_size, limits or SamplerLimits())
    return SamplerState(
        **{name: jnp.zeros((max_rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    )


def pack_bits(token_ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns [ceil(V / 32)] u32 with the bits of `token_ids` set; ids outside 0..V-1 are ignored.

    Example: pack_bits([0, 33], 40) = [0b1, 0b10].
    """
    ids = np.asarray(token_ids, np.int64).reshape(-1)
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[ids[(ids >= 0) & (ids < vocab_size)]] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def pack_row(
    params: SamplingParams,
    prompt_token_ids: Sequence[int] | np.ndarray,
    output_token_ids: Sequence[int] | np.ndarray,
    *,
    vocab_size: int,
    eos_token_ids: Sequence[int] = (),
    bad_words_token_ids: Sequence[Sequence[int]] = (),
    limits: SamplerLimits | None = None,
) -> RowSetup:
    """Packs one row of the state on the host, for `reset_row`.

    After preemption, `output_token_ids` restore counts, history and last token exactly.

    Args:
      params: the request's parameters, checked by `check_request`.
      prompt_token_ids: the prompt.
      output_token_ids: tokens sampled so far (empty for a new request).
      vocab_size: V of the logits.
      eos_token_ids: the model's end tokens; banned with `stop_token_ids` below min_tokens, even
        with ignore_eos.
      bad_words_token_ids: the token sequences of `params.bad_words`.
      limits: the limits that the state was made with.

    Returns:
      Arrays whose shapes depend on `vocab_size` and `limits` alone.
    """
    limits = limits or SamplerLimits()
    shapes = _row_shapes(vocab_size, limits)
    row = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    prompt = np.asarray(prompt_token_ids, np.int64).reshape(-1)
    output = np.asarray(output_token_ids, np.int64).reshape(-1)

    newest = output if output.size else prompt
    row["last_tokens"][...] = newest[-1] if newest.size else 0
    recent = output[-row["history"].size :]
    row["history"][:] = _NO_TOKEN
    row["history"][row["history"].size - recent.size :] = recent
    counts = np.bincount(output[(output >= 0) & (output < vocab_size)], minlength=vocab_size)
    row["output_counts"][:] = np.minimum(counts, _MAX_COUNT)
    row["prompt_bits"] = pack_bits(prompt, vocab_size)

    singles = [word[0] for word in bad_words_token_ids if len(word) == 1]
    allowed = params.allowed_token_ids
    row["allowed_bits"] = pack_bits(
        np.arange(vocab_size) if allowed is None else allowed, vocab_size
    ) & ~pack_bits(singles, vocab_size)
    row["stop_bits"] = pack_bits([*eos_token_ids, *params.stop_token_ids], vocab_size)

    bias = params.logit_bias or {}
    row["bias_ids"][:] = vocab_size
    row["bias_ids"][: len(bias)] = list(bias)
    row["bias_values"][: len(bias)] = list(bias.values())

    row["bad_prefixes"][:] = _ANY_TOKEN
    row["bad_tokens"][:] = vocab_size
    for i, word in enumerate(word for word in bad_words_token_ids if len(word) > 1):
        row["bad_prefixes"][i, row["history"].size - len(word) + 1 :] = word[:-1]
        row["bad_tokens"][i] = word[-1]
    return RowSetup(**row)  # pyright: ignore[reportArgumentType]


def reset_row(state: SamplerState, row: Int[Array, ""] | int, setup: RowSetup) -> SamplerState:
    """Overwrites row `row` with `setup`, at every admission.

    `state` should be donated. A row outside 0 .. R - 1 changes nothing.
    """
    row = droppable_rows(jnp.asarray(row, jnp.int32), state.num_rows)
    return SamplerState(
        **{
            field.name: getattr(state, field.name)
            .at[row]
            .set(getattr(setup, field.name), mode="drop")
            for field in dataclasses.fields(SamplerState)
        }
    )


def observe(
    state: SamplerState,
    rows: Int[Array, "S"],
    tokens: Int[Array, "S"],
    active: Bool[Array, "S"],
) -> SamplerState:
    """Appends one sampled token to each row; the S sequences have distinct rows.

    Inactive sequences, rows outside 0 .. R - 1 (padding) and negative ids (NO_TOKEN) are dropped.
    Pure: it can also return the state after a drafted token.
    """
    active = active & (tokens >= 0)
    rows = jnp.where(active, droppable_rows(rows, state.num_rows), state.num_rows)
    tokens = tokens.astype(jnp.int32)
    counts = state.output_counts.at[rows, tokens].get(mode="fill", fill_value=0)
    counts = jnp.minimum(counts.astype(jnp.int32) + 1, _MAX_COUNT).astype(jnp.uint16)
    history = state.history.at[rows].get(mode="fill", fill_value=_NO_TOKEN)
    history = jnp.concatenate([history[:, 1:], tokens[:, None]], axis=1)
    return dataclasses.replace(
        state,
        last_tokens=state.last_tokens.at[rows].set(tokens, mode="drop"),
        history=state.history.at[rows].set(history, mode="drop"),
        output_counts=state.output_counts.at[rows, tokens].set(counts, mode="drop"),
    )


def droppable_rows(rows: Array, num_rows: int) -> Array:
    """Replaces negative rows, which would index from the end, by `num_rows`, which is dropped."""
    return jnp.where(rows < 0, num_rows, rows)
