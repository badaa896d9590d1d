"""How many drafts a step carries: what a perfectly informed choice would carry, found by trying."""

import numpy as np
import pytest

from jinfer.speculation.adaptive import NUM_TRIALS, RETRY_AFTER, TRIAL_SHARE, DraftLength

SIZES = (2, 4)


def serve(length, lengths, cost, rate, num_steps, rng):
    """Simulated steps: returns tokens and seconds in all, and the choices."""
    tokens = seconds = 0.0
    choices = []
    for _ in range(num_steps):
        size = length.choose(lengths)
        given = [min(n, size) for n in lengths]
        for n in given:
            accepted = next((i for i in range(n) if rng.random() >= rate), n)
            length.note_drafts(n, accepted)
            tokens += 1 + accepted
        took = cost(len(lengths), max(given))
        length.note_step(len(lengths), max(given), took)
        seconds += took
        choices.append(size)
    return tokens, seconds, choices


@pytest.mark.parametrize(
    ("costs", "rate", "best"),
    [
        ({0: 1.0, 2: 1.04, 4: 1.08}, 0.9, 4),
        ({0: 1.0, 2: 1.04, 4: 1.08}, 0.02, 0),
        ({0: 1.0, 2: 3.0, 4: 5.0}, 0.9, 0),
        ({0: 1.0, 2: 1.3, 4: 2.4}, 0.5, 2),  # tokens 1, 1.75 and 1.94
        ({0: 1.0, 2: 1.0, 4: 1.0}, 0.5, 4),
        ({0: 1.0, 2: 1.0, 4: 1.0}, 0.02, 0),  # tokens 1, 1.02 and 1.02
    ],
    ids=["free and good", "bad drafts", "dear", "two pay", "free", "free and next to useless"],
)
def test_the_best_number_is_found_and_kept(costs, rate, best):
    length, rng = DraftLength(SIZES), np.random.default_rng(0)
    tokens, seconds, choices = serve(length, [4] * 3, lambda _, n: costs[n], rate, 1000, rng)
    settled = choices[100:]
    assert settled.count(best) >= 0.95 * len(settled)
    assert set(choices) == {0, 2, 4}
    # Trying costs little: never below 0.95 of plain decoding's speed.
    assert tokens / seconds >= 0.95 * 3 / costs[0]


def test_what_changes_is_noticed():
    length, rng = DraftLength(SIZES), np.random.default_rng(1)
    dear = lambda _, n: 1.0 + n  # noqa: E731
    serve(length, [4], dear, 0.9, 50, rng)
    _, _, choices = serve(length, [4], lambda _, n: 1.0, 0.9, 20 * RETRY_AFTER, rng)
    assert choices[-10:].count(4) >= 9


def test_batches_are_judged_apart_and_nothing_to_draft_is_no_trial():
    length, rng = DraftLength(SIZES), np.random.default_rng(2)
    cost = lambda n, drafts: 1.0 if n == 1 else 1.0 + drafts  # noqa: E731
    for _ in range(30):
        serve(length, [4], cost, 0.9, 10, rng)
        serve(length, [4] * 8, cost, 0.9, 10, rng)
    assert length.choose([4]) == 4
    assert length.choose([4] * 8) == 0
    assert DraftLength(SIZES).choose([0, 0]) == 0


def test_each_kind_of_step_is_tried_before_it_is_judged():
    length, rng = DraftLength(SIZES), np.random.default_rng(3)
    _, _, choices = serve(length, [4], lambda _, n: 1.0, 0.5, 3 * NUM_TRIALS, rng)
    assert sorted(choices) == sorted([0, 2, 4] * NUM_TRIALS)
    short, rng = DraftLength(SIZES), np.random.default_rng(3)
    _, _, choices = serve(short, [1, 0], lambda _, n: 1.0, 0.5, 40, rng)
    assert set(choices) == {0, 2}


@pytest.mark.parametrize("price", [3.0, 12.0, 40.0])
def test_trials_of_what_is_dear_are_rare(price):
    """However dear, all trials after the first lose at most their share of the time."""
    length, rng = DraftLength((4,)), np.random.default_rng(4)
    cost = lambda _, n: price if n else 1.0  # noqa: E731
    serve(length, [4], cost, 0.3, 2 * NUM_TRIALS, rng)
    tokens, seconds, choices = serve(length, [4], cost, 0.3, 20_000, rng)
    assert 0 < choices.count(4) < len(choices) / RETRY_AFTER
    assert tokens / seconds > 1 - 1.2 * TRIAL_SHARE


def test_however_many_kinds_of_steps_share_what_trials_may_lose():
    length, rng = DraftLength((1, 2, 4)), np.random.default_rng(8)
    cost = lambda _, n: 1.0 + 1.5 * n  # noqa: E731
    serve(length, [4] * 8, cost, 0.5, 10, rng)
    plain_steps = seconds = 0.0
    for turn in range(200):  # batches that shrink as their texts end
        for num_seqs in (8, 6, 3, 1):
            got = serve(length, [4] * num_seqs, cost, 0.5, 16, rng)
            plain_steps += got[0] / num_seqs  # that would have brought as many tokens
            seconds += got[1]
        if turn == 20:  # three sizes in three batches are not measured yet
            assert plain_steps / seconds > 0.97
    assert plain_steps / seconds > 1 - 1.2 * TRIAL_SHARE


def test_a_step_that_prefills_too_is_no_trial():
    length = DraftLength(SIZES)
    assert length.choose([4] * 2, may_try=False) == 0  # nothing is known
    for size, seconds in ((0, 1.0), (2, 1.1), (4, 1.3)):
        for _ in range(NUM_TRIALS):
            length.note_step(2, size, seconds)
    assert length.choose([4] * 2, may_try=False) == 2  # 1.75 tokens in 1.1 s, 1.94 in 1.3 s
    for _ in range(10 * RETRY_AFTER):
        length.note_step(2, 2, 1.1)
    assert length.choose([4] * 2, may_try=False) == 2
    assert length.choose([4] * 2) == 0  # not tried for longest
    length.note_step(2, 0, 1.0)
    for _ in range(RETRY_AFTER):
        length.note_step(2, 2, 1.1)
    assert length.choose([4] * 2) == 4


def test_a_rest_lasts_until_the_next_trial():
    length, rng = DraftLength((4,)), np.random.default_rng(5)
    assert length.num_steps_without([4]) == 0  # nothing is known
    serve(length, [4], lambda _, n: 4.0 if n else 1.0, 0.5, 2 * NUM_TRIALS, rng)
    num_steps = length.num_steps_without([4])
    # A trial loses 4 - 1.94 seconds and may lose one part in two hundred.
    assert 300 < num_steps < 600
    length.note_step(1, 0, 1.0, num_steps - 1)
    assert length.choose([4]) == 0
    length.note_step(1, 0, 1.0)
    assert length.choose([4]) == 4
    assert length.num_steps_without([4]) == 0
    length.note_step(1, 4, 1.0)  # now cheap: no rest
    assert length.num_steps_without([4]) == 0


def test_what_it_costs_to_begin_again_makes_rests_longer():
    rests = []
    for extra in (0.0, 5.0):
        length, rng = DraftLength((4,)), np.random.default_rng(6)
        serve(length, [4], lambda _, n: 4.0 if n else 1.0, 0.5, 2 * NUM_TRIALS, rng)
        length.note_resumption(1, 999.0)  # which compiled
        before = length.num_steps_without([4])
        length.note_resumption(1, 1.0 + extra)
        rests.append(length.num_steps_without([4]))
        assert rests[0] == before
    assert rests[1] - rests[0] == pytest.approx(5.0 / TRIAL_SHARE, abs=2)


@pytest.mark.parametrize(("price", "most"), [(8.0, 0), (1.05, 100)])
def test_a_batch_of_another_size_begins_with_what_is_known_of_others(price, most):
    """Where drafts were dear, they are tried late; where they paid, at once."""
    length, rng = DraftLength((4,)), np.random.default_rng(7)
    cost = lambda _, n: price if n else 1.0  # noqa: E731
    serve(length, [4] * 8, cost, 0.5, 50, rng)
    _, _, choices = serve(length, [4] * 5, cost, 0.5, 100, rng)
    assert abs(choices.count(4) - most) <= NUM_TRIALS + 2
    assert choices[:NUM_TRIALS] == [0] * NUM_TRIALS
    _, _, choices = serve(length, [4] * 5, cost, 0.5, 2000, rng)
    assert choices.count(4) > 0
