"""Turns a plan into one jitted step on the device and its results back into Python values.

The runner owns the device: weights, KV pool, sampler state. It decides nothing about requests.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jinfer.config.cache import CacheConfig
from jinfer.config.engine import EngineConfig
from jinfer.config.sampling_params import SamplingParams
from jinfer.config.typing import Params
from jinfer.engine.device import buckets, results
from jinfer.engine.device import packing as ragged_batch
from jinfer.engine.device import tree_packing as tree_batch
from jinfer.engine.device.drafter import Drafter
from jinfer.engine.device.host_pages import HostPages
from jinfer.engine.device.results import Launched, StepResult
from jinfer.engine.plan import PageMoves, Plan
from jinfer.engine.request import Request
from jinfer.kv import cache as kv_cache
from jinfer.kv.cache import KVCache
from jinfer.linear import layouts as formats
from jinfer.linear import prepared as qkernels
from jinfer.models.model import Model
from jinfer.sampling.args import ArgRow, SampleArgs, arg_row, pack_args
from jinfer.sampling.state import init_state, pack_row
from jinfer.steps import blocks, decode, logprobs, pool, verify
from jinfer.steps import forward as steps
from jinfer.steps import params as weights
from jinfer.steps import tree as tree_steps
from jinfer.steps.batch import DecodeBatch, StepBatch
from jinfer.steps.tracing import refuse_tracing

logger = logging.getLogger(__name__)

CLEAR_BATCH = 16  # pages that one program clears; fewer are padded
COPY_BATCH = 4  # likewise copies, through a buffer of so many pages


class Runner:
    """Executes plans on the default device.

    Args:
      model: the model.
      params: its weights; used as they are, no copy, but for numpy's arrays and for quantized
        ones where kernels want them laid out anew. All lies on the device of the first.
      cache: size of the KV pool.
      config: engine limits.
      heads: Medusa heads, if `config.speculation` is with them.
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
        self.device = weights.device_of(params)
        params = qkernels.prepare_params(params, impl=config.linear_impl)
        self.params = weights.bind(params, self.device)
        self._formats = formats.of(self.params)
        self.cache = cache
        self.config = config
        self.drafter = drafter
        if drafter is not None:
            drafter.params = weights.bind(drafter.params, self.device)
        self._note_weights()
        self._own_kv = drafter is not None and drafter.has_own_kv
        self.buckets = buckets.Buckets.of(config)
        self.max_pages = -(-config.max_model_len // cache.page_size)
        self.vocab_size = model.config.vocab_size
        self.top_k = min(config.max_logprobs, self.vocab_size)
        self._num_rows = config.max_num_seqs
        self._heads = None if heads is None else weights.bind(heads, self.device)
        self._is_tree = config.speculation is not None and config.speculation.is_tree
        self._arg_rows: weakref.WeakKeyDictionary[Request, ArgRow] = weakref.WeakKeyDictionary()
        self.reset()

    def reset(self) -> None:
        """Makes empty pools and an empty sampler state; the old ones go first."""
        self.__dict__.pop("kv", None)
        self.__dict__.pop("state", None)
        if self.drafter is not None:
            self.drafter.reset(self.cache)
        self.kv = kv_cache.init(self.model.config, self.cache)
        self.state = init_state(self._num_rows, self.vocab_size)
        self.host = HostPages(self.config.num_host_pages, self.device)
        self.kv, self.state = weights.bind((self.kv, self.state), self.device)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pools, scales included."""
        pools = self.kv, None if self.drafter is None else self.drafter.kv
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pools))

    # ------------------------------------------------------------------ launching

    def launch(self, plan: Plan) -> Launched:
        """Dispatches a plan and returns at once."""
        self.move_pages(plan.moves)
        for seq in plan.seqs:
            if seq.is_new_row:
                self._reset_row(seq.request)
        is_decode = plan.is_decode and all(seq.num_samples > 0 for seq in plan.seqs)
        # Trees are grown from what every step guesses; what a drafter misses it can be fed later.
        is_decode = is_decode and (plan.is_resting or not self._is_tree)
        if self._own_kv:
            self._catch_up(plan, is_fed=not (is_decode or plan.is_resting))
        return self._launch_decode(plan) if is_decode else self._launch_ragged(plan)

    def move_pages(self, moves: PageMoves) -> None:
        """Dispatches what is to be done with whole pages before a step."""
        nowhere = self.cache.num_pages
        if moves.saved:
            self.host.save(self.kv, moves.saved)
        for begin in range(0, len(moves.cleared), CLEAR_BATCH):
            pages = list(moves.cleared[begin : begin + CLEAR_BATCH])
            pages += [nowhere] * (CLEAR_BATCH - len(pages))
            self._change_pools(pool.clear_pages, _int32(pages))
        for begin in range(0, len(moves.copied), COPY_BATCH):
            copies = list(moves.copied[begin : begin + COPY_BATCH])
            copies += [(0, nowhere, 0)] * (COPY_BATCH - len(copies))
            self._change_pools(pool.copy_pages, *map(_int32, zip(*copies)))
        if moves.loaded:
            self.kv = self.host.load(self.kv, moves.loaded)

    def _change_pools(self, change: Callable[..., KVCache], *pages: Any) -> None:
        self.kv = change(self.kv, *pages)
        if self.drafter is not None and self.drafter.kv is not None:
            self.drafter.kv = change(self.drafter.kv, *pages)

    def _reset_row(self, request: Request) -> None:
        setup = pack_row(
            request.params,
            request.prompt_token_ids,
            request.output_token_ids,
            vocab_size=self.vocab_size,
            eos_token_ids=request.eos_token_ids,
            bad_words_token_ids=request.bad_words_token_ids,
        )
        self.state = pool.reset_row(self.state, _int32(request.row), setup)

    def _args(self, plan: Plan, size: int) -> SampleArgs:
        return pack_args([self._arg_row(seq.request) for seq in plan.seqs], size)

    def _arg_row(self, request: Request) -> ArgRow:
        row = self._arg_rows.get(request)
        if row is None:
            row = arg_row(request.params, seed=request.seed, prompt_len=request.num_prompt_tokens)
            self._arg_rows[request] = row
        return row

    def _launch_decode(self, plan: Plan) -> Launched:
        size = buckets.fit(self.buckets.decode, len(plan.seqs))
        batch = self.decode_padding(size)
        for s, seq in enumerate(plan.seqs):
            ragged_batch.put_request(batch, s, seq.request)
            batch.positions[s] = seq.start
            batch.limits[s] = seq.num_samples
            batch.tokens[s] = ragged_batch.known_tokens(seq.request, seq.start, 1)[0]
        out = self._decode(batch, self._args(plan, size), plan.num_steps)
        return self._launched(plan, out, prompt_targets=None)

    def _launch_ragged(self, plan: Plan) -> Launched:
        is_prefill = any(seq.is_prefill for seq in plan.seqs)
        max_drafts = buckets.fit(self.buckets.drafts, plan.max_drafts) if plan.max_drafts else 0
        # A step that only guesses anew, with no tree to verify, runs as a short prefill.
        if not is_prefill and max_drafts:
            size = buckets.fit(self.buckets.decode, len(plan.seqs))
            batch = self._verify_padding(size, max_drafts)
        else:
            max_drafts = self.buckets.drafts[-1] if max_drafts else 0
            num_tokens = buckets.fit(self.buckets.tokens, plan.num_tokens)
            size = buckets.fit(self.buckets.seqs, len(plan.seqs))
            batch = self.ragged_padding(num_tokens, size)
        sampled, num_drafts, targets = ragged_batch.fill(plan, batch, self.cache.page_size)
        args = self._args(plan, size)
        if self._is_tree:
            parents = tree_batch.fill(plan, batch, max_drafts)
            out = self._verify_tree(batch, args, sampled, num_drafts, parents)
        elif max_drafts:
            out = self._verify(batch, args, sampled, num_drafts, max_drafts)
        else:
            out = self._forward(batch, args, sampled, is_fed=not plan.is_resting)
        return self._launched(plan, out, prompt_targets=targets)

    def _verify_padding(self, size: int, max_drafts: int) -> StepBatch:
        width = max_drafts + 1
        batch = self.ragged_padding(size * width, size, width)
        return tree_batch.with_mask(batch) if self._is_tree else batch

    def ragged_padding(self, num_tokens: int, size: int, max_q_len: int | None = None) -> StepBatch:
        """Returns the batch of a bucket with nothing in it."""
        return StepBatch.padding(
            num_tokens,
            size,
            max_pages=self.max_pages,
            num_slots=self.cache.num_slots,
            num_rows=self._num_rows,
            max_q_len=max_q_len,
        )

    def decode_padding(self, size: int) -> DecodeBatch:
        """Returns the batch of a bucket with nothing in it."""
        return DecodeBatch.padding(size, max_pages=self.max_pages, num_rows=self._num_rows)

    def feed_drafter(self, batch: StepBatch) -> None:
        """Has a drafter with a pool of its own compute a step's tokens, too, before that step."""
        if self.drafter is not None:
            self.drafter.feed(self.state, batch, self.config.attention_impl)

    def _catch_up(self, plan: Plan, *, is_fed: bool) -> None:
        """Feeds a drafter what it missed of the sequences that it is to draft for.

        `is_fed` says whether it will compute what the plan itself computes.
        """
        assert self.drafter is not None and self.drafter.fed is not None
        fed = self.drafter.fed
        fed.note_moves(plan.moves)
        wanted = [(seq.request, seq.start) for seq in plan.seqs if seq.num_drafts]
        sizes = self.buckets.tokens, self.buckets.seqs
        for pieces in fed.take_missing(wanted, sizes[0][-1], sizes[1][-1]):
            num_tokens = buckets.fit(sizes[0], sum(count for _, _, count in pieces))
            batch = self.ragged_padding(num_tokens, buckets.fit(sizes[1], len(pieces)))
            begin = 0
            for s, (request, start, count) in enumerate(pieces):
                tokens = ragged_batch.known_tokens(request, start, count)
                ragged_batch.put_request(batch, s, request)
                ragged_batch.put_tokens(batch, s, begin, start, tokens, self.cache.page_size)
                begin += count
            self.feed_drafter(batch)
        fed.note_plan(plan, is_fed=is_fed)

    def _forward(
        self, batch: StepBatch, args: SampleArgs, sampled: Any, *, is_fed: bool = True
    ) -> blocks.StepOutput:
        if is_fed:
            self.feed_drafter(batch)
        out, self.kv, self.state = steps.forward_step(
            self.model,
            self.params,
            self.kv,
            self.state,
            batch,
            args,
            sampled,
            impl=self.config.attention_impl,
        )
        return out

    def _verify(
        self, batch: StepBatch, args: SampleArgs, sampled: Any, num_drafts: Any, max_drafts: int
    ) -> blocks.StepOutput:
        if self.drafter is not None:
            out, self.kv, self.state = self.drafter.draft_and_verify(
                *(self.model, self.params, self.kv, self.state, batch, args, sampled, num_drafts),
                max_drafts=max_drafts,
                impl=self.config.attention_impl,
            )
            return out
        out, self.kv, self.state = verify.verify_step(
            self.model,
            self.params,
            self.kv,
            self.state,
            batch,
            args,
            sampled,
            num_drafts,
            max_drafts=max_drafts,
            impl=self.config.attention_impl,
        )
        return out

    def _verify_tree(
        self, batch: StepBatch, args: SampleArgs, sampled: Any, num_drafts: Any, parents: Any
    ) -> blocks.StepOutput:
        speculation = self.config.speculation
        assert speculation is not None
        max_drafts = parents.shape[0] - 1
        out, self.kv, self.state = tree_steps.tree_step(
            self.model,
            self.params,
            self.kv,
            self.state,
            batch,
            args,
            sampled,
            num_drafts,
            parents,
            self._heads,
            max_drafts=max_drafts,
            max_depth=speculation.max_depth if max_drafts else 0,
            num_ranks=speculation.num_ranks,
            typical=speculation.typical,
            impl=self.config.attention_impl,
        )
        return out

    def _decode(self, batch: DecodeBatch, args: SampleArgs, num_steps: int) -> blocks.StepOutput:
        out, self.kv, self.state = decode.decode_loop(
            self.model,
            self.params,
            self.kv,
            self.state,
            batch,
            args,
            _int32(num_steps),
            max_steps=self.config.num_decode_steps,
            impl=self.config.attention_impl,
        )
        return out

    def _launched(self, plan: Plan, out: blocks.StepOutput, prompt_targets: Any) -> Launched:
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
        may_rest = self.config.speculation is not None and self.config.speculation.adaptive
        for size in self.buckets.decode:
            args = pack_args([], size)
            if may_rest or not self._is_tree:
                self._warm_logprobs(self._decode(self.decode_padding(size), args, 1))
            if self._is_tree:
                max_drafts = self.buckets.drafts[-1]
                self._warm_tree(self._verify_padding(size, max_drafts), max_drafts)
                continue
            for max_drafts in self.buckets.drafts:
                self._warm_verification(self._verify_padding(size, max_drafts), max_drafts)
        for num_tokens in self.buckets.tokens:
            for size in self.buckets.seqs:
                batch = self.ragged_padding(num_tokens, size)
                if self._is_tree:
                    out = self._warm_tree(batch, 0)
                else:
                    if self.buckets.drafts:
                        self._warm_verification(batch, self.buckets.drafts[-1])
                    sampled = np.zeros(size, np.bool_)
                    out = self._forward(batch, pack_args([], size), sampled)
                    self._warm_logprobs(out)
                targets: Any = np.zeros(num_tokens, np.int32)
                assert out.hidden is not None
                logprobs.prompt_logprobs(self.model, self.params, out.hidden, targets, k=self.top_k)
                logprobs.prompt_log_softmax(self.model, self.params, out.hidden)
        nowhere = self.cache.num_pages
        self.move_pages(PageMoves(cleared=(nowhere,), copied=((0, nowhere, 0),)))
        self.kv = self.host.warmup(self.kv)
        setup = pack_row(SamplingParams(), [0], [], vocab_size=self.vocab_size)
        self.state = pool.reset_row(self.state, _int32(self._num_rows), setup)
        jax.block_until_ready((self.kv, self.state))
        return time.perf_counter() - begin

    def _warm_verification(self, batch: StepBatch, max_drafts: int) -> None:
        size = batch.rows.shape[0]
        none, zero = np.zeros(size, np.bool_), np.zeros(size, np.int32)
        self._warm_logprobs(self._verify(batch, pack_args([], size), none, zero, max_drafts))

    def _warm_tree(self, batch: StepBatch, max_drafts: int) -> blocks.StepOutput:
        size = batch.rows.shape[0]
        none, zero = np.zeros(size, np.bool_), np.zeros(size, np.int32)
        parents = np.full((max_drafts + 1, size), -1, np.int32)
        out = self._verify_tree(batch, pack_args([], size), none, zero, parents)
        self._warm_logprobs(out)
        return out

    def _warm_logprobs(self, out: blocks.StepOutput) -> None:
        logprobs.top_logprobs(out.logits, out.tokens, k=self.top_k)
        logprobs.log_softmax(out.logits)

    def update_weights(self, params: Params) -> None:
        """Serves `params` from the next step on, laid out like the present ones.

        Raises:
          ValueError: their tree, shapes or dtypes differ from the present weights', or an array
            was donated or deleted.
        """
        params = weights.bind(params, self.device)
        params = qkernels.prepare_params(params, impl=self.config.linear_impl)
        weights.check_alike(self.params, params)
        params = formats.like(params, self._formats)
        if self.drafter is not None:
            self.drafter.update_weights(params)
        self.params = params
        self._note_weights()

    def check_weights(self) -> None:
        """Raises ValueError, naming it, if a weight was donated or deleted since it came."""
        weights.check_alive(self._weights)

    def _note_weights(self) -> None:
        drafts = None if self.drafter is None else self.drafter.params
        trees = (self.params, drafts)
        flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
        self._weights = [pair for pairs in flat for pair in pairs]


def _int32(value: Any) -> Any:
    return np.asarray(value, np.int32)
