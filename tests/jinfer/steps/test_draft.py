"""The step that drafts and verifies: its tokens are distributed as the target alone samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jinfer import SamplingParams
from jinfer.config.cache import CacheConfig
from jinfer.config.model import ModelConfig
from jinfer.kv import cache as kv_cache
from jinfer.models.model import Model
from jinfer.sampling.args import arg_row, pack_args
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import SamplerLimits, SamplerState, observe, pack_row
from jinfer.speculation import accept_chain as accept
from jinfer.steps import draft as draft_steps
from jinfer.steps.batch import StepBatch
from jinfer.steps.inputs import Pool, StepInputs, Weights

V, K, S, PAGE = 8, 2, 512, 8
ROUNDS = 48  # runs of S draws of two tokens
PROMPT = 3  # one token
LIMITS = SamplerLimits(max_logit_bias=1, max_bad_words=1, max_bad_word_tokens=2)
CONFIG = ModelConfig(
    family="llama",
    vocab_size=V,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    eos_token_ids=(0,),
    tie_word_embeddings=False,
)
MODEL = Model(CONFIG)
CASES = {
    "temperature": SamplingParams(temperature=0.8),
    "top_p": SamplingParams(temperature=1.0, top_p=0.8),
    "top_k": SamplingParams(temperature=1.2, top_k=4),
    "min_p": SamplingParams(temperature=1.0, min_p=0.15),
    "penalties": SamplingParams(
        temperature=1.0, presence_penalty=0.5, frequency_penalty=0.9, repetition_penalty=1.4
    ),
    "seed": SamplingParams(temperature=1.0, seed=1),
}


def make_params(key):
    """Weights whose distributions are neither flat nor at one point."""
    params = MODEL.init(jax.random.key(key))
    return jax.tree.map(lambda x: 2.0 * x if x.ndim == 2 else x, params)


@pytest.fixture(scope="module")
def params():
    return make_params(0)


@pytest.fixture(scope="module")
def draft_params(params):
    """A drafter that is often right."""
    return jax.tree.map(lambda a, b: a + 0.15 * b, params, make_params(1))


def make_batch(starts):
    """One sequence a page: its newest token at `starts`, and places for K drafts."""
    size = K + 1
    positions = starts[:, None] + np.arange(size)
    slots = np.arange(S)[:, None] * PAGE + positions
    arrays = {
        "tokens": np.where(positions == 0, PROMPT, -1).ravel(),
        "positions": positions.ravel(),
        "seq_ids": np.repeat(np.arange(S), size),
        "slots": slots.ravel(),
        "q_starts": np.arange(S + 1) * size,
        "kv_lens": starts + size,
        "prompt_lens": np.ones(S),
        "page_table": np.arange(S)[:, None],
        "rows": np.arange(S),
    }
    arrays = {name: jnp.asarray(value, jnp.int32) for name, value in arrays.items()}
    return StepBatch(**arrays, max_q_len=size)


def draw_pairs(case, params, draft_params, own_kv, rounds=ROUNDS, step=draft_steps.draft_step):
    """The first two tokens of S sequences in each of `rounds` runs, and counts of first steps."""
    setup = pack_row(case, [PROMPT], [], vocab_size=V, limits=LIMITS)
    row = arg_row(case, seed=0, prompt_len=1)
    pairs, all_counts = [], []
    cache = CacheConfig(num_pages=S, page_size=PAGE)
    for turn in range(rounds):
        args = pack_args([row] * S, S)
        args.ints[:, 3] = np.arange(turn * S, (turn + 1) * S) * 7919 + 11  # the seed's low word
        state = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (S, *x.shape)), setup)
        state = SamplerState(**vars(state))
        kv = kv_cache.init(CONFIG, cache)
        pool = Pool(kv, state, kv_cache.init(CONFIG, cache) if own_kv else None)
        weights = Weights(params, draft_params)
        outputs = []
        starts = np.zeros(S, np.int64)
        for _ in range(2):
            drafts = np.ones(S, bool), np.full(S, K, np.int32)
            inputs = StepInputs(make_batch(starts), args, *drafts)
            out, pool = step(MODEL, weights, pool, inputs, drafter=MODEL, max_drafts=K)
            outputs.append((np.asarray(out.tokens), np.asarray(out.counts)))
            starts = starts + outputs[-1][1]
        (first, counts), (second, _) = outputs
        pairs.append(np.stack([first[0], np.where(counts > 1, first[1], second[0])]))
        all_counts.append(counts)
    return np.concatenate(pairs, axis=1), np.concatenate(all_counts)


def exact(case, params):
    """The probability of each pair, from the model's dense forward pass and `process_logits`."""
    setup = pack_row(case, [PROMPT], [], vocab_size=V, limits=LIMITS)
    state = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (V, *x.shape)), setup)
    state = SamplerState(**vars(state))
    args = pack_args([arg_row(case, seed=0, prompt_len=1)] * V, V)
    rows, ones = jnp.arange(V), jnp.ones(V, jnp.int32)
    tokens = jnp.stack([jnp.full(V, PROMPT), rows], axis=1).astype(jnp.int32)
    logits = MODEL.logits(params, tokens)
    first = process_logits(logits[:, 0], args, state, rows, ones)
    state = observe(state, rows, rows.astype(jnp.int32), jnp.ones(V, bool))
    second = process_logits(logits[:, 1], args, state, rows, ones + 1)
    return np.asarray(jax.nn.softmax(first)[0][:, None] * jax.nn.softmax(second), np.float64)


def p_value(pairs, expected):
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(pairs), 1)
    expected = expected / expected.sum() * pairs.shape[1]
    assert counts[expected == 0].sum() == 0, "a token that cannot come"
    often = expected >= 5
    assert often.sum() > 3
    rest = expected[~often].sum()
    seen, wanted = counts[often], expected[often]
    if rest >= 5:
        seen, wanted = [*seen, counts[~often].sum()], [*wanted, rest]
    wanted = np.asarray(wanted) * (np.sum(seen) / np.sum(wanted))
    return stats.chisquare(seen, wanted).pvalue


def check(name, params, draft_params, own_kv, rounds):
    pairs, counts = draw_pairs(CASES[name], params, draft_params, own_kv, rounds)
    assert p_value(pairs, exact(CASES[name], params)) > 0.01
    assert all(np.mean(counts == n) > 0.05 for n in (1, 2, 3))  # not vacuous


def test_the_next_two_tokens_are_distributed_as_without_drafts(params, draft_params):
    check("penalties", params, draft_params, own_kv=False, rounds=6)


@pytest.mark.slow
@pytest.mark.parametrize("own_kv", [False, True], ids=["shared pool", "own pool"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_in_many_draws(name, own_kv, params, draft_params):
    check(name, params, draft_params, own_kv, ROUNDS)


@pytest.mark.slow
def test_a_wrong_claim_of_what_drafts_were_drawn_from_is_found_out(
    params, draft_params, monkeypatch
):
    """The test above has the power to tell."""
    draw = accept.draw_draft
    monkeypatch.setattr(accept, "draw_draft", lambda x, *rest: draw(1.5 * x, *rest))
    wrapped = draft_steps.draft_step.__wrapped__
    static = ("model", "drafter", "max_drafts", "impl")

    def fresh(*inputs, **options):  # not the program that the tests above compiled
        return wrapped(*inputs, **options)

    fresh = jax.jit(functools.wraps(wrapped)(fresh), static_argnames=static)
    pairs, _ = draw_pairs(CASES["temperature"], params, draft_params, False, step=fresh)
    assert p_value(pairs, exact(CASES["temperature"], params)) < 1e-6
