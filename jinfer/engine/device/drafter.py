"""The model that drafts inside the steps of another: weights and, if it has one, its KV pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jinfer.config.cache import CacheConfig
from jinfer.config.model import ModelConfig
from jinfer.config.typing import Params
from jinfer.engine.drafting.fed_pages import FedPages
from jinfer.kv import cache as kv_cache
from jinfer.kv.cache import KVCache
from jinfer.linear.weight import array_bytes
from jinfer.models.model import Model
from jinfer.sampling.args import SampleArgs
from jinfer.sampling.state import SamplerState
from jinfer.steps import draft as draft_steps
from jinfer.steps import params as weights
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import StepOutput


class Drafter:
    """A model that drafts.

    Args:
      model: of the target's vocabulary.
      params: its weights, laid out as the device wants them.
      follow: makes its weights of new ones of the target, whose KV pool it then shares; None: a
        model of its own, with a pool of its own.
    """

    def __init__(
        self, model: Model, params: Params, follow: Callable[[Params], Params] | None = None
    ) -> None:
        self.model = model
        self.params = params
        self._follow = follow
        self.kv: KVCache | None = None
        self.fed: FedPages | None = None  # of its own pool

    @property
    def has_own_kv(self) -> bool:
        """Whether every step must be fed to it, too."""
        return self._follow is None

    @property
    def own_kv_config(self) -> ModelConfig | None:
        """The model that its own pool is for, if it has one."""
        return self.model.config if self.has_own_kv else None

    def num_weight_bytes(self, target: Params) -> int:
        """Bytes of its weights beside the target's, with which it may share some."""
        shared = {id(leaf) for leaf in jax.tree.leaves(target)}
        leaves = jax.tree.leaves(self.params)
        return sum(array_bytes(leaf) for leaf in leaves if id(leaf) not in shared)

    def reset(self, cache: CacheConfig) -> None:
        """Makes an empty pool, if it has its own; the old one goes first."""
        self.kv = None
        if self.has_own_kv:
            device = weights.device_of(self.params)
            self.kv = weights.bind(kv_cache.init(self.model.config, cache), device)
            self.fed = FedPages(cache.num_pages, cache.page_size)

    def update_weights(self, params: Params) -> None:
        """Follows the target's new weights, if it is made of them."""
        if self._follow is not None:
            self.params = self._follow(params)

    def feed(self, state: SamplerState, batch: StepBatch, impl: str) -> None:
        """Computes a step's tokens in its own pool, if it has one, before that step."""
        if self.kv is not None:
            self.kv = draft_steps.feed_step(
                self.model, self.params, self.kv, state, batch, impl=impl
            )

    def draft_and_verify(
        self,
        model: Model,
        params: Params,
        kv: KVCache,
        state: SamplerState,
        batch: StepBatch,
        args: SampleArgs,
        sampled: Any,
        num_drafts: Any,
        *,
        max_drafts: int,
        impl: str,
    ) -> tuple[StepOutput, KVCache, SamplerState]:
        """Dispatches `draft_steps.draft_step`; returns what `steps.verify_step` does."""
        out, kv, self.kv, state = draft_steps.draft_step(
            *(model, params, kv, self.model, self.params, self.kv, state, batch, args, sampled),
            num_drafts,
            max_drafts=max_drafts,
            impl=impl,
        )
        return out, kv, state
