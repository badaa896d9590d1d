"""Every kernel lowers for its platform with any JAX, and no wheels of a compiler."""

import jax
import pytest

from pallas_kernels import target
from pallas_kernels.fp8_matmul import cases as fp8_matmul
from pallas_kernels.quant_matmul import cases as quant_matmul

PLATFORMS = {"h100": "cuda", "v5e": "tpu", "tpu7x": "tpu"}


@pytest.mark.parametrize("name", PLATFORMS)
@pytest.mark.parametrize("op", [quant_matmul, fp8_matmul], ids=lambda op: op.__name__)
def test_quick_cases_lower_for_a_platform_that_is_not_there(op, name):
    cases = op.compile_cases(target.TARGETS[name], quick=True)
    assert cases
    num_kernels = 0
    for case in cases:
        with target.state(name):
            traced = jax.jit(case.fn).trace(*case.abstract_args)
            text = traced.lower(lowering_platforms=(PLATFORMS[name],)).as_text()
        has_kernel = "mosaic_gpu" in text or "tpu_custom_call" in text
        num_kernels += has_kernel
        assert has_kernel or not case.expects_wgmma, case.name
    assert num_kernels >= len(cases) // 2


@pytest.mark.parametrize("op", [quant_matmul, fp8_matmul], ids=lambda op: op.__name__)
def test_names_of_cases_are_unique_and_quick_ones_are_among_all(op):
    for chip in PLATFORMS:
        names = [c.name for c in op.compile_cases(target.TARGETS[chip])]
        quick = [c.name for c in op.compile_cases(target.TARGETS[chip], quick=True)]
        assert len(set(names)) == len(names)
        assert set(quick) < set(names)
