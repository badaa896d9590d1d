"""Token masks of a provider reach every kind of step, and nobody but their request."""

import jax
import numpy as np
import pytest
from tiers import thorough_but
from tiny_engines import SPECULATION, VOCAB, add, make_engine, make_params, run

from jinfer.config.beam_params import BeamSearchParams
from jinfer.config.sampling_params import SamplingParams
from jinfer.engine.beam.searcher import BeamSearcher
from jinfer.engine.token_masks import fill_masks, has_masks, no_masks
from jinfer.sampling.state import pack_bits

A, B = 11, 42
PROMPTS = ([7, 8, 9] * 4, [3] * 20, [60, 61])  # within a page, in two chunks, short
METHODS = thorough_but(("none", *SPECULATION), default=("none", "ngram", "medusa"))


class Alternating:
    """Allows "a b a b ..."."""

    def mask(self, token_ids, drafts):
        text = [*token_ids, *drafts]
        assert text == [(A, B)[i % 2] for i in range(len(text))]  # never after what it forbids
        return pack_bits([(A, B)[len(text) % 2]], VOCAB)


class Thirds:
    """Forbids a third of the tokens, another one after each token."""

    def mask(self, token_ids, drafts):
        place = len(token_ids) + len(drafts)
        return pack_bits([t for t in range(VOCAB) if (t + place) % 3], VOCAB)


class Failing(Alternating):
    """Raises after four tokens."""

    def mask(self, token_ids, drafts):
        if len(token_ids) == 4:
            raise KeyError("no such state")
        return super().mask(token_ids, drafts)


class Nothing:
    """Allows all, then nothing."""

    def mask(self, token_ids, drafts):
        return None if len(token_ids) + len(drafts) < 2 else np.zeros(-(-VOCAB // 32), np.uint32)


def greedy(max_tokens=10, **fields):
    return SamplingParams(
        detokenize=False, max_tokens=max_tokens, **{"temperature": 0, "ignore_eos": True} | fields
    )


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def alone(params):
    """Greedy texts of the prompts from an engine that knows no masks."""
    engine = make_engine(params)
    requests = [add(engine, str(i), prompt, greedy()) for i, prompt in enumerate(PROMPTS)]
    run(engine)
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_text_through_every_kind_of_step(params, alone, method):
    """Sampled and greedy, in batches with requests whose tokens the masks do not change."""
    engine = make_engine(params, None if method == "none" else method)
    expected = [(A, B)[i % 2] for i in range(10)]
    for fields in ({}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}):
        for i, prompt in enumerate(PROMPTS):
            masked = add(engine, "masked", prompt, greedy(**fields), token_masks=Alternating())
            free = add(engine, "free", PROMPTS[i - 1], greedy())
            run(engine)
            assert masked.output_token_ids == expected
            assert free.output_token_ids == alone[i - 1]
    engine.check_integrity()


@pytest.mark.parametrize("method", thorough_but(SPECULATION, default=("ngram", "lookahead")))
def test_masks_that_leave_a_choice_give_the_text_of_plain_decoding(params, method):
    """Drafts are verified, each under the mask of its own place; some are accepted."""
    texts, metrics = [], []
    for name in (None, method):
        engine = make_engine(params, name)
        requests = [
            add(engine, str(i), prompt, greedy(30), token_masks=Thirds())
            for i, prompt in enumerate(PROMPTS)
        ]
        run(engine)
        texts.append([request.output_token_ids for request in requests])
        metrics.append(engine.metrics())
    assert texts[0] == texts[1]
    assert all((token + i) % 3 for text in texts[0] for i, token in enumerate(text))
    # The masks after drafts that a model makes inside the step cannot be known.
    has_drafts = method in ("ngram", "medusa", "lookahead")
    assert (metrics[1]["num_drafted_tokens"] > 0) == has_drafts
    assert (metrics[1]["num_accepted_tokens"] > 0) == has_drafts


def test_drafts_that_the_masks_allow_are_accepted(params):
    """The prompt repeats what the masks force, so n-grams find it: far fewer steps than tokens."""
    engine = make_engine(params, "ngram")
    request = add(engine, "masked", [A, B] * 6, greedy(20), token_masks=Alternating())
    run(engine)
    assert request.output_token_ids == [A, B] * 10
    assert request.metrics.num_accepted_tokens >= 12


def test_only_rows_with_masks_wait_for_their_tokens(params):
    """Others are in two steps at a time, and run several steps in one program."""
    engine = make_engine(params)
    plans = []
    plan = engine.scheduler.plan

    def spy():
        plans.append((plan(), engine.scheduler.num_in_flight))
        return plans[-1][0]

    engine.scheduler.plan = spy
    add(engine, "masked", PROMPTS[2], greedy(12), token_masks=Alternating())
    add(engine, "free", PROMPTS[0], greedy(24))
    run(engine)
    seqs = [(seq, made, plan) for plan, made in plans if plan is not None for seq in plan.seqs]
    masked = [entry for entry in seqs if entry[0].request.request_id == "masked"]
    free = [entry for entry in seqs if entry[0].request.request_id == "free"]
    assert all(seq.is_masked and seq.num_samples == 1 for seq, _, _ in masked)
    assert not any(seq.is_masked for seq, _, _ in free)
    assert any(plan.num_steps > 1 for _, _, plan in masked if len(plan.seqs) == 2)
    assert any(made == 2 and len(plan.seqs) == 1 for _, made, plan in free)
    plans.clear()
    add(engine, "masked", PROMPTS[2], greedy(6), token_masks=Alternating())
    run(engine)
    assert all(plan.num_steps == 1 for plan, _ in plans if plan is not None)


def test_a_mask_of_none_allows_all_and_of_zeros_ends_the_request(params, alone):
    engine = make_engine(params)
    request = add(engine, "masked", PROMPTS[0], greedy(), token_masks=Nothing())
    run(engine)
    assert request.output_token_ids == alone[0][:2]
    assert request.error == (
        "request masked: the token mask left no token to sample after 2 output tokens; "
        "allow more of them"
    )


def test_a_provider_that_fails_ends_its_request_alone(params, alone):
    engine = make_engine(params)
    broken = add(engine, "broken", PROMPTS[0], greedy(), token_masks=Failing())
    free = add(engine, "free", PROMPTS[1], greedy())
    run(engine)
    assert broken.finish_reason == "error"
    assert broken.error == "the token masks of request broken failed: KeyError: 'no such state'"
    assert broken.output_token_ids == [A, B, A, B]
    assert free.output_token_ids == alone[1]
    engine.check_integrity()


def test_preempted_requests_go_on_under_their_masks(params):
    """The pool holds one of two requests: the later one is computed again from its tokens."""
    engine = make_engine(params, num_pages=5)
    requests = [
        add(engine, str(i), PROMPTS[0], greedy(20), token_masks=Alternating()) for i in range(2)
    ]
    run(engine)
    assert engine.scheduler.stats.num_preemptions > 0
    assert all(request.output_token_ids == [A, B] * 10 for request in requests)


def test_beams_have_masks_of_their_own(params):
    engine = make_engine(params, max_num_seqs=4)
    search = BeamSearcher(engine, BeamSearchParams(beam_width=2, max_tokens=6))

    class Pairs:
        def mask(self, token_ids, drafts):
            assert not drafts
            last = token_ids[-1] if token_ids else None
            return pack_bits({None: [A, B], A: [B], B: [A]}[last], VOCAB)

    search.add(PROMPTS[0], token_masks=Pairs())
    free = search.add(PROMPTS[1])
    found = {}
    while search.has_work():
        found |= dict(search.step())
    texts = [[node.token for node in text.last.path()] for text in found[0]]
    assert sorted(texts) == [[A, B] * 3, [B, A] * 3]
    assert [node.token for node in found[free][0].last.path()] != texts[0]


def test_a_mask_for_each_node_of_a_tree():
    masks = no_masks(5, -(-VOCAB // 32)).copy()
    # a (b, a forbidden one with a child), and a forbidden root
    fill_masks(masks, Alternating(), [A, B], (A, B, 7, 8), (0, 1, 1, 3))
    allowed = [np.flatnonzero(np.unpackbits(row.view("u1"), bitorder="little")) for row in masks]
    assert [ids.tolist() for ids in allowed[:3]] == [[A], [B], [A]]
    assert all(len(ids) == 32 * masks.shape[1] for ids in allowed[3:])


def test_masks_of_another_shape_or_type_are_refused():
    class Wrong:
        def __init__(self, mask):
            self.mask = lambda token_ids, drafts: mask

    masks = no_masks(1, 3).copy()
    for mask in (np.zeros(2, np.uint32), np.zeros(3, np.int32)):
        with pytest.raises(ValueError, match=r"must be uint32\[3\], got"):
            fill_masks(masks, Wrong(mask), [])


def test_masks_that_allow_all_take_no_memory():
    nothing = no_masks(4, 1000)
    assert not has_masks(nothing) and has_masks(nothing.copy())
    assert jax.tree.leaves(nothing)[0].base.nbytes <= 4
