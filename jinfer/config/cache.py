"""Configuration of the KV pool, and the number formats of K and V."""

from __future__ import annotations

import dataclasses

from jinfer.config.fields import require as require

# Formats of K and V in the cache and the bits of a value; those below 16 have scales.
KV_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8, "int8": 8, "int4": 4}


_KV_NAMES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}


def kv_format(name: str, field: str = "kv_cache_dtype") -> str:
    """Returns the canonical name of a KV format; `field` is named in errors.

    Raises:
      ValueError: the format is not supported for K and V.
    """
    found = _KV_NAMES.get(name, name) if isinstance(name, str) else name
    require(
        isinstance(found, str) and found in KV_BITS,
        f"{field} must be auto or one of {', '.join([*KV_BITS, *_KV_NAMES])}, got {name!r}",
    )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV pool: `num_pages` pages per layer, `page_size` tokens each.

    Attributes:
      dtype: format of K and V, see `KV_BITS`; fp8 and fp8_e4m3 become float8_e4m3fn.
    """

    num_pages: int
    page_size: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", kv_format(self.dtype))
        require(self.num_pages > 0, f"num_pages must be positive, got {self.num_pages}")
        require(
            self.page_size > 0 and self.page_size & (self.page_size - 1) == 0,
            f"page_size must be a power of two, got {self.page_size}",
        )

    @property
    def is_quantized(self) -> bool:
        """Whether every token and head has a scale for K and one for V."""
        return KV_BITS[self.dtype] < 16

    @property
    def num_slots(self) -> int:
        """Token places per layer."""
        return self.num_pages * self.page_size
