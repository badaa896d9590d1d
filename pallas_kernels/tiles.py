"""Tile sizes: the explicit ones, else measured ones (`tuned/<device>.json`), else a heuristic's.

A tile set is a frozen dataclass of sizes. `scripts/autotune.py` writes the tables.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from pallas_kernels.target import Target

FOLDER = pathlib.Path(__file__).parent / "tuned"

T = TypeVar("T")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_multiple(tiles: Any, **units: int) -> None:
    for name, unit in units.items():
        value = getattr(tiles, name)
        _require(
            isinstance(value, int) and value > 0 and value % unit == 0,
            f"{type(tiles).__name__}: {name} must be a positive multiple of {unit}, got {value!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantMatmulGpuTiles:
    """Tiles of the Mosaic GPU kernels of `quant_matmul` and `fp8_matmul`: out^T = w x^T.

    Attributes:
      block_m: rows of x per tile: `wgmma`'s N, a multiple of 8 up to 256.
      rows: outputs (columns of the weight) per compute warpgroup, 64 or 128.
      warpgroups: compute warpgroups per block, 1 to 3, besides the one that copies.
      block_k: inputs per pipeline stage.
      stages: pipeline stages in shared memory.
      scale_weights: scale the weights before the product (cheap for many rows of x) instead of
        each group's product after it (cheap for few rows, and exact).
      splits: about how many blocks may share one output tile's inputs; 1: not shared, the sums
        stay in registers.
    """

    block_m: int
    rows: int = 64
    warpgroups: int = 2
    block_k: int = 128
    stages: int = 4
    scale_weights: bool = False
    splits: int = 1

    def __post_init__(self) -> None:
        _require_multiple(self, block_m=8, rows=64, block_k=32)
        _require(self.block_m <= 256, f"block_m must be at most 256, got {self.block_m}")
        _require(self.rows in (64, 128), f"rows must be 64 or 128, got {self.rows}")
        _require(self.warpgroups in (1, 2, 3), f"warpgroups must be 1 to 3, got {self.warpgroups}")
        _require(self.block_k <= 256, f"block_k must be at most 256, got {self.block_k}")
        _require(self.splits >= 1, f"splits must be at least 1, got {self.splits}")
        _require(self.stages >= 2, f"stages must be at least 2, got {self.stages}")

    @property
    def block_n(self) -> int:
        """Outputs per block."""
        return self.rows * self.warpgroups


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantMatmulTpuTiles:
    """Tiles of the Mosaic TPU kernels of `quant_matmul` and `fp8_matmul`.

    Attributes:
      block_m: rows of x per tile, a multiple of 8.
      block_n: outputs per tile, a multiple of 128.
      block_k: inputs per grid step, a multiple of the group and of 128.
      scale_weights: scale the weights before the product instead of each group's product after.
    """

    block_m: int
    block_n: int = 512
    block_k: int = 1024
    scale_weights: bool = False

    def __post_init__(self) -> None:
        _require_multiple(self, block_m=8, block_n=128, block_k=128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tunable:
    """A kernel at one shape whose tiles can be measured; ops enumerate them in `tunables`.

    Attributes:
      op: op and backend, "quant_matmul.mosaic_gpu".
      case: key in the table, see `measured`.
      candidates: tile sets, the most promising first.
      inputs: makes random arguments from a seed.
      run: `run(tiles, *inputs)`, the kernel.
      reference: `reference(*inputs)`, the result that the kernel must agree with.
    """

    op: str
    case: str
    candidates: tuple[Any, ...]
    inputs: Callable[[int], tuple[Any, ...]]
    run: Callable[..., jax.Array]
    reference: Callable[..., jax.Array]


def bucket(num_rows: int) -> int:
    """Returns the power of two, at least 8, that `num_rows` rows are padded to or tuned as."""
    return max(8, 1 << (num_rows - 1).bit_length())


def table_name(target: Target) -> str:
    """Returns the file name of a target's table: "h100.json"."""
    return re.sub(r"[^a-z0-9]+", "_", target.name.lower()).strip("_") + ".json"


@functools.cache
def read_table(path: pathlib.Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns {op: {case: sizes}} of a table file; empty if there is no file.

    Raises:
      ValueError: the file is not such a table.
    """
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())["tiles"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(
            f"{path} must hold a JSON object with 'tiles', got {type(e).__name__}: {e}; "
            "remove it, or rewrite it with scripts/autotune.py"
        ) from e
    return table


def measured(op: str, target: Target, case: str, cls: type[T]) -> T | None:
    """Returns the measured tiles of `case`, or None if there are none.

    Args:
      op: op and backend, "quant_matmul.mosaic_gpu".
      target: the chip; its table is `tuned/<name>.json`.
      case: the shape that the kernel is specialised for: "M16 K4096 N6144 int4 g128".
      cls: the tile dataclass.

    Raises:
      ValueError: the entry's sizes are not those of `cls`.
    """
    path = FOLDER / table_name(target)
    entry = read_table(path).get(op, {}).get(case)
    if entry is None:
        return None
    names = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    _require(set(entry) <= names, f"{path}: {op}, {case}: expected {names}, got {set(entry)}")
    return cls(**entry)


def choose(
    op: str, target: Target, case: str, cls: type[T], explicit: T | None, heuristic: Callable[[], T]
) -> T:
    """Returns explicit tiles if given, else measured ones, else `heuristic()`."""
    return explicit or measured(op, target, case, cls) or heuristic()


def write_table(target: Target, tiles: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Merges {op: {case: tile dataclass}} into the table file at `path`."""
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"tiles": {}}
    table |= {"device": target.name, "jax": jax.__version__}
    for op, cases in tiles.items():
        entries = table["tiles"].setdefault(op, {})
        entries |= {case: dataclasses.asdict(sizes) for case, sizes in cases.items()}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    read_table.cache_clear()
