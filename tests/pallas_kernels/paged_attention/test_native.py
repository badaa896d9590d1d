"""The native backend against float64 numpy and the jnp backend, on the cases of all backends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import native
from pallas_kernels.paged_attention import PagedKV, pack_int4, ragged_paged_attention

pytestmark = pytest.mark.skipif(native().why_not is not None, reason=str(native().why_not))

attend = jax.jit(
    ragged_paged_attention,
    static_argnames=(
        *("sm_scale", "soft_cap", "sliding_window", "max_q_len"),
        *("return_lse", "config", "impl"),
    ),
)
F32_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def check(inputs, expected, tolerance=F32_TOLERANCE):
    out, lse = attend(*inputs.args, **inputs.kwargs, return_lse=True, impl="native")
    assert out.dtype == inputs.q.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], **tolerance)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected[1], **F32_TOLERANCE)
    padding = inputs.q_starts[-1]
    assert not np.asarray(out[padding:]).any()
    assert np.isneginf(np.asarray(lse[padding:])).all()


@pytest.mark.parametrize("head_dim", [32, 64])
def test_agrees_with_float64(case, reference, head_dim):
    """Heads of 64 have a form of their own for one token a sequence."""
    inputs = dataclasses.replace(case, head_dim=head_dim).build()
    check(inputs, reference(inputs))


@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (96, 32), (128, 64), (256, 128)])
@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn", "int8"])
def test_heads_and_pages_of_real_models(make_case, reference, head_dim, page_size, kv_dtype):
    seqs = ((1, 2 * page_size + 1), (3, page_size), (0, 0), (1, 1))
    case = make_case(
        name="", seqs=seqs, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype, num_tokens=7
    )
    inputs = case.build()
    check(inputs, reference(inputs))


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 1), (7, 1), (9, 3)])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 4.0}, {"sliding_window": 1500}])
def test_long_sequences_are_joined_of_parts(make_case, reference, heads, options):
    seqs = ((1, 1023), (1, 1024), (1, 1025), (1, 2600), (3, 2100))
    case = make_case(name="", seqs=seqs, heads=heads, head_dim=64, page_size=32, **options)
    inputs = case.build()
    check(inputs, reference(inputs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(make_case, reference, dtype):
    inputs = make_case(name="", seqs=((1, 300), (40, 60)), head_dim=64).build(dtype=dtype)
    check(inputs, reference(inputs), {"rtol": 5e-3, "atol": 5e-3})


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("seqs", [((1, 30), (1, 9)), ((20, 33), (1, 9))])
def test_int4_pages(make_case, head_dim, seqs):
    inputs = make_case(name="", seqs=seqs, head_dim=head_dim).build()
    rng = np.random.default_rng(0)
    shape = inputs.kv.k_pages.shape
    k, v = (pack_int4(jnp.asarray(rng.integers(-8, 8, shape), jnp.int8)) for _ in range(2))
    scales = [jnp.asarray(rng.uniform(0.5, 2, shape[:3]), jnp.float32) for _ in range(2)]
    inputs = dataclasses.replace(inputs, kv=PagedKV(k, v, *scales))
    expected = attend(*inputs.args, **inputs.kwargs, return_lse=True, impl="xla")
    check(inputs, [np.asarray(x, np.float64) for x in expected])


def test_every_code_of_fp8_pages(make_case):
    inputs = make_case(name="", seqs=((1, 1),), heads=(1, 1), head_dim=256).build()
    codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.float8_e4m3fn)
    shape = inputs.kv.k_pages.shape
    k, v = jnp.zeros(shape, codes.dtype), jnp.broadcast_to(codes, shape)
    inputs = dataclasses.replace(inputs, kv=PagedKV(k, v))
    out = np.asarray(attend(*inputs.args, **inputs.kwargs, impl="native"))[0, 0]
    np.testing.assert_array_equal(out, np.asarray(codes, np.float32))


@pytest.mark.parametrize("where", ["k", "v", "q"])
@pytest.mark.parametrize("seqs", [((1, 30), (1, 9)), ((20, 33), (3, 9))])
def test_nan_comes_through_and_stays_with_its_sequence(make_case, seqs, where):
    inputs = make_case(name="", seqs=seqs, head_dim=64).build()
    clean = np.asarray(attend(*inputs.args, **inputs.kwargs, impl="native"))
    page = inputs.page_table[0, 0]
    if where == "q":
        inputs.q[0] = np.nan
    else:
        pages = getattr(inputs.kv, f"{where}_pages").at[page, :, 3].set(jnp.nan)
        inputs = dataclasses.replace(
            inputs, kv=dataclasses.replace(inputs.kv, **{f"{where}_pages": pages})
        )
    out = np.asarray(attend(*inputs.args, **inputs.kwargs, impl="native"))
    end = inputs.q_starts[1]
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[end:], clean[end:])


def test_results_do_not_depend_on_other_sequences(make_case):
    """Nor on how a chunk is cut, bit for bit, as long as it has more than one token."""
    seqs = ((1, 1500), (40, 70), (1, 1), (5, 5), (70, 70))
    inputs = make_case(name="", seqs=seqs, head_dim=64).build()
    together = np.asarray(attend(*inputs.args, **inputs.kwargs, impl="native"))
    for s in range(len(seqs)):
        first, end = inputs.q_starts[s], inputs.q_starts[s + 1]
        q, kv, kv_lens, table, _ = inputs.args
        for begin in {first, min(first + 3, end - 1)} if end - first > 4 else {first}:
            alone = attend(
                *(q[begin:end], kv, kv_lens[s : s + 1], table[s : s + 1]),
                jnp.array([0, end - begin], jnp.int32),
                **{**inputs.kwargs, "max_q_len": int(end - begin)},
                impl="native",
            )
            np.testing.assert_array_equal(np.asarray(alone), together[begin:end])


def test_operands_out_of_bounds_read_nothing_else(make_case):
    """Page ids are clamped as XLA's are, lengths to the table, and the program ends."""
    inputs = make_case(name="", seqs=((1, 30), (3, 9)), head_dim=64).build()
    q, kv, _, table, _ = inputs.args
    lens = jnp.array([2**30, -5], jnp.int32)
    starts = jnp.array([0, 1, 2**30], jnp.int32)
    out = attend(q, kv, lens, table + 10**6, starts, **inputs.kwargs, impl="native")
    assert out.shape == q.shape
