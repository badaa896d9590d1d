"""Shared by all backends of paged attention: pages, the static part of a call, and its checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PACKED_DTYPE = jnp.dtype(jnp.uint8)  # two int4 per byte
QUANTIZED_DTYPES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8), PACKED_DTYPE)
FLOAT_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKV:
    """Keys and values in pages of B tokens; the tokens of one head in a page are contiguous.

    K is `k_pages * k_scale[..., None]`, likewise V. Quantized pages (e4m3, int8, int4) have one
    scale per token and head; the scale of K is applied to the logits and that of V to the
    probabilities, never to a dequantized page.

    Attributes:
      k_pages, v_pages: [P, K, B, H] f32, bf16, f16, e4m3 or int8; or u8 [P, K, B, H / 2], two int4
        codes per byte as `pack_int4` packs them, whose values `decode_int4` gives.
      k_scale, v_scale: [P, K, B] f32, both or neither; int8 and int4 pages must have them.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.k_pages.shape[1]

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_pages.shape[3] * (2 if self.is_packed else 1)

    @property
    def is_quantized(self) -> bool:
        return jnp.dtype(self.k_pages.dtype) in QUANTIZED_DTYPES

    @property
    def is_packed(self) -> bool:
        return jnp.dtype(self.k_pages.dtype) == PACKED_DTYPE


def pack_int4(x: jax.Array) -> jax.Array:
    """Packs int8 [..., H] of codes in -8..7 into u8 [..., H / 2].

    Byte i holds value i in its low half and value i + H / 2 in its high half, so that unpacking
    concatenates two halves instead of interleaving them: H = 4, [a b c d] -> [c:a d:b].
    """
    low, high = jnp.split(lax.bitcast_convert_type(x, jnp.uint8), 2, axis=-1)
    return (low & 15) | (high << 4)


def decode_int4(x: jax.Array) -> jax.Array:
    """Decodes the int4 codes in u8 [..., H / 2] to f32 [..., H] in -1..1.

    Sixteen levels, denser near zero: u (0.7 + 0.3 u^2) at u = (code + 1/2) / 7.5. For values with a
    Gaussian distribution, such as rotated heads, the squared error is a quarter lower than with
    uniform levels of the same largest value, and no level is lost to symmetry.
    """
    return int4_levels(unpack_int4(x))


def int4_levels(codes: jax.Array) -> jax.Array:
    """Returns the f32 values of codes in -8..7; see `decode_int4`."""
    u = (codes.astype(jnp.float32) + 0.5) / 7.5
    return u * (0.7 + 0.3 * u * u)


def unpack_int4(x: jax.Array) -> jax.Array:
    """Unpacks u8 [..., H / 2] into int8 [..., H]: the inverse of `pack_int4`."""
    signed = lax.bitcast_convert_type(x, jnp.int8)
    low = jnp.right_shift(jnp.left_shift(signed, 4), 4)  # arithmetic shift: extends the sign
    return jnp.concatenate([low, jnp.right_shift(signed, 4)], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The static part of a call; see `ragged_paged_attention` for the meaning of each field."""

    sm_scale: float
    soft_cap: float | None
    sliding_window: int | None
    max_q_len: int
    return_lse: bool
    config: Any


def check_arguments(
    q: jax.Array,
    kv: PagedKV,
    kv_lens: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    tree_mask: jax.Array | None,
    spec: AttentionSpec,
) -> None:
    """Raises a ValueError that says what was expected, what was given and what to do."""
    if q.ndim != 3 or jnp.dtype(q.dtype) not in FLOAT_DTYPES:
        raise ValueError(f"q must be f32, bf16 or f16 [T, N, H], got {_type(q)}")
    _, num_heads, head_dim = q.shape
    if kv.k_pages.ndim != 4 or kv.head_dim < head_dim:
        raise ValueError(
            f"kv.k_pages must be [P, K, B, H] with H at least the {head_dim} of q (uint8, two "
            f"values a byte: half of it), got {_type(kv.k_pages)}"
        )
    if kv.v_pages.shape != kv.k_pages.shape or kv.v_pages.dtype != kv.k_pages.dtype:
        raise ValueError(
            f"kv.v_pages must be {_type(kv.k_pages)} as kv.k_pages is, got {_type(kv.v_pages)}"
        )
    if jnp.dtype(kv.k_pages.dtype) not in FLOAT_DTYPES + QUANTIZED_DTYPES:
        raise ValueError(
            "kv pages must be f32, bf16, f16, float8_e4m3fn, int8, or uint8 of two int4 a byte, "
            f"got {kv.k_pages.dtype}"
        )
    if num_heads % kv.num_kv_heads:
        raise ValueError(
            f"q has {num_heads} heads, not a multiple of the {kv.num_kv_heads} heads of kv; "
            "every KV head must serve the same number of query heads"
        )
    _check_scales(kv)
    for name, x, ndim in (
        ("kv_lens", kv_lens, 1),
        ("page_table", page_table, 2),
        ("q_starts", q_starts, 1),
    ):
        if x.ndim != ndim or x.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32 with {ndim} axes, got {_type(x)}")
    num_seqs = kv_lens.shape[0]
    if page_table.shape[0] != num_seqs:
        raise ValueError(
            f"page_table must be int32[{num_seqs}, max_pages], a row for each of kv_lens, "
            f"got {_type(page_table)}"
        )
    if q_starts.shape[0] != num_seqs + 1:
        raise ValueError(
            f"q_starts must be int32[{num_seqs + 1}], the first token of each sequence and the "
            f"live token count after them, got {_type(q_starts)}"
        )
    _check_spec(spec)
    _check_tree_mask(q, tree_mask, spec)


def _check_scales(kv: PagedKV) -> None:
    if (kv.k_scale is None) != (kv.v_scale is None):
        raise ValueError("kv.k_scale and kv.v_scale must be both given or both None")
    if kv.k_scale is None or kv.v_scale is None:
        if kv.k_pages.dtype in (jnp.int8, jnp.uint8):
            raise ValueError(
                f"{kv.k_pages.dtype} kv pages need k_scale and v_scale, "
                f"f32{list(kv.k_pages.shape[:3])}; got None"
            )
        return
    if not kv.is_quantized:
        raise ValueError(
            "scales go with float8_e4m3fn, int8 or uint8 pages, got "
            f"{kv.k_pages.dtype} pages with scales"
        )
    for name, x in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
        if x.shape != kv.k_pages.shape[:3] or x.dtype != jnp.float32:
            raise ValueError(
                f"kv.{name} must be float32{list(kv.k_pages.shape[:3])}, a scale for each token "
                f"and head of the pages, got {_type(x)}"
            )


def _check_spec(spec: AttentionSpec) -> None:
    if spec.soft_cap is not None and not spec.soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, or None for no cap, got {spec.soft_cap}")
    if spec.sliding_window is not None and not spec.sliding_window > 0:
        raise ValueError(
            f"sliding_window must be at least 1 token, or None for all, got {spec.sliding_window}"
        )
    if spec.max_q_len < 1:
        raise ValueError(f"max_q_len must be at least 1, got {spec.max_q_len}")


def _check_tree_mask(q: jax.Array, tree_mask: jax.Array | None, spec: AttentionSpec) -> None:
    if tree_mask is None:
        return
    if tree_mask.ndim != 2 or tree_mask.shape[0] != q.shape[0] or tree_mask.dtype != jnp.uint32:
        raise ValueError(
            f"tree_mask must be uint32[{q.shape[0]}, words], a row of bits for each token of q, "
            f"got {_type(tree_mask)}"
        )
    if spec.max_q_len > 32 * tree_mask.shape[1]:
        raise ValueError(
            f"tree_mask has {32 * tree_mask.shape[1]} bits a token, too few for sequences of up to "
            f"max_q_len = {spec.max_q_len} tokens; state a smaller max_q_len or give more words"
        )


def _type(x: Any) -> str:
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"
