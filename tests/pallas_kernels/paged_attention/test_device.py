"""On the accelerator that is there: every case, at a real head's width, on fresh random inputs."""

import dataclasses
import time

import jax
import pytest

from pallas_kernels import target

pytestmark = pytest.mark.device


@pytest.fixture
def kernel():
    kind = target.current().kind
    if kind not in ("gpu", "tpu"):
        pytest.skip(f"needs an accelerator, JAX runs on {kind}")
    return {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}[kind]


def test_every_case_agrees_with_jnp(case, attend_both, kernel):
    page = 128 if case.kv_dtype != "float32" else 16
    real = dataclasses.replace(case, head_dim=128, page_size=page)
    attend_both(real.build(seed=time.time_ns() % 2**32, dtype="bfloat16"), kernel)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn", "int8"])
def test_long_contexts_agree_with_jnp(
    make_case, attend_both, kernel, head_dim, page_size, kv_dtype
):
    if kernel == "mosaic_tpu" and (head_dim % 128 or (kv_dtype != "float32" and page_size < 128)):
        pytest.skip("a TPU wants pages 128 wide, and 128 tall where they have scales")
    case = make_case(
        name="",
        seqs=((1, 5000), (1, 70), (0, 0), (1, 2049), (300, 3000), (1, 1)),
        heads=(8, 2),
        head_dim=head_dim,
        page_size=page_size,
        kv_dtype=kv_dtype,
        num_tokens=320,
    )
    attend_both(case.build(seed=time.time_ns() % 2**32, dtype="bfloat16"), kernel)


def test_the_same_inputs_give_the_same_bits(make_case, kernel):
    from pallas_kernels.paged_attention import ragged_paged_attention

    inputs = make_case(name="", seqs=((1, 5000), (200, 900)), head_dim=128, page_size=64).build(
        dtype="bfloat16"
    )
    options = inputs.kwargs | {"impl": kernel}
    run = jax.jit(lambda *args: ragged_paged_attention(*args, **options))
    first = run(*inputs.args)
    for _ in range(20):
        assert (run(*inputs.args) == first).all()
