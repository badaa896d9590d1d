"""Quantized K and V: the codes against their specification, the pool, and a tiny engine on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_config

from jinfer import LLM, SamplingParams
from jinfer.config import memory
from jinfer.config.cache import CacheConfig, kv_format
from jinfer.config.model import ModelConfig
from jinfer.kv import cache as kv_cache
from jinfer.kv import codes as kv_quant
from jinfer.models.model import Model
from pallas_kernels import target
from pallas_kernels.paged_attention import ragged_paged_attention

FORMATS = ("float8_e4m3fn", "int8", "int4")
CONFIG = make_config(199, head_dim=16)
PAGES, PAGE = 6, 4


def heads(seed, *shape):
    """Heads [..., H] with a few outlier channels, as K has them."""
    x = np.random.default_rng(seed).standard_normal((*shape, CONFIG.head_dim))
    x[..., 3] *= 20
    return jnp.asarray(x, jnp.float32)


def empty_pool(dtype):
    cache = CacheConfig(num_pages=PAGES, page_size=PAGE, dtype=dtype)
    return kv_cache.init(CONFIG, cache)


def int32(values):
    return jnp.asarray(values, jnp.int32)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_value_comes_back_within_half_a_step(dtype):
    x = heads(0, 64, 2)
    codes, scale = kv_quant.quantize(x, dtype)
    error = np.abs(kv_quant.dequantize(codes, scale) - x)
    if dtype == "float8_e4m3fn":  # 3 bits of mantissa; below 2^-6 steps of 2^-9
        bound = np.maximum(np.abs(x) * 2.0**-4, scale[..., None] * 2.0**-10)
    elif dtype == "int8":
        bound = scale[..., None] / 2 * np.ones_like(x)
    else:  # the outer levels lie a fifth apart, or the last tenth is clipped
        bound = 0.11 * np.abs(x).max(axis=-1, keepdims=True)
    assert (error <= bound * (1 + 1e-5)).all()
    if dtype != "int4":  # the largest value of a head is met, so no smaller scale would do
        top = np.abs(x).max(axis=-1)
        np.testing.assert_allclose(scale, top / kv_quant.MAX_CODE[dtype], rtol=1e-6)


def test_int4_takes_the_best_of_its_scales():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1000, 64)), jnp.float32)
    codes, scale = kv_quant.quantize(x, "int4")
    shares = np.asarray(scale / jnp.abs(x).max(axis=-1))
    found = {share: int(np.isclose(shares, share).sum()) for share in kv_quant.SHARES}
    assert sum(found.values()) == 1000 and min(found.values()) > 20
    error = np.square(kv_quant.dequantize(codes, scale) - x).mean()
    assert error < 0.0076  # even steps of max |x| / 7 give 0.0117


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("factor", [0.0, 1e-37, 1e-20, 1e30])
def test_heads_of_any_size_stay_finite(dtype, factor):
    x = heads(1, 100, 1) * factor
    back = kv_quant.dequantize(*kv_quant.quantize(x, dtype))
    assert np.isfinite(np.asarray(back)).all()
    if factor > 1e-30:
        assert np.abs(back - x).max() <= np.abs(x).max() / 7


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen_and_stays_in_its_head(dtype, bad):
    x = heads(2, 3, 2).at[1, 0, 5].set(bad)
    back = np.asarray(kv_quant.dequantize(*kv_quant.quantize(x, dtype)))
    is_bad = ~np.isfinite(back).all(axis=-1)
    assert is_bad.tolist() == [[False, False], [True, False], [False, False]]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("num_tokens", "where"),  # a TPU is given single rows
    [(1, "cpu"), (2, "cpu"), (4, "cpu"), (8, "cpu"), (16, "cpu"), (1, "v6e"), (8, "v6e")],
)
def test_the_last_row_of_a_bucket_is_written_and_padding_is_dropped(dtype, num_tokens, where):
    kv = empty_pool(dtype)
    k, v = heads(3, num_tokens, 2), heads(4, num_tokens, 2)
    slots = np.random.default_rng(5).permutation(PAGES * PAGE)[:num_tokens]

    def write(slots):
        with target.state(where):
            return kv_cache.write(kv, 1, k, v, int32(slots))

    padded = slots.copy()
    padded[1:-1] = kv.num_slots  # what the engine gives to padding rows
    padded[1::2] = -1
    padded[-1] = slots[-1]
    for given, after in ((slots, write(slots)), (padded, write(padded))):
        expected = [np.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kv)]
        stored = [*zip(*(kv_quant.quantize(x, dtype) for x in (k, v)))]
        new = [np.asarray(x) for pair in stored for x in pair]  # k, v, k_scale, v_scale
        for pool, rows in zip(expected, new):
            for slot, row in zip(given, rows):
                if 0 <= slot < kv.num_slots:
                    page = kv.num_pages + slot // PAGE  # of layer 1
                    pool[page, :, slot % PAGE] = row.view(pool.dtype)
        for pool, got in zip(expected, jax.tree.leaves(after)):
            np.testing.assert_array_equal(got, pool)


@pytest.mark.parametrize("dtype", FORMATS)
def test_attention_reads_what_was_written(dtype):
    """The pool against its twin of dequantized floats; a chunk reads its own tokens so, too."""
    num_tokens = 11
    k, v, q = heads(6, num_tokens, 2), heads(7, num_tokens, 2), heads(8, num_tokens, 4)
    slots = int32([*range(8, 19)])  # pages 2, 3, 4
    kv = kv_cache.write(empty_pool(dtype), 0, k, v, slots)
    twin = [kv_quant.dequantize(*kv_quant.quantize(x, dtype)) for x in (k, v)]
    plain = kv_cache.write(empty_pool("float32"), 0, *twin, slots)
    for rows in (1, num_tokens):  # a decode, a whole prompt
        outs = [
            ragged_paged_attention(
                q[-rows:],
                paged,
                int32([num_tokens]),
                int32([[2, 3, 4]]),
                int32([0, rows]),
                sm_scale=0.25,
            )
            for paged in (kv_cache.paged(kv), kv_cache.paged(plain))
        ]
        # The outliers' logits are several hundred, and f32 rounds them by 2^-16.
        np.testing.assert_allclose(outs[0], outs[1], rtol=2e-4, atol=5e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *FORMATS])
def test_the_planner_counts_the_bytes_of_the_pool(dtype):
    kv = empty_pool(dtype)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(kv))
    assert num_bytes == PAGES * memory.page_bytes(CONFIG, PAGE, dtype)
    per_token = {"float32": 64, "bfloat16": 32, "float8_e4m3fn": 20, "int8": 20, "int4": 12}
    assert num_bytes == 2 * 2 * 2 * per_token[dtype] * PAGES * PAGE


def test_formats_go_by_several_names_and_others_are_refused():
    assert kv_format("fp8") == kv_format("fp8_e4m3") == kv_format("float8_e4m3fn")
    assert CacheConfig(num_pages=1, page_size=4, dtype="fp8").dtype == "float8_e4m3fn"
    for name in ("fp8_e5m2", "int3", "float64"):
        with pytest.raises(ValueError, match=r"kv_cache_dtype must be auto or one of .*fp8"):
            kv_format(name)
    with pytest.raises(ValueError, match=r"head_dim must be even .*, got 15"):  # int4 packs pairs
        ModelConfig(**{**vars(CONFIG), "head_dim": 15})


# ------------------------------------------------------------------ through the engine

MODEL = Model(CONFIG)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def make_llm(params):
    made = {}

    def make(dtype):
        if dtype not in made:
            made[dtype] = LLM(
                MODEL,
                params=params,
                kv_cache_dtype=dtype,
                skip_tokenizer_init=True,
                max_model_len=64,
                max_num_seqs=2,
                max_num_batched_tokens=16,
                block_size=8,
                num_decode_steps=1,
                kv_cache_memory_bytes=40_000,
            )
        return made[dtype]

    return make


PROMPTS = [np.random.default_rng(s).integers(1, 199, 30).tolist() for s in range(2)]


def test_a_pool_of_the_same_bytes_holds_more_pages(make_llm):
    pages = {dtype: make_llm(dtype).get_metrics()["num_pages"] for dtype in ("auto", "fp8", "int4")}
    assert pages == {"auto": 9, "fp8": 16, "int4": 16}  # 128 tokens are all that can be live
    big = {"page_size": 8, "budget_bytes": 2**20}
    counts = [memory.num_pages(CONFIG, dtype=d, **big) for d in ("float32", "fp8", "int4")]
    assert counts == [2**20 // n for n in (4096, 1280, 768)]


@pytest.mark.parametrize(("dtype", "most"), [("fp8", 0.2), ("int8", 0.05), ("int4", 1.0)])
@pytest.mark.thorough
def test_logprobs_are_those_of_float_kv_up_to_the_step(make_llm, dtype, most):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    rows = []
    for llm in (make_llm("auto"), make_llm(dtype)):
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        rows.append(
            [
                entry[token].logprob
                for prompt, output in zip(PROMPTS, outputs)
                for token, entry in zip(prompt[1:], output.prompt_logprobs[1:])
            ]
        )
    error = np.abs(np.subtract(*rows)).max()
    assert 0 < error < most


@pytest.mark.thorough
def test_quantized_kv_gives_the_same_tokens_warm_and_cold_alone_and_batched(make_llm):
    """Around every multiple of page (8) and chunk (16), with what the cache gave counted."""
    llm = make_llm("int8")
    warm = SamplingParams(temperature=0, max_tokens=5)
    cold = SamplingParams(temperature=0, max_tokens=5, skip_reading_prefix_cache=True)
    rng = np.random.default_rng(9)
    lengths = sorted({n + d for n in (8, 16, 24, 32, 48) for d in (-1, 0, 1)})
    prompts = [rng.integers(1, 199, length).tolist() for length in lengths]

    def run(prompts, params):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [o.outputs[0].token_ids for o in outputs], [o.num_cached_tokens for o in outputs]

    expected = []
    for prompt in prompts:
        [tokens], cached = run([prompt], cold)
        assert cached == [0]
        expected.append(tokens)
        # All but the last token: what ends inside a page is copied from there.
        assert run([prompt], warm) == ([tokens], [len(prompt) - 1])
    # Together their chunks share the 16 tokens of a step, so they are cut elsewhere.
    assert run(prompts, cold) == (expected, [0] * len(prompts))
    llm.check_integrity()
