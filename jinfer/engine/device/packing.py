"""Packs plans, prompt chunks and beams into the inputs of a step; works on NumPy arrays only."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jinfer.config.cache import CacheConfig
from jinfer.config.engine import EngineConfig
from jinfer.engine.device.buckets import Buckets, fit
from jinfer.engine.plan import Plan, ScheduledSeq
from jinfer.engine.request import Request
from jinfer.engine.token_masks import TokenMaskError, fill_masks, no_masks
from jinfer.sampling.args import ArgRow, SampleArgs, arg_row, pack_args
from jinfer.speculation import trees as draft_tree
from jinfer.steps.batch import DecodeBatch, StepBatch
from jinfer.steps.inputs import Beams, StepInputs


class Packed(NamedTuple):
    """A plan as the inputs of one step.

    Attributes:
      inputs: of the step.
      max_drafts: the most drafts of a sequence that the step is compiled for.
      prompt_targets: [T] the token after each, where prompt logprobs are wanted; None of decodes.
    """

    inputs: StepInputs
    max_drafts: int = 0
    prompt_targets: Any = None


class Chunk(NamedTuple):
    """Known tokens of a request that a step computes without sampling."""

    request: Request
    start: int
    num_tokens: int


class BeamRow(NamedTuple):
    """One beam of a step: its newest token, the place of that, its pages and its sum."""

    request: Request
    token: int
    position: int
    pages: Sequence[int]
    total: float


class Packer:
    """Packs for one engine.

    Args:
      config: limits of the engine.
      cache: size of the KV pool.
      vocab_size: of the model.
    """

    def __init__(self, config: EngineConfig, cache: CacheConfig, vocab_size: int) -> None:
        self.buckets = Buckets.of(config)
        self.is_tree = config.speculation is not None and config.speculation.is_tree
        self.num_rows = config.max_num_seqs
        self.num_slots = cache.num_slots
        self.page_size = cache.page_size
        self.max_pages = -(-config.max_model_len // cache.page_size)
        self.num_mask_words = -(-vocab_size // 32)
        self._arg_rows: weakref.WeakKeyDictionary[Request, ArgRow] = weakref.WeakKeyDictionary()

    # ------------------------------------------------------------------ padding

    def ragged(self, num_tokens: int, num_seqs: int) -> StepInputs:
        """Returns inputs of `forward_step` with nothing in them."""
        batch = self._batch(num_tokens, num_seqs)
        sampled: Any = np.zeros(num_seqs, np.bool_)
        masks = no_masks(num_seqs, self.num_mask_words)
        return StepInputs(batch, pack_args([], num_seqs), sampled, token_mask=masks)

    def verification(
        self, max_drafts: int, num_seqs: int, num_tokens: int | None = None
    ) -> StepInputs:
        """Returns inputs of a step that verifies chains or trees, with nothing in them.

        Without `num_tokens` there are 1 + max_drafts a sequence, and a tree mask where drafts are
        trees; with it the step may prefill as well, and has no tree mask.
        """
        width = max_drafts + 1
        if num_tokens is not None:
            batch = self._batch(num_tokens, num_seqs)
        else:
            batch = self._batch(num_seqs * width, num_seqs, width)
            if self.is_tree:
                words: Any = np.zeros((num_seqs * width, -(-width // 32)), np.uint32)
                batch = dataclasses.replace(batch, tree_mask=words)
        sampled: Any = np.zeros(num_seqs, np.bool_)
        num_drafts: Any = np.zeros(num_seqs, np.int32)
        parents: Any = np.full((width, num_seqs), -1, np.int32) if self.is_tree else None
        masks = no_masks(width, num_seqs, self.num_mask_words)
        args = pack_args([], num_seqs)
        return StepInputs(batch, args, sampled, num_drafts, parents, token_mask=masks)

    def decode(self, num_seqs: int) -> StepInputs:
        """Returns inputs of `decode_loop` with nothing in them."""
        batch = DecodeBatch.padding(num_seqs, max_pages=self.max_pages, num_rows=self.num_rows)
        masks = no_masks(num_seqs, self.num_mask_words)
        args = pack_args([], num_seqs)
        return StepInputs(batch, args, num_steps=_int32(1), token_mask=masks)

    def beams(self, num_seqs: int) -> StepInputs:
        """Returns inputs of `beam_step` with no beam in them."""
        batch = self._batch(num_seqs, num_seqs, 1)
        np.asarray(batch.seq_ids)[:] = np.arange(num_seqs)
        np.asarray(batch.q_starts)[:] = np.arange(num_seqs + 1)
        totals: Any = np.full(num_seqs, -np.inf, np.float32)
        temperature: Any = np.ones(num_seqs, np.float32)
        masks = no_masks(num_seqs, self.num_mask_words)
        return StepInputs(batch, beams=Beams(totals, temperature), token_mask=masks)

    def _batch(self, num_tokens: int, num_seqs: int, max_q_len: int | None = None) -> StepBatch:
        return StepBatch.padding(
            num_tokens,
            num_seqs,
            max_pages=self.max_pages,
            num_slots=self.num_slots,
            num_rows=self.num_rows,
            max_q_len=max_q_len,
        )

    # ------------------------------------------------------------------ packing

    def pack_decode(self, plan: Plan) -> Packed:
        """Packs a plan of decodes for `decode_loop`."""
        size = fit(self.buckets.decode, len(plan.seqs))
        inputs = self.decode(size)
        batch: Any = inputs.batch
        for s, seq in enumerate(plan.seqs):
            _put_request(batch, s, seq.request, seq.request.pages)
            batch.positions[s] = seq.start
            batch.limits[s] = seq.num_samples
            batch.tokens[s] = known_tokens(seq.request, seq.start, 1)[0]
        inputs = dataclasses.replace(
            inputs,
            args=self._args(plan.seqs, size),
            num_steps=_int32(plan.num_steps),
            token_mask=_masks(plan.seqs, inputs.token_mask),
        )
        return Packed(inputs)

    def pack_ragged(self, plan: Plan) -> Packed:
        """Packs any plan for the step over ragged batches, or the one that verifies drafts."""
        inputs, max_drafts = self._padding(plan)
        batch: Any = inputs.batch
        sampled, num_drafts = np.asarray(inputs.sampled), inputs.num_drafts
        targets = np.zeros(batch.tokens.shape[0], np.int32)
        begin = 0
        for s, seq in enumerate(plan.seqs):
            known = known_tokens(seq.request, seq.start, seq.num_tokens - seq.num_drafts)
            _put_request(batch, s, seq.request, seq.request.pages)
            self._put_tokens(batch, s, begin, seq.start, [*known, *seq.drafts.token_ids])
            sampled[s] = seq.num_samples > 0
            if num_drafts is not None:
                np.asarray(num_drafts)[s] = seq.num_drafts
            if batch.tree_mask is not None:
                _put_tree(inputs, s, seq)
            if seq.wants_prompt_logprobs:
                prompt, end = seq.request.prompt_token_ids, seq.start + seq.num_tokens
                following = prompt[seq.start + 1 : end + 1]
                targets[begin : begin + len(following)] = following
            begin += seq.num_tokens
        inputs = dataclasses.replace(
            inputs,
            args=self._args(plan.seqs, sampled.shape[0]),
            token_mask=_masks(plan.seqs, inputs.token_mask),
        )
        return Packed(inputs, max_drafts, targets)

    def _padding(self, plan: Plan) -> tuple[StepInputs, int]:
        """Returns the inputs to fill with a plan, and the most drafts that they have room for."""
        is_prefill = any(seq.is_prefill for seq in plan.seqs)
        max_drafts = fit(self.buckets.drafts, plan.max_drafts) if plan.max_drafts else 0
        # A step that only guesses anew, with no tree to verify, runs as a short prefill.
        if max_drafts and not is_prefill:
            size = fit(self.buckets.decode, len(plan.seqs))
            return self.verification(max_drafts, size), max_drafts
        max_drafts = self.buckets.drafts[-1] if max_drafts else 0
        num_tokens = fit(self.buckets.tokens, plan.num_tokens)
        size = fit(self.buckets.seqs, len(plan.seqs))
        if max_drafts or self.is_tree:
            return self.verification(max_drafts, size, num_tokens), max_drafts
        return self.ragged(num_tokens, size), 0

    def pack_chunks(self, chunks: Sequence[Chunk]) -> StepInputs:
        """Packs known tokens of requests, none of which samples."""
        num_tokens = fit(self.buckets.tokens, sum(chunk.num_tokens for chunk in chunks))
        inputs = self.ragged(num_tokens, fit(self.buckets.seqs, len(chunks)))
        begin = 0
        for s, (request, start, count) in enumerate(chunks):
            pages = request.pages[: -(-(start + count) // self.page_size)]
            _put_request(inputs.batch, s, request, pages)
            tokens = known_tokens(request, start, count)
            self._put_tokens(inputs.batch, s, begin, start, tokens)
            begin += count
        return inputs

    def pack_beams(
        self, rows: Sequence[tuple[int, BeamRow]], size: int, temperature: float, token_mask: Any
    ) -> StepInputs:
        """Packs beams, each with its place among `size` of them; `token_mask` None: no masks."""
        inputs = self.beams(size)
        batch: Any = inputs.batch
        assert inputs.beams is not None
        np.asarray(inputs.beams.temperature)[:] = temperature
        for s, row in rows:
            page, offset = divmod(row.position, self.page_size)
            _put_request(batch, s, row.request, row.pages)
            batch.tokens[s], batch.positions[s] = row.token, row.position
            batch.slots[s] = row.pages[page] * self.page_size + offset
            batch.kv_lens[s] = row.position + 1
            np.asarray(inputs.beams.totals)[s] = row.total
        if token_mask is None:
            return inputs
        return dataclasses.replace(inputs, token_mask=token_mask)

    def _args(self, seqs: Sequence[ScheduledSeq], size: int) -> SampleArgs:
        return pack_args([self._arg_row(seq.request) for seq in seqs], size)

    def _arg_row(self, request: Request) -> ArgRow:
        row = self._arg_rows.get(request)
        if row is None:
            row = arg_row(request.params, seed=request.seed, prompt_len=request.num_prompt_tokens)
            self._arg_rows[request] = row
        return row

    def _put_tokens(self, batch: Any, s: int, begin: int, start: int, tokens: list[int]) -> None:
        """Gives sequence `s` the places from `begin` on: tokens at positions from `start` on."""
        end, size = begin + len(tokens), self.page_size
        places = np.arange(start, start + len(tokens), dtype=np.int32)
        batch.tokens[begin:end] = tokens
        batch.positions[begin:end] = places
        batch.seq_ids[begin:end] = s
        batch.slots[begin:end] = batch.page_table[s, places // size] * size + places % size
        batch.q_starts[s + 1 :] = end
        batch.kv_lens[s] = start + len(tokens)


def _put_request(batch: Any, s: int, request: Request, pages: Sequence[int]) -> None:
    """Fills in what does not depend on the tokens; beams have no row of the sampler's state."""
    if request.row is not None:
        batch.rows[s] = request.row
    batch.prompt_lens[s] = request.num_prompt_tokens
    batch.page_table[s, : len(pages)] = pages


def _put_tree(inputs: StepInputs, s: int, seq: ScheduledSeq) -> None:
    """Fills in the parents, positions and mask of a sequence's tree."""
    batch: Any = inputs.batch
    shape = seq.drafts.parents or ()
    root = int(batch.q_starts[s])
    end = root + 1 + len(shape)
    batch.tree_mask[root:end] = draft_tree.mask_rows(shape, batch.tree_mask.shape[1])
    depths = np.array(draft_tree.depths(shape), np.int32)
    batch.positions[root + 1 : end] = seq.start + depths
    np.asarray(inputs.parents)[1 : 1 + len(shape), s] = shape


def _masks(seqs: Sequence[ScheduledSeq], nothing: Any) -> Any:
    """Returns the masks of a plan's sequences; `nothing`, of the same shape, if none has any.

    Raises:
      TokenMaskError: a provider failed.
    """
    masked = [(s, seq) for s, seq in enumerate(seqs) if seq.is_masked]
    if not masked:
        return nothing
    masks = nothing.copy()
    for s, seq in masked:
        request, drafts = seq.request, seq.drafts
        assert request.token_masks is not None
        own = masks[None, s] if masks.ndim == 2 else masks[:, s]  # views
        try:
            fill_masks(
                *(own, request.token_masks, request.output_token_ids),
                *(drafts.token_ids, drafts.parents),
            )
        except Exception as error:
            raise TokenMaskError(request.request_id) from error
    return masks


def known_tokens(request: Request, start: int, count: int) -> list[int]:
    """Token ids at positions start .. start + count - 1, -1 where still on the device."""
    prompt = request.prompt_token_ids
    end = start + count
    tokens = prompt[start:end]
    if end > len(prompt):
        offset = max(start - len(prompt), 0)
        tokens = tokens + request.output_token_ids[offset : end - len(prompt)]
    return tokens + [-1] * (count - len(tokens))


def _int32(value: Any) -> Any:
    return np.asarray(value, np.int32)
