"""One list of cases for every rung, and the specification in float64 numpy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.paged_attention import PagedKV, ragged_paged_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences as (tokens of this step, keys in all), and the shape of everything else."""

    name: str
    seqs: tuple[tuple[int, int], ...]
    num_tokens: int | None = None  # padded; None: no padding
    heads: tuple[int, int] = (4, 2)  # N, K
    head_dim: int = 32
    page_size: int = 8
    kv_dtype: str = "float32"
    soft_cap: float | None = None
    sliding_window: int | None = None
    max_q_len: int | None = None
    has_tree: bool = False
    scale: float = 1.0  # of the queries: large ones make the softmax sharp

    def build(self, seed: int = 0, dtype: str = "float32") -> Inputs:
        return _build(self, seed, dtype)


@dataclasses.dataclass(frozen=True)
class Inputs:
    q: np.ndarray
    kv: PagedKV
    kv_lens: np.ndarray
    page_table: np.ndarray
    q_starts: np.ndarray
    tree_mask: np.ndarray | None
    options: dict

    @property
    def args(self):
        arrays = (self.q, self.kv_lens, self.page_table, self.q_starts)
        q, kv_lens, page_table, q_starts = map(jnp.asarray, arrays)
        return q, self.kv, kv_lens, page_table, q_starts

    @property
    def kwargs(self):
        tree = None if self.tree_mask is None else jnp.asarray(self.tree_mask)
        return {**self.options, "tree_mask": tree}


CASES = (
    Case(name="one token", seqs=((1, 1),)),
    Case(name="one page exactly", seqs=((1, 8), (1, 16))),
    Case(name="page boundary minus and plus one", seqs=((1, 7), (1, 9), (1, 15), (1, 17))),
    Case(name="empty places and padding rows", seqs=((1, 5), (0, 0), (1, 9), (0, 0)), num_tokens=7),
    Case(name="nothing at all", seqs=((0, 0), (0, 0)), num_tokens=3, max_q_len=1),
    Case(name="lengths that differ a hundredfold", seqs=((1, 3), (1, 300), (1, 40))),
    Case(name="mha", seqs=((1, 11), (1, 4)), heads=(4, 4)),
    Case(name="mqa", seqs=((1, 11), (1, 4)), heads=(8, 1)),
    Case(name="seven heads a group", seqs=((1, 11), (1, 20)), heads=(14, 2)),
    Case(name="soft cap", seqs=((1, 30), (2, 9)), soft_cap=5.0, scale=8.0),
    Case(name="window shorter than a page", seqs=((1, 30), (1, 2), (1, 17)), sliding_window=5),
    Case(name="window of one", seqs=((1, 30), (3, 9)), sliding_window=1),
    Case(name="whole prompt", seqs=((33, 33),), page_size=16),
    Case(name="prompt longer than a query tile", seqs=((150, 150),), page_size=16),
    Case(name="last row of every tile", seqs=((64, 64), (65, 65), (63, 63), (128, 130))),
    Case(name="chunk behind a prefix", seqs=((40, 97), (33, 35)), num_tokens=80),
    Case(name="chunk with a window", seqs=((70, 200), (3, 20)), sliding_window=20),
    Case(name="decodes and chunks mixed", seqs=((1, 50), (1, 3), (40, 70), (0, 0), (1, 1), (5, 5))),
    Case(name="few tokens each", seqs=((3, 20), (1, 9), (2, 2), (4, 31)), max_q_len=4),
    Case(name="few tokens of one among many", seqs=((1, 20), (1, 9), (1, 2), (1, 40), (3, 31))),
    Case(name="no tokens but keys", seqs=((0, 12), (1, 9)), max_q_len=1),
    Case(name="tree of 16", seqs=((16, 40), (16, 16), (9, 30)), has_tree=True),
    Case(name="tree of 40", seqs=((40, 75), (1, 30)), has_tree=True),
    Case(name="tree with a window", seqs=((8, 40), (5, 9)), has_tree=True, sliding_window=11),
    Case(name="sharp softmax", seqs=((1, 40), (6, 20)), scale=60.0),
    Case(name="fp8 decode", seqs=((1, 30), (1, 9)), kv_dtype="float8_e4m3fn"),
    Case(name="fp8 chunk", seqs=((20, 33), (1, 9)), kv_dtype="float8_e4m3fn", soft_cap=10.0),
    Case(name="int8 decode", seqs=((1, 30), (1, 9)), kv_dtype="int8"),
    Case(name="int8 tree", seqs=((7, 33), (4, 9)), kv_dtype="int8", has_tree=True, max_q_len=8),
)  # fmt: skip


def _build(case: Case, seed: int, dtype: str) -> Inputs:
    rng = np.random.default_rng(seed)
    (n, k), h, b = case.heads, case.head_dim, case.page_size
    q_lens = [s[0] for s in case.seqs]
    kv_lens = np.array([s[1] for s in case.seqs], np.int32)
    q_starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    num_tokens = case.num_tokens or int(q_starts[-1])
    pages_of = -(-kv_lens // b)
    num_pages = int(pages_of.sum()) + 2
    ids = rng.permutation(num_pages)
    # Entries past the end name a page that holds nothing but NaN.
    page_table = np.full((len(case.seqs), int(pages_of.max()) + 1), ids[-1], np.int32)
    start = 0
    for s, count in enumerate(pages_of):
        page_table[s, :count] = ids[start : start + count]
        start += count
    shape = (num_pages, k, b, h)
    k_pages, v_pages = rng.standard_normal(shape), rng.standard_normal(shape)
    k_scale = v_scale = None
    if case.kv_dtype == "int8":
        k_pages, v_pages = (np.clip(np.rint(x * 40), -127, 127) for x in (k_pages, v_pages))
    if case.kv_dtype in ("int8", "float8_e4m3fn"):
        size = 1 / 40 if case.kv_dtype == "int8" else 1.0
        k_scale, v_scale = (
            jnp.asarray(rng.uniform(0.5, 2, shape[:3]) * size, jnp.float32) for _ in range(2)
        )
    kv_type = np.dtype(getattr(ml_dtypes, case.kv_dtype, case.kv_dtype))
    if case.kv_dtype == "float32":
        kv_type = np.dtype(getattr(ml_dtypes, dtype, dtype))
    is_live = np.zeros((num_pages, b), bool)
    for s, kv_len in enumerate(kv_lens):
        keys = np.arange(kv_len)
        is_live[page_table[s, keys // b], keys % b] = True
    kv = jax.tree.map(
        lambda x: _poison(x, is_live),
        PagedKV(*(jnp.asarray(x.astype(kv_type)) for x in (k_pages, v_pages)), k_scale, v_scale),
    )
    q = rng.standard_normal((num_tokens, n, h)) * case.scale
    tree = None
    if case.has_tree:
        tree = rng.integers(0, 2**32, (num_tokens, -(-max(q_lens) // 32)), np.uint32)  # padding
        for s, count in enumerate(q_lens):
            tree[q_starts[s] : q_starts[s] + count] = _random_tree(rng, count, tree.shape[1])
    options = {
        "sm_scale": h**-0.5,
        "soft_cap": case.soft_cap,
        "sliding_window": case.sliding_window,
        "max_q_len": case.max_q_len or max(q_lens),
    }
    q = q.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    return Inputs(q, kv, kv_lens, page_table, q_starts, tree, options)


def _poison(x: jax.Array, is_live: np.ndarray) -> jax.Array:
    """Fills places [P, B] where no key lives with what a former owner may have left: NaN."""
    mask = jnp.asarray(is_live)[:, None, :].reshape(len(is_live), 1, -1, *[1] * (x.ndim - 3))
    garbage = 127 if x.dtype == jnp.int8 else jnp.nan
    return jnp.where(mask, x, jnp.array(garbage, x.dtype))


def _random_tree(rng, count: int, words: int) -> np.ndarray:
    bits = np.zeros((count, 32 * words), bool)
    for i in range(count):
        if i:
            bits[i] = bits[rng.integers(0, i)]
        bits[i, i] = True
    return (
        (bits.reshape(count, words, 32) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
    )


def attention_in_float64(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Returns (out [T, N, H], lse [T, N]): one token, one head, one sum after the other."""
    kv, options = inputs.kv, inputs.options
    k, v = (np.asarray(x).astype(np.float64) for x in (kv.k_pages, kv.v_pages))
    if kv.k_scale is not None:
        k *= np.asarray(kv.k_scale, np.float64)[..., None]
        v *= np.asarray(kv.v_scale, np.float64)[..., None]
    q = inputs.q.astype(np.float64)
    group = q.shape[1] // k.shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for s, kv_len in enumerate(inputs.kv_lens):
        first, end = inputs.q_starts[s], inputs.q_starts[s + 1]
        table = inputs.page_table[s]
        keys = np.concatenate([k[p] for p in table], axis=1)[:, :kv_len]  # [K, kv_len, H]
        values = np.concatenate([v[p] for p in table], axis=1)[:, :kv_len]
        for t in range(first, end):
            visible = _visible_keys(inputs, int(kv_len), int(end - first), int(t - first), t)
            if not visible.any():
                continue
            for n in range(q.shape[1]):
                logits = keys[n // group][visible] @ q[t, n] * options["sm_scale"]
                if cap := options["soft_cap"]:
                    logits = cap * np.tanh(logits / cap)
                top = logits.max()
                weights = np.exp(logits - top)
                out[t, n] = weights @ values[n // group][visible] / weights.sum()
                lse[t, n] = top + np.log(weights.sum())
    return out, lse


def _visible_keys(inputs: Inputs, kv_len: int, q_len: int, j: int, t: int) -> np.ndarray:
    start = kv_len - q_len
    keys = np.arange(kv_len)
    window = inputs.options["sliding_window"] or 10**9
    if inputs.tree_mask is None:
        return (keys <= start + j) & (keys > start + j - window)
    words = inputs.tree_mask[t]
    bits = np.array([int(words[i // 32]) >> (i % 32) & 1 for i in range(q_len)], bool)
    visible = keys > start + bits.sum() - 1 - window
    visible[start:] = bits
    return visible


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))


@pytest.fixture
def reference():
    return attention_in_float64


@pytest.fixture
def cases():
    return {case.name: case for case in CASES}


@pytest.fixture
def make_case():
    return Case


@pytest.fixture
def attend_both():
    """A function that runs a backend and the jnp one on the same inputs and compares them.

    Both see the same 16-bit inputs; they differ in the rounding of the probabilities (8 bits of
    mantissa in bf16) and of the result. The jnp one gets the queries as f32: those of 16 bits are
    shortened on accelerators (TF32) after sm_scale, too much for a sharp softmax.
    """

    def check(inputs: Inputs, impl: str, config=None) -> None:
        run = jax.jit(
            functools.partial(ragged_paged_attention, **inputs.options, return_lse=True),
            static_argnames=("impl", "config"),
        )
        tree = inputs.kwargs["tree_mask"]
        q, *rest = inputs.args
        expected, expected_lse = run(q.astype(jnp.float32), *rest, tree_mask=tree, impl="xla")
        out, lse = run(q, *rest, tree_mask=tree, impl=impl, config=config)
        assert out.dtype == q.dtype
        out, expected = (np.asarray(x, np.float64) for x in (out, expected))
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(out, expected, atol=2**-7 * scale, rtol=2**-7)
        lse, expected_lse = np.asarray(lse), np.asarray(expected_lse)
        assert (np.isneginf(lse) == np.isneginf(expected_lse)).all()
        is_seen = np.isfinite(expected_lse)
        np.testing.assert_allclose(lse[is_seen], expected_lse[is_seen], atol=2e-3, rtol=2e-3)

    return check
