"""The sequences of one step and their tokens, as pytrees of arrays; knows nothing of requests."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """A ragged batch: the new tokens of S sequences laid end to end, padded to T tokens.

    Sequence s owns tokens q_starts[s] .. q_starts[s + 1] - 1. Example with S = 3, T = 8: a prefill
    chunk of 4 tokens at positions 16-19, one decode, and a padding sequence:

        tokens     a a a a b . . .        q_starts  [0, 4, 5, 5]
        positions  16 17 18 19 7 0 0 0    kv_lens   [20, 8, 0]
        seq_ids    0 0 0 0 1 . . .        rows      [5, 2, R]

    Padding tokens have slots >= num_slots (dropped when KV is written), padding sequences have no
    tokens, kv_len 0 and a row >= R (dropped when state is written).

    Attributes:
      tokens: [T] token ids; a negative id means "the last token sampled for this sequence's row",
        which may still be on its way.
      positions: [T] place of each token in its sequence.
      seq_ids: [T] index into the S sequences.
      slots: [T] place in one layer's pool, page * page_size + offset.
      q_starts: [S + 1] first token of each sequence; the last entry is the live token count.
      kv_lens: [S] tokens of context including this step's.
      prompt_lens: [S] tokens of the prompt; two rope scalings choose their frequencies by it.
      page_table: [S, M] page ids; entries past the context are 0.
      rows: [S] row of the sampler state that the sequence uses.
      max_q_len: static bound on the tokens of any sequence (1: a pure decode step).
      tree_mask: [T, ceil(max_q_len / 32)] which of its sequence's tokens in this step each one
        sees, bit by bit, see `ragged_paged_attention`; None: those up to itself.

    Drafts under verification are the last tokens of their sequence, after the newest sampled one.
    Those of a tree have their depth for a position, and places one after the other.
    """

    tokens: Int[Array, "T"]
    positions: Int[Array, "T"]
    seq_ids: Int[Array, "T"]
    slots: Int[Array, "T"]
    q_starts: Int[Array, "S1"]
    kv_lens: Int[Array, "S"]
    prompt_lens: Int[Array, "S"]
    page_table: Int[Array, "S M"]
    rows: Int[Array, "S"]
    max_q_len: int = dataclasses.field(metadata={"static": True}, default=1)
    tree_mask: UInt32[Array, "T W"] | None = None

    @classmethod
    def padding(
        cls,
        num_tokens: int,
        num_seqs: int,
        *,
        max_pages: int,
        num_slots: int,
        num_rows: int,
        max_q_len: int | None = None,
    ) -> StepBatch:
        """Returns a batch of nothing but padding, in NumPy arrays to be filled in.

        Args:
          num_tokens: T.
          num_seqs: S.
          max_pages: M.
          num_slots: slots of a layer, the slot of padding tokens.
          num_rows: R, the row of padding sequences.
          max_q_len: most tokens of a sequence; T if None.
        """
        return cls(
            tokens=_full(0, num_tokens),
            positions=_full(0, num_tokens),
            seq_ids=_full(0, num_tokens),
            slots=_full(num_slots, num_tokens),
            q_starts=_full(0, num_seqs + 1),
            kv_lens=_full(0, num_seqs),
            prompt_lens=_full(0, num_seqs),
            page_table=_full(0, num_seqs, max_pages),
            rows=_full(num_rows, num_seqs),
            max_q_len=num_tokens if max_q_len is None else max_q_len,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeBatch:
    """S sequences that decode for several steps, one token each a step.

    Attributes:
      tokens: [S] the first step's tokens; negative: the last one sampled for the row.
      positions: [S] position of the first token to compute.
      limits: [S] steps after which a sequence is left alone; 0 for padding.
      prompt_lens: [S] tokens of each prompt.
      page_table: [S, M] page ids, with pages for every step; entries past them are 0.
      rows: [S] row of the sampler state; R or more for padding.
    """

    tokens: Int[Array, "S"]
    positions: Int[Array, "S"]
    limits: Int[Array, "S"]
    prompt_lens: Int[Array, "S"]
    page_table: Int[Array, "S M"]
    rows: Int[Array, "S"]

    @classmethod
    def padding(cls, num_seqs: int, *, max_pages: int, num_rows: int) -> DecodeBatch:
        """Returns a batch of nothing but padding, in NumPy arrays to be filled in."""
        return cls(
            tokens=_full(-1, num_seqs),
            positions=_full(0, num_seqs),
            limits=_full(0, num_seqs),
            prompt_lens=_full(0, num_seqs),
            page_table=_full(0, num_seqs, max_pages),
            rows=_full(num_rows, num_seqs),
        )


def _full(value: int, *shape: int) -> Any:
    return np.full(shape, value, np.int32)
