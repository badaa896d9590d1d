"""The model that drafts inside the steps of another: its weights, and what it has been fed."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jinfer.config.cache import CacheConfig
from jinfer.config.model import ModelConfig
from jinfer.config.typing import Params
from jinfer.engine.drafting.fed_pages import FedPages
from jinfer.kv import cache as kv_cache
from jinfer.kv.cache import KVCache
from jinfer.linear.weight import array_bytes
from jinfer.models.model import Model
from pallas_kernels.target import Target


class Drafter:
    """A model that drafts.

    Args:
      model: of the target's vocabulary.
      params: its weights, placed.
      follow: makes its weights of new ones of the target, whose KV cache it then shares; None: it
        is another model, with a KV cache of its own.
    """

    def __init__(
        self, model: Model, params: Params, follow: Callable[[Params], Params] | None = None
    ) -> None:
        self.model = model
        self.params = params
        self._follow = follow
        self.fed: FedPages | None = None  # what its own KV cache holds

    @property
    def has_own_kv(self) -> bool:
        """Whether it has a KV cache of its own, so that every step must be fed to it, too."""
        return self._follow is None

    @property
    def own_kv_config(self) -> ModelConfig | None:
        """The model that its own KV cache is for, if it has one."""
        return self.model.config if self.has_own_kv else None

    def num_weight_bytes(self, target: Params) -> int:
        """Bytes of its weights beside the target's, with which it may share some."""
        shared = {id(leaf) for leaf in jax.tree.leaves(target)}
        leaves = jax.tree.leaves(self.params)
        return sum(array_bytes(leaf) for leaf in leaves if id(leaf) not in shared)

    def make_kv(self, cache: CacheConfig, target: Target) -> KVCache | None:
        """Returns an empty KV cache of its own, of which nothing is fed; None if it has none."""
        if not self.has_own_kv:
            return None
        self.fed = FedPages(cache.num_pages, cache.page_size)
        return kv_cache.init(self.model.config, cache, target)

    def update_weights(self, params: Params) -> None:
        """Follows the target's new weights, if it is made of them."""
        if self._follow is not None:
            self.params = self._follow(params)
