"""Shared type names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Params: TypeAlias = Mapping[str, Any]
"""A nested plain dict (with a tuple under "layers") whose leaves are arrays or QTensors."""
