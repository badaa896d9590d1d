"""Turns a plan into one jitted step on the device and its results back into Python values.

The runner owns the device: the weights, and the pool that every step donates. It decides nothing
about requests.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jinfer.config.cache import CacheConfig
from jinfer.config.engine import EngineConfig
from jinfer.config.sampling_params import SamplingParams
from jinfer.config.typing import Params
from jinfer.engine.device import results
from jinfer.engine.device.buckets import Buckets
from jinfer.engine.device.drafter import Drafter
from jinfer.engine.device.host_pages import HostPages
from jinfer.engine.device.packing import Chunk, Packed, Packer
from jinfer.engine.device.results import Launched, StepResult
from jinfer.engine.pages.costs import TransferCosts
from jinfer.engine.plan import PageMoves, Plan
from jinfer.engine.request import Request
from jinfer.kv import cache as kv_cache
from jinfer.kv.cache import KVCache
from jinfer.linear import placement
from jinfer.linear.placement import Placement
from jinfer.models.model import Model
from jinfer.sampling.state import RowSetup, init_state, pack_row
from jinfer.steps import beam, decode, forward, logprobs, tree, verify
from jinfer.steps import draft as draft_steps
from jinfer.steps import pool as pool_steps
from jinfer.steps.blocks import StepOutput
from jinfer.steps.inputs import Pool, StepInputs, Weights
from jinfer.steps.tracing import refuse_tracing

logger = logging.getLogger(__name__)

CLEAR_BATCH = 16  # pages that one program clears; fewer are padded
COPY_BATCH = 4  # likewise copies, through a buffer of so many pages


class Runner:
    """Executes plans on the device of the weights.

    Args:
      model: the model.
      params: its weights, placed; pool and state come to the same device.
      cache: size of the KV pool.
      config: engine limits.
      heads: Medusa heads, placed, if `config.speculation` is with them.
      drafter: drafts inside the steps, for the methods of speculation that have one.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        cache: CacheConfig,
        config: EngineConfig,
        heads: Mapping[str, jax.Array] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.model = model
        self.placement = Placement.of(params, config.linear_impl)
        self.params = params
        self._formats = placement.formats_of(params)
        self.cache = cache
        self.config = config
        self.drafter = drafter
        self._note_weights()
        self.packer = Packer(config, cache)
        self.vocab_size = model.config.vocab_size
        self.top_k = min(config.max_logprobs, self.vocab_size)
        self._heads = heads
        self.reset()

    def reset(self) -> None:
        """Makes an empty pool; the old one goes first."""
        self.__dict__.pop("pool", None)
        kv = kv_cache.init(self.model.config, self.cache, self.placement.target)
        draft_kv = (
            None
            if self.drafter is None
            else self.drafter.make_kv(self.cache, self.placement.target)
        )
        state = init_state(self.config.max_num_seqs, self.vocab_size)
        self.host = HostPages(self.config.num_host_pages, self.placement)
        self.pool: Pool = self.placement.bind(Pool(kv, state, draft_kv))

    @property
    def buckets(self) -> Buckets:
        """Padded sizes of its steps."""
        return self.packer.buckets

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV caches, scales included."""
        caches = self.pool.kv, self.pool.draft_kv
        return sum(leaf.nbytes for leaf in jax.tree.leaves(caches))

    # ------------------------------------------------------------------ pages and rows

    def move_pages(self, moves: PageMoves) -> None:
        """Dispatches what is to be done with whole pages before a step."""
        nowhere = self.cache.num_pages
        if moves.saved:
            self.host.save(self.pool.kv, moves.saved)
        for begin in range(0, len(moves.cleared), CLEAR_BATCH):
            pages = list(moves.cleared[begin : begin + CLEAR_BATCH])
            pages += [nowhere] * (CLEAR_BATCH - len(pages))
            self._change_caches(pool_steps.clear_pages, _int32(pages))
        for begin in range(0, len(moves.copied), COPY_BATCH):
            copies = list(moves.copied[begin : begin + COPY_BATCH])
            copies += [(0, nowhere, 0)] * (COPY_BATCH - len(copies))
            self._change_caches(pool_steps.copy_pages, *map(_int32, zip(*copies)))
        if moves.loaded:
            self._set_kv(self.host.load(self.pool.kv, moves.loaded))

    def copy_beam_pages(self, pages: Sequence[tuple[int, int]], size: int) -> None:
        """Dispatches copies of whole pages (from, to), at most `size`, which makes a program."""
        padded = [*pages, *[(0, self.cache.num_pages)] * (size - len(pages))]
        self._set_kv(pool_steps.copy_pages(self.pool.kv, *map(_int32, zip(*padded))))

    def measure_host(self) -> TransferCosts:
        """Returns what moving pages to the host and back costs here."""
        costs, kv = self.host.measure(self.pool.kv, self.cache.page_size)
        self._set_kv(kv)
        return costs

    def _set_kv(self, kv: KVCache) -> None:
        self.pool = dataclasses.replace(self.pool, kv=kv)

    def _change_caches(self, change: Callable[..., KVCache], *pages: Any) -> None:
        self._set_kv(change(self.pool.kv, *pages))
        if self.pool.draft_kv is not None:
            draft_kv = change(self.pool.draft_kv, *pages)
            self.pool = dataclasses.replace(self.pool, draft_kv=draft_kv)

    def _reset_row(self, request: Request) -> None:
        setup = pack_row(
            request.params,
            request.prompt_token_ids,
            request.output_token_ids,
            vocab_size=self.vocab_size,
            eos_token_ids=request.eos_token_ids,
            bad_words_token_ids=request.bad_words_token_ids,
        )
        self._set_row(request.row, setup)

    def _set_row(self, row: Any, setup: RowSetup) -> None:
        state = pool_steps.reset_row(self.pool.state, _int32(row), setup)
        self.pool = dataclasses.replace(self.pool, state=state)

    # ------------------------------------------------------------------ launching

    def launch(self, plan: Plan) -> Launched:
        """Dispatches a plan and returns at once."""
        self.move_pages(plan.moves)
        for seq in plan.seqs:
            if seq.is_new_row:
                self._reset_row(seq.request)
        is_loop = plan.is_decode and all(seq.num_samples > 0 for seq in plan.seqs)
        # Every step guesses, so that trees can be made of it; a plain step does not.
        is_loop = is_loop and (plan.is_speculation_paused or not self.packer.is_tree)
        if self.pool.draft_kv is not None:
            self._catch_up(plan, is_fed=not (is_loop or plan.is_speculation_paused))
        if is_loop:
            packed = self.packer.pack_decode(plan)
            out = self._decode(packed.inputs)
        else:
            packed = self.packer.pack_ragged(plan)
            out = self._run_ragged(packed, is_fed=not plan.is_speculation_paused)
        return self._launched(plan, out, packed.prompt_targets)

    def _run_ragged(self, packed: Packed, *, is_fed: bool) -> StepOutput:
        if self.packer.is_tree:
            return self._verify_tree(packed.inputs)
        if packed.max_drafts:
            return self._verify(packed.inputs, packed.max_drafts)
        return self._forward(packed.inputs, is_fed=is_fed)

    def prefill(self, chunk: Chunk) -> None:
        """Computes known tokens of a request that is in no plan, and samples nothing."""
        self._forward(self.packer.pack_chunks([chunk]))

    def _catch_up(self, plan: Plan, *, is_fed: bool) -> None:
        """Feeds a drafter what it missed of the sequences that it is to draft for.

        `is_fed` says whether it will compute what the plan itself computes.
        """
        assert self.drafter is not None and self.drafter.fed is not None
        fed = self.drafter.fed
        fed.note_moves(plan.moves)
        wanted = [(seq.request, seq.start) for seq in plan.seqs if seq.num_drafts]
        for pieces in fed.take_missing(wanted, self.buckets.tokens[-1], self.buckets.seqs[-1]):
            self._feed(self.packer.pack_chunks([Chunk(*piece) for piece in pieces]))
        fed.note_plan(plan, is_fed=is_fed)

    # ------------------------------------------------------------------ steps

    def _feed(self, inputs: StepInputs) -> None:
        """Has a drafter with a KV cache of its own compute a step's tokens, before that step."""
        if self.drafter is None or self.pool.draft_kv is None:
            return
        # The program needs the batch alone.
        _, self.pool = draft_steps.feed_step(
            *(self.drafter.model, self.drafter.params, self.pool, StepInputs(inputs.batch)),
            impl=self.config.attention_impl,
        )

    def _forward(self, inputs: StepInputs, *, is_fed: bool = True) -> StepOutput:
        if is_fed:
            self._feed(inputs)
        out, self.pool = forward.forward_step(
            *(self.model, self.params, self.pool, inputs), impl=self.config.attention_impl
        )
        return out

    def _decode(self, inputs: StepInputs) -> StepOutput:
        out, self.pool = decode.decode_loop(
            *(self.model, self.params, self.pool, inputs),
            max_steps=self.config.num_decode_steps,
            impl=self.config.attention_impl,
        )
        return out

    def _verify(self, inputs: StepInputs, max_drafts: int) -> StepOutput:
        impl = self.config.attention_impl
        if self.drafter is not None:
            both = Weights(self.params, self.drafter.params)
            out, self.pool = draft_steps.draft_step(
                *(self.model, both, self.pool, inputs),
                drafter=self.drafter.model,
                max_drafts=max_drafts,
                impl=impl,
            )
            return out
        out, self.pool = verify.verify_step(
            *(self.model, self.params, self.pool, inputs), max_drafts=max_drafts, impl=impl
        )
        return out

    def _verify_tree(self, inputs: StepInputs) -> StepOutput:
        speculation = self.config.speculation
        assert speculation is not None and inputs.parents is not None
        has_drafts = inputs.parents.shape[0] > 1
        out, self.pool = tree.tree_step(
            *(self.model, Weights(self.params, self._heads), self.pool, inputs),
            max_depth=speculation.max_depth if has_drafts else 0,
            num_ranks=speculation.num_ranks,
            typical=speculation.typical,
            impl=self.config.attention_impl,
        )
        return out

    def continue_beams(self, inputs: StepInputs, *, num_beams: int, k: int) -> tuple[Any, ...]:
        """Dispatches a step of beam search; returns what `best_continuations` does."""
        out, self.pool = beam.beam_step(
            *(self.model, self.params, self.pool, inputs),
            num_beams=num_beams,
            k=k,
            impl=self.config.attention_impl,
        )
        return out

    def _launched(self, plan: Plan, out: StepOutput, prompt_targets: Any) -> Launched:
        """Dispatches what the plan's requests want beside tokens."""
        wanted = {seq.request.params.logprobs for seq in plan.seqs if seq.num_samples}
        prompt_wanted = {
            seq.request.params.prompt_logprobs for seq in plan.seqs if seq.wants_prompt_logprobs
        }
        top = full = prompt_top = prompt_full = None
        if wanted - {None}:
            assert plan.num_steps == 1, "no logits are kept of all steps of a loop"
            top = logprobs.top_logprobs(out.logits, out.tokens, k=self.top_k)
            if -1 in wanted:
                full = logprobs.log_softmax(out.logits)
        if prompt_wanted:
            assert prompt_targets is not None and out.hidden is not None
            prompt_top = logprobs.prompt_logprobs(
                self.model, self.params, out.hidden, prompt_targets, k=self.top_k
            )
            if -1 in prompt_wanted:
                prompt_full = logprobs.prompt_log_softmax(self.model, self.params, out.hidden)
        return Launched(
            plan, out.tokens, out.counts, out.guesses, top, full, prompt_top, prompt_full
        )

    def fetch(self, launched: Launched) -> StepResult:
        """Waits for a step and returns its results."""
        return results.fetch(launched)

    # ------------------------------------------------------------------ warming up

    def warmup(self) -> float:
        """Compiles every program that a plan can need; returns the seconds it took.

        The programs run once with nothing but padding, which leaves pool and state as they were.
        """
        refuse_tracing()
        begin = time.perf_counter()
        self._warm_steps()
        nowhere = self.cache.num_pages
        self.move_pages(PageMoves(cleared=(nowhere,), copied=((0, nowhere, 0),)))
        self._set_kv(self.host.warmup(self.pool.kv))
        setup = pack_row(SamplingParams(), [0], [], vocab_size=self.vocab_size)
        self._set_row(self.config.max_num_seqs, setup)
        jax.block_until_ready(self.pool)
        return time.perf_counter() - begin

    def _warm_steps(self) -> None:
        packer, sizes = self.packer, self.buckets
        may_rest = self.config.speculation is not None and self.config.speculation.adaptive
        for size in sizes.decode:
            if may_rest or not packer.is_tree:
                self._warm_logprobs(self._decode(packer.decode(size)))
            for max_drafts in sizes.drafts:
                self._warm_verification(packer.verification(max_drafts, size), max_drafts)
        for num_tokens in sizes.tokens:
            for size in sizes.seqs:
                if packer.is_tree:
                    out = self._warm_verification(packer.verification(0, size, num_tokens), 0)
                else:
                    if sizes.drafts:
                        most = sizes.drafts[-1]
                        inputs = packer.verification(most, size, num_tokens)
                        self._warm_verification(inputs, most)
                    out = self._forward(packer.ragged(num_tokens, size))
                    self._warm_logprobs(out)
                targets: Any = np.zeros(num_tokens, np.int32)
                assert out.hidden is not None
                logprobs.prompt_logprobs(self.model, self.params, out.hidden, targets, k=self.top_k)
                logprobs.prompt_log_softmax(self.model, self.params, out.hidden)

    def _warm_verification(self, inputs: StepInputs, max_drafts: int) -> StepOutput:
        is_tree = self.packer.is_tree
        out = self._verify_tree(inputs) if is_tree else self._verify(inputs, max_drafts)
        self._warm_logprobs(out)
        return out

    def _warm_logprobs(self, out: StepOutput) -> None:
        logprobs.top_logprobs(out.logits, out.tokens, k=self.top_k)
        logprobs.log_softmax(out.logits)

    def update_weights(self, params: Params) -> None:
        """Serves placed `params` from the next step on, in the formats of the present ones.

        Raises:
          ValueError: their tree, shapes or dtypes differ from the present weights'.
        """
        placement.check_alike(self.params, params)
        params = placement.in_formats(params, self._formats)
        if self.drafter is not None:
            self.drafter.update_weights(params)
        self.params = params
        self._note_weights()

    def check_weights(self) -> None:
        """Raises ValueError, naming it, if a weight was donated or deleted since it came."""
        placement.check_alive(self._weights)

    def _note_weights(self) -> None:
        drafts = None if self.drafter is None else self.drafter.params
        trees = (self.params, drafts)
        flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
        self._weights = [pair for pairs in flat for pair in pairs]


def _int32(value: Any) -> Any:
    return np.asarray(value, np.int32)
