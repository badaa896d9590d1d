"""AWQ on matrices: searches scales and clipping with a Gram matrix.

Lin et al. 2023 (arXiv:2306.00978). Important inputs are scaled up before rounding and their
producer is scaled down (`folding`), so that nothing is done at run time. The paper runs the layer
again for each candidate; here X^T X replaces the tokens: ||X D||^2 = tr(D^T (X^T X) D), exactly.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jinfer.config.fields import require
from jinfer.config.quant_format import TENSOR, QFormat
from jinfer.linear.grids import decode, encode, expand_groups, scales_from_range, split_groups
from jinfer.linear.qtensor import check_finite

NUM_RATIOS = 20  # exponents 0, 1/20, .. 19/20
COARSE = 4  # step of the first pass over them
NUM_CLIPS = 10  # ranges of 100 %, 95 %, .. 55 %
CLIP_STEP = 0.05
LEAST_SCALE = 1e-4


def search_scales(
    w: Array,
    gram: Array,
    mean_abs: Array,
    fmt: QFormat,
    *,
    duo: bool = True,
    ties: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Finds s such that rounding W s and dividing by s changes the outputs least.

    Candidates: s = 1; and mean|x|^r (paper), or mean|x|^r / (mean|w| / amax)^(1 - r) with `duo`
    (AutoAWQ), normalized to sqrt(max s min s) = 1, for r = 0, 1/20, .. 19/20; nine of these twenty
    are tried, see `_trials`.

    Args:
      w: [I, O], all weights that share the input, side by side along O.
      gram: f32 [I, I], X^T X over calibration tokens.
      mean_abs: f32 [I], mean of |x| over tokens.
      fmt: the grid to round on; its group or channel scales.
      duo: whether to use the weights' magnitudes, too.
      ties: i32 [I], inputs with one id get one scale: their producer is one number (a KV head that
        several query heads read). None: all free.

    Returns:
      s f32 [I], and two f32 []: the squared output error with it and with s = 1.

    Raises:
      ValueError: shapes disagree or something is not finite.
    """
    num_inputs = w.shape[0]
    require(
        gram.shape == (num_inputs, num_inputs) and mean_abs.shape == (num_inputs,),
        f"a weight {list(w.shape)} needs gram [{num_inputs}, {num_inputs}] and mean_abs "
        f"[{num_inputs}], got {list(gram.shape)} and {list(mean_abs.shape)}",
    )
    require(fmt.group != TENSOR and fmt.block == 1, f"{fmt}: AWQ needs scales by group or channel")
    for value, what in ((w, "weight"), (gram, "gram"), (mean_abs, "mean_abs")):
        check_finite(value, what)
    return _search_scales(w, gram, mean_abs, ties, fmt, duo)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _search_scales(
    w: Array, gram: Array, mean_abs: Array, ties: Array | None, fmt: QFormat, duo: bool
) -> tuple[Array, Array, Array]:
    w, num_inputs = w.astype(jnp.float32), w.shape[0]
    relative = jnp.mean(_relative_size(w, fmt), axis=1)
    if ties is not None:
        mean_abs, relative = _pool(mean_abs, ties), _pool(relative, ties)
    mean_abs = jnp.maximum(mean_abs, LEAST_SCALE)

    def candidate(i: Array) -> Array:
        ratio = i.astype(jnp.float32) / NUM_RATIOS
        s = mean_abs**ratio
        if duo:
            s = s / (relative ** (1 - ratio) + LEAST_SCALE)
        s = jnp.maximum(s, LEAST_SCALE)
        return s / jnp.sqrt(jnp.max(s) * jnp.min(s))

    def loss(s: Array) -> Array:
        delta = fake_quantize(w * s[:, None], fmt) / s[:, None] - w
        product = jnp.dot(gram, delta, precision=lax.Precision.HIGHEST)
        # Two small sums: one over all entries would depend on the number of threads.
        return jnp.sum(jnp.sum(delta * product, axis=0))

    def step(found: tuple[Array, Array, Array], trial: tuple[Array, Array, Array]):
        (centre, best_i, best), (start, offset, moves) = found, trial
        centre = jnp.where(moves, best_i, centre)
        i = jnp.clip(jnp.where(start >= 0, start, centre + offset), 0, NUM_RATIOS - 1)
        new = loss(candidate(i))
        is_better = new < best
        found = centre, jnp.where(is_better, i, best_i), jnp.where(is_better, new, best)
        return found, None

    ones = jnp.ones(num_inputs, jnp.float32)
    plain = loss(ones)
    zero = jnp.int32(0)
    _, best_i, best = lax.scan(step, (zero, zero, jnp.float32(jnp.inf)), _trials())[0]
    is_better = best < plain
    return jnp.where(is_better, candidate(best_i), ones), jnp.minimum(best, plain), plain


def _trials() -> tuple[Array, Array, Array]:
    """Returns the trials of the search: every fourth exponent, then two and one beside the best.

    Returns:
      For each try: its exponent, or -1; else how far from the centre; and whether the centre moves
      to the best before it.
    """
    coarse = range(0, NUM_RATIOS, COARSE)
    offsets = [sign * d for d in (COARSE // 2, COARSE // 4) for sign in (-1, 1)]
    start = jnp.asarray([*coarse, *[-1] * len(offsets)], jnp.int32)
    offset = jnp.asarray([*[0] * len(coarse), *offsets], jnp.int32)
    moves = jnp.asarray([*[False] * len(coarse), *[o < 0 for o in offsets]])
    return start, offset, moves


def _pool(values: Array, ties: Array) -> Array:
    """Each input's mean over the inputs tied to it."""
    num = values.shape[0]
    sums = jnp.zeros(num, jnp.float32).at[ties].add(values)
    counts = jnp.zeros(num, jnp.float32).at[ties].add(1.0)
    return (sums / jnp.maximum(counts, 1.0))[ties]


def _relative_size(w: Array, fmt: QFormat) -> Array:
    """|w| / the largest of its group, [I, O]."""
    num_inputs, num_outputs = w.shape
    amax = jnp.max(jnp.abs(split_groups(w, fmt.group_size(num_inputs))), axis=1)  # [G, O]
    rows = expand_groups(amax, fmt, num_inputs, num_outputs)
    return jnp.abs(w) / (rows + 1e-6)


def fake_quantize(w: Array, fmt: QFormat) -> Array:
    """f32 [I, O] rounded on `fmt`'s grid and back."""
    num_inputs, num_outputs = w.shape
    parts = split_groups(w, fmt.group_size(num_inputs))  # [G, g, O]
    return _round_groups(parts, fmt).reshape(-1, num_outputs)[:num_inputs]


def _round_groups(parts: Array, fmt: QFormat) -> Array:
    """[G, g, O], each group on its own grid and back."""
    low, high = (f(parts, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
    scale, zero = scales_from_range(low, high, fmt)
    return decode(encode(parts, scale, zero, fmt), scale, zero, fmt)


@functools.partial(jax.jit, static_argnums=2)
def clip_weights(w: Array, gram: Array, fmt: QFormat) -> Array:
    """Clamps each group to the range that changes its share of the outputs least.

    For each output and group, of max|w| times 1, 0.95, .. 0.55, the one with the least
    ||X_g (Q(clamp(w)) - w)||^2; X_g^T X_g is a block of the Gram matrix. Not for q and k, whose
    outputs meet in a product (AWQ's code leaves them out).

    Args:
      w: [I, O], already scaled.
      gram: f32 [I, I] of the inputs after scaling (divide by s s^T).
      fmt: the grid; groups or channel.

    Returns:
      f32 [I, O], clamped.
    """
    num_inputs, num_outputs = w.shape
    group = fmt.group_size(num_inputs)
    parts = split_groups(w.astype(jnp.float32), group)  # [G, g, O]
    num_groups = parts.shape[0]
    pad = num_groups * group - num_inputs
    blocks = jnp.pad(gram, ((0, pad), (0, pad))).reshape(num_groups, group, num_groups, group)
    diagonal = jnp.arange(num_groups, dtype=jnp.int32)
    blocks = blocks[diagonal, :, diagonal, :]  # [G, g, g]
    amax = jnp.max(jnp.abs(parts), axis=1, keepdims=True)  # [G, 1, O]

    def attempt(i: Array) -> tuple[Array, Array]:
        limit = amax * (1 - i.astype(jnp.float32) * CLIP_STEP)
        delta = _round_groups(jnp.clip(parts, -limit, limit), fmt) - parts
        product = jnp.einsum("gij,gjo->gio", blocks, delta, precision=lax.Precision.HIGHEST)
        return jnp.sum(delta * product, axis=1, keepdims=True), limit

    def step(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        new = attempt(i)
        is_better = new[0] < best[0]
        return jax.tree.map(lambda a, b: jnp.where(is_better, a, b), new, best)

    _, limit = lax.fori_loop(1, NUM_CLIPS, step, attempt(jnp.int32(0)))
    clamped = jnp.clip(parts, -limit, limit)
    return clamped.reshape(num_groups * group, num_outputs)[:num_inputs]
