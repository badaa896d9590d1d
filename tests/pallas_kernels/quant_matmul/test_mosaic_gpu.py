"""The Hopper kernel, simulated on the CPU (jax 0.11 and up), against float64; and its schedule."""

import dataclasses
import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, compile_only, target, tiles
from pallas_kernels.quant_matmul import cases, mosaic_gpu, prepare, quant_matmul
from pallas_kernels.quant_matmul.base import QuantSpec
from pallas_kernels.quant_matmul.schedule import Schedule, sum_parts

BF16_OUT = 3e-3  # one rounding to bf16 at the end
BF16_WEIGHTS = 5e-3  # weights rounded to bf16 too
H100 = target.TARGETS["h100"]

needs_simulator = pytest.mark.skipif(
    compat.why_not_interpret("gpu") is not None, reason=str(compat.why_not_interpret("gpu"))
)


def simulate(case, inputs, seed=0):
    x, q, scale, zero = inputs.arrays()
    sizes = {"block_m": max(8, min(tiles.bucket(case.num_rows), 64)), "block_k": 128, "stages": 3}
    config = tiles.QuantMatmulGpuTiles(**(sizes | case.gpu))
    few_cores = dataclasses.replace(H100, num_cores=case.cores)
    w = prepare(q, scale, zero, group=inputs.group, target=H100)
    with target.state(few_cores), compat.interpret(detect_races=True):
        return np.asarray(
            quant_matmul(
                x, w.q, w.scale, w.zero, group=w.group, layout=w.layout, config=config,
                impl="mosaic_gpu",
            )
        )  # fmt: skip


@needs_simulator
def test_simulated_kernel_agrees_with_float64(case, inputs, relative_error, capsys):
    if case.scales == "float16":
        pytest.skip("the kernel reads f32 and bf16 scales; test_refusals covers f16")
    y = simulate(case, inputs)
    bound = BF16_WEIGHTS if case.gpu.get("scale_weights") else BF16_OUT
    assert relative_error(y, inputs.expected()) < bound
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("splits", [1, 2, 4, 100])
@pytest.mark.parametrize(
    "num_tiles, k_tiles, cores", [(3, 4, 2), (48, 32, 132), (1, 7, 5), (9, 1, 4)]
)
def test_a_schedule_gives_every_k_tile_to_one_block_and_counts_the_parts(
    num_tiles, k_tiles, cores, splits
):
    s = Schedule.make(num_tiles, k_tiles, cores, splits)
    blocks = np.arange(num_tiles * k_tiles).reshape(num_tiles, k_tiles) // s.per_block
    assert s.num_blocks == blocks.max() + 1 <= cores
    parts = [len(set(row)) for row in blocks]
    assert [s.last_part(t) + 1 for t in range(num_tiles)] == parts
    assert s.max_parts == max(parts)
    if splits == 1:
        assert s.max_parts == 1


def test_parts_that_no_block_wrote_do_not_count():
    s = Schedule(num_tiles=4, k_tiles=4, per_block=6)  # 2 x 2 tiles of 8 x 16: parts 1 2 1 2
    parts = np.full((2, 16, 32), np.nan, np.float32)
    parts[0] = 1
    for tile in range(4):
        m, n = tile % 2 * 8, tile // 2 * 16
        if s.last_part(tile) == 1:
            parts[1, m : m + 8, n : n + 16] = 10
    y = np.asarray(sum_parts(jnp.asarray(parts), s, 2, (8, 16)))
    expected = np.ones((16, 32))
    for tile in range(4):
        m, n = tile % 2 * 8, tile // 2 * 16
        expected[m : m + 8, n : n + 16] += 10 * s.last_part(tile)
    assert s.max_parts == 2
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("num_rows", [1, 16])
def test_a_call_launches_the_kernel_and_the_sum_of_its_parts_and_nothing_else(num_rows):
    if reason := compile_only.why_not_compile("h100"):
        pytest.skip(reason)
    case = cases.Case(model="", linear="", num_rows=num_rows, num_inputs=4096, num_outputs=4096)
    with compile_only.compile_target("h100") as compiler:
        program = compiler.compile(
            functools.partial(quant_matmul, group=128, layout="nk"), *case.abstract_args("nk")
        )
    text = program.executable.as_text()
    launches = re.findall(r" (fusion|custom-call|copy|call|while)\(", text[text.index("ENTRY") :])
    assert launches == ["custom-call", "fusion"]


def test_every_real_shape_gets_tiles_that_fit():
    for case in cases.cases():
        _, q, _, _ = case.abstract_args("nk")
        group = case.group or case.num_inputs
        spec = QuantSpec(group=group, layout="nk", out_dtype=jnp.bfloat16, config=None)
        t = mosaic_gpu.ranked_tiles(case.num_rows, q, spec, case.num_groups, H100)[0]
        assert t.stages >= 3, (case, t)
        assert case.num_inputs % t.block_k == 0
        assert t.block_m <= tiles.bucket(case.num_rows)
