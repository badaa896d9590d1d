"""Plans as the arrays of a ragged step, packed row by row; no device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jinfer.engine.plan import Plan
from jinfer.engine.request import Request
from jinfer.steps.batch import DecodeBatch, StepBatch


class Packed(NamedTuple):
    """What a step wants to know beside its batch.

    Attributes:
      sampled: [S] which sequences sample.
      num_drafts: [S] drafts at the end of each sequence's tokens.
      prompt_targets: [T] the token after each, where prompt logprobs are wanted.
    """

    sampled: Any
    num_drafts: Any
    prompt_targets: Any


def fill(plan: Plan, batch: StepBatch, page_size: int) -> Packed:
    """Fills the padding `batch` with a plan."""
    size = batch.rows.shape[0]
    sampled, num_drafts = np.zeros(size, np.bool_), np.zeros(size, np.int32)
    targets = np.zeros(batch.tokens.shape[0], np.int32)
    begin = 0
    for s, seq in enumerate(plan.seqs):
        request, num_known = seq.request, seq.num_tokens - seq.num_drafts
        known = known_tokens(request, seq.start, num_known)
        put_request(batch, s, request)
        put_tokens(batch, s, begin, seq.start, [*known, *seq.drafts.token_ids], page_size)
        sampled[s] = seq.num_samples > 0
        num_drafts[s] = seq.num_drafts
        if seq.wants_prompt_logprobs:
            following = request.prompt_token_ids[seq.start + 1 : seq.start + seq.num_tokens + 1]
            targets[begin : begin + len(following)] = following
        begin += seq.num_tokens
    return Packed(sampled, num_drafts, targets)


def put_request(batch: StepBatch | DecodeBatch, s: int, request: Request) -> None:
    """Fills in what does not depend on the tokens."""
    batch.rows[s] = request.row
    batch.prompt_lens[s] = request.num_prompt_tokens
    batch.page_table[s, : len(request.pages)] = request.pages


def put_tokens(
    batch: Any, s: int, begin: int, start: int, tokens: list[int], page_size: int
) -> None:
    """Gives sequence `s` the places from `begin` on: tokens at positions from `start` on."""
    end = begin + len(tokens)
    places = np.arange(start, start + len(tokens), dtype=np.int32)
    batch.tokens[begin:end] = tokens
    batch.positions[begin:end] = places
    batch.seq_ids[begin:end] = s
    batch.slots[begin:end] = (
        batch.page_table[s, places // page_size] * page_size + places % page_size
    )
    batch.q_starts[s + 1 :] = end
    batch.kv_lens[s] = start + len(tokens)


def known_tokens(request: Request, start: int, count: int) -> list[int]:
    """Token ids at positions start .. start + count - 1, -1 where still on the device."""
    prompt = request.prompt_token_ids
    end = start + count
    tokens = prompt[start:end]
    if end > len(prompt):
        offset = max(start - len(prompt), 0)
        tokens = tokens + request.output_token_ids[offset : end - len(prompt)]
    return tokens + [-1] * (count - len(tokens))
