"""Attention of ragged queries over paged keys and values.

One form serves decode, chunked prefill, mixed batches and the verification of token trees.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import whole_number
from pallas_kernels.paged_attention import mosaic_gpu, mosaic_tpu, native, xla
from pallas_kernels.paged_attention.base import AttentionSpec as AttentionSpec
from pallas_kernels.paged_attention.base import PagedKV as PagedKV
from pallas_kernels.paged_attention.base import check_arguments
from pallas_kernels.paged_attention.base import decode_int4 as decode_int4
from pallas_kernels.paged_attention.base import int4_levels as int4_levels
from pallas_kernels.paged_attention.base import pack_int4 as pack_int4
from pallas_kernels.paged_attention.base import unpack_int4 as unpack_int4
from pallas_kernels.paged_attention.mosaic_gpu import MosaicGpuTiles as MosaicGpuTiles
from pallas_kernels.paged_attention.mosaic_tpu import MosaicTpuTiles as MosaicTpuTiles
from pallas_kernels.paged_attention.xla import XlaTiles as XlaTiles

IMPLS = (mosaic_gpu.IMPL, mosaic_tpu.IMPL, native.IMPL, xla.IMPL)


def ragged_paged_attention(
    q: jax.Array,
    kv: PagedKV,
    kv_lens: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    *,
    sm_scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    max_q_len: int | None = None,
    tree_mask: jax.Array | None = None,
    return_lse: bool = False,
    config: Any = None,
    impl: str = dispatch.AUTO,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends from each query token to the keys of its own sequence, causally or along a tree.

    Sequence s has n_s = q_starts[s + 1] - q_starts[s] query tokens, whose own keys are already in
    the pages: they are the last n_s of its kv_lens[s] keys. Query token j sits at position
    pos = kv_lens[s] - n_s + j and computes, over its visible keys i,

        out = sum_i softmax_i(cap(sm_scale * q . k_i)) v_i    cap(x) = soft_cap tanh(x / soft_cap)

    Key i is visible if i <= pos and, with a window, i > pos - sliding_window. Example with S = 3,
    T = 8, pages of 4 tokens: a prefill chunk, a decode and an unused entry:

        tokens    a a a a b . . .     q_starts [0, 4, 5, 5]    kv_lens [6, 3, 0]
        position  2 3 4 5 2           page_table [[7, 2], [5, 0], [0, 0]]

    With `tree_mask`, the n_s tokens of a sequence are nodes of a tree (a parent before its
    children) instead of a chain: bit i of a token's row says whether it sees the i-th of its
    sequence's n_s last keys; all keys before those are seen. Each token sets its own bit and its
    ancestors'. Its position is then the first node's plus its depth (bits set, minus one), and the
    window masks keys before the tree only.

    Args:
      q: [T, N, H] queries of all sequences end to end, padded to T.
      kv: the pages; N must be a multiple of its K heads, query head n reads KV head n // (N / K).
        They may be wider than H (TPUs need multiples of 128), with zeros in the rest.
      kv_lens: i32 [S], keys of each sequence including this step's; 0 for an unused entry.
      page_table: i32 [S, M], page ids of each sequence in order; entries past kv_lens must be valid
        ids too (0 for instance).
      q_starts: i32 [S + 1], first token of each sequence; the last entry is the live token count.
      sm_scale: factor on the logits, before the cap.
      soft_cap: bound on the logits, None for none.
      sliding_window: number of visible keys including the token's own, None for all.
      max_q_len: static bound on every n_s, T if None. Smaller bounds make faster programs; 1 is a
        pure decode step. Results of a sequence with more tokens are undefined.
      tree_mask: u32 [T, ceil(max_q_len / 32)].
      return_lse: also return the log of the sum of exponentials of each token's logits.
      config: tiles of the named backend, instead of the tuned ones.
      impl: "auto", or one of the names in `IMPLS`.

    Returns:
      [T, N, H] in q's dtype, accumulated in f32. Padding tokens (at or past q_starts[-1]) and
      tokens that see no key give zeros. With `return_lse` also f32 [T, N], -inf where none is seen.

    Raises:
      ValueError: an argument's shape, dtype or value is wrong.
      TypeError: kv is not a `PagedKV`.
      NotImplementedError: the named backend cannot run these arguments here.
    """
    if not isinstance(kv, PagedKV):
        raise TypeError(f"kv must be a PagedKV, got {type(kv).__name__}; PagedKV(k_pages, v_pages)")
    kv = PagedKV(*(_as_array(getattr(kv, f.name)) for f in dataclasses.fields(kv)))
    q, kv_lens, page_table, q_starts = map(jnp.asarray, (q, kv_lens, page_table, q_starts))
    tree_mask = _as_array(tree_mask)
    for name, x in (("q", q), ("kv.k_pages", kv.k_pages), ("kv_lens", kv_lens),
                    ("page_table", page_table)):  # fmt: skip
        if x.ndim == 0 or x.size == 0:
            raise ValueError(
                f"{name} must not be empty, got {x.dtype}{list(x.shape)}; pad it to one "
                "entry: a sequence whose kv_lens is 0 has no tokens"
            )
    num_tokens, window = q.shape[0], sliding_window
    longest = num_tokens if max_q_len is None else whole_number("max_q_len", max_q_len)
    spec = AttentionSpec(
        sm_scale=float(sm_scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        sliding_window=None if window is None else whole_number("sliding_window", window),
        max_q_len=min(longest, num_tokens),
        return_lse=return_lse,
        config=config,
    )
    check_arguments(q, kv, kv_lens, page_table, q_starts, tree_mask, spec)
    head_dim = q.shape[2]
    if wider := kv.head_dim - head_dim:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, wider)))
    args = (q, kv, kv_lens, page_table, q_starts, tree_mask, spec)
    with jax.named_scope("paged_attention"):
        out, lse = dispatch.pick("paged_attention", IMPLS, impl, *args).run(*args)
    out = out[:, :, :head_dim]
    return (out, lse) if return_lse else out


def _as_array(x: Any) -> Any:
    return None if x is None else jnp.asarray(x)
