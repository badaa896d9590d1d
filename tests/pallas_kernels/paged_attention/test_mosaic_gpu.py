"""The Hopper kernel: its work list by law, its numbers simulated, its build for a real H100."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, target
from pallas_kernels.paged_attention import (
    AttentionSpec,
    MosaicGpuTiles,
    PagedKV,
    mosaic_gpu,
    packing,
    ragged_paged_attention,
)

# One case of each kind: the other cases take a minute or two and run with -m slow.
QUICK = ("empty places and padding rows", "tree of 16", "chunk with a window", "fp8 decode")


@pytest.fixture
def simulated():
    if reason := compat.why_not_interpret("gpu"):
        pytest.skip(reason)
    with compat.interpret(detect_races=True):
        yield
    compat.reset_interpreter()


@pytest.mark.parametrize("name", QUICK)
def test_simulated_it_agrees_with_jnp_and_has_no_race(name, cases, attend_both, simulated):
    attend_both(cases[name].build(dtype="bfloat16"), "mosaic_gpu")
    assert not compat.races_found("gpu")


@pytest.mark.slow
def test_every_case_simulated_agrees_with_jnp(case, attend_both, simulated):
    attend_both(case.build(seed=1, dtype="bfloat16"), "mosaic_gpu")
    assert not compat.races_found("gpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "page_size", "kv_dtype"),
    [
        (64, 16, "float32"),  # bf16, as the queries are
        (96, 32, "float32"),
        (128, 64, "float32"),
        (256, 128, "float32"),
        (64, 16, "int8"),
        (96, 128, "float8_e4m3fn"),
        (128, 32, "float8_e4m3fn"),
    ],
)
def test_heads_and_pages_of_real_models(
    make_case, attend_both, simulated, head_dim, page_size, kv_dtype
):
    seqs = ((1, 2 * page_size + 1), (3, page_size), (0, 0), (1, 1))
    case = make_case(
        name="", seqs=seqs, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype, num_tokens=7
    )
    attend_both(case.build(dtype="bfloat16"), "mosaic_gpu")
    assert not compat.races_found("gpu")


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "int8"])
def test_8_bit_pages_of_64_tokens(make_case, attend_both, simulated, kv_dtype):
    case = make_case(name="", seqs=((1, 200), (1, 64)), page_size=64, kv_dtype=kv_dtype)
    attend_both(case.build(dtype="bfloat16"), "mosaic_gpu")


@pytest.mark.slow
def test_8_bit_pages_of_wide_heads(make_case, attend_both, simulated):
    """There is room for one converted block in chunks, and for one attending warpgroup else."""
    case = make_case(
        name="", seqs=((70, 90), (1, 150)), head_dim=256, page_size=64, kv_dtype="float8_e4m3fn"
    )
    attend_both(case.build(dtype="bfloat16"), "mosaic_gpu")


@pytest.mark.slow
def test_fp8_pages_need_no_scales(make_case, attend_both, simulated):
    case = make_case(name="", seqs=((1, 200), (1, 64)), page_size=16, kv_dtype="float8_e4m3fn")
    inputs = case.build(dtype="bfloat16")
    plain = dataclasses.replace(inputs.kv, k_scale=None, v_scale=None)
    attend_both(dataclasses.replace(inputs, kv=plain), "mosaic_gpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiles",
    [
        MosaicGpuTiles(num_attending=1),
        MosaicGpuTiles(kv_block=128, num_stages=2, min_part=1),
        MosaicGpuTiles(num_stages=2, min_part=1, max_part=1),
    ],
)
@pytest.mark.thorough
def test_any_tiles_give_the_same(make_case, attend_both, simulated, tiles):
    case = make_case(name="", seqs=((1, 700), (1, 3), (0, 0), (1, 64)), page_size=16)
    attend_both(case.build(dtype="float16"), "mosaic_gpu", tiles)


@pytest.mark.parametrize(
    ("num_seqs", "tile_tokens", "min_part"), [(1, 1, 4), (5, 1, 4), (5, 16, 4), (5, 1, 1)]
)
def test_the_work_list_holds_every_block_once(num_seqs, tile_tokens, min_part):
    """Law: the items of a tile cover its blocks without gap or overlap, the largest item first."""
    config = MosaicGpuTiles(min_part=min_part)
    rng = np.random.default_rng(num_seqs)
    spec = AttentionSpec(
        sm_scale=1.0,
        soft_cap=None,
        sliding_window=None if min_part == 1 else 100,
        max_q_len=99,
        return_lse=False,
        config=None,
    )
    for _ in range(3):
        q_lens = rng.integers(0, 2 if tile_tokens == 1 else 100, num_seqs).astype(np.int32)
        most = 200 if min_part == 1 else 40_000
        kv_lens = (q_lens + rng.integers(0, most, num_seqs) * (q_lens > 0)).astype(np.int32)
        q = jax.ShapeDtypeStruct((500, 32, 128), jnp.bfloat16)
        kv = jax.eval_shape(lambda: PagedKV(*[jnp.zeros((9, 8, 64, 128), jnp.bfloat16)] * 2))
        table = jax.ShapeDtypeStruct((num_seqs, 700), jnp.int32)
        launch = mosaic_gpu._launch(q, kv, table, None, spec, 1, config)
        max_q_len = 1 if tile_tokens == 1 else 99
        tiles = packing.list_tiles(jnp.asarray(q_lens), max_q_len, 500, tile_tokens)
        blocks = mosaic_gpu._list_blocks(tiles, jnp.asarray(kv_lens), launch)
        items, written = mosaic_gpu._list_items(tiles, blocks, 8, launch, config)
        items = np.asarray(items)
        assert (np.diff(items[:, 4]) <= 0).all()
        covered = {}
        for tile, seq, part, first, num, full_first, full_end, *_ in items:
            if num:
                assert 0 <= full_first <= full_end <= num and part < launch.num_parts
                assert seq == tiles.seq[tile]
                covered.setdefault(int(tile), []).append((int(part), int(first), int(num)))
        for tile in range(len(tiles.seq)):
            parts = sorted(covered.get(tile, []))
            assert [p[0] for p in parts] == list(range(len(parts)))
            at = int(blocks.first[tile])
            for _, first, num in parts:
                assert first == at
                at += num
            assert at == int(blocks.first[tile] + blocks.num[tile]) or not parts
            assert sum(p[2] for p in parts) == int(blocks.num[tile])
            wrote = [2 * part + w for part, _, num in parts for w in range(min(2, num))]
            assert wrote == list(range(int(written[tile])))


def _abstract(dtype=jnp.bfloat16, kv_dtype=jnp.bfloat16, head_dim=128, page=64, num_tokens=8):
    s = jax.ShapeDtypeStruct
    pages = s((64, 8, page, head_dim), kv_dtype)
    scales = s((64, 8, page), jnp.float32) if jnp.dtype(kv_dtype).itemsize == 1 else None
    kv = PagedKV(pages, pages, scales, scales)
    i32 = jnp.int32
    return s((num_tokens, 32, head_dim), dtype), kv, s((8,), i32), s((8, 16), i32), s((9,), i32)


@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("num_tokens", "max_q_len"), [(8, 1), (512, 512)])
def test_it_lowers_for_cuda_on_every_jax(kv_dtype, num_tokens, max_q_len):
    def f(*args):
        return ragged_paged_attention(*args, sm_scale=0.1, max_q_len=max_q_len, impl="mosaic_gpu")

    args = _abstract(kv_dtype=kv_dtype, num_tokens=num_tokens)
    with target.state("h100"):
        lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32, "kv_dtype": jnp.float32}, "q must be bf16 or f16"),
        ({"kv_dtype": jnp.float16}, "kv pages must be bfloat16"),
        ({"kv_dtype": jnp.uint8}, "only the xla backend reads int4 kv pages"),
        ({"head_dim": 80}, "head_dim must be a multiple of 32"),
        ({"page": 48}, "page size must divide 64"),
    ],
)
def test_what_it_cannot_run_it_refuses_with_the_reason(change, reason):
    with target.state("h100"), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            lambda *a: ragged_paged_attention(*a, sm_scale=1.0, impl="mosaic_gpu"),
            *_abstract(**change),
        )


def test_without_a_hopper_gpu_it_says_so():
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        jax.eval_shape(
            lambda *a: ragged_paged_attention(*a, sm_scale=1.0, impl="mosaic_gpu"), *_abstract()
        )


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("max_q_len", [1, 512])
def test_tiles_without_a_table_fit_every_head(head_dim, kv_dtype, max_q_len):
    q, kv, *_ = _abstract(kv_dtype=kv_dtype, head_dim=head_dim)
    first, *_ = mosaic_gpu.candidates(q, kv, max_q_len)
    assert first.num_stages >= 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_block": 96},
        {"num_stages": 3},
        {"num_attending": 3},
        {"num_converted": 3},
        {"min_part": 30},
    ],
)
def test_impossible_tiles_are_refused(wrong):
    with pytest.raises(ValueError, match="MosaicGpuTiles"):
        dataclasses.replace(MosaicGpuTiles(), **wrong)
