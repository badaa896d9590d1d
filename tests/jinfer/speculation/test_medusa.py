"""Medusa heads: how they start, learn, are kept and refused, on a tiny random model."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jinfer.config.model import ModelConfig
from jinfer.models.model import Model
from jinfer.speculation import medusa
from jinfer.speculation.medusa_tree import check_tree, fit_tree, tokens_per_step
from jinfer.training import loop as training
from jinfer.training import medusa as medusa_training
from jinfer.training.loop import Checkpoints, TrainingConfig

VOCAB, HIDDEN, HEADS = 61, 24, 2
MODEL = Model(
    ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
)
CONFIG = medusa.MedusaConfig(
    num_heads=HEADS, hidden_size=HIDDEN, vocab_size=VOCAB, shared_unembedding=False
)
LOSS = medusa_training.HeadLoss(MODEL)
TRAINING = TrainingConfig(num_steps=80, batch_size=128, learning_rate=3e-2, checkpoint_every=40)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def data():
    """Texts that count upwards from a random start: easy to foretell."""
    starts = np.random.default_rng(0).integers(0, VOCAB, 16)
    texts = [(((start + np.arange(20)) % VOCAB).tolist(), 0) for start in starts]
    return training.windows(texts, 16)


@pytest.fixture(scope="module")
def learnt(params, data):
    return medusa_training.examples(MODEL, params, *data, num_heads=HEADS)


@pytest.fixture(scope="module")
def trained(params, learnt):
    """(heads, losses by step) of an unbroken run."""
    seen = []
    heads = medusa.init(CONFIG, MODEL, params)
    heads = training.train(
        LOSS, (params, {}), heads, learnt, TRAINING, on_step=lambda _, each: seen.append(each)
    )
    return heads, np.stack(seen)


@pytest.mark.parametrize("reads_root", [False, True])
@pytest.mark.parametrize(("is_shared", "is_tied"), [(False, False), (False, True), (True, True)])
def test_new_heads_say_what_the_models_own_head_says(params, is_shared, is_tied, reads_root):
    model = Model(dataclasses.replace(MODEL.config, tie_word_embeddings=is_tied))
    if is_tied:
        params = {name: part for name, part in params.items() if name != "lm_head"}
    config = dataclasses.replace(CONFIG, shared_unembedding=is_shared, reads_root=reads_root)
    heads = medusa.init(config, model, params)
    assert (("head" in heads), ("u" in heads)) == (not is_shared, reads_root)
    hidden = np.random.default_rng(0).normal(0, 1, (3, HIDDEN)).astype(np.float32)
    for k in range(HEADS):
        got = medusa.head_logits(model, params, heads, k, hidden, np.arange(3))
        np.testing.assert_allclose(got, model.unembed(params, hidden), rtol=1e-6, atol=1e-6)


def test_the_loss_of_each_head_falls_and_the_backbone_stays(params, data, trained):
    before = jax.tree.map(np.asarray, params)
    _, losses = trained
    assert losses.shape == (TRAINING.num_steps, HEADS)
    assert (losses[-3:].mean(0) < losses[:3].mean(0) - 1.0).all()
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, params))


def test_heads_learn_the_token_that_is_theirs(params, data, learnt, trained):
    """The counting texts: after token v head k should say v + 2 + k."""
    ranks = medusa_training.target_ranks(MODEL, params, trained[0], learnt, num_ranks=4)
    assert ((ranks == medusa_training.NO_TARGET) == (learnt.targets < 0)).all()
    accuracies = medusa_training.rank_accuracies(ranks, 4)
    assert accuracies.shape == (HEADS, 4)
    assert (accuracies[:, 0] > 0.5).all()
    assert (accuracies.sum(1) <= 1 + 1e-6).all()
    tokens, _ = data
    hidden = jax.jit(training.hidden_states, static_argnums=0)(MODEL, params, tokens)
    for k in range(HEADS):
        logits = medusa.head_logits(MODEL, params, trained[0], k, hidden, (tokens + 1) % VOCAB)
        guess = np.argmax(logits, -1)
        is_right = guess == (tokens + 2 + k) % VOCAB
        assert is_right[:, 1 : 16 - 2 - k].mean() > 0.5


def test_heads_that_read_the_root_foretell_what_only_the_root_tells(params, tmp_path):
    """Pairs of a random token and the one after it: half of all roots are just drawn."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, VOCAB, (64, 10))
    texts = [(np.stack([s, (s + 1) % VOCAB], 1).reshape(-1).tolist(), 0) for s in starts]
    learnt = medusa_training.examples(MODEL, params, *training.windows(texts, 20), num_heads=1)
    is_drawn = (learnt.roots + 1) % VOCAB == learnt.targets[:, 0]
    assert 0.45 < is_drawn.mean() < 0.55
    right = {}
    for reads_root in (False, True):
        config = dataclasses.replace(CONFIG, num_heads=1, reads_root=reads_root)
        heads = medusa.init(config, MODEL, params)
        config_of_training = dataclasses.replace(TRAINING, num_steps=150)
        heads = training.train(LOSS, (params, {}), heads, learnt, config_of_training)
        ranks = medusa_training.target_ranks(MODEL, params, heads, learnt, num_ranks=1)
        right[reads_root] = (ranks[is_drawn, 0] == 0).mean()
        medusa.save(tmp_path, config, heads, rank_accuracies=[[0.5]], tree=((0,),))
        again, loaded, _ = medusa.load(tmp_path, MODEL.config)
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, loaded, heads)
    assert right[True] > 0.9 and right[False] < 0.4, right


def test_examples_are_the_places_after_which_heads_guess(params):
    """Of a prompt only the last token; padding and the batch do not matter."""
    tokens, spans = training.windows([(list(range(20, 30)), 4), (list(range(5)), 0)], 10)
    got = medusa_training.examples(MODEL, params, tokens, spans, num_heads=3, batch_size=8)
    none = medusa_training.NO_TARGET
    assert got.roots.tolist() == [24, 25, 26, 27, 28, 1, 2, 3]
    assert got.targets.tolist() == [
        *[[t + 2, t + 3, t + 4] for t in (23, 24, 25)],
        [28, 29, none],
        [29, none, none],
        *([2, 3, 4], [3, 4, none], [4, none, none]),
    ]
    whole = jax.jit(training.hidden_states, static_argnums=0)(MODEL, params, tokens)
    want = np.concatenate([whole[0, 3:8], whole[1, :3]])
    np.testing.assert_allclose(got.hidden, want, rtol=1e-4, atol=1e-5)
    one = medusa_training.examples(MODEL, params, tokens, spans, num_heads=3, batch_size=1)
    np.testing.assert_array_equal(one.targets, got.targets)
    np.testing.assert_allclose(one.hidden, got.hidden, rtol=1e-4, atol=1e-5)


def test_a_target_that_is_none_teaches_nothing(params, learnt):
    heads = medusa.init(CONFIG, MODEL, params)
    hidden, roots, targets = learnt.hidden[:6], learnt.roots[:6], learnt.targets[:6].copy()
    targets[2:, 0] = medusa_training.NO_TARGET
    _, some = LOSS((params, {}), heads, hidden, roots, targets)
    _, first = LOSS((params, {}), heads, hidden[:2], roots[:2], targets[:2])
    np.testing.assert_allclose(some[0], first[0], rtol=1e-5)
    targets[:] = medusa_training.NO_TARGET
    assert LOSS((params, {}), heads, hidden, roots, targets)[1].tolist() == [0, 0]


def test_the_draft_vocabulary_is_of_the_most_frequent_targets():
    targets = np.array([[5, 5], [5, 3], [3, 2], [9, medusa_training.NO_TARGET]])
    tokens = medusa_training.draft_tokens(targets, vocab_size=12, size=5)
    assert tokens.tolist() == [5, 3, 2, 9, 0]
    ranks = medusa_training.as_ranks(targets, tokens[:3], 12)
    assert ranks.tolist() == [[0, 0], [0, 1], [1, 2], [-1, -1]]


@pytest.mark.parametrize("is_shared", [False, True])
def test_heads_of_a_draft_vocabulary_guess_as_others_would_among_its_tokens(
    params, learnt, is_shared
):
    tokens = np.array([40, 3, 17, 5, 60], np.int32)
    config = dataclasses.replace(CONFIG, shared_unembedding=is_shared, draft_vocab_size=5)
    heads = medusa.init(config, MODEL, params, tokens)
    assert heads["head"].shape == (1 if is_shared else HEADS, HIDDEN, 5)
    hidden = learnt.hidden[:9]
    whole = np.asarray(MODEL.unembed(params, hidden))[:, tokens]
    best = tokens[np.argsort(-whole, axis=-1)[:, :3]]
    got = medusa.guess(MODEL, params, heads, hidden, learnt.roots[:9], num_ranks=3)
    np.testing.assert_array_equal(got, np.stack([best] * HEADS, axis=1))


def test_of_a_shared_draft_vocabulary_only_the_blocks_are_trained(params, learnt, tmp_path):
    """And what is outside of it can be no hit."""
    config = dataclasses.replace(CONFIG, shared_unembedding=True, draft_vocab_size=30)
    tokens = medusa_training.draft_tokens(learnt.targets, vocab_size=VOCAB, size=30)
    weights, frozen = medusa.split(config, medusa.init(config, MODEL, params, tokens))
    assert set(weights) == {"w", "b"} and set(frozen) == {"head", "tokens"}
    data = learnt._replace(targets=medusa_training.as_ranks(learnt.targets, tokens, VOCAB))
    losses = []
    weights = training.train(
        *(LOSS, (params, frozen), weights, data, TRAINING),
        on_step=lambda _, each: losses.append(each),
    )
    assert (losses[-1] < losses[0] - 1.0).all()
    heads = {**frozen, **weights}
    ranks = medusa_training.target_ranks(MODEL, params, heads, learnt, num_ranks=99)
    found = medusa_training.rank_accuracies(ranks, 30)
    inside = np.isin(learnt.targets, tokens).sum(0) / (learnt.targets >= 0).sum(0)
    np.testing.assert_allclose(found.sum(1), inside, rtol=1e-6)
    medusa.save(tmp_path, config, heads, rank_accuracies=found.tolist(), tree=((0,),))
    again, loaded, _ = medusa.load(tmp_path, MODEL.config)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, heads)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", np.arange(4, dtype=np.int32), r"should have the arrays .*'tokens': \(5,\)"),
        ("tokens", np.arange(57, 62, dtype=np.int32), "ids 57 to 61, expected ids"),
        ("head", np.zeros((HEADS, HIDDEN, 5), np.float32), r"'head': \(1, 24, 5\)"),
    ],
)
def test_weights_of_other_shapes_than_described_are_refused(params, tmp_path, name, value, message):
    config = dataclasses.replace(CONFIG, shared_unembedding=True, draft_vocab_size=5)
    heads = medusa.init(config, MODEL, params, np.arange(5, dtype=np.int32))
    medusa.save(tmp_path, config, {**heads, name: value}, rank_accuracies=[[1.0]], tree=((0,),))
    with pytest.raises(ValueError, match=message):
        medusa.load(tmp_path, MODEL.config)


def test_a_draft_vocabulary_of_another_size_is_refused(params):
    with pytest.raises(ValueError, match="must be 1 to the vocabulary's 61, got 62"):
        dataclasses.replace(CONFIG, draft_vocab_size=62)
    config = dataclasses.replace(CONFIG, draft_vocab_size=5)
    with pytest.raises(ValueError, match="draft_vocab_size is 5, and 4 draft_tokens are given"):
        medusa.init(config, MODEL, params, np.arange(4))


def test_a_run_that_was_cut_ends_with_the_same_bits(params, learnt, trained, tmp_path):
    class Cut(Exception):
        pass

    def cut(step, _):
        if step == 47:
            raise Cut

    heads = medusa.init(CONFIG, MODEL, params)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(Cut):
        training.train(
            *(LOSS, (params, {}), heads, learnt, TRAINING), checkpoints=checkpoints, on_step=cut
        )
    checkpoints.close()
    steps = []
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    resumed = training.train(
        *(LOSS, (params, {}), heads, learnt, TRAINING),
        checkpoints=checkpoints,
        on_step=lambda step, _: steps.append(step),
    )
    checkpoints.close()
    assert steps == list(range(41, 81))  # from the checkpoint of step 40 on
    jax.tree.map(np.testing.assert_array_equal, resumed, trained[0])


def test_saved_heads_load_as_they_were(params, trained, tmp_path):
    accuracies = [[0.5, 0.2], [0.3, 0.1]]
    tree = ((0,), (1,), (0, 0), (0, 1))
    medusa.save(tmp_path, CONFIG, trained[0], rank_accuracies=accuracies, tree=tree)
    config, heads, loaded_tree = medusa.load(tmp_path, MODEL.config)
    assert (config, loaded_tree) == (CONFIG, tree)
    jax.tree.map(np.testing.assert_array_equal, heads, trained[0])


def test_heads_of_another_model_are_refused_with_both_named(trained, tmp_path):
    medusa.save(tmp_path, CONFIG, trained[0], rank_accuracies=[[1.0], [1.0]], tree=((0,),))
    other = dataclasses.replace(MODEL.config, hidden_size=32)
    with pytest.raises(ValueError, match=r"hidden_size=24, the model \(llama\) has hidden_size=32"):
        medusa.load(tmp_path, other)
    other = dataclasses.replace(MODEL.config, vocab_size=99)
    with pytest.raises(ValueError, match=r"vocab_size=61, the model \(llama\) has vocab_size=99"):
        medusa.load(tmp_path, other)


def test_a_tree_deeper_than_its_heads_is_refused_with_both_named(trained, tmp_path):
    tree = ((0,), (0, 0), (0, 0, 0))
    medusa.save(tmp_path, CONFIG, trained[0], rank_accuracies=[[1.0], [1.0]], tree=tree)
    with pytest.raises(ValueError, match=r"3 levels deep at node \[0, 0, 0\], and there are 2"):
        medusa.load(tmp_path, MODEL.config)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (((0, 0),), "without its parent"),
        (((0,), (0,)), "occurs twice"),
        (((-1,),), "ranks from 0"),
    ],
)
def test_what_is_no_tree_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        check_tree(tree, num_heads=2)


def test_the_fitted_tree_is_the_best_of_its_size():
    """Against all trees of 3 nodes with 2 heads of 2 ranks."""
    ranks = np.random.default_rng(0).choice([0, 1, -2, 5], (60, 2), p=[0.5, 0.2, 0.2, 0.1]).tolist()

    def gained(tree):
        return sum((a,) in tree for a, _ in ranks) + sum((a, b) in tree for a, b in ranks)

    nodes = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    tree = fit_tree(ranks, num_nodes=3, max_rank=2)
    check_tree(tree, num_heads=2)
    best = 0
    for chosen in itertools.combinations(nodes, 3):
        if all(len(node) == 1 or node[:1] in chosen for node in chosen):
            best = max(best, gained(chosen))
    assert gained(tree) == best
    assert set(fit_tree(ranks, num_nodes=100, max_rank=2)) == set(nodes)
    assert fit_tree([[0, 0], [0, -2]], num_nodes=2) == ((0,), (0, 0))
    with pytest.raises(ValueError, match="no head ever guesses"):
        fit_tree([[-2, 0], [-1, -1]], num_nodes=2)


def test_tokens_a_step_are_counted_as_decoding_goes():
    tree = ((0,), (1,), (0, 1))
    #  2 guesses right, to the 4th place; none right; 1 right, beyond the end
    ranks = [[0, 1], [0, 1], [0, 1], [2, 0], [1, 0], [0, 0]]
    assert tokens_per_step(tree, ranks) == pytest.approx((3 + 1 + 2) / 3)
    assert tokens_per_step(tree, [[1, 1]] * 4) == 2.0
    assert tokens_per_step(tree, [[-1, 0]] * 4) == 1.0


def test_each_window_comes_once_before_any_comes_twice():
    config = TrainingConfig(num_steps=5, batch_size=3)
    rows = np.concatenate([training.batch_rows(step, 5, config) for step in range(5)])
    for epoch in rows.reshape(3, 5):
        assert sorted(epoch) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="nothing to learn from"):
        training.windows([([1, 2], 0)], 8)
