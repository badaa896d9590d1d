"""The matmul kernels on the accelerator of this machine, with fresh random inputs: -m device.

JAX_PLATFORMS=cuda python -m pytest -m device tests/pallas_kernels -n 8
"""

import functools
import secrets

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import target, timing
from pallas_kernels.fp8_matmul import cases as fp8_cases
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.quant_matmul import cases as quant_cases
from pallas_kernels.quant_matmul import preferred_layout, quant_matmul

pytestmark = pytest.mark.device

BF16 = 8e-3  # weights and results rounded to bf16

NEEDS_DEVICE = "needs an accelerator: JAX_PLATFORMS=cuda or tpu, and -m device"
QUANT = [c for c in quant_cases.cases() if c.model != "qwen3-8b"]
FP8 = [c for c in fp8_cases.cases() if c.block]


@pytest.fixture(autouse=True)
def kernel():
    if timing.describe_accelerator() is None:
        pytest.skip(NEEDS_DEVICE)
    kind = target.current().kind
    return {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(kind) or pytest.skip(f"no kernel: {kind}")


def relative_error(y, expected):
    y, expected = y.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("case", QUANT, ids=str)
def test_quant_matmul_agrees_with_the_exact_product(case, kernel):
    if case.group is None and kernel == "mosaic_tpu":
        pytest.skip("scales per channel are left to XLA")
    layout, group = preferred_layout(), case.group or case.num_inputs
    args = case.random_args(layout, secrets.randbits(31))

    def exact(x, q, scale, zero):
        def spread(a):
            return jnp.repeat(a.astype(jnp.float32), group, axis=0)[: case.num_inputs]

        w = (q if layout == "kn" else q.T).astype(jnp.float32)
        w = w if zero is None else w - spread(zero)
        return jnp.matmul(x.astype(jnp.float32), w * spread(scale), precision="highest")

    f = functools.partial(quant_matmul, group=group, layout=layout, impl=kernel)
    y = jax.jit(f)(*args)
    assert relative_error(y, jax.jit(exact)(*args)) < BF16
    again = jax.jit(f)(*args)
    assert bool((y == again).all()), "a result that moves between runs is a race"


@pytest.mark.parametrize("case", FP8, ids=str)
def test_fp8_matmul_agrees_with_the_plain_form(case, kernel):
    layout = "nk" if kernel == "mosaic_gpu" else "kn"
    args = case.random_args(layout, secrets.randbits(31))
    f = functools.partial(fp8_matmul, block=case.block, layout=layout)
    y = jax.jit(functools.partial(f, impl=kernel))(*args)
    assert relative_error(y, jax.jit(functools.partial(f, impl="xla"))(*args)) < BF16
