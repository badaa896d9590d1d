"""Quantizes K and V to 8-bit or 4-bit codes with a scale for each token and head.

    x ~ level(code) * scale

fp8 and int8: the level is the code, and scale = max |x| / the largest code. int4: 16 uneven levels
(`decode_int4`), and the one of a few scales with the least squared error; `steps` rotates such
heads first, which spreads the outlier channels of K over all (see `kv.rotation`).

Each token is quantized by itself when it is written, so that the result does not depend on its
chunk or batch.
"""

from __future__ import annotations

import logging

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jinfer.config.cache import kv_format
from jinfer.config.model import ModelConfig
from pallas_kernels.paged_attention import decode_int4, int4_levels, pack_int4

_log = logging.getLogger(__name__)

# The largest code of the even formats; int8 leaves its lowest one out, to be symmetric.
MAX_CODE = {"float8_e4m3fn": 448.0, "int8": 127.0}
# int4: scales to try, as shares of max |x|. What is clipped costs less than the finer steps gain.
SHARES = (1.0, 0.95, 0.9)
# Below this a head counts as zero, so that scales stay normal numbers, which no CPU flushes to 0.
_TINY = 1e-30


def quantize(
    x: Float[Array, "*T H"], dtype: str
) -> tuple[Shaped[Array, "*T Hs"], Float[Array, "*T"]]:
    """Returns (codes, scale) of `x`.

    Args:
      x: heads of K or V.
      dtype: "float8_e4m3fn", "int8" or "int4".

    Returns:
      Codes of `dtype`, [..., H]; of int4 two a byte, u8 [..., H / 2] as `pack_int4` lays them. The
      scale f32 [...]. NaN or infinity in a head affects its own scale only.
    """
    x = x.astype(jnp.float32)
    top = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), _TINY)
    if dtype == "int4":
        return _quantize_int4(x, top)
    most = MAX_CODE[dtype]
    scale = top / most
    # Rounding may carry the quotient past the largest code, which XLA would cast to NaN.
    codes = jnp.clip(x / scale[..., None], -most, most)
    if dtype == "int8":
        codes = jnp.rint(codes)
    return codes.astype(dtype), scale


def quantize_static(
    x: Float[Array, "*T K H"], dtype: str, scale: Float[Array, "Ks"]
) -> tuple[Shaped[Array, "*T K H"], Float[Array, "*T K"]]:
    """Returns (codes, scale) of `x` with given scales; values out of range saturate.

    Args:
      x: heads of K or V.
      dtype: "float8_e4m3fn" or "int8", of which all 256 codes are used.
      scale: one for all heads, or one each.

    Returns:
      As `quantize`: the scale is the given one for every token, or NaN beside what is not finite.
    """
    x = x.astype(jnp.float32)
    most = MAX_CODE[dtype]
    least = -most - 1 if dtype == "int8" else -most
    scale = jnp.broadcast_to(scale, x.shape[:-1])
    codes = jnp.clip(x / scale[..., None], least, most)
    if dtype == "int8":
        codes = jnp.rint(codes)
    return codes.astype(dtype), scale + 0.0 * jnp.max(jnp.abs(x), axis=-1)


def static_scales(model: ModelConfig, dtype: str) -> tuple[Array, Array] | None:
    """Returns the scales of K and V, f32 [L, 1 or K], that a pool of `dtype` is written with."""
    static = model.static_kv
    if static is None or static.dtype != dtype:
        return None
    return jnp.asarray(static.k, jnp.float32), jnp.asarray(static.v, jnp.float32)


def resolve_format(name: str, model: ModelConfig, weights_dtype: str) -> str:
    """Returns the format of the pool for a `kv_cache_dtype`.

    "auto" is the checkpoint's own, else that of the weights. A log line says whether static scales
    are used.

    Raises:
      ValueError: the format is not supported for K and V.
    """
    static = model.static_kv
    if name == "auto":
        name = static.dtype if static is not None and static.is_default else weights_dtype
    found = kv_format(name)
    if static is not None and found == static.dtype:
        _log.info("K and V are kept as %s with the checkpoint's static scales", found)
    elif static is not None:
        _log.warning(
            "the checkpoint's static scales of K and V are for %s and are not used: "
            "K and V are kept as %s",
            *(static.dtype, found),
        )
    return found


def _quantize_int4(x: Array, top: Array) -> tuple[Array, Array]:
    def rounded(share: float) -> tuple[Array, Array, Array]:
        scale = top * share
        y = x / scale[..., None]
        # An approximation of the level, off by at most a twelfth of a step (sixteen comparisons
        # would be exact, but take XLA minutes to compile in every layer).
        u = y * (1.39 + y * y * (-0.686 + 0.307 * y * y))
        codes = jnp.clip(jnp.floor(7.5 * u), -8, 7).astype(jnp.int8)
        error = jnp.square(int4_levels(codes) * scale[..., None] - x)
        return codes, scale, jnp.sum(error, axis=-1)

    codes, scale, error = rounded(SHARES[0])
    for share in SHARES[1:]:
        others = rounded(share)
        is_better = others[2] < error
        codes = jnp.where(is_better[..., None], others[0], codes)
        scale, error = (jnp.where(is_better, x, y) for x, y in zip(others[1:], (scale, error)))
    return pack_int4(codes), scale


def dequantize(codes: Shaped[Array, "*T Hs"], scale: Float[Array, "*T"]) -> Float[Array, "*T H"]:
    """Returns what attention reads, f32 [..., H]; the specification, for tests and reports."""
    numbers = decode_int4(codes) if codes.dtype == jnp.uint8 else codes.astype(jnp.float32)
    return numbers * scale[..., None]
