"""The TPU kernel, simulated on the CPU, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, target, tiles
from pallas_kernels.quant_matmul import cases, mosaic_tpu, quant_matmul
from pallas_kernels.quant_matmul.base import QuantSpec

BF16_OUT = 3e-3  # one rounding to bf16 at the end
BF16_WEIGHTS = 5e-3  # weights rounded to bf16 too


def test_simulated_kernel_agrees_with_float64(case, inputs, relative_error):
    if case.num_groups == 1:
        pytest.skip("scales per channel are left to XLA")
    if case.num_inputs % 128 or case.num_outputs % 128 or case.codes == "uint4":
        pytest.skip("K, N or codes that the kernel refuses; test_refusals covers them")
    config = tiles.QuantMatmulTpuTiles(
        **({"block_m": 16, "block_n": 128, "block_k": max(128, inputs.group)} | case.tpu)
    )
    x, q, scale, zero = inputs.arrays()
    with target.state("v6e"), compat.interpret(detect_races=True):
        y = quant_matmul(x, q, scale, zero, group=inputs.group, config=config, impl="mosaic_tpu")
        assert not compat.races_found()
    bound = BF16_WEIGHTS if config.scale_weights else BF16_OUT
    assert relative_error(np.asarray(y), inputs.expected()) < bound


def test_every_real_shape_gets_tiles_that_divide_it():
    for case in cases.cases():
        if case.group is None:
            continue
        _, q, _, _ = case.abstract_args("kn")
        spec = QuantSpec(group=case.group, layout="kn", out_dtype=jnp.bfloat16, config=None)
        t = mosaic_tpu.heuristic_tiles(case.num_rows, q, spec)
        assert case.num_inputs % t.block_k == 0 and t.block_k % case.group == 0
        assert case.num_outputs % t.block_n == 0
        vmem = 2 * (t.block_m * t.block_k * 2 + t.block_k * t.block_n) + 8 * t.block_m * t.block_n
        assert vmem < 16 << 20, (case, t)  # the compiler's default share of VMEM
