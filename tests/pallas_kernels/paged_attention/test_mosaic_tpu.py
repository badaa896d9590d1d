"""The TPU kernel: its numbers simulated with race detection, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, target
from pallas_kernels.paged_attention import (
    MosaicTpuTiles,
    PagedKV,
    mosaic_tpu,
    ragged_paged_attention,
)

# One case of each kind; the others run with -m slow.
QUICK = ("empty places and padding rows", "tree of 40", "chunk with a window", "int8 tree")


@pytest.fixture
def simulated():
    if reason := compat.why_not_interpret("tpu"):
        pytest.skip(reason)
    with compat.interpret(detect_races=True):
        yield
    compat.reset_interpreter()


def fitted(case):
    """The case on pages that a TPU can copy: as tall as its registers."""
    return dataclasses.replace(case, page_size=8 if case.kv_dtype == "float32" else 128)


@pytest.mark.parametrize("name", QUICK)
def test_simulated_it_agrees_with_jnp_and_has_no_race(name, cases, attend_both, simulated):
    attend_both(fitted(cases[name]).build(), "mosaic_tpu")
    assert not compat.races_found()


@pytest.mark.slow
def test_every_case_simulated_agrees_with_jnp(case, attend_both, simulated):
    attend_both(fitted(case).build(seed=1), "mosaic_tpu")
    assert not compat.races_found()


@pytest.mark.parametrize("tiles", [MosaicTpuTiles(kv_block=8, q_rows=16), MosaicTpuTiles()])
def test_any_tiles_give_the_same(make_case, attend_both, simulated, tiles):
    case = make_case(name="", seqs=((1, 70), (0, 0), (20, 33), (1, 64)), heads=(20, 10))
    attend_both(case.build(), "mosaic_tpu", tiles)


@pytest.mark.parametrize("has_tree", [False, True])
def test_tokens_without_keys_give_zeros_and_those_after_them_are_not_waited_for(
    make_case, attend_both, simulated, has_tree
):
    """A tile without blocks starts no copy for the next one, which would wait for it forever."""
    case = make_case(name="", seqs=((2, 9), (3, 12), (2, 20)), has_tree=has_tree)
    inputs = case.build()
    kv_lens = inputs.kv_lens.copy()
    kv_lens[0] = 0
    attend_both(dataclasses.replace(inputs, kv_lens=kv_lens), "mosaic_tpu")


def test_16_bit_pages(make_case, attend_both, simulated):
    case = make_case(name="", seqs=((1, 70), (5, 33)), page_size=16)
    attend_both(case.build(dtype="bfloat16"), "mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "page_size", "kv_dtype"),
    [
        (128, 16, "float32"),  # bf16, as the queries are
        (256, 64, "float32"),
        (128, 128, "float8_e4m3fn"),
        (256, 128, "int8"),
    ],
)
def test_heads_and_pages_of_real_models(
    make_case, attend_both, simulated, head_dim, page_size, kv_dtype
):
    seqs = ((1, 2 * page_size + 1), (3, page_size), (0, 0), (1, 1))
    case = make_case(
        name="", seqs=seqs, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype, num_tokens=7
    )
    attend_both(case.build(dtype="bfloat16"), "mosaic_tpu")
    assert not compat.races_found()


@pytest.mark.parametrize("impl", ["xla", "mosaic_tpu"])
@pytest.mark.thorough
def test_it_agrees_with_the_specification_of_the_kernel_that_jax_brings(make_case, simulated, impl):
    """JAX's own wants K and V interleaved, [P, B, 2 K, H], and no empty place."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    case = make_case(
        name="", seqs=((1, 70), (20, 33), (1, 64)), soft_cap=20.0, sliding_window=30, scale=3.0
    )
    inputs = case.build()
    q, kv, kv_lens, page_table, q_starts = inputs.args
    out = ragged_paged_attention(*inputs.args, **inputs.kwargs, impl=impl)
    pages = jnp.stack([kv.k_pages, kv.v_pages], axis=2)  # [P, K, 2, B, H]
    pages = jnp.moveaxis(pages, 3, 1).reshape(len(kv.k_pages), 8, 4, 32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = ref_ragged_paged_attention(
            *(q, pages, kv_lens, page_table, q_starts, jnp.array([3], jnp.int32)),
            sm_scale=inputs.options["sm_scale"],
            soft_cap=20.0,
            sliding_window=30,
        )
    assert jnp.allclose(out, expected, atol=1e-5)


def _abstract(dtype=jnp.bfloat16, kv_dtype=jnp.bfloat16, head_dim=128, page=64):
    s = jax.ShapeDtypeStruct
    pages = s((64, 8, page, head_dim), kv_dtype)
    scales = s((64, 8, page), jnp.float32) if jnp.dtype(kv_dtype).itemsize == 1 else None
    i32 = jnp.int32
    kv = PagedKV(pages, pages, scales, scales)
    return s((8, 32, head_dim), dtype), kv, s((8,), i32), s((8, 16), i32), s((9,), i32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float16, "kv_dtype": jnp.float16}, "q must be bf16 or f32"),
        ({"kv_dtype": jnp.float32}, "kv pages must be bfloat16"),
        ({"kv_dtype": jnp.uint8}, "only the xla backend reads int4 kv pages"),
        ({"head_dim": 64}, "multiple of 128 wide.*make them 128 wide"),
        ({"page": 24}, "page size must be a multiple of 16"),
        ({"kv_dtype": jnp.int8}, "page size must be a multiple of 128"),
    ],
)
def test_what_it_cannot_run_it_refuses_with_the_reason(change, reason):
    with target.state("v6e"), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            lambda *a: ragged_paged_attention(*a, sm_scale=1.0, impl="mosaic_tpu"),
            *_abstract(**change),
        )


def test_without_a_tpu_it_says_so():
    with pytest.raises(NotImplementedError, match="needs a TPU, the target is cpu"):
        jax.eval_shape(
            lambda *a: ragged_paged_attention(*a, sm_scale=1.0, impl="mosaic_tpu"), *_abstract()
        )


def test_impossible_tiles_are_refused():
    with pytest.raises(ValueError, match="MosaicTpuTiles"):
        MosaicTpuTiles(kv_block=0)


@pytest.mark.parametrize("name", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize("shape", [(32, 8, 128), (32, 32, 128), (8, 4, 256), (64, 1, 128)])
def test_the_tiles_without_a_table_fit_into_vmem(name, shape):
    num_heads, num_kv_heads, head_dim = shape
    s = jax.ShapeDtypeStruct
    q = s((2048, num_heads, head_dim), jnp.bfloat16)
    pages = s((64, num_kv_heads, 128, head_dim), jnp.bfloat16)
    with target.state(name) as where:
        tiles = mosaic_tpu._heuristic(q, PagedKV(pages, pages))
        row = num_kv_heads * head_dim * 2
        pages_bytes = 2 * 2 * tiles.kv_block * row
        # Queries, results twice (double buffers), accumulator, maximum, sum, lse: f32 of 128 lanes.
        rows_bytes = tiles.q_rows * (4 * row + 2 * row + num_kv_heads * 128 * 4 * 4)
        assert pages_bytes + rows_bytes < mosaic_tpu._vmem_limit() < where.smem_bytes
