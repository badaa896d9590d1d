"""Trees of a plan as arrays of its batch: positions, masks, parents; knows nothing of requests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jinfer.engine.plan import Plan
from jinfer.speculation import trees as draft_tree
from jinfer.steps.batch import StepBatch


def with_mask(batch: StepBatch) -> StepBatch:
    """Returns `batch` with a mask of zeros to be filled in."""
    words = -(-batch.max_q_len // 32)
    mask: Any = np.zeros((batch.tokens.shape[0], words), np.uint32)
    return dataclasses.replace(batch, tree_mask=mask)


def fill(plan: Plan, batch: StepBatch, max_drafts: int) -> Any:
    """Fills in positions and mask of the drafts, where the batch has one.

    Returns:
      [max_drafts + 1, S] parents, as `tree_accept.Nodes` has them.
    """
    parents = np.full((max_drafts + 1, batch.rows.shape[0]), -1, np.int32)
    if batch.tree_mask is None:
        return parents
    mask, positions = np.asarray(batch.tree_mask), np.asarray(batch.positions)
    for s, seq in enumerate(plan.seqs):
        shape = seq.drafts.parents or ()
        root = int(batch.q_starts[s])
        end = root + 1 + len(shape)
        mask[root:end] = draft_tree.mask_rows(shape, mask.shape[1])
        positions[root + 1 : end] = seq.start + np.array(draft_tree.depths(shape), np.int32)
        parents[1 : 1 + len(shape), s] = shape
    return parents
