"""Static scales of K and V, which a checkpoint has from its calibration.

x ~ code * scale, one scale for all tokens of a layer, or of each of its KV heads
"""

from __future__ import annotations

import dataclasses

Scales = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticKV:
    """The scales for a pool of one format; a part of `ModelConfig`.

    Attributes:
      dtype: the format, "float8_e4m3fn" or "int8". Pools of other formats do not use the scales.
      k, v: by layer, one number or one for each KV head.
      is_default: whether `kv_cache_dtype="auto"` means this format.
    """

    dtype: str
    k: Scales
    v: Scales
    is_default: bool = False

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        """Raises ValueError unless it fits a model of so many layers and heads."""
        for name, rows in (("k", self.k), ("v", self.v)):
            widths = {len(row) for row in rows}
            if len(rows) != num_layers or len(widths) != 1 or not widths <= {1, num_kv_heads}:
                raise ValueError(
                    f"static_kv.{name} must have {num_layers} rows of 1 or {num_kv_heads} scales, "
                    f"got {[len(row) for row in rows]}"
                )
