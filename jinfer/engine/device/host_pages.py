"""The content of pages in host memory: copied there and back on the device's own stream.

A slot holds one page in arrays of its own, in pinned host memory where the backend has that kind
(NVIDIA GPUs and TPUs do, JAX's CPU backend likewise), else in numpy arrays. Up to
`MAX_BATCHES_UNDER_WAY` batches are dispatched without waiting; more would take too much device
memory on their way.
"""

from __future__ import annotations

import collections
import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jinfer.config.memory import format_size
from jinfer.engine.device import buckets
from jinfer.engine.pages.costs import TransferCosts
from jinfer.engine.pages.pool import PageError
from jinfer.kv.cache import KVCache
from jinfer.linear.placement import Placement
from jinfer.steps import pool

logger = logging.getLogger(__name__)

PAGE_BATCH = 16  # pages that one program reads or writes
SIZES = buckets.ladder(1, PAGE_BATCH, 4)
MAX_BATCHES_UNDER_WAY = 2


class HostPages:
    """Slots of host memory for the pages of a pool.

    Args:
      num_slots: how many.
      placement: of the pool.
    """

    def __init__(self, num_slots: int, placement: Placement) -> None:
        self._placement = placement
        self._slots: list[Any] = [None] * num_slots  # what `kv_cache.read_pages` gives of a page
        self._blank: Any = None  # a page of zeros on the device, to fill up batches with

    def save(self, kv: KVCache, moves: Sequence[tuple[int, int]]) -> None:
        """Copies pages of the pool to slots, as they are after all steps dispatched so far.

        Args:
          kv: the pool; it stays.
          moves: (page, slot) each.
        """
        for i, part in enumerate(_batches(moves)):
            contents = pool.read_pages(kv, _page_ids([page for page, _ in part], kv.num_pages))
            contents = self._placement.to_host(contents[: len(part)])
            for (_, slot), content in zip(part, contents, strict=True):
                self._slots[slot] = content
            if i % MAX_BATCHES_UNDER_WAY == MAX_BATCHES_UNDER_WAY - 1:
                jax.block_until_ready(contents)

    def load(self, kv: KVCache, moves: Sequence[tuple[int, int]]) -> KVCache:
        """Copies slots to pages of the pool, which is donated; returns the new one.

        Args:
          kv: the pool.
          moves: (slot, page) each.
        """
        for i, part in enumerate(_batches(moves)):
            contents = [self._slots[slot] for slot, _ in part]
            kv = self._write(kv, contents, [page for _, page in part])
            if i % MAX_BATCHES_UNDER_WAY == MAX_BATCHES_UNDER_WAY - 1:
                jax.block_until_ready(kv)
        return kv

    def check(self, slots: Sequence[int]) -> None:
        """Verifies that something lies in each of `slots`.

        Raises:
          PageError: one is empty.
        """
        empty = [slot for slot in slots if self._slots[slot] is None]
        if empty:
            raise PageError(f"host slots {empty} should hold pages and are empty")

    def warmup(self, kv: KVCache) -> KVCache:
        """Compiles what `save` and `load` need; the pool, which is donated, stays as it was."""
        if self._slots:
            for size in SIZES:
                contents = self._placement.to_host(
                    pool.read_pages(kv, _page_ids([], kv.num_pages, size))
                )
                kv = self._write(kv, contents, [kv.num_pages] * size)
        return kv

    def measure(self, kv: KVCache, page_size: int) -> tuple[TransferCosts, KVCache]:
        """Returns what moves cost here, having moved pages of a pool that is idle and donated.

        The fixed part of a load is what a single page takes beyond its share of a batch.
        """
        seconds: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
        kv = self.warmup(kv)
        for size in (1, PAGE_BATCH) * 3:
            jax.block_until_ready(kv)
            begin = time.perf_counter()
            contents = self._placement.to_host(
                pool.read_pages(kv, _page_ids([], kv.num_pages, size))
            )
            jax.block_until_ready(contents)
            seconds["save", size].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            kv = jax.block_until_ready(self._write(kv, contents, [kv.num_pages] * size))
            seconds["load", size].append(time.perf_counter() - begin)
        median = {kind: statistics.median(times) for kind, times in seconds.items()}
        load_page_s = median["load", PAGE_BATCH] / PAGE_BATCH
        costs = TransferCosts(
            page_size,
            save_page_s=median["save", PAGE_BATCH] / PAGE_BATCH,
            load_page_s=load_page_s,
            load_s=max(0.0, median["load", 1] - load_page_s),
        )
        num_slots = len(self._slots)
        num_bytes = num_slots * sum(leaf.nbytes for leaf in jax.tree.leaves(kv)) // kv.num_pages
        logger.info(
            "host tier: %d pages of %d tokens, %s of %s memory; a page takes %.2f ms there, "
            "%.2f ms back",
            *(num_slots, page_size, format_size(num_bytes), self._placement.host_memory_kind),
            *(1e3 * costs.save_page_s, 1e3 * costs.load_page_s),
        )
        return costs, kv

    # ------------------------------------------------------------------ inside

    def _write(self, kv: KVCache, contents: Sequence[Any], pages: Sequence[int]) -> KVCache:
        size = buckets.fit(SIZES, len(pages))
        if self._blank is None:
            [self._blank] = pool.read_pages(kv, _page_ids([], kv.num_pages, 1))
        contents = list(self._placement.from_host(list(contents)))
        contents += [self._blank] * (size - len(contents))
        return pool.write_pages(kv, contents, _page_ids(pages, kv.num_pages))


def _batches(moves: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
    return [moves[i : i + PAGE_BATCH] for i in range(0, len(moves), PAGE_BATCH)]


def _page_ids(pages: Sequence[int], num_pages: int, size: int | None = None) -> Any:
    """Page ids padded to a size that there is a program for; out of range where there is none."""
    padded = np.full(size or buckets.fit(SIZES, len(pages)), num_pages, np.int32)
    padded[: len(pages)] = pages
    return padded
