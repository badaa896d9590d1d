"""Top-k, top-p and min-p as one threshold on the logits, found without sorting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jinfer.sampling.args import SampleArgs

NEG_INF = float("-inf")

_BLOCK = 64  # adjacent values that `_largest` represents by their maximum
_NUM_BLOCKS = 128  # blocks that it keeps

Test: TypeAlias = Callable[[Array], Array]  # thresholds [S] -> bool [S]


def filter_logits(x: Float[Array, "S V"], args: SampleArgs) -> Float[Array, "S V"]:
    """Steps 6 to 9 of `process_logits`; greedy rows pass unchanged."""
    x = x / jnp.where(args.is_greedy, 1.0, args.temperature)[:, None]
    top = jnp.max(x, axis=-1)  # [S]
    threshold = top + jnp.log(args.min_p)  # -inf without min_p, and for a row without tokens
    needs_k = (args.top_k > 0) & (args.top_k < x.shape[1])
    needs_p = args.top_p < 1.0
    threshold = lax.cond(
        jnp.any(needs_k | needs_p),
        lambda t: _raise_threshold(x, args, top, t, needs_k, needs_p),
        lambda t: t,
        threshold,
    )
    # Keeps the most likely token, even where top_p is 0 in f32 or rounding raises the threshold.
    return jnp.where(x >= jnp.minimum(threshold, top)[:, None], x, NEG_INF)


def _raise_threshold(
    x: Array, args: SampleArgs, top: Array, threshold: Array, needs_k: Array, needs_p: Array
) -> Array:
    """Returns the [S] thresholds raised to that of top-k, then to that of top-p."""
    few, floor = _largest(x)
    bottom = jnp.full_like(floor, NEG_INF)

    def search(make_test: Callable[[Array], Test], needed: Array) -> tuple[Array, Array]:
        """Bisects over the few largest values, and over all values in rows where those do not do.

        That is decided for each row, so that no row depends on its batch mates.
        """
        test = make_test(few)
        found = _bisect(test, floor, top)
        is_found = test(floor)
        in_all = lax.cond(
            jnp.any(needed & ~is_found),
            lambda: _bisect(make_test(x), bottom, top),
            lambda: found,
        )
        return jnp.where(is_found, found[0], in_all[0]), jnp.where(is_found, found[1], in_all[1])

    def raise_to_k(threshold: Array) -> Array:
        # f32 sums are exact up to 2^24 and several times faster on CPUs than integer sums.
        k = args.top_k.astype(jnp.float32)

        def holds_k(values: Array) -> Test:
            return lambda t: jnp.sum(values >= t[:, None], axis=-1, dtype=jnp.float32) >= k

        edge, _ = search(holds_k, needs_k)
        return jnp.where(needs_k, jnp.maximum(threshold, edge), threshold)

    def raise_to_p(threshold: Array) -> Array:
        shift = jnp.where(top > NEG_INF, top, 0.0)[:, None]

        def mass_of(values: Array) -> Array:
            return jnp.where(values >= threshold[:, None], jnp.exp(values - shift), 0.0)

        goal = args.top_p * jnp.sum(mass_of(x), axis=-1)

        def holds_p(values: Array) -> Test:
            mass = mass_of(values)
            return lambda t: jnp.sum(jnp.where(values > t[:, None], mass, 0.0), axis=-1) >= goal

        _, edge = search(holds_p, needs_p)
        return jnp.where(needs_p, jnp.maximum(threshold, edge), threshold)

    threshold = lax.cond(jnp.any(needs_k), raise_to_k, lambda t: t, threshold)
    return lax.cond(jnp.any(needs_p), raise_to_p, lambda t: t, threshold)


def _largest(x: Array) -> tuple[Array, Array]:
    """Returns some of each row's values and a floor; all values above the floor are among them.

    They are the 128 blocks of 64 adjacent values with the largest maxima; the least of these maxima
    is the floor. So they include the 128 largest values, and no sort runs over the vocabulary:

        x  | 3 1 | 0 9 | 4 8 | 2 2 |     with 2 blocks of 2:   few 0 9 4 8   floor 8

    Returns:
      [S, 8192] (all of a smaller vocabulary) and [S].
    """
    num_rows, vocab_size = x.shape
    if vocab_size <= _NUM_BLOCKS * _BLOCK:
        return x, jnp.full((num_rows,), NEG_INF, jnp.float32)
    padding = -vocab_size % _BLOCK
    blocks = jnp.pad(x, ((0, 0), (0, padding)), constant_values=NEG_INF)
    blocks = blocks.reshape(num_rows, -1, _BLOCK)
    peaks, which = lax.top_k(jnp.max(blocks, axis=-1), _NUM_BLOCKS)
    few = jnp.take_along_axis(blocks, which[:, :, None], axis=1)
    # Not peaks[:, -1]: XLA would fold that slice into its top_k and sort every block's maximum.
    return few.reshape(num_rows, -1), jnp.min(peaks, axis=-1)


def _bisect(holds: Test, low: Array, top: Array) -> tuple[Array, Array]:
    """Finds, in each row, the two adjacent f32 between which `holds` turns from true to false.

    `holds` must be decreasing in the threshold and true at `low` (otherwise the row's result is
    undefined); it is never called above `top`. Bisects over an order-preserving map of f32 to u32
    (flip the sign bit of positive numbers, all bits of negative ones), so that 32 halvings end at
    adjacent floats for any range.

    Returns:
      The largest threshold at which it holds, and the next float above it; where it holds at
      `top` itself, `top` and the float after it.
    """
    ends = _to_key(low), _to_key(top) + jnp.uint32(1)

    def halve(_, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // jnp.uint32(2)
        is_true = holds(_from_key(middle))
        return jnp.where(is_true, middle, low), jnp.where(is_true, high, middle)

    low, high = lax.fori_loop(0, 32, halve, ends)
    return _from_key(low), _from_key(high)


def _to_key(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _from_key(key: Array) -> Array:
    sign = jnp.uint32(0x80000000)
    return lax.bitcast_convert_type(jnp.where(key >= sign, key & ~sign, ~key), jnp.float32)
