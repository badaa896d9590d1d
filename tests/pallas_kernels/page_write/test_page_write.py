"""Rows go to their places and nowhere else, whatever the backend and the dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import native
from pallas_kernels.page_write import page_write

needs_native = pytest.mark.skipif(native().why_not is not None, reason=str(native().why_not))
IMPLS = ["xla", pytest.param("native", marks=needs_native)]
write = jax.jit(page_write, static_argnames="impl", donate_argnums=0)


def in_numpy(pool, rows, pages, offsets):
    pool = np.array(pool)
    for t, (page, offset) in enumerate(zip(pages, offsets)):
        if 0 <= page < len(pool):
            pool[page, :, offset] = rows[t]
    return pool


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8", "uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("width", [(16,), (), (5,)])
@pytest.mark.parametrize("num_tokens", [1, 7, 150])
def test_rows_go_to_their_places(impl, dtype, width, num_tokens):
    rng = np.random.default_rng(0)
    shape = (20, 3, 8, *width)
    pool = jnp.asarray(rng.integers(0, 100, shape), dtype)
    rows = jnp.asarray(rng.integers(0, 100, (num_tokens, 3, *width)), dtype)
    places = rng.permutation(20 * 8)[:num_tokens].astype(np.int32)
    pages, offsets = places // 8, places % 8
    pages[::3] = np.resize([20, -1, 2**31 - 1, -(2**31)], len(pages[::3]))  # padding, dropped
    expected = in_numpy(pool, rows, pages, offsets)
    out = write(pool, rows, jnp.asarray(pages), jnp.asarray(offsets), impl=impl)
    np.testing.assert_array_equal(np.asarray(out), expected)


@needs_native
def test_a_donated_pool_is_written_in_place_also_in_loops():
    pool = jnp.zeros((50, 2, 16, 64), jnp.uint16)

    def loop(pool, rows, pages, offsets):
        def body(i, pool):
            return page_write(pool, rows + jnp.uint16(i), pages, offsets + i, impl="native")

        return jax.lax.fori_loop(0, 4, body, pool)

    args = (
        jnp.ones((3, 2, 64), jnp.uint16),
        jnp.arange(3, dtype=jnp.int32),
        jnp.zeros(3, jnp.int32),
    )
    compiled = jax.jit(loop, donate_argnums=0).lower(pool, *args).compile()
    hlo = compiled.as_text()
    assert "custom-call" in hlo
    assert not [line for line in hlo.splitlines() if "u16[50,2,16,64]" in line and " copy(" in line]
    out = compiled(pool, *args)
    assert [int(out[0, 0, i, 0]) for i in range(5)] == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pool_that_is_not_donated_stays(impl):
    pool = jnp.zeros((2, 1, 4, 8))
    args = (jnp.ones((1, 1, 8)), jnp.array([1], jnp.int32), jnp.array([2], jnp.int32))
    out = jax.jit(page_write, static_argnames="impl")(pool, *args, impl=impl)
    assert out.sum() == 8 and pool.sum() == 0
