"""Pages of the prefix cache in host memory, and which are to be saved or loaded next.

A page that the prefix cache evicts from the device is saved to a slot of host memory under the
digest of its text. It is loaded into a page of the device when a request needs that text again,
unless computing it costs less. A loaded page stays saved, so that evicting it again costs nothing.
The slot that was used longest ago is evicted first:

    device tree evicts page 7 (text 5 6 7 8)      find 5 6 7 8 9: page 3 on the device, slot 0 here
    slot 0 <- page 7, before the next step        page 4 <- slot 0, before the step that reads it

This module does the bookkeeping only: `take` returns what is to be moved before the next step. All
saves come first, so that a page is read before it is overwritten. Slots to be loaded from are
pinned until then.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from jinfer.engine.pages.costs import TransferCosts
from jinfer.engine.pages.pool import PageError
from jinfer.engine.pages.radix import PageKey
from jinfer.engine.plan import PageMoves


class _Entry(NamedTuple):
    slot: int
    first: bytes
    depth: int


class HostTier:
    """The slots of host memory and the texts whose pages they hold.

    Args:
      num_slots: capacity in pages.
      page_size: tokens in a page.

    Attributes:
      costs: decides between loading and computing again.
      num_saved_pages, num_loaded_pages: pages moved since the tier was made.
      num_host_hits: admissions for which pages were loaded.
      num_host_declined: admissions that found pages here and computed them again.
      num_host_dropped_pages: pages evicted for lack of space.
      num_swaps: preempted requests that were admitted again with pages loaded from here.
      num_recomputes: preempted requests that were admitted again without pages from here and with
        more than half of their tokens to compute.
    """

    def __init__(self, num_slots: int, page_size: int) -> None:
        self.num_slots = num_slots
        self.costs = TransferCosts(page_size)
        self._entries: collections.OrderedDict[bytes, _Entry] = collections.OrderedDict()
        self._free = list(range(num_slots - 1, -1, -1))
        self._saves: dict[int, int] = {}  # slot -> page
        self._loads: list[tuple[int, int]] = []  # (slot, page)
        self._pinned: collections.Counter[int] = collections.Counter()
        self._forgotten: set[int] = set()  # pinned slots without an entry: free after `take`
        self.num_saved_pages = 0
        self.num_loaded_pages = 0
        self.num_host_hits = 0
        self.num_host_declined = 0
        self.num_host_dropped_pages = 0
        self.num_swaps = 0
        self.num_recomputes = 0

    @property
    def num_cached(self) -> int:
        """Pages in host memory, or about to be saved there."""
        return len(self._entries)

    # ------------------------------------------------------------------ saving

    def save(self, key: PageKey, page: int) -> None:
        """Plans to save the content of `page`, which the device is about to reuse."""
        if key.digest in self._entries:
            self._entries.move_to_end(key.digest)
            return
        if not self.costs.is_worth_saving():
            return
        slot = self._free.pop() if self._free else self._evict()
        if slot is not None:
            self._entries[key.digest] = _Entry(slot, key.first, key.depth)
            self._saves[slot] = page
            self.num_saved_pages += 1

    def _evict(self) -> int | None:
        """Frees the slot used longest ago among those that are not pinned; None if all are."""
        for digest, entry in self._entries.items():
            if not self._pinned[entry.slot]:
                del self._entries[digest]
                self.num_saved_pages -= self._saves.pop(entry.slot, None) is not None
                self.num_host_dropped_pages += 1
                return entry.slot
        return None

    # ------------------------------------------------------------------ loading

    def find(self, above: PageKey, edges: Iterable[bytes]) -> list[PageKey]:
        """Returns the keys of the saved pages that continue a text; changes nothing.

        Args:
          above: key of the text that the device has.
          edges: the pages that follow.
        """
        found = []
        for edge in edges:
            above = above.below(edge)
            if above.digest not in self._entries:
                break
            found.append(above)
        return found

    def pin(self, keys: Sequence[PageKey]) -> list[int]:
        """Returns the slots of `keys` and keeps them from eviction until the next `take`."""
        for key in reversed(keys):  # so that the end of a text is evicted first
            self._entries.move_to_end(key.digest)
        slots = [self._entries[key.digest].slot for key in keys]
        self._pinned.update(slots)
        return slots

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Plans to load pinned slots into `pages`."""
        self._loads += zip(slots, pages, strict=True)
        self.num_loaded_pages += len(slots)

    def note_admission(
        self, *, is_resumed: bool, num_found: int, num_loaded: int, is_computed: bool
    ) -> None:
        """Counts how an admitted request got its pages.

        Args:
          is_resumed: whether it had been preempted.
          num_found: pages that were found here.
          num_loaded: how many of them are loaded.
          is_computed: whether more than half of its tokens are to be computed.
        """
        self.num_host_hits += num_loaded > 0
        self.num_host_declined += num_found > num_loaded
        self.num_swaps += is_resumed and num_loaded > 0
        self.num_recomputes += is_resumed and num_loaded == 0 and is_computed

    def take(self, moves: PageMoves) -> PageMoves:
        """Returns `moves` with the planned saves and loads, which are planned no more; unpins."""
        moves = dataclasses.replace(
            moves,
            saved=tuple((page, slot) for slot, page in self._saves.items()),
            loaded=tuple(self._loads),
        )
        self._saves, self._loads = {}, []
        self._pinned.clear()
        self._free += self._forgotten
        self._forgotten.clear()
        return moves

    # ------------------------------------------------------------------ forgetting

    def forget(self, key: PageKey) -> None:
        """Forgets a page and all pages that follow it, and more than these.

        It forgets every text that begins with the same page and is at least as long, and everything
        if `key` is a first page, since others may have been copied from it in part. That is more
        than needed, but it happens only after errors and needs no links between entries.
        """
        if key.depth <= 1:
            self.reset()
        gone = [
            digest
            for digest, entry in self._entries.items()
            if entry.first == key.first and entry.depth >= key.depth
        ]
        for digest in gone:
            self._remove(digest)

    def forget_text(self, namespace: Hashable, first_edge: bytes, num_kept: int) -> None:
        """Forgets the pages from number `num_kept` on of the texts that begin with `first_edge`."""
        self.forget(PageKey.root(namespace).below(first_edge)._replace(depth=num_kept + 1))

    def reset(self) -> None:
        """Forgets everything."""
        for digest in tuple(self._entries):
            self._remove(digest)

    def clear(self) -> None:
        """Forgets everything, including planned moves."""
        self.num_saved_pages -= len(self._saves)
        self._entries.clear()
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._saves, self._loads = {}, []
        self._pinned.clear()
        self._forgotten.clear()

    def _remove(self, digest: bytes) -> None:
        slot = self._entries.pop(digest).slot
        if self._pinned[slot]:  # it is still to be loaded
            self._forgotten.add(slot)
        else:
            self.num_saved_pages -= self._saves.pop(slot, None) is not None
            self._free.append(slot)

    # ------------------------------------------------------------------ invariants

    def filled_slots(self) -> list[int]:
        """Slots that hold a page now, without those that are still to be written."""
        return [e.slot for e in self._entries.values() if e.slot not in self._saves]

    def check(self) -> None:
        """Verifies that each slot is exactly one of free, in use, and forgotten while pinned.

        Raises:
          PageError: it is not; the message names the slots.
        """
        used = [entry.slot for entry in self._entries.values()]
        slots = collections.Counter([*used, *self._free, *self._forgotten])
        wrong = [s for s in {*range(self.num_slots), *slots} if slots[s] != 1]
        if wrong or any(slot not in range(self.num_slots) for slot in slots):
            raise PageError(f"host slots {wrong} are neither free nor in use, or both")
        held = {*used, *self._forgotten}
        lost = [slot for slot in self._saves if slot not in held]
        lost += [slot for slot, _ in self._loads if slot not in held or not self._pinned[slot]]
        if lost or not self._forgotten <= self._pinned.keys():
            raise PageError(f"host slots {lost} are to be saved or loaded and are not reserved")

    def metrics(self, page_bytes: int) -> dict[str, float]:
        """Returns the counts since the tier was made and its size; see the attributes."""
        return {
            "num_host_pages": self.num_slots,
            "num_host_cached_pages": self.num_cached,
            "num_host_hits": self.num_host_hits,
            "num_host_declined": self.num_host_declined,
            "num_host_dropped_pages": self.num_host_dropped_pages,
            "num_saved_pages": self.num_saved_pages,
            "num_loaded_pages": self.num_loaded_pages,
            "saved_bytes": self.num_saved_pages * page_bytes,
            "loaded_bytes": self.num_loaded_pages * page_bytes,
            "num_swaps": self.num_swaps,
            "num_recomputes": self.num_recomputes,
        }
