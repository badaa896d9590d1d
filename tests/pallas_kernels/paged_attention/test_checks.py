"""Wrong arguments are refused with what was expected, what came and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compile_only, dispatch, target
from pallas_kernels.native import native
from pallas_kernels.paged_attention import (
    PagedKV,
    XlaTiles,
    ragged_paged_attention,
)
from pallas_kernels.paged_attention.cases import compile_cases

s, f32, i32 = jax.ShapeDtypeStruct, jnp.float32, jnp.int32


def arguments(**change):
    pages = change.pop("pages", s((9, 2, 8, 16), f32))
    v_pages = change.pop("v_pages", pages)
    scales = change.pop("k_scale", None), change.pop("v_scale", None)
    args = {
        "q": s((5, 4, 16), f32),
        "kv": PagedKV(pages, v_pages, *scales),
        "kv_lens": s((3,), i32),
        "page_table": s((3, 4), i32),
        "q_starts": s((4,), i32),
        "sm_scale": 1.0,
    }
    return args | change


def call(**change):
    return dispatch.explain(ragged_paged_attention, **arguments(**change))


INT8, SCALE = s((9, 2, 8, 16), jnp.int8), s((9, 2, 8), f32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": s((5, 64), f32)}, r"q must be f32, bf16 or f16 \[T, N, H\], got float32\[5, 64\]"),
        ({"q": s((5, 4, 16), i32)}, r"got int32\[5, 4, 16\]"),
        ({"pages": s((9, 2, 8, 8), f32)}, "H at least the 16 of q"),
        ({"v_pages": s((9, 2, 8, 17), f32)}, "v_pages must be float32.*as kv.k_pages is"),
        ({"pages": s((9, 2, 8, 16), i32)}, "kv pages must be f32.*got int32"),
        ({"q": s((5, 3, 16), f32)}, "q has 3 heads, not a multiple of the 2 heads"),
        ({"pages": INT8}, r"int8 kv pages need k_scale and v_scale, f32\[9, 2, 8\]"),
        ({"pages": INT8, "k_scale": SCALE}, "both given or both None"),
        ({"k_scale": SCALE, "v_scale": SCALE}, "scales go with float8_e4m3fn, int8 or uint8"),
        (
            {"pages": INT8, "k_scale": SCALE, "v_scale": s((9, 2), f32)},
            r"v_scale must be float32\[",
        ),
        ({"kv_lens": s((3,), f32)}, "kv_lens must be int32 with 1 axes, got float32"),
        ({"page_table": s((4, 3), i32)}, r"page_table must be int32\[3, max_pages\]"),
        ({"page_table": s((12,), i32)}, r"page_table must be int32 with 2 axes, got int32\[12\]"),
        ({"page_table": s((3, 4), jnp.uint32)}, "page_table must be int32.*got uint32"),
        ({"k_scale": s((9, 2, 4), f32), "v_scale": SCALE, "pages": INT8}, "kv.k_scale must be"),
        ({"q_starts": s((3,), i32)}, r"q_starts must be int32\[4\].*got int32\[3\]"),
        ({"soft_cap": 0.0}, "soft_cap must be positive"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"max_q_len": 0}, "max_q_len must be at least 1"),
        ({"sliding_window": 2.5}, "sliding_window must be a whole number.*got 2.5"),
        ({"max_q_len": 2.0}, "max_q_len must be a whole number.*got 2.0"),
        ({"q": s((0, 4, 16), f32)}, r"q must not be empty, got float32\[0, 4, 16\]; pad"),
        ({"pages": s((0, 2, 8, 16), f32)}, "kv.k_pages must not be empty"),
        ({"pages": s((9, 0, 8, 16), f32)}, "kv.k_pages must not be empty"),
        ({"page_table": s((3, 0), i32)}, "page_table must not be empty"),
        ({"kv_lens": s((0,), i32), "q_starts": s((1,), i32)}, "kv_lens must not be empty"),
        ({"tree_mask": s((4, 1), jnp.uint32)}, r"tree_mask must be uint32\[5, words\]"),
        ({"tree_mask": s((5, 1), i32)}, r"tree_mask must be uint32"),
        ({"tree_mask": s((5, 0), jnp.uint32)}, "0 bits a token, too few.*max_q_len = 5"),
        ({"impl": "triton"}, "impl must be one of"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_pages_that_are_no_paged_kv_are_refused():
    with pytest.raises(TypeError, match="kv must be a PagedKV, got tuple"):
        call(kv=(1, 2))


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_impossible_tiles_are_refused(sizes):
    with pytest.raises(ValueError, match="XlaTiles: kv_block and q_block must be at least 1"):
        XlaTiles(kv_block=sizes[0], q_block=sizes[1])


def test_numpy_arrays_and_lists_are_as_good_as_jax_arrays(make_case):
    """A host's scheduler keeps its page tables in numpy."""
    inputs = make_case(name="", seqs=((1, 20), (9, 9)), kv_dtype="int8").build()
    expected = ragged_paged_attention(*inputs.args, **inputs.kwargs)
    q, kv, *rest = jax.tree.map(np.asarray, inputs.args)
    for kv_lens, page_table, q_starts in (rest, [x.astype(np.int64) for x in rest],
                                          [x.tolist() for x in rest]):  # fmt: skip
        out = ragged_paged_attention(q, kv, kv_lens, page_table, q_starts, **inputs.kwargs)
        assert (out == expected).all()


def test_arguments_that_no_kernel_takes_fall_to_jnp_on_a_cpu():
    [decision] = call(q=s((5, 4, 8), f32), pages=s((9, 2, 16, 8), f32))
    assert decision.chosen == "xla"
    assert "multiples of 16" in dict(decision.reasons)["native"] or native().why_not
    assert dict(decision.reasons)["mosaic_gpu"].startswith("needs a Hopper GPU")


@pytest.mark.parametrize(("name", "chosen"), [("h100", "mosaic_gpu"), ("v6e", "mosaic_tpu")])
def test_16_bit_arguments_take_the_kernel_of_their_target(name, chosen):
    bf16 = jnp.bfloat16
    with target.state(name):
        [decision] = call(q=s((5, 4, 128), bf16), pages=s((9, 2, 16, 128), bf16))
        assert decision.chosen == chosen
        [decision] = call(q=s((5, 4, 128), bf16), pages=s((9, 2, 12, 128), bf16))
        assert decision.chosen == "xla"


def test_pages_wider_than_the_queries_hold_zeros_in_the_rest(make_case, reference):
    inputs = make_case(name="", seqs=((1, 20), (3, 9))).build()
    q, kv, *rest = inputs.args
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 96))), kv)
    plain = ragged_paged_attention(q, kv, *rest, **inputs.kwargs)
    out = ragged_paged_attention(q, wide, *rest, **inputs.kwargs)
    assert out.shape == plain.shape
    assert jnp.allclose(out, plain, atol=1e-6)


def test_the_unused_config_of_another_backend_is_refused():
    from pallas_kernels.paged_attention import MosaicTpuTiles

    with pytest.raises(NotImplementedError, match="config must be XlaTiles, got MosaicTpuTiles"):
        ragged_paged_attention(**zeros(arguments(config=MosaicTpuTiles(), impl="xla")))


def zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if hasattr(x, "shape") else x, tree)


@pytest.mark.parametrize("name", ["h100", "v5e", "v6e", "tpu7x"])
def test_a_real_call_compiles_for_a_chip_that_is_not_there(name):
    """The first of the calls of scripts/compile_kernels.py; that script does them all."""
    if reason := compile_only.why_not_compile(name):
        pytest.skip(reason)
    with compile_only.compile_target(name) as compiler:
        cases = compile_cases(compiler.target)
        assert len({case.name for case in cases}) == len(cases)
        done = compiler.compile(cases[0].fn, *cases[0].abstract_args)
    assert done.temp_bytes < cases[0].max_temp_bytes
    if name == "h100":
        [kernel] = done.kernels
        assert kernel.spill_bytes == 0 and kernel.has_wgmma and kernel.has_tma
