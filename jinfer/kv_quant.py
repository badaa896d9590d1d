"""K and V as 8-bit or 4-bit codes with a scale for each token and head; knows nothing of pages.

    x ~ code * scale,  scale = max |x| / largest code,  over the head's H values

A token is quantized on its own, when it is written: what is read back does not depend on the chunk
or the batch that it came in.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.paged_attention import pack_int4, unpack_int4

# The largest code of each format; int8 and int4 leave their lowest one out, to be symmetric.
MAX_CODE = {"float8_e4m3fn": 448.0, "int8": 127.0, "int4": 7.0}
# Below this a head counts as zero: its scale stays a normal number, which no CPU flushes to 0.
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
      scale f32 [...]. NaN or infinity in a head make its scale so, and nobody else's.
    """
    most = MAX_CODE[dtype]
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), _TINY) / most
    # Rounding may carry the quotient past the end, and XLA casts what does not fit to NaN.
    codes = jnp.clip(x / scale[..., None], -most, most)
    if dtype == "float8_e4m3fn":
        return codes.astype(jnp.float8_e4m3fn), scale
    codes = jnp.rint(codes).astype(jnp.int8)
    return (pack_int4(codes) if dtype == "int4" else codes), scale


def dequantize(codes: Shaped[Array, "*T Hs"], scale: Float[Array, "*T"]) -> Float[Array, "*T H"]:
    """Returns what attention reads, f32 [..., H]; the specification, for tests and reports."""
    if codes.dtype == jnp.uint8:
        codes = unpack_int4(codes)
    return codes.astype(jnp.float32) * scale[..., None]
