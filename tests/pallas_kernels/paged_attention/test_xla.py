"""The jnp backend against float64 numpy, and the laws of its loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import (
    PagedKV,
    decode_int4,
    pack_int4,
    ragged_paged_attention,
    unpack_int4,
)
from pallas_kernels.paged_attention.xla import XlaTiles

attend = jax.jit(
    ragged_paged_attention,
    static_argnames=(
        *("sm_scale", "soft_cap", "sliding_window", "max_q_len"),
        *("return_lse", "config", "impl"),
    ),
)

# f32 sums of up to 300 terms against float64.
F32_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def check(inputs, expected, **options):
    out, lse = attend(*inputs.args, **inputs.kwargs, return_lse=True, impl="xla", **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], **F32_TOLERANCE)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected[1], **F32_TOLERANCE)
    padding = inputs.q_starts[-1]
    assert not np.asarray(out[padding:]).any()
    assert np.isneginf(np.asarray(lse[padding:])).all()


def test_agrees_with_float64(case, reference):
    inputs = case.build()
    check(inputs, reference(inputs))


def test_tiles_do_not_matter(case, reference):
    inputs = case.build(seed=1)
    check(inputs, reference(inputs), config=XlaTiles(kv_block=8, q_block=16))


@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (96, 32), (128, 64), (256, 128)])
@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn", "int8"])
def test_heads_and_pages_of_real_models(make_case, reference, head_dim, page_size, kv_dtype):
    seqs = ((1, 2 * page_size + 1), (3, page_size), (0, 0), (1, 1))
    case = make_case(
        name="", seqs=seqs, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype, num_tokens=7
    )
    inputs = case.build()
    check(inputs, reference(inputs))


def test_bits_past_a_trees_last_node_mean_nothing(make_case, reference):
    """Not for what a node sees, nor for its depth, by which the window goes."""
    case = make_case(name="", seqs=((5, 40), (3, 9)), has_tree=True, sliding_window=6)
    inputs = case.build()
    expected = reference(inputs)
    tree_mask = inputs.tree_mask.copy()
    tree_mask[:5] |= np.uint32(0xFFFFFFE0)
    tree_mask[5:] |= np.uint32(0xFFFFFFF8)
    check(dataclasses.replace(inputs, tree_mask=tree_mask), expected)


@pytest.mark.parametrize("seqs", [((1, 20), (1, 9)), ((1, 20), (40, 60)), ((3, 20), (2, 9))])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 6, "has_tree": True}])
def test_64_bit_jax_changes_nothing(make_case, reference, seqs, options):
    inputs = make_case(name="", seqs=seqs, **options).build()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        check(inputs, reference(inputs))
        out = ragged_paged_attention(*inputs.args, **inputs.kwargs)  # its loop knows its bounds
    np.testing.assert_allclose(np.asarray(out), reference(inputs)[0], **F32_TOLERANCE)


def test_one_program_serves_every_length(make_case, reference):
    traces = []
    inputs = make_case(name="", seqs=((1, 300), (1, 300))).build()
    sm_scale = inputs.options["sm_scale"]
    f = jax.jit(lambda *a: traces.append(1) or ragged_paged_attention(*a, sm_scale=sm_scale))
    for length in (1, 8, 130, 300):
        inputs = dataclasses.replace(inputs, kv_lens=np.array([length, 300], np.int32))
        out = f(*inputs.args)
        np.testing.assert_allclose(np.asarray(out), reference(inputs)[0], **F32_TOLERANCE)
    assert len(traces) == 1


def test_any_mix_of_sequences_gives_what_each_gives_alone(make_case):
    seqs = ((1, 50), (40, 70), (1, 1), (5, 5), (70, 70))
    inputs = make_case(name="", seqs=seqs).build()
    together = attend(*inputs.args, **inputs.kwargs)
    for s in range(len(seqs)):
        first, end = inputs.q_starts[s], inputs.q_starts[s + 1]
        q, kv, kv_lens, table, _ = inputs.args
        alone = attend(
            *(q[first:end], kv, kv_lens[s : s + 1], table[s : s + 1]),
            jnp.array([0, end - first], jnp.int32),
            **{**inputs.kwargs, "max_q_len": int(end - first)},
        )
        np.testing.assert_allclose(np.asarray(alone), np.asarray(together[first:end]), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_inputs_are_accumulated_in_f32(make_case, reference, dtype):
    inputs = make_case(name="", seqs=((1, 300), (40, 60))).build(dtype=dtype)
    out, lse = attend(*inputs.args, **inputs.kwargs, return_lse=True)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    expected = reference(inputs)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected[1], rtol=1e-5, atol=1e-5)


def test_a_long_table_costs_nothing_in_temporaries(make_case):
    """The padded table of 4096 tokens is never gathered: temporaries stay below a page's worth."""
    case = make_case(name="", seqs=((1, 20),) * 4)
    q, kv, kv_lens, table, q_starts = case.build().args
    wide = jnp.pad(table, ((0, 0), (0, 4096 // case.page_size - table.shape[1])))
    temps = []
    for t in (table, wide):
        args = (q, kv, kv_lens, t, q_starts)
        compiled = attend.lower(*args, sm_scale=1.0, max_q_len=1).compile()
        temps.append(compiled.memory_analysis().temp_size_in_bytes)
    gathered = 2 * 4 * 4096 * 2 * case.head_dim * 4
    assert temps[1] < gathered / 8, temps


def test_int4_is_packed_two_a_byte_and_comes_back():
    values = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    packed = pack_int4(jnp.asarray(values))
    assert (packed.shape, packed.dtype) == ((2, 4), jnp.uint8)
    np.testing.assert_array_equal(unpack_int4(packed), values)
    assert int(packed[0, 0]) == 0xC8  # -8 below, -4 above


def test_int4_levels_are_symmetric_and_grow_from_the_middle():
    codes = jnp.arange(-8, 8, dtype=jnp.int8)
    levels = np.asarray(decode_int4(pack_int4(codes)))
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-7)
    assert levels[-1] == pytest.approx(1)
    gaps = np.diff(levels)
    assert (np.diff(gaps[7:]) > 0).all() and gaps[7] > 0


@pytest.mark.parametrize("seqs", [((1, 30), (1, 9), (0, 0)), ((20, 33), (1, 9))])
def test_int4_pages_are_read_as_the_float_pages_of_what_they_stand_for(make_case, seqs):
    inputs = make_case(name="", seqs=seqs, kv_dtype="int8").build()
    kv = inputs.kv
    packed = [pack_int4(x // 16) for x in (kv.k_pages, kv.v_pages)]  # -8..7
    floats = [
        decode_int4(x) * scale[..., None] for x, scale in zip(packed, (kv.k_scale, kv.v_scale))
    ]
    outs = [
        attend(*dataclasses.replace(inputs, kv=pages).args, **inputs.kwargs, impl="xla")
        for pages in (PagedKV(*floats), PagedKV(*packed, kv.k_scale, kv.v_scale))
    ]
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-5, atol=1e-6)
