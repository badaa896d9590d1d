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
from jinfer.config.typing import Params
from jinfer.engine.device import programs, results
from jinfer.engine.device.buckets import Buckets
from jinfer.engine.device.calls import Call, Calls
from jinfer.engine.device.drafter import Drafter
from jinfer.engine.device.host_pages import HostPages
from jinfer.engine.device.packing import Chunk, Packed, Packer
from jinfer.engine.device.programs import (
    CLEAR_BATCH,
    COPY_BATCH,
    BeamSizes,
    EngineSpec,
    Program,
)
from jinfer.engine.device.results import Launched, StepResult
from jinfer.engine.pages.costs import TransferCosts
from jinfer.engine.plan import PageMoves, Plan
from jinfer.engine.request import Request
from jinfer.engine.token_masks import has_masks
from jinfer.kv import cache as kv_cache
from jinfer.kv.cache import KVCache
from jinfer.linear import placement
from jinfer.linear.placement import Placement
from jinfer.models.model import Model
from jinfer.sampling.state import init_state, pack_row
from jinfer.steps import logprobs
from jinfer.steps import pool as pool_steps
from jinfer.steps.blocks import StepOutput
from jinfer.steps.inputs import Pool, StepInputs, Weights
from jinfer.steps.tracing import refuse_tracing

logger = logging.getLogger(__name__)


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
        self.packer = Packer(config, cache, model.config.vocab_size)
        self._calls = Calls(model, config, None if drafter is None else drafter.model)
        self.vocab_size = model.config.vocab_size
        self.top_k = min(config.max_logprobs, self.vocab_size)
        self._heads = heads
        self._no_masks: dict[tuple[int, ...], jax.Array] = {}  # of each shape, on the device
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
        state = pool_steps.reset_row(self.pool.state, _int32(request.row), setup)
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
            return self.verify_tree(packed.inputs, packed.max_drafts)
        if packed.max_drafts:
            return self.verify(packed.inputs, packed.max_drafts)
        return self.forward(packed.inputs, is_fed=is_fed)

    def prefill(self, chunk: Chunk) -> None:
        """Computes known tokens of a request that is in no plan, and samples nothing."""
        self.forward(self.packer.pack_chunks([chunk]))

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

    def _run(self, call: Call, inputs: StepInputs) -> Any:
        if inputs.token_mask is not None:
            inputs = dataclasses.replace(inputs, token_mask=self._place_masks(inputs.token_mask))
        output, self.pool = call(self._weights, self.pool, inputs)
        return output

    def _place_masks(self, masks: Any) -> jax.Array:
        """Returns masks on the device; those that allow all tokens are there already."""
        if has_masks(masks):
            return self.placement.bind(masks)
        if masks.shape not in self._no_masks:
            self._no_masks[masks.shape] = self.placement.bind(masks)
        return self._no_masks[masks.shape]

    def _feed(self, inputs: StepInputs) -> None:
        """Has a drafter with a KV cache of its own compute a step's tokens, before that step."""
        if self.pool.draft_kv is not None:
            self._run(self._calls.feed(), StepInputs(inputs.batch))

    def forward(self, inputs: StepInputs, *, is_fed: bool = True) -> StepOutput:
        """Dispatches a step over a ragged batch; `is_fed`: a draft model computes it, too."""
        if is_fed:
            self._feed(inputs)
        return self._run(self._calls.forward(), inputs)

    def _decode(self, inputs: StepInputs) -> StepOutput:
        return self._run(self._calls.decode(), inputs)

    def verify(self, inputs: StepInputs, max_drafts: int) -> StepOutput:
        """Dispatches a step that verifies chains of drafts."""
        return self._run(self._calls.verify(max_drafts), inputs)

    def verify_tree(self, inputs: StepInputs, max_drafts: int) -> StepOutput:
        """Dispatches a step that verifies trees of drafts."""
        return self._run(self._calls.tree(max_drafts), inputs)

    def continue_beams(self, inputs: StepInputs, *, num_beams: int, k: int) -> tuple[Any, ...]:
        """Dispatches a step of beam search; returns what `best_continuations` does."""
        return self._run(self._calls.beams(num_beams, k), inputs)

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

    def programs(self, beams: BeamSizes | None = None) -> tuple[Program, ...]:
        """Returns every program that requests, and beam searches of some sizes, can need."""
        return programs.programs(self.spec, beams)

    @property
    def spec(self) -> EngineSpec:
        """What its programs depend on."""
        drafter = self.drafter
        return EngineSpec(
            *(self.model, self.config, self.cache, self._weights),
            drafter=None if drafter is None else drafter.model,
            has_draft_kv=drafter is not None and drafter.has_own_kv,
            target=self.placement.target,
            device=self.placement.device,
        )

    def warmup(self) -> float:
        """Compiles every program that a plan can need; returns the seconds it took."""
        refuse_tracing()
        begin = time.perf_counter()
        programs.compile_all(self.programs())
        return time.perf_counter() - begin

    # ------------------------------------------------------------------ weights

    @property
    def _weights(self) -> Weights:
        drafter = self._heads if self.drafter is None else self.drafter.params
        return Weights(self.params, drafter)

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
        placement.check_alive(self._served)

    def _note_weights(self) -> None:
        drafts = None if self.drafter is None else self.drafter.params
        trees = (self.params, drafts)
        flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
        self._served = [pair for pairs in flat for pair in pairs]


def _int32(value: Any) -> Any:
    return np.asarray(value, np.int32)
