"""The padded sizes that steps are compiled for; knows nothing of jax."""

from __future__ import annotations

import bisect
import dataclasses

from jinfer.config.engine import EngineConfig


def ladder(first: int, last: int, factor: int) -> tuple[int, ...]:
    """Returns first, first * factor, ... up to and always including `last`."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= factor
    return (*sizes, last)


def _decode_sizes(most: int) -> tuple[int, ...]:
    """Powers of two, and from 16 on the sizes half-way between them, where padding costs most."""
    sizes = set(ladder(1, most, 2))
    return tuple(
        sorted(sizes | {size * 3 // 2 for size in sizes if 16 <= size < size * 3 // 2 < most})
    )


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Padded sizes: few, so that everything is compiled during warm-up.

    Attributes:
      decode: sequences in a pure decode step: 1, 2, 4, 8, 16, 24, 32, 48, 64, ...
      tokens: tokens in a step that prefills: 16, 64, 256, ...
      seqs: sequences in a step that prefills: one alone, or as many as there may be.
      drafts: most drafts of a sequence in a step that verifies: 2, 4, ... for steps to choose from;
        one size of trees, and where there are always as many drafts as there may be (fewer only
        where a text ends). None: no speculation.
    """

    decode: tuple[int, ...]
    tokens: tuple[int, ...]
    seqs: tuple[int, ...]
    drafts: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: EngineConfig) -> Buckets:
        """Returns the buckets that cover every plan under `config`."""
        speculation = config.speculation
        most = 0 if speculation is None else speculation.num_speculative_tokens
        has_choice = speculation and speculation.adaptive and not speculation.is_tree
        first = min(2, most) if has_choice else most
        return cls(
            decode=_decode_sizes(config.max_num_seqs),
            tokens=ladder(min(16, config.max_num_batched_tokens), config.max_num_batched_tokens, 4),
            seqs=ladder(1, config.max_num_seqs, max(2, config.max_num_seqs)),
            drafts=ladder(first, most, 2) if most else (),
        )


def fit(sizes: tuple[int, ...], size: int) -> int:
    """Returns the smallest of `sizes` that holds `size`."""
    idx = bisect.bisect_left(sizes, size)
    assert idx < len(sizes), f"{size} is beyond the largest bucket {sizes[-1]}"
    return sizes[idx]
