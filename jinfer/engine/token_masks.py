"""Masks of the tokens that may come next, which a provider on the host makes for one request.

A request with a provider is restricted: each of its tokens is sampled under a mask that depends on
all tokens before it. The host must therefore know them when a step is packed, so no step samples
for the request while an earlier one is in flight; other requests run ahead as usual. With drafts,
each verified place has a mask of its own: the one after the drafts before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

ALL_TOKENS = np.uint32(0xFFFFFFFF)  # a word of a mask that allows all of its 32 tokens


class TokenMasks(Protocol):
    """Provider of one request's masks; called in the engine's thread, one call at a time."""

    def mask(self, token_ids: Sequence[int], drafts: Sequence[int]) -> np.ndarray | None:
        """Returns which tokens may follow `token_ids` and then `drafts`.

        Calls need not come in order: rejected drafts are asked about and never come true, and
        after a preemption or a failed step the same tokens are asked about again.

        Args:
          token_ids: the output tokens so far, without the prompt; not to be kept or changed.
          drafts: tokens after them, each allowed by the mask before it.

        Returns:
          [ceil(V / 32)] u32, bit v % 32 of word v // 32 is 1 where token v is allowed; None: all
          tokens are. Whatever it raises ends the request with an error.
        """
        ...


class TokenMaskError(Exception):
    """A request's provider failed: the cause is `__cause__`.

    Attributes:
      request_id: of that request.
    """

    def __init__(self, request_id: str) -> None:
        super().__init__(f"the token masks of request {request_id} failed")
        self.request_id = request_id


def no_masks(*shape: int) -> Any:
    """Returns masks [*shape] that allow all tokens, as one word of memory, not to be written to."""
    return np.broadcast_to(ALL_TOKENS, shape)


def has_masks(masks: np.ndarray) -> bool:
    """Whether masks may restrict anything: those of `no_masks` are known not to."""
    return any(masks.strides)


def fill_masks(
    masks: np.ndarray,
    provider: TokenMasks,
    token_ids: Sequence[int],
    drafts: Sequence[int] = (),
    parents: Sequence[int] | None = None,
) -> None:
    """Writes the mask of each verified place of one request into `masks`.

    Places behind a draft that is not allowed keep what they have, since they cannot be reached.

    Args:
      masks: [P, W] with P > len(drafts), of ones; place 0 is after `token_ids`, place i + 1 after
        draft i.
      provider: of the request.
      token_ids: its output tokens.
      drafts: tokens after them, all of which are known.
      parents: the place that each draft follows, if they are a tree; None: a chain.

    Raises:
      ValueError: a mask of the provider has another shape or dtype.
    """
    masks[0] = _words(provider.mask(token_ids, ()), masks)
    parents = range(len(drafts)) if parents is None else parents
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for place, (parent, token) in enumerate(zip(parents, drafts, strict=True), 1):
        if parent in paths and _allows(masks[parent], token):
            paths[place] = (*paths[parent], token)
            masks[place] = _words(provider.mask(token_ids, paths[place]), masks)


def _allows(words: np.ndarray, token: int) -> bool:
    return bool(words[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def _words(mask: np.ndarray | None, masks: np.ndarray) -> Any:
    if mask is None:
        return ALL_TOKENS
    if mask.shape != masks.shape[-1:] or mask.dtype != np.uint32:
        raise ValueError(
            f"a token mask must be uint32[{masks.shape[-1]}], got {mask.dtype}{list(mask.shape)}"
        )
    return mask
