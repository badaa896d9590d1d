"""Explicit tiles come before measured ones, and those before a heuristic."""

import dataclasses
import json

import pytest

from pallas_kernels import target, tiles
from pallas_kernels.tiles import QuantMatmulGpuTiles, QuantMatmulTpuTiles

H100 = target.TARGETS["h100"]
CASE = "M16 K4096 N6144 int4 g128"


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles.read_table.cache_clear()
    yield tmp_path / "h100.json"
    tiles.read_table.cache_clear()


def choose(explicit=None):
    guess = QuantMatmulGpuTiles(block_m=8)
    return tiles.choose(
        "quant_matmul.mosaic_gpu", H100, CASE, QuantMatmulGpuTiles, explicit, lambda: guess
    )


def test_explicit_beats_measured_beats_heuristic(table):
    assert choose().block_m == 8
    measured = QuantMatmulGpuTiles(block_m=16, block_k=256, splits=3)
    tiles.write_table(H100, {"quant_matmul.mosaic_gpu": {CASE: measured}}, table)
    assert choose() == measured
    assert choose(QuantMatmulGpuTiles(block_m=32)).block_m == 32


def test_writing_keeps_the_entries_of_other_cases_and_ops(table):
    first, second = QuantMatmulGpuTiles(block_m=16), QuantMatmulTpuTiles(block_m=8)
    tiles.write_table(H100, {"a": {"x": first, "y": first}}, table)
    tiles.write_table(
        H100, {"a": {"y": dataclasses.replace(first, block_m=64)}, "b": {"x": second}}, table
    )
    assert tiles.measured("a", H100, "x", QuantMatmulGpuTiles) == first
    assert tiles.measured("a", H100, "y", QuantMatmulGpuTiles).block_m == 64
    assert tiles.measured("b", H100, "x", QuantMatmulTpuTiles) == second
    assert tiles.measured("b", H100, "z", QuantMatmulTpuTiles) is None
    assert json.loads(table.read_text())["device"] == "h100"


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_a_broken_table_says_which_file_and_what_to_do(table, text):
    table.write_text(text)
    with pytest.raises(ValueError, match=r"h100\.json.*autotune"):
        choose()


def test_an_entry_of_another_version_is_refused_by_name(table):
    table.write_text(json.dumps({"tiles": {"quant_matmul.mosaic_gpu": {CASE: {"block_x": 3}}}}))
    with pytest.raises(ValueError, match="block_x"):
        choose()


@pytest.mark.parametrize("name, file", [("h100", "h100.json"), ("NVIDIA H200", "nvidia_h200.json")])
def test_each_device_has_its_own_table(name, file):
    assert tiles.table_name(dataclasses.replace(H100, name=name)) == file


@pytest.mark.parametrize(
    "rows, expected", [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (256, 256)]
)
def test_rows_are_bucketed_to_powers_of_two(rows, expected):
    assert tiles.bucket(rows) == expected


@pytest.mark.parametrize(
    "sizes",
    [
        {"block_m": 12},
        {"block_m": 264},
        {"block_m": 0},
        {"block_m": 8, "rows": 192},
        {"block_m": 8, "warpgroups": 4},
        {"block_m": 8, "block_k": 512},
        {"block_m": 8, "stages": 1},
        {"block_m": 8, "splits": 0},
    ],
)
def test_sizes_that_no_kernel_takes_are_refused(sizes):
    with pytest.raises(ValueError):
        QuantMatmulGpuTiles(**sizes)


@pytest.mark.parametrize("path", sorted(tiles.FOLDER.glob("*.json")), ids=lambda p: p.name)
def test_the_shipped_tables_are_readable(path):
    tiles.read_table.cache_clear()
    assert tiles.read_table(path)
