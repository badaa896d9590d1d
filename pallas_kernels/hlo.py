"""Types of arrays as XLA prints them, for checks of compiled programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_NAMES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8e4m3fn",
    "float8_e5m2": "f8e5m2",
    "int8": "s8",
}


def type_name(dtype: Any, shape: Sequence[int]) -> str:
    """Returns an array's type: "bf16[1024,8,64,128]"."""
    return f"{_NAMES[np.dtype(dtype).name]}[{','.join(map(str, shape))}]"


def dense_types(*shapes: Sequence[int]) -> tuple[str, ...]:
    """Returns the types that float copies of quantized arrays would have; matrices either way."""
    either = {tuple(s) for s in shapes} | {tuple(s)[::-1] for s in shapes if len(s) == 2}
    floats = ("bfloat16", "float16", "float32")
    return tuple(type_name(dtype, shape) for shape in sorted(either) for dtype in floats)
