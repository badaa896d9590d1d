"""Whole pages of the pool, moved in all layers at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config import memory
from jinfer.config.cache import CacheConfig
from jinfer.config.model import ModelConfig
from jinfer.kv import cache as kv_cache
from jinfer.steps import pool as steps_pool
from pallas_kernels import target
from pallas_kernels.paged_attention import ragged_paged_attention

CONFIG = ModelConfig(
    family="llama",
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=32,
)


def make_pool(dtype):
    kv = kv_cache.init(CONFIG, CacheConfig(num_pages=5, page_size=2, dtype=dtype))

    def fill(pool):
        return jnp.arange(pool.size, dtype=jnp.int32).reshape(pool.shape).astype(pool.dtype)

    return jax.tree.map(fill, kv)


def leaves(kv):
    """[L, P, ...] of everything that the pool holds."""
    return [np.asarray(x).reshape(3, 5, *x.shape[1:]) for x in jax.tree.leaves(kv)]


def int32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8", "int4"])
def test_pages_are_copied_in_every_layer_and_padding_is_dropped(dtype):
    before = leaves(make_pool(dtype))
    # 1 -> 4 and 4 -> 0 at once: reads come before writes.
    after = leaves(steps_pool.copy_pages(make_pool(dtype), int32(1, 4, 2, 2), int32(4, 0, 5, -1)))
    for old, new in zip(before, after):
        expected = old.copy()
        expected[:, 4], expected[:, 0] = old[:, 1], old[:, 4]
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_of_a_page_copied_in_part_the_rest_is_zero(dtype):
    before = leaves(make_pool(dtype))
    counts = int32(1, 2, 1)
    after = leaves(steps_pool.copy_pages(make_pool(dtype), int32(1, 2, 2), int32(4, 0, 5), counts))
    for old, new in zip(before, after):
        expected = old.copy()
        expected[:, 4, :, 0], expected[:, 4, :, 1] = old[:, 1, :, 0], 0
        expected[:, 0] = old[:, 2]
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8", "int4"])
def test_pages_are_read_and_written_elsewhere_with_all_that_belongs_to_them(dtype):
    before = leaves(make_pool(dtype))
    contents = steps_pool.read_pages(make_pool(dtype), int32(3, 1, 5))
    empty = jax.tree.map(jnp.zeros_like, make_pool(dtype))
    after = leaves(steps_pool.write_pages(empty, contents, int32(0, 4, 5)))  # the third is dropped
    for old, new in zip(before, after):
        expected = np.zeros_like(old)
        expected[:, 0], expected[:, 4] = old[:, 3], old[:, 1]
        np.testing.assert_array_equal(new, expected)


def test_pages_are_cleared_in_every_layer():
    for old, new in zip(
        leaves(make_pool("float32")),
        leaves(steps_pool.clear_pages(make_pool("float32"), int32(3, 5))),
    ):
        expected = old.copy()
        expected[:, 3] = 0
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("dtype", ["float32", "int4"])
@pytest.mark.parametrize("where", ["cpu", "v6e"])  # a TPU is given single rows
def test_tokens_move_with_their_scales_in_every_layer(dtype, where):
    pool = make_pool(dtype)
    before = leaves(pool)
    # Slot 3 is the second place of page 1; slot 10 is past the end.
    with target.state(where):
        after = leaves(kv_cache.move_slots(pool, int32(3, 0), int32(8, 10)))
    assert len(after) == (2 if dtype == "float32" else 4)
    for old, new in zip(before, after):
        expected = old.copy()
        expected[:, 4, :, 0] = old[:, 1, :, 1]
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8", "int4"])
@pytest.mark.thorough
def test_on_a_tpu_heads_lie_128_wide_and_are_read_as_written(dtype):
    """Narrower ones no kernel reads there; int4, which none reads at all, stays as it is."""
    cache = CacheConfig(num_pages=5, page_size=2, dtype=dtype)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 3, 2, 4), jnp.float32)
    k, v = k[:, :1], v[:, :1]

    def attend():
        kv = kv_cache.init(CONFIG, cache)
        kv = kv_cache.write(kv, 1, k, v, int32(6, 7, 2))
        table = kv_cache.layer_pages(kv, 1, int32(3, 1)[None])
        out = ragged_paged_attention(
            q, kv_cache.paged(kv), int32(3), table, int32(0, 3), sm_scale=0.5, impl="xla"
        )
        return kv, out

    plain, expected = attend()
    with target.state("v6e"):
        kv, out = attend()
        stored = kv_cache.as_stored(CONFIG, cache.dtype)
    assert kv.k.shape[-1] == (2 if dtype == "int4" else 128)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    for pool, config in ((kv, stored), (plain, CONFIG)):
        # On a CPU bf16 and fp8 lie as integers of the same width.
        num_bytes = sum(x.nbytes for x in jax.tree.leaves(pool))
        assert num_bytes == memory.page_bytes(config, 2, cache.dtype) * 5
    assert kv_cache.as_stored(CONFIG, cache.dtype) == CONFIG
