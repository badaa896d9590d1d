"""What the copy engine asks of addresses in shared memory: no simulator and no compiler checks it.

CUDA programming guide, "Alignment requirements for multi-dimensional bulk tensor asynchronous copy
operations": 128 bytes. A plain bulk copy, which takes no tensor map, asks for 16.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import target
from pallas_kernels.fp8_matmul import cases as fp8_cases
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.paged_attention import PagedKV, ragged_paged_attention
from pallas_kernels.quant_matmul import cases as quant_cases
from pallas_kernels.quant_matmul import quant_matmul

ZEROS = plgpu.OOBFillMode.ZEROS  # the default: a copy by tensor map, which fills with zeros


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(leaf):
                yield from equations(getattr(leaf, "jaxpr", leaf))


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def copies(f, *args):
    """Yields (buffer in shared memory, its indexer, mode) of each copy in f's kernels."""
    with target.state("h100"):
        jaxpr = jax.make_jaxpr(f)(*args)
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name not in ("copy_gmem_to_smem", "copy_smem_to_gmem"):
            continue
        is_load = equation.primitive.name == "copy_gmem_to_smem"
        trees = [equation.params[f"{x}_transforms_treedef"] for x in ("src", "dst")]
        rest = equation.invars[3 if is_load else 2 :]
        start = trees[0].num_leaves if is_load else 0
        tree = trees[is_load]
        transforms = jax.tree.unflatten(tree, rest[start : start + tree.num_leaves])
        mode = equation.params.get("oob_mode") if is_load else None
        yield equation.invars[is_load].aval, transforms, ZEROS if mode is None else mode


def alignment(aval, indexer):
    """Returns the bytes that the address surely is a multiple of; a dynamic index may be odd."""
    found = 1024  # of each buffer's own address
    stride = jnp.dtype(aval.dtype).itemsize
    for index, size in zip(indexer.indices[::-1], indexer.shape[::-1], strict=True):
        at = getattr(index, "start", index)
        found = math.gcd(found, at * stride if isinstance(at, int) else stride)
        stride *= size
    return found


def check(f, *args):
    found = list(copies(f, *args))
    assert found
    for aval, transforms, mode in found:
        *tiling, indexer = transforms
        if not tiling:  # else whole tiles of 256 bytes or more
            wanted = 128 if mode == ZEROS else 16
            assert alignment(aval, indexer) % wanted == 0, (aval, indexer, mode)


@pytest.mark.parametrize("num_rows", [1, 16, 64])
@pytest.mark.parametrize("scales", ["block", "channel"])
def test_stages_of_the_fp8_matmul_are_aligned(num_rows, scales):
    case = fp8_cases.Case(
        model="", linear="", num_rows=num_rows, num_inputs=512, num_outputs=256, scales=scales
    )
    f = functools.partial(fp8_matmul, block=case.block, layout="nk", impl="mosaic_gpu")
    check(f, *case.abstract_args("nk"))


@pytest.mark.parametrize(("num_rows", "group"), [(1, 128), (16, 32), (64, 64)])
def test_stages_of_the_quantized_matmul_are_aligned(num_rows, group):
    case = quant_cases.Case(
        model="", linear="", num_rows=num_rows, num_inputs=512, num_outputs=256, group=group,
        has_zero=True,
    )  # fmt: skip
    f = functools.partial(quant_matmul, group=group, layout="nk", impl="mosaic_gpu")
    check(f, *case.abstract_args("nk"))


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_stages_of_paged_attention_are_aligned(page_size, dtype):
    s, i32 = jax.ShapeDtypeStruct, jnp.int32
    pages, scale = s((9, 2, page_size, 64), dtype), s((9, 2, page_size), jnp.float32)
    kv = PagedKV(pages, pages, *([scale] * 2 if dtype == jnp.int8 else [None] * 2))
    attend = functools.partial(ragged_paged_attention, sm_scale=1.0, impl="mosaic_gpu")
    f = lambda *args: attend(*args, max_q_len=80)  # noqa: E731  # tiles of chunks, and decoding
    check(f, s((90, 8, 64), jnp.bfloat16), kv, s((3,), i32), s((3, 8), i32), s((4,), i32))
