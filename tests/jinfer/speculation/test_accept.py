"""Acceptance: what comes out is distributed as the target alone samples, whatever was drafted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiers import thorough_but

from jinfer import SamplingParams
from jinfer.sampling.args import arg_row, pack_args
from jinfer.sampling.draw import sample
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import SamplerState, observe, pack_bits, pack_row
from jinfer.speculation import accept_chain as accept
from jinfer.speculation.accept_chain import Chains, Places
from jinfer.speculation.accept_tree import Nodes, verify_tree

V, K, N = 7, 2, 24_000  # tokens, drafts, sequences (one draw of a batch each)
PROMPT = [1, 3, 3]
CASES = {
    "temperature": SamplingParams(temperature=0.8),
    "top_p": SamplingParams(temperature=1.0, top_p=0.8),
    "top_k": SamplingParams(temperature=1.2, top_k=4),
    "min_p": SamplingParams(temperature=1.0, min_p=0.15),
    "penalties": SamplingParams(
        temperature=1.0, presence_penalty=0.5, frequency_penalty=0.9, repetition_penalty=1.4
    ),
    "bias": SamplingParams(temperature=1.0, logit_bias={2: 1.5}, min_tokens=2, stop_token_ids=[4]),
}


def bigram(seed):
    """A model of the last token alone: logits [V, V]."""
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, (V, V)), jnp.float32)


TARGET = bigram(0)
DRAFTER = TARGET + 0.5 * bigram(1)


def start(params):
    """N sequences of one prompt, that differ in their seeds."""
    setup = pack_row(params, PROMPT, [], vocab_size=V)
    state = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x)[None], (N, *x.shape)), setup)
    state = SamplerState(**vars(state))
    args = pack_args([arg_row(params, seed=0, prompt_len=len(PROMPT))] * N, N)
    args.ints[:, 3] = np.arange(N) * 7919 + 11  # the seed's low word
    args = jax.tree.map(jnp.asarray, args)
    return args, state, jnp.arange(N), jnp.full(N, len(PROMPT), jnp.int32)


def draft(args, state, rows, positions):
    """K drafts of each sequence, with the distributions that they were drawn from."""
    drafts, logits = [], []
    for i in range(K):
        x = process_logits(DRAFTER[state.last_tokens], args, state, rows, positions + i)
        tokens = accept.draw_draft(x, args, positions + i)
        state = observe(state, rows, tokens, jnp.ones(N, bool))
        drafts.append(tokens)
        logits.append(x)
    return jnp.stack(drafts), jnp.stack(logits)


@jax.jit
def speculate(args, state, rows, positions):
    """One verification of drawn drafts; the two tokens that it and plain steps after it give."""
    drafts, draft_logits = draft(args, state, rows, positions)
    inputs = jnp.concatenate([state.last_tokens[None], drafts])
    counted = jnp.full(N, K, jnp.int32)
    places = Places(args, rows, positions, jnp.ones(N, bool))
    tokens, counts, after = accept.verify(
        TARGET[inputs], places, state, Chains(drafts, counted, draft_logits)
    )
    return tokens, counts, two_tokens(tokens, counts, args, after, rows, positions), drafts


@jax.jit
def speculate_given(args, state, rows, positions):
    """The same with drafts that are given: the drafter's likeliest tokens."""
    first = jnp.argmax(DRAFTER[state.last_tokens], axis=-1)
    drafts = jnp.stack([first, jnp.argmax(DRAFTER[first], axis=-1)]).astype(jnp.int32)
    inputs = jnp.concatenate([state.last_tokens[None], drafts])
    counted = jnp.full(N, K, jnp.int32)
    places = Places(args, rows, positions, jnp.ones(N, bool))
    tokens, counts, after = accept.verify(TARGET[inputs], places, state, Chains(drafts, counted))
    return counts, two_tokens(tokens, counts, args, after, rows, positions)


@functools.partial(jax.jit, static_argnames="typical")
def speculate_along_a_tree(args, state, rows, positions, typical=None):
    """The same with a tree: the drafter's two likeliest tokens, and two after each of them."""
    first = jax.lax.top_k(DRAFTER[state.last_tokens], 2)[1].T  # [2, N]
    second = [jax.lax.top_k(DRAFTER[x], 2)[1].T for x in first]
    drafts = jnp.concatenate([state.last_tokens[None], first, *second])
    parents = jnp.array([-1, 0, 0, 1, 1, 2, 2], jnp.int32)
    nodes = Nodes(drafts, jnp.broadcast_to(parents[:, None], drafts.shape))
    walk, after = verify_tree(
        TARGET[drafts],
        Places(args, rows, positions, jnp.ones(N, bool)),
        state,
        nodes,
        max_depth=K,
        typical=typical,
    )
    return walk.counts, two_tokens(walk.tokens, walk.counts, args, after, rows, positions)


def two_tokens(tokens, counts, args, state, rows, positions):
    x = process_logits(TARGET[state.last_tokens], args, state, rows, positions + counts)
    after = sample(x, args, positions + counts)
    return jnp.stack([tokens[0], jnp.where(counts > 1, tokens[1], after)])


@jax.jit
def decode(args, state, rows, positions):
    """Two tokens of plain decoding."""
    tokens = []
    for i in range(2):
        x = process_logits(TARGET[state.last_tokens], args, state, rows, positions + i)
        tokens.append(sample(x, args, positions + i))
        state = observe(state, rows, tokens[-1], jnp.ones(N, bool))
    return jnp.stack(tokens)


def exact(params):
    """The probability of each pair of tokens under the target, from `process_logits` alone."""
    args, state, rows, positions = jax.tree.map(lambda x: x[:V], start(params))
    x = process_logits(TARGET[state.last_tokens], args, state, rows, positions)
    first = jax.nn.softmax(x, axis=-1)[0]
    state = observe(state, rows, jnp.arange(V), jnp.ones(V, bool))
    x = process_logits(TARGET[jnp.arange(V)], args, state, rows, positions + 1)
    return np.asarray(first[:, None] * jax.nn.softmax(x, axis=-1), np.float64)


def p_value(pairs, expected):
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(np.asarray(pairs)), 1)
    expected = expected / expected.sum() * N
    assert counts[expected == 0].sum() == 0, "a token that cannot come"
    often = expected >= 5
    seen = [*counts[often], counts[~often].sum()]
    wanted = [*expected[often], expected[~often].sum()]
    if wanted[-1] < 5:
        seen, wanted = seen[:-1], np.array(wanted[:-1])
        wanted = wanted * (sum(seen) / wanted.sum())
    return stats.chisquare(seen, wanted).pvalue


@pytest.mark.parametrize("name", thorough_but(CASES, default=("penalties",)))
def test_drawn_drafts_leave_the_distribution_of_the_next_two_tokens(name):
    tokens, counts, pairs, drafts = speculate(*start(CASES[name]))
    assert p_value(pairs, exact(CASES[name])) > 0.01
    # Not vacuous: every outcome came often, and a rejected draft is replaced by another token.
    assert all(np.mean(np.asarray(counts) == n) > 0.05 for n in (1, 2, 3))
    rejected = np.asarray(counts) == 1
    assert np.all(np.asarray(tokens)[0, rejected] != np.asarray(drafts)[0, rejected])


def test_drawn_drafts_leave_every_token_of_a_request_with_a_seed_as_it_is():
    params = dataclasses.replace(CASES["penalties"], seed=1)
    _, counts, pairs, _ = speculate(*start(params))
    assert np.array_equal(pairs, decode(*start(params)))
    assert np.mean(np.asarray(counts) == 3) > 0.3  # both drafts accepted


@pytest.mark.parametrize("name", thorough_but(CASES, default=("penalties",)))
def test_given_drafts_leave_every_token_as_it_is(name):
    """Seed for seed, which is more than the distribution."""
    counts, pairs = speculate_given(*start(CASES[name]))
    plain = decode(*start(CASES[name]))
    assert np.array_equal(pairs, plain)
    assert p_value(plain, exact(CASES[name])) > 0.01
    assert len(np.unique(np.asarray(counts))) > 1


@pytest.mark.parametrize("name", thorough_but(CASES, default=("penalties",)))
def test_a_tree_of_drafts_leaves_every_token_as_it_is(name):
    counts, pairs = speculate_along_a_tree(*start(CASES[name]))
    assert np.array_equal(pairs, decode(*start(CASES[name])))
    assert p_value(pairs, exact(CASES[name])) > 0.01
    assert all(np.mean(np.asarray(counts) == n) > 0.05 for n in (1, 2, 3))


def test_typical_acceptance_is_lossy_greedy_rows_apart():
    """So the test above would see a rule that is biased."""
    for params, is_lossy in ((CASES["temperature"], True), (SamplingParams(temperature=0), False)):
        counts, pairs = speculate_along_a_tree(*start(params), typical=(0.09, 0.3))
        assert np.array_equal(pairs, decode(*start(params))) != is_lossy
        if is_lossy:
            assert p_value(pairs, exact(params)) < 1e-6
            lossless, _ = speculate_along_a_tree(*start(params))
            assert np.mean(np.asarray(counts)) > np.mean(np.asarray(lossless))


def test_typical_acceptance_takes_a_likely_child_and_no_unlikely_one():
    args, state, rows, positions = jax.tree.map(
        lambda x: x[:64], start(SamplingParams(temperature=1.0))
    )
    p = np.full(V, 1e-9)
    p[[1, 2, 3]] = [0.9, 0.08, 0.02]  # the threshold is 0.09: alpha exp(-entropy) is more
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (3, 64, V))
    parents = jnp.broadcast_to(jnp.array([[-1], [0], [0]], jnp.int32), (3, 64))

    @jax.jit
    def draw(drafts):
        tokens = jnp.broadcast_to(drafts[:, None], (3, 64))
        walk, _ = verify_tree(
            logits,
            Places(args, rows, positions, jnp.ones(64, bool)),
            state,
            Nodes(tokens, parents),
            max_depth=1,
            typical=(0.09, 0.3),
        )
        return walk.tokens[0], walk.counts

    tokens, counts = draw(jnp.array([0, 2, 1]))  # the likely one second
    assert set(tokens.tolist()) == {1} and set(counts.tolist()) == {2}
    tokens, _ = draw(jnp.array([0, 3, 4]))  # none is likely: drawn as ever
    assert 0.7 < np.mean(np.asarray(tokens) == 1) < 1.0


@pytest.mark.parametrize("bias", ["accepts too much", "wrong residual"])
@pytest.mark.thorough
def test_a_biased_rule_is_found_out(bias, monkeypatch):
    """The test above has the power to tell."""
    draw = accept.draw

    def biased(target, args, positions, drafted, has_draft, draft_logits):
        if bias == "accepts too much":
            return draw(target, args, positions, drafted, has_draft, draft_logits - 0.4 * target)
        tokens = draw(target, args, positions, drafted, has_draft, draft_logits)
        plain = sample(target, args, positions)
        return jnp.where(has_draft & (tokens != drafted), plain, tokens)

    monkeypatch.setattr(accept, "draw", biased)
    unjitted = speculate.__wrapped__
    _, _, pairs, _ = jax.jit(lambda *x: unjitted(*x))(*start(CASES["temperature"]))
    assert p_value(pairs, exact(CASES["temperature"])) < 1e-6


def test_sequences_without_drafts_and_idle_ones_are_as_in_a_plain_step():
    args, state, rows, positions = jax.tree.map(lambda x: x[:4], start(CASES["penalties"]))
    drafts = jnp.zeros((K, 4), jnp.int32)
    logits = TARGET[jnp.concatenate([state.last_tokens[None], drafts])]
    active = jnp.array([True, True, True, False])
    tokens, counts, after = accept.verify(
        logits,
        Places(args, rows, positions, active),
        state,
        Chains(drafts, jnp.zeros(4, jnp.int32)),
    )
    x = process_logits(logits[0], args, state, rows, positions)
    plain = sample(x, args, positions)
    assert np.array_equal(tokens[0], plain)
    assert counts.tolist() == [1, 1, 1, 0]
    expected = observe(state, rows, plain, active)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), after, expected))


def test_a_mask_for_each_place():
    args, state, rows, positions = jax.tree.map(
        lambda x: x[:2], start(SamplingParams(temperature=0))
    )
    logits = jnp.broadcast_to(jnp.arange(V, dtype=jnp.float32), (K + 1, 2, V))
    masks = np.stack(
        [
            [pack_bits([2], V), pack_bits([2], V)],
            [pack_bits([3], V), pack_bits([4], V)],
            [pack_bits([5], V), pack_bits([5], V)],
        ]
    )
    tokens, counts, _ = accept.verify(
        logits,
        Places(args, rows, positions, jnp.ones(2, bool)),
        state,
        Chains(jnp.array([[2, 2], [3, 3]], jnp.int32), jnp.full(2, K, jnp.int32)),
        token_mask=jnp.asarray(masks),
    )
    assert counts.tolist() == [3, 2]
    assert tokens[:, 0].tolist() == [2, 3, 5]
    assert tokens[:2, 1].tolist() == [2, 4]
