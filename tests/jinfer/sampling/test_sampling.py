"""The sampler against a plain float64 reference, and the laws that make results reproducible."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jinfer.config.sampling_params import NO_TOKEN, SamplingParams, child_seed
from jinfer.sampling import state as sampling_state
from jinfer.sampling.args import arg_row, pack_args, state_flags
from jinfer.sampling.check import check_request
from jinfer.sampling.draw import sample
from jinfer.sampling.logprobs import top_logprobs
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import (
    SamplerLimits,
    SamplerState,
    init_state,
    pack_bits,
    pack_row,
    reset_row,
    state_bytes,
)
from jinfer.sampling.threshold import _largest

V = 61  # not a multiple of 32: the last word of every bit row is ragged
LIMITS = SamplerLimits(max_logit_bias=8, max_bad_words=4, max_bad_word_tokens=4)
EOS = (2,)
PROMPT = [1, 5, 9, 9, 60]
OUTPUT = [7, 5, 7, 7, 30, 31]
BAD_WORDS = [[8], [7, 30, 31, 40], [31, 41], [30, 42], [31]]

process = jax.jit(process_logits)
draw = jax.jit(sample)
reset = jax.jit(reset_row)
observe = jax.jit(sampling_state.observe)


# --- the reference -------------------------------------------------------------------------------


def reference(logits, p, *, prompt=(), output=(), bad_words=(), eos=EOS):
    """The processed logits of one sequence in float64, straight from the documented order."""
    x = np.array(logits, np.float64)
    if p.allowed_token_ids is not None:
        x[[t for t in range(x.size) if t not in set(p.allowed_token_ids)]] = -np.inf
    for word in bad_words if p.bad_words else ():
        n = len(word) - 1
        if n == 0 or list(output[len(output) - n :]) == list(word[:-1]):
            x[word[-1]] = -np.inf
    if len(output) < p.min_tokens:
        x[[*eos, *p.stop_token_ids]] = -np.inf
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    for token in set(prompt) | set(output):
        r = p.repetition_penalty
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token in set(output):
        count = list(output).count(token)
        x[token] -= p.frequency_penalty * count + p.presence_penalty
    return x if p.is_greedy else cut(x, p)


def cut(x, p):
    x = x / p.temperature
    if p.min_p > 0:
        x[np.exp(x - x.max()) < p.min_p] = -np.inf
    if 0 < p.top_k < x.size:
        x[x < np.sort(x)[-p.top_k]] = -np.inf
    if p.top_p < 1:
        probs = np.exp(x - x.max())
        probs /= probs.sum()
        above = np.array([probs[x > value].sum() for value in x])
        x[above >= p.top_p] = -np.inf
    return x


def make(params, *, seeds=None, prompt=PROMPT, output=OUTPUT, size=None, eos=EOS):
    """State, args, rows and positions of a batch with the same prompt and output everywhere."""
    size = size or len(params)
    state = init_state(size, V, LIMITS)
    for i, p in enumerate(params):
        setup = pack_row(
            p, prompt, output, vocab_size=V, eos_token_ids=eos,
            bad_words_token_ids=BAD_WORDS if p.bad_words else (), limits=LIMITS,
        )  # fmt: skip
        state = reset(state, i, setup)
    seeds = seeds or range(len(params))
    arg_rows = [arg_row(p, seed=s, prompt_len=len(prompt)) for p, s in zip(params, seeds)]
    args = pack_args(arg_rows, size)
    rows = np.where(np.arange(size) < len(params), np.arange(size), size).astype(np.int32)
    positions = np.full(size, len(prompt) + len(output), np.int32)
    return state, args, rows, positions


def random_logits(size, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(size=(size, V)).astype(np.float32) * scale


def assert_same_distribution(got, want):
    got = np.asarray(got, np.float64)
    assert not np.isnan(got).any()
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    # f32 rounding of a few operations on values up to a few hundred.
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-5)


FIELDS = {
    "nothing": {},
    "temperature": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "tiny top_p": {"top_p": 1e-6},
    "top_p near one": {"top_p": 0.9999},
    "min_p": {"min_p": 0.07},
    "min_p of one": {"min_p": 1.0},
    "all cuts": {"temperature": 1.4, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    "min_p before top_p": {"top_p": 0.9, "min_p": 0.2, "temperature": 1.6},
    "presence": {"presence_penalty": 1.5},
    "negative presence": {"presence_penalty": -1.5},
    "frequency": {"frequency_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.7},
    "repetition below one": {"repetition_penalty": 0.6},
    "bias": {"logit_bias": {3: 4.0, 60: -100.0, 7: 1.25}},
    "bias before repetition": {"logit_bias": {5: 30.0}, "repetition_penalty": 2.0},
    "allowed": {"allowed_token_ids": [0, 31, 32, 60]},
    "bad words": {"bad_words": ["x"]},
    "allowed and bad": {"bad_words": ["x"], "allowed_token_ids": [8, 40, 41, 42, 43]},
    "min_tokens": {"min_tokens": 7, "stop_token_ids": [33, 60]},
    "min_tokens reached": {"min_tokens": 6, "stop_token_ids": [33, 60]},
    "everything": {
        "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 0.3,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {4: 2.0},
        "allowed_token_ids": list(range(3, 55)), "bad_words": ["x"], "min_tokens": 9,
        "stop_token_ids": [11],
    },
}  # fmt: skip


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", FIELDS)
def test_each_field_matches_the_reference(name, greedy):
    p = SamplingParams(**{**FIELDS[name], **({"temperature": 0} if greedy else {})})
    logits = random_logits(8, seed=len(name))
    state, args, rows, positions = make([p] * 8)
    got = process(logits, args, state, rows, positions)
    bad = BAD_WORDS if p.bad_words else ()
    for row, x in zip(got, logits):
        want = reference(x, p, prompt=PROMPT, output=OUTPUT, bad_words=bad)
        assert_same_distribution(row, want)


def test_a_batch_of_all_kinds_is_the_same_as_each_alone():
    kinds = [SamplingParams(**kw) for kw in FIELDS.values()] + [SamplingParams(temperature=0)]
    logits = random_logits(len(kinds), seed=3)
    together = make(kinds, size=len(kinds))
    state, args, rows, positions = together
    mixed = process(logits, args, state, rows, positions)
    tokens = draw(mixed, args, positions)
    for i, p in enumerate(kinds):
        state, args, rows, positions = make([p], seeds=[i])
        alone = process(logits[i : i + 1], args, state, rows, positions)
        np.testing.assert_array_equal(alone[0], mixed[i])
        assert draw(alone, args, positions)[0] == tokens[i]


# --- the cuts at their edges ---------------------------------------------------------------------


def cut_alone(x, **kwargs):
    x = np.asarray(x, np.float32)
    padded = np.full(V, -np.inf, np.float32)
    padded[: x.size] = x
    state, args, rows, positions = make([SamplingParams(**kwargs)])
    return np.asarray(process(padded[None], args, state, rows, positions)[0, : x.size])


@pytest.mark.parametrize(
    ("kwargs", "kept"),
    [
        ({"top_k": 1}, [0, 1]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 3}, [0, 1, 2, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.2}, [0, 1]),
        ({"top_p": 0.9}, [0, 1, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.9}, [0, 1]),
        ({"min_p": 1.0}, [0, 1]),
    ],
)
def test_ties_at_the_edge_all_stay(kwargs, kept):
    out = cut_alone([3.0, 3.0, 1.0, 1.0, 1.0, -1.0], **kwargs)
    assert np.flatnonzero(out > -np.inf).tolist() == kept


@pytest.mark.parametrize("value", [0.0, -7.5, 1e30, -1e30, 1e-40])
@pytest.mark.parametrize("kwargs", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_a_uniform_distribution_is_never_cut(kwargs, value):
    assert np.isfinite(cut_alone([value] * V, **kwargs)).all()


def test_zeros_of_either_sign_are_ties():
    for kwargs in ({"top_k": 1}, {"top_p": 0.1}):
        out = cut_alone([0.0, -0.0, 0.0, -1.0], **kwargs)
        assert np.flatnonzero(out > -np.inf).tolist() == [0, 1, 2]


def test_values_one_ulp_apart_are_told_apart():
    x = np.float32(12.5)
    below = np.nextafter(x, np.float32(0))
    assert np.flatnonzero(cut_alone([below, x, x], top_k=2) > -np.inf).tolist() == [1, 2]
    assert np.flatnonzero(cut_alone([below, x, x], top_p=0.6) > -np.inf).tolist() == [1, 2]


def test_top_k_counts_only_tokens_that_are_left():
    out = cut_alone([1.0, -np.inf, 3.0, -np.inf], top_k=3)
    assert np.flatnonzero(out > -np.inf).tolist() == [0, 2]


def test_no_cut_leaves_the_logits_bit_for_bit():
    x = random_logits(1)[0]
    np.testing.assert_array_equal(cut_alone(x), x)
    np.testing.assert_array_equal(cut_alone(x, temperature=0, repetition_penalty=1.0), x)


@pytest.mark.parametrize("seed", range(6))
def test_the_cuts_match_the_reference_on_grids_full_of_ties(seed):
    rng = np.random.default_rng(seed)
    size = 16
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.5, 1.0, 2.0])),
            top_k=int(rng.choice([0, 1, 2, 5, 30, 60])),
            top_p=float(rng.choice([1.0, rng.uniform(0.01, 0.999)])),
            min_p=float(rng.choice([0.0, rng.uniform(0.0, 0.5)])),
        )
        for _ in range(size)
    ]
    logits = rng.integers(-3, 4, size=(size, V)).astype(np.float32)
    logits[rng.random((size, V)) < 0.3] = -np.inf
    logits[:, 0] = 0.0
    state, args, rows, positions = make(params)
    got = process(logits, args, state, rows, positions)
    for i, p in enumerate(params):
        assert_same_distribution(got[i], reference(logits[i], p, prompt=PROMPT, output=OUTPUT))


LARGE = 50_000  # beyond the size at which only blocks with great maxima are searched first


def large_batch(kind):
    """Logits whose nucleus lies in few blocks ("peaked"), in most ("flat"), or both in turn."""
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(8, LARGE)).astype(np.float32) * 2
    peaked = flat + 20 * (rng.random((8, LARGE)) < 0.001).astype(np.float32)
    coarse = np.round(peaked)
    mixed = np.where(np.arange(8)[:, None] % 2 == 0, peaked, flat)
    return {"flat": flat, "peaked": peaked, "coarse": coarse, "mixed": mixed}[kind]


@pytest.mark.parametrize("kind", ["peaked", "flat", "coarse", "mixed"])
def test_large_vocabularies_are_cut_where_float64_cuts_them(kind):
    params = [
        SamplingParams(top_p=0.95), SamplingParams(top_k=1), SamplingParams(top_k=128),
        SamplingParams(top_k=129), SamplingParams(top_k=3000, top_p=0.5),
        SamplingParams(min_p=0.02, top_p=0.9), SamplingParams(top_p=0.3), SamplingParams(top_k=50),
    ]  # fmt: skip
    logits = large_batch(kind)
    state = init_state(1, LARGE, LIMITS)
    rows = positions = np.zeros(8, np.int32)
    arg_rows = [arg_row(p, seed=0, prompt_len=1) for p in params]
    got = np.asarray(process(logits, pack_args(arg_rows, 8), state, rows, positions))
    for i, p in enumerate(params):
        x = np.sort(logits[i].astype(np.float64))[::-1]
        x = x[x >= x[0] + math.log(p.min_p)] if p.min_p else x
        x = x[x >= x[p.top_k - 1]] if p.top_k else x
        mass = np.cumsum(np.exp(x - x[0]))
        edge = x[np.searchsorted(mass, p.top_p * mass[-1])]
        # The mass is summed in f32: the edge may move by the few tokens that 1e-6 of it holds.
        slack = 0 if p.top_p == 1.0 or kind == "coarse" else 2
        assert abs(int(np.isfinite(got[i]).sum()) - int((x >= edge).sum())) <= slack
        alone = pack_args(arg_rows[i : i + 1], 1)
        alone = process(logits[i : i + 1], alone, state, rows[:1], positions[:1])
        np.testing.assert_array_equal(alone[0], got[i])


def test_the_few_largest_hold_every_value_above_their_floor():
    x = large_batch("mixed")
    few, floor = jax.jit(_largest)(x)
    assert few.shape == (8, 8192)
    for row, some, edge in zip(x, np.asarray(few), np.asarray(floor)):
        peaks = np.pad(row, (0, -LARGE % 64), constant_values=-np.inf).reshape(-1, 64).max(axis=1)
        assert edge == np.sort(peaks)[-128]
        np.testing.assert_array_equal(np.sort(some[some > edge]), np.sort(row[row > edge]))
        assert (some >= edge).sum() >= 128


# --- rows without hope, and hostile logits -------------------------------------------------------


def test_nan_counts_as_banned_and_infinity_as_the_largest_number():
    x = np.array([np.nan, 2.0, 1.0, np.nan], np.float32)
    for kwargs in ({}, {"temperature": 0}, {"top_p": 0.9, "top_k": 3, "min_p": 0.01}):
        out = cut_alone(x, **kwargs)
        assert np.isneginf(out[[0, 3]]).all() and np.isfinite(out[1])
    out = cut_alone([np.inf, 1.0], top_p=0.5, temperature=1.0)
    assert np.isfinite(out[0]) and np.isneginf(out[1])


@pytest.mark.parametrize("kwargs", [{"temperature": 0}, {}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_row_without_tokens_stays_so_and_gives_no_token(kwargs, value):
    params = [SamplingParams(**kwargs, repetition_penalty=1.2, min_p=0.0), SamplingParams()]
    state, args, rows, positions = make(params)
    logits = random_logits(2)
    logits[0] = value
    got = np.asarray(process(logits, args, state, rows, positions))
    assert np.isneginf(got[0]).all() and np.isfinite(got[1]).all()
    tokens = draw(got, args, positions)
    assert tokens[0] == NO_TOKEN and tokens[1] >= 0


def test_one_finite_token_is_always_taken():
    logits = np.full((4, V), -np.inf, np.float32)
    logits[:, 47] = -1e4
    state, args, rows, positions = make([SamplingParams(top_p=0.3, top_k=2, min_p=0.5)] * 4)
    got = process(logits, args, state, rows, positions)
    assert draw(got, args, positions).tolist() == [47] * 4


def test_half_precision_logits_are_cast_once():
    logits = jnp.asarray(random_logits(4), jnp.bfloat16)
    kinds = [SamplingParams(**FIELDS[n]) for n in ("everything", "top_p", "repetition", "bias")]
    state, args, rows, positions = make(kinds)
    low = process(logits, args, state, rows, positions)
    high = process(logits.astype(jnp.float32), args, state, rows, positions)
    assert low.dtype == jnp.float32
    np.testing.assert_array_equal(low, high)


def test_a_token_mask_bans_what_its_bits_leave_out():
    allowed = [[0, 31], [32, 60], list(range(V)), []]
    mask = np.stack([pack_bits(ids, V) for ids in allowed])
    logits = random_logits(4)
    state, args, rows, positions = make([SamplingParams()] * 3 + [SamplingParams(temperature=0)])
    got = np.asarray(process(logits, args, state, rows, positions, mask))
    for row, ids, x in zip(got, allowed, logits):
        assert np.flatnonzero(row > -np.inf).tolist() == ids
        np.testing.assert_array_equal(row[ids], x[ids])


def test_bits_are_packed_as_documented():
    assert pack_bits([0, 33], 40).tolist() == [1, 2]
    assert pack_bits([31, 63, 64, -1], 64).tolist() == [2**31, 2**31]
    assert pack_bits([], 33).tolist() == [0, 0]


# --- the draw ------------------------------------------------------------------------------------


def distribution_after(params, logits):
    x = reference(logits, params, prompt=PROMPT, output=OUTPUT)
    probs = np.exp(x - x.max())
    return probs / probs.sum()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 12},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_distribution(kwargs, vary):
    num_draws = 20_480
    p = SamplingParams(**kwargs)
    logits = random_logits(1, seed=5, scale=1.0)
    state, args, rows, positions = make([p])
    processed = process(logits, args, state, rows, positions)

    def one(seed, position):
        ints = jnp.asarray(args.ints).at[:, 3].set(seed)
        return sample(processed, dataclasses.replace(args, ints=ints), position[None])[0]

    spread = jnp.arange(num_draws, dtype=jnp.uint32)
    fixed = jnp.full_like(spread, 11)
    seeds, places = (spread, fixed) if vary == "seed" else (fixed, spread)
    tokens = np.asarray(jax.jit(jax.vmap(one))(seeds, places.astype(jnp.int32)))
    counts = np.bincount(tokens, minlength=V)
    probs = distribution_after(p, logits[0])
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    order = np.argsort(probs[kept])
    observed, expected = counts[kept][order], num_draws * probs[kept][order]
    # Pearson's test wants at least about five expected draws a cell: pool the rarest tokens.
    first = np.searchsorted(np.cumsum(expected), 5.0)
    observed = np.concatenate([[observed[: first + 1].sum()], observed[first + 1 :]])
    expected = np.concatenate([[expected[: first + 1].sum()], expected[first + 1 :]])
    if observed.size > 1:
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def test_a_token_is_a_function_of_seed_and_position_alone():
    logits = random_logits(1, seed=8, scale=1.0)[0]
    p = SamplingParams(top_p=0.95, temperature=1.2)
    position = 21
    wanted = []
    for seed in range(20):
        args = pack_args([arg_row(p, seed=seed, prompt_len=3)], 1)
        state = init_state(1, V, LIMITS)
        rows, positions = np.zeros(1, np.int32), np.full(1, position, np.int32)
        x = process(logits[None], args, state, rows, positions)
        wanted.append(int(draw(x, args, positions)[0]))
    assert len(set(wanted)) > 3
    company = [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=3)]
    for size in (2, 4, 8, 32):
        for place in {0, 1, size // 2, size - 1}:
            for seed in (0, 7, 19):
                params = [company[(i + seed) % 3] for i in range(size)]
                params[place] = p
                batch = random_logits(size, seed=size + seed)
                batch[place] = logits
                arg_rows = [
                    arg_row(q, seed=seed if i == place else 99 + i, prompt_len=i)
                    for i, q in enumerate(params)
                ]
                args = pack_args(arg_rows, size)
                state = init_state(size, V, LIMITS)
                positions = np.arange(size, dtype=np.int32) + 40
                positions[place] = position
                x = process(batch, args, state, np.arange(size, dtype=np.int32), positions)
                assert draw(x, args, positions)[place] == wanted[seed]


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 5, 2**64 - 1])
def test_the_key_is_the_seed_folded_with_the_position(seed):
    x = random_logits(1, seed=2, scale=1.0)
    args = pack_args([arg_row(SamplingParams(), seed=seed, prompt_len=0)], 1)
    words = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    for position in range(8):
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position)
        want = jnp.argmax(x[0] + jax.random.gumbel(key, (V,), jnp.float32))
        assert draw(x, args, np.array([position], np.int32))[0] == want
    if seed < 2**31:
        np.testing.assert_array_equal(jax.random.key_data(jax.random.key(seed)), words)


def test_the_samples_of_one_request_differ():
    x = np.tile(random_logits(1, seed=2, scale=0.5), (16, 1))
    arg_rows = [arg_row(SamplingParams(), seed=child_seed(3, i), prompt_len=0) for i in range(16)]
    tokens = draw(x, pack_args(arg_rows, 16), np.full(16, 4, np.int32))
    assert len(set(tokens.tolist())) > 8


def test_greedy_takes_the_lowest_id_among_equals():
    x = np.zeros((3, V), np.float32)
    x[0, [30, 9]] = 5.0
    x[1, V - 1] = 1.0
    args = pack_args([], 3)
    assert draw(x, args, np.zeros(3, np.int32)).tolist() == [9, V - 1, 0]


def test_a_greedy_batch_draws_no_random_numbers_and_no_vocabulary_is_sorted():
    state, args, rows, positions = make([SamplingParams(temperature=0)] * 2)
    logits = random_logits(2)

    def both(logits):
        x = process_logits(logits, args, state, rows, positions)
        return sample(x, args, positions)

    outer = {eqn.primitive.name for eqn in jax.make_jaxpr(both)(logits).jaxpr.eqns}
    assert "cond" in outer
    assert not {n for n in outer if "random" in n or "threefry" in n or n in ("exp", "while")}
    text = str(jax.make_jaxpr(both)(logits))
    assert "random_bits" in text and " sort" not in text


# --- the state -----------------------------------------------------------------------------------


def assert_same_state(got, want, rows=slice(None)):
    for field in dataclasses.fields(SamplerState):
        a, b = np.asarray(getattr(got, field.name)), np.asarray(getattr(want, field.name))
        np.testing.assert_array_equal(a[rows], b[rows], err_msg=field.name)


def test_a_row_reset_after_preemption_is_the_row_that_was_lost():
    p = SamplingParams(**FIELDS["everything"])
    rng = np.random.default_rng(0)
    outputs = rng.integers(0, V, size=40).tolist()
    for cut_at in (0, 1, 2, 3, 17, 40):
        setup = pack_row(
            p, PROMPT, [], vocab_size=V, eos_token_ids=EOS,
            bad_words_token_ids=BAD_WORDS, limits=LIMITS,
        )  # fmt: skip
        state = reset(init_state(3, V, LIMITS), 1, setup)
        for token in outputs[:cut_at]:
            state = observe(state, np.array([1]), np.array([token]), np.array([True]))
        again = pack_row(
            p, PROMPT, outputs[:cut_at], vocab_size=V, eos_token_ids=EOS,
            bad_words_token_ids=BAD_WORDS, limits=LIMITS,
        )  # fmt: skip
        dirty = jax.tree.map(lambda x: jnp.full_like(x, 77), state)
        assert_same_state(reset(dirty, 1, again), state, rows=1)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_last_row_of_a_bucket_is_written_and_padding_never_is(size):
    p = SamplingParams(frequency_penalty=1.0)
    num_rows = 8
    state = init_state(num_rows, V, LIMITS)
    for i in range(num_rows):
        state = reset(state, i, pack_row(p, PROMPT, [i], vocab_size=V, limits=LIMITS))
    before = jax.tree.map(np.array, state)
    # The last sequence owns the last row; all others are padding of one kind or another.
    padding = ([num_rows, -1, num_rows + 5, -num_rows] * 2)[: size - 1]
    rows = np.array([*padding, num_rows - 1])
    tokens, active = np.full(size, 33), np.ones(size, bool)
    after = observe(state, rows, tokens, active)
    assert_same_state(after, before, rows=slice(0, num_rows - 1))
    last = jax.tree.map(lambda x: np.asarray(x[num_rows - 1]), after)
    assert last.last_tokens == 33 and last.output_counts[33] == 1 and last.history[-1] == 33
    assert last.output_counts.sum() == 2
    idle = observe(state, rows, tokens, np.zeros(size, bool))
    assert_same_state(idle, before)


def test_a_fresh_row_has_the_prompts_last_token_and_no_history():
    """Token 0 is a real token: an empty history must not look like a run of it."""
    p = SamplingParams(bad_words=["x"])
    setup = pack_row(
        p, PROMPT, [], vocab_size=V, bad_words_token_ids=[[0, 5], [0, 0, 6]], limits=LIMITS
    )
    state = reset(init_state(1, V, LIMITS), 0, setup)
    assert state.last_tokens[0] == PROMPT[-1]
    args = pack_args([arg_row(p, seed=0, prompt_len=5)], 1)
    rows, positions = np.zeros(1, np.int32), np.full(1, 5, np.int32)
    banned = []
    for _ in range(3):
        got = process(random_logits(1), args, state, rows, positions)
        banned.append(np.flatnonzero(np.isneginf(got[0])).tolist())
        state = observe(state, rows, np.array([0]), np.array([True]))
    assert banned == [[], [5], [5, 6]]


def test_resetting_a_row_out_of_range_changes_nothing():
    state = init_state(2, V, LIMITS)
    setup = pack_row(SamplingParams(), PROMPT, OUTPUT, vocab_size=V, limits=LIMITS)
    for row in (-1, 2, 100):
        assert_same_state(reset(state, row, setup), state)


def test_prompts_of_any_length_share_one_compiled_reset():
    traces = []

    @jax.jit
    def fresh(state, row, setup):
        traces.append(row)
        return reset_row(state, row, setup)

    state = init_state(2, V, LIMITS)
    for length in (1, 5, 3000):
        prompt = np.arange(length) % V
        setup = pack_row(SamplingParams(), prompt, prompt[:2], vocab_size=V, limits=LIMITS)
        state = fresh(state, np.int32(0), setup)
    assert len(traces) == 1


def test_counts_saturate_instead_of_wrapping():
    setup = pack_row(SamplingParams(), PROMPT, np.full(70_000, 4), vocab_size=V, limits=LIMITS)
    state = reset(init_state(1, V, LIMITS), 0, setup)
    state = observe(state, np.array([0]), np.array([4]), np.array([True]))
    assert state.output_counts[0, 4] == 65535


def test_a_drafted_prefix_is_seen_without_touching_the_state():
    """What the speculative path does: observe on a copy, then process the next position."""
    p = SamplingParams(bad_words=["x"], frequency_penalty=1.0, min_tokens=8, repetition_penalty=1.3)
    state, args, rows, positions = make([p])
    before = jax.tree.map(np.array, state)
    draft = [7, 30, 31]
    hypothetical = state
    for step, token in enumerate([*draft, 3]):
        x = random_logits(1, seed=step)
        got = process(x, args, hypothetical, rows, positions + step)
        output = OUTPUT + draft[:step]
        want = reference(x[0], p, prompt=PROMPT, output=output, bad_words=BAD_WORDS)
        assert_same_distribution(got[0], want)
        hypothetical = observe(hypothetical, rows, np.array([token]), np.array([True]))
    assert_same_state(state, before)


def test_a_long_run_of_mixed_requests_matches_the_reference_step_by_step():
    names = ["everything", "frequency", "bad words", "min_tokens", "nothing", "repetition"]
    params = [SamplingParams(**{**FIELDS[n], "seed": 1}) for n in names]
    state, args, rows, positions = make(params, output=[], size=8)
    outputs = [[] for _ in params]
    for step in range(30):
        logits = random_logits(8, seed=step, scale=1.5)
        logits[:, [7, 30, 31]] += 3.0  # so that bad words come up
        got = process(logits, args, state, rows, positions + step)
        tokens = draw(got, args, positions + step)
        state = observe(state, rows, tokens, np.arange(8) < len(params))
        for i, p in enumerate(params):
            bad = BAD_WORDS if p.bad_words else ()
            want = reference(logits[i], p, prompt=PROMPT, output=outputs[i], bad_words=bad)
            assert_same_distribution(got[i], want)
            outputs[i].append(int(tokens[i]))
    assert {7, 30, 31} & set(outputs[4])
    assert not {2, 33, 60} & set(outputs[3][:7])


def test_a_row_that_needs_no_state_may_skip_its_reset():
    plain = SamplingParams(top_k=5, stop_token_ids=[3], seed=1)
    assert state_flags(plain) == 0
    assert state_flags(SamplingParams(**FIELDS["everything"])) == 31
    dirty = jax.tree.map(lambda x: jnp.full_like(x, 3), init_state(2, V, LIMITS))
    params = [plain, SamplingParams(**FIELDS["everything"])]
    clean, args, rows, positions = make(params)
    logits = random_logits(2)
    want = process(logits, args, clean, rows, positions)
    got = process(logits, args, dirty, rows, positions)
    np.testing.assert_array_equal(got[0], want[0])
    assert not np.array_equal(got[1], want[1])


def test_padding_sequences_are_neutral():
    params = [SamplingParams(**FIELDS["everything"])]
    alone = make(params)
    state, args, rows, positions = make(params, size=4)
    logits = random_logits(4)
    got = process(logits, args, state, rows, positions)
    want = process(logits[:1], alone[1], alone[0], alone[2], alone[3])
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1:], logits[1:])


def test_state_bytes_counts_every_array():
    state = init_state(3, V, LIMITS)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == state_bytes(3, V, LIMITS)
    assert state_bytes(256, 262_144) < 160 * 2**20


def test_everything_runs_under_vmap():
    params = [SamplingParams(**FIELDS[n]) for n in ("everything", "top_p", "nothing", "bias")]
    state, args, rows, positions = make(params)
    logits = random_logits(12).reshape(3, 4, V)

    def step(x):
        y = process_logits(x, args, state, rows, positions)
        return y, sample(y, args, positions)

    got, tokens = jax.jit(jax.vmap(step))(logits)
    for i in range(3):
        want = process(logits[i], args, state, rows, positions)
        np.testing.assert_allclose(got[i], want, rtol=1e-6)
        np.testing.assert_array_equal(tokens[i], draw(want, args, positions))


# --- admission -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words", "match"),
    [
        ({"logit_bias": {i: 1.0 for i in range(9)}}, [], "logit_bias has 9 entries, at most 8"),
        ({"logit_bias": {V: 1.0}}, [], "outside the vocabulary"),
        ({"bad_words": ["x"]}, [[1, 2, 3, 4, 5]], "5 tokens exceeds the limit of 4"),
        ({"bad_words": ["x"]}, [[1, i] for i in range(5)], "5 sequences .* at most 4"),
        ({"bad_words": ["x"]}, [[V]], "bad_words holds token ids outside"),
        ({"bad_words": ["x"]}, [[]], "has no tokens"),
        ({"bad_words": ["x"]}, [[i] for i in range(V)], "leave no token"),
        ({"bad_words": ["x"], "allowed_token_ids": [5]}, [[5]], "leave no token"),
        ({"allowed_token_ids": [2], "min_tokens": 1}, [], "leave no token"),
        ({"allowed_token_ids": [3], "min_tokens": 1, "stop_token_ids": [3]}, [], "leave no token"),
    ],
)
def test_what_the_state_cannot_hold_is_refused_at_admission(kwargs, words, match):
    with pytest.raises(ValueError, match=match):
        check_request(
            SamplingParams(**kwargs), V, eos_token_ids=EOS, bad_words_token_ids=words,
            limits=LIMITS,
        )  # fmt: skip


def test_what_fits_is_admitted():
    check_request(
        SamplingParams(**FIELDS["everything"]), V, eos_token_ids=EOS,
        bad_words_token_ids=BAD_WORDS, limits=LIMITS,
    )  # fmt: skip
    many = [[i] for i in range(V - 1)]
    check_request(SamplingParams(bad_words=["x"]), V, bad_words_token_ids=many, limits=LIMITS)


# --- log probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 5, V])
def test_log_probabilities_match_float64(k):
    logits = random_logits(6)
    logits[3] = np.round(logits[3])  # ties
    tokens = np.array([0, 5, V - 1, 7, 8, int(logits[5].argmax())], np.int32)
    ids, top, of_token, rank = jax.jit(top_logprobs, static_argnums=2)(logits, tokens, k)
    x = logits.astype(np.float64)
    want = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    assert ids.shape == top.shape == (6, k)
    for i, token in enumerate(tokens):
        np.testing.assert_allclose(of_token[i], want[i, token], atol=2e-6)
        assert rank[i] == (x[i] >= x[i, token]).sum()
        np.testing.assert_allclose(top[i], want[i, np.asarray(ids[i])], atol=2e-6)
        np.testing.assert_allclose(top[i], np.sort(want[i])[::-1][:k], atol=2e-6)
        assert len(set(ids[i].tolist())) == k
    assert rank[5] == 1


def test_log_probabilities_of_half_precision_logits_are_taken_in_f32():
    logits = jnp.asarray(random_logits(2), jnp.bfloat16)
    tokens = np.array([1, 2], np.int32)
    low = top_logprobs(logits, tokens, 3)
    high = top_logprobs(logits.astype(jnp.float32), tokens, 3)
    for a, b in zip(low, high):
        np.testing.assert_array_equal(a, b)
    assert low[1].dtype == jnp.float32
