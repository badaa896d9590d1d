"""The table of every program that an engine can need.

Warming up, `explain_kernels` and `scripts/compile_kernels.py --model-step` are made from it. A
program is a jitted function with the shapes of its arguments; nothing here holds or makes arrays.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jinfer.config.cache import CacheConfig
from jinfer.config.engine import EngineConfig
from jinfer.config.sampling_params import SamplingParams
from jinfer.engine.device import host_pages
from jinfer.engine.device.calls import Call, Calls
from jinfer.engine.device.packing import Packer
from jinfer.kv import cache as kv_cache
from jinfer.models.model import Model
from jinfer.sampling.state import init_state, pack_row
from jinfer.steps import logprobs
from jinfer.steps import pool as pool_steps
from jinfer.steps.blocks import StepOutput
from jinfer.steps.inputs import Pool, StepInputs, Weights
from pallas_kernels.target import Target

CLEAR_BATCH = 16  # pages that one program clears; fewer are padded
COPY_BATCH = 4  # likewise copies, through a buffer of so many pages
MAX_THREADS = 8  # that compile at a time
SAMPLING = ("decode", "forward", "verify", "tree", "prefill verify", "prefill tree")


class Program(NamedTuple):
    """One program: `fn(*args, **static)`.

    Attributes:
      kind: what it does: those in SAMPLING, "feed" and "beams" are steps.
      sizes: the padded sizes that tell it from others of its kind, for people to read.
      fn: a jitted function.
      args: its arguments; arrays are `jax.ShapeDtypeStruct`s.
      static: its other static arguments.
    """

    kind: str
    sizes: str
    fn: Any
    args: tuple[Any, ...]
    static: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its kind and its sizes."""
        return f"{self.kind} {self.sizes}".rstrip()

    @property
    def key(self) -> Any:
        """Equal for programs of equal functions, shapes and static choices."""
        leaves, structure = jax.tree.flatten(self.args)
        shapes = tuple((x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves)
        return self.fn, structure, shapes, tuple(self.static.items())


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """What the programs of an engine depend on.

    Attributes:
      model, config, cache: of the engine.
      weights: of model and drafter, arrays or their shapes.
      drafter: the model that drafts, if there is one.
      has_draft_kv: whether it has a KV cache of its own.
      target: the chip that KV caches are laid out for; None: the current one.
      device: where all arrays lie; None: nothing is said about it.
    """

    model: Model
    config: EngineConfig
    cache: CacheConfig
    weights: Weights
    drafter: Model | None = None
    has_draft_kv: bool = False
    target: Target | None = None
    device: Any = None

    @property
    def top_k(self) -> int:
        """How many likeliest tokens the programs of logprobs return."""
        return min(self.config.max_logprobs, self.model.config.vocab_size)


class BeamSizes(NamedTuple):
    """The sizes of one kind of beam search.

    Attributes:
      num_beams: beams of a search.
      num_candidates: continuations of a search that the host sees.
      num_searches: the numbers of searches that a step is padded to.
    """

    num_beams: int
    num_candidates: int
    num_searches: tuple[int, ...]


def programs(spec: EngineSpec, beams: BeamSizes | None = None) -> tuple[Program, ...]:
    """Returns every program that an engine can need, each once.

    Args:
      spec: the engine.
      beams: adds what searches of these sizes need.
    """
    table = _Table(spec)
    steps = list(table.steps())
    rows = itertools.chain(steps, table.logprobs(steps), table.pages())
    if beams is not None:
        rows = itertools.chain(rows, table.beams(beams))
    return tuple({program.key: program for program in rows}.values())


def largest_steps(spec: EngineSpec) -> tuple[Program, ...]:
    """Returns of each kind of step the largest program; nothing is traced."""
    return tuple({step.kind: step for step in _Table(spec).steps()}.values())


def compile_all(table: Iterable[Program]) -> None:
    """Compiles programs in several threads, so that calling their functions compiles nothing.

    They are traced and lowered here: Python does one at a time, and JAX's contexts of this thread
    (default matmul precision, `use_impl` and the like) are part of what a program is.
    """
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        lowered = (program.fn.lower(*program.args, **program.static) for program in table)
        for done in [pool.submit(one.compile) for one in lowered]:
            done.result()


class _Table:
    """Makes the rows of the table; arrays of the engine have a device, packed ones have none."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.packer = Packer(spec.config, spec.cache, spec.model.config.vocab_size)
        self.calls = Calls(spec.model, spec.config, spec.drafter)
        self.weights = jax.tree.map(_of_weight, spec.weights)
        vocab_size, num_rows = spec.model.config.vocab_size, spec.config.max_num_seqs

        def make_pool() -> Pool:
            draft_kv = None
            if spec.has_draft_kv:
                assert spec.drafter is not None
                draft_kv = kv_cache.init(spec.drafter.config, spec.cache, spec.target)
            kv = kv_cache.init(spec.model.config, spec.cache, spec.target)
            return Pool(kv, init_state(num_rows, vocab_size), draft_kv)

        self.pool = self._on_device(jax.eval_shape(make_pool))

    def _on_device(self, tree: Any) -> Any:
        """Returns the shapes of arrays that lie on the engine's device."""
        if self.spec.device is None:
            return tree
        sharding = jax.sharding.SingleDeviceSharding(self.spec.device)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    # ------------------------------------------------------------------ steps

    def steps(self) -> Iterator[Program]:
        """Yields the steps of plans."""
        packer, sizes, config = self.packer, self.packer.buckets, self.spec.config
        may_pause = config.speculation is not None and config.speculation.adaptive
        for num_seqs in sizes.decode:
            if may_pause or not packer.is_tree:
                inputs = packer.decode(num_seqs)
                yield self._step("decode", f"S={num_seqs}", self.calls.decode(), inputs)
            for max_drafts in sizes.drafts:
                yield self._verification(f"S={num_seqs}", max_drafts, num_seqs)
        for num_tokens, num_seqs in itertools.product(sizes.tokens, sizes.seqs):
            shape = f"T={num_tokens} S={num_seqs}"
            if packer.is_tree:
                yield self._verification(shape, 0, num_seqs, num_tokens)
                continue
            # Beside a chunk of a prompt there is a second sequence, whose drafts are verified.
            if sizes.drafts and num_seqs > 1:
                yield self._verification(shape, sizes.drafts[-1], num_seqs, num_tokens)
            yield from self._forward(num_tokens, num_seqs)

    def _forward(self, num_tokens: int, num_seqs: int) -> Iterator[Program]:
        shape, inputs = f"T={num_tokens} S={num_seqs}", self.packer.ragged(num_tokens, num_seqs)
        if self.pool.draft_kv is not None:
            yield self._step("feed", shape, self.calls.feed(), StepInputs(inputs.batch))
        yield self._step("forward", shape, self.calls.forward(), inputs)

    def _verification(
        self, shape: str, max_drafts: int, num_seqs: int, num_tokens: int | None = None
    ) -> Program:
        inputs = self.packer.verification(max_drafts, num_seqs, num_tokens)
        is_tree, calls = self.packer.is_tree, self.calls
        call = calls.tree(max_drafts) if is_tree else calls.verify(max_drafts)
        kind = "tree" if is_tree else "verify"
        kind = kind if num_tokens is None else f"prefill {kind}"
        return self._step(kind, f"{shape} drafts={max_drafts}", call, inputs)

    def _step(self, kind: str, shape: str, call: Call, inputs: StepInputs) -> Program:
        shapes: StepInputs = jax.tree.map(_of_packed, inputs)
        masks = self._on_device(shapes.token_mask)
        shapes = dataclasses.replace(shapes, token_mask=masks)
        args = (call.model, call.pick(self.weights), self.pool, shapes)
        return Program(kind, shape, call.fn, args, call.static)

    def logprobs(self, steps: Iterable[Program]) -> Iterator[Program]:
        """Yields the programs of logprobs of what steps return."""
        k, model, params = self.spec.top_k, self.spec.model, self.weights.target
        for step in steps:
            if step.kind not in SAMPLING:
                continue
            out, _ = step.fn.eval_shape(*step.args, **step.static)
            out: StepOutput = self._on_device(out)
            shape = "x".join(map(str, out.logits.shape))
            args = (out.logits, out.tokens)
            yield Program("logprobs", shape, logprobs.top_logprobs, args, {"k": k})
            yield Program("all logprobs", shape, logprobs.log_softmax, args[:1], {})
            if out.hidden is None or out.hidden.shape[0] not in self.packer.buckets.tokens:
                continue
            num_tokens = out.hidden.shape[0]
            targets = jax.ShapeDtypeStruct((num_tokens,), np.int32)
            args, fn = (model, params, out.hidden), logprobs.prompt_logprobs
            shape = f"T={num_tokens}"
            yield Program("prompt logprobs", shape, fn, (*args, targets), {"k": k})
            yield Program("all prompt logprobs", shape, logprobs.prompt_log_softmax, args, {})

    # ------------------------------------------------------------------ pages and rows

    def pages(self) -> Iterator[Program]:
        """Yields what changes pages of the KV caches and rows of the sampler's state."""
        ids, copied = (jax.ShapeDtypeStruct((n,), np.int32) for n in (CLEAR_BATCH, COPY_BATCH))
        for kv in filter(None, (self.pool.kv, self.pool.draft_kv)):
            yield Program("clear pages", "", pool_steps.clear_pages, (kv, ids), {})
            yield Program("copy pages", "", pool_steps.copy_pages, (kv, *[copied] * 3), {})
        for size in host_pages.SIZES if self.spec.config.num_host_pages else ():
            kv, ids = self.pool.kv, jax.ShapeDtypeStruct((size,), np.int32)
            contents = jax.eval_shape(pool_steps.read_pages, kv, ids)
            contents = self._on_device(list(contents))
            yield Program("read pages", f"N={size}", pool_steps.read_pages, (kv, ids), {})
            args = (kv, contents, ids)
            yield Program("write pages", f"N={size}", pool_steps.write_pages, args, {})
        setup = pack_row(SamplingParams(), [0], [], vocab_size=self.spec.model.config.vocab_size)
        row = jax.ShapeDtypeStruct((), np.int32)
        args = (self.pool.state, row, jax.tree.map(_of_packed, setup))
        yield Program("reset row", "", pool_steps.reset_row, args, {})

    # ------------------------------------------------------------------ beams

    def beams(self, sizes: BeamSizes) -> Iterator[Program]:
        """Yields what beam searches need: their step, copies of pages, and prompts."""
        call = self.calls.beams(sizes.num_beams, sizes.num_candidates)
        for num_searches in sizes.num_searches:
            size = num_searches * sizes.num_beams
            yield self._step("beams", f"S={size}", call, self.packer.beams(size))
            ids = jax.ShapeDtypeStruct((size,), np.int32)
            args = (self.pool.kv, ids, ids)
            yield Program("copy beams", f"N={size}", pool_steps.copy_pages, args, {})
        for num_tokens in self.packer.buckets.tokens:  # of prompts
            yield from self._forward(num_tokens, self.packer.buckets.seqs[0])


def _of_weight(x: Any) -> Any:
    """The shape of a weight, in the layout that it has on the device."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.format)


def _of_packed(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
