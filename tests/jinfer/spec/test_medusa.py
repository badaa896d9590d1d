"""Medusa heads: how they start, learn, are kept and refused, on a tiny random model."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jinfer.config import ModelConfig
from jinfer.models.model import Model
from jinfer.spec import medusa, medusa_training, training
from jinfer.spec.medusa_tree import check_tree, expected_tokens, fit_tree
from jinfer.spec.training import Checkpoints, TrainingConfig

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
TRAINING = TrainingConfig(num_steps=80, batch_size=8, learning_rate=3e-2, checkpoint_every=40)


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
def trained(params, data):
    """(heads, losses by step) of an unbroken run."""
    seen = []
    heads = medusa.init(CONFIG, MODEL, params)
    heads = training.train(
        LOSS, params, heads, *data, TRAINING, on_step=lambda _, each: seen.append(each)
    )
    return heads, np.stack(seen)


@pytest.mark.parametrize(("is_shared", "is_tied"), [(False, False), (False, True), (True, True)])
def test_new_heads_say_what_the_models_own_head_says(params, is_shared, is_tied):
    model = Model(dataclasses.replace(MODEL.config, tie_word_embeddings=is_tied))
    if is_tied:
        params = {name: part for name, part in params.items() if name != "lm_head"}
    config = dataclasses.replace(CONFIG, shared_unembedding=is_shared)
    heads = medusa.init(config, model, params)
    assert ("head" in heads) != is_shared
    hidden = np.random.default_rng(0).normal(0, 1, (3, HIDDEN)).astype(np.float32)
    for k in range(HEADS):
        got = medusa.head_logits(model, params, heads, k, hidden)
        np.testing.assert_allclose(got, model.unembed(params, hidden), rtol=1e-6, atol=1e-6)


def test_the_loss_of_each_head_falls_and_the_backbone_stays(params, data, trained):
    before = jax.tree.map(np.asarray, params)
    _, losses = trained
    assert losses.shape == (TRAINING.num_steps, HEADS)
    assert (losses[-3:].mean(0) < losses[:3].mean(0) - 1.0).all()
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, params))


def test_heads_learn_the_token_that_is_theirs(params, data, trained):
    """The counting texts: after token v head k should say v + 2 + k."""
    accuracies = medusa_training.rank_accuracies(MODEL, params, trained[0], *data, num_ranks=4)
    assert accuracies.shape == (HEADS, 4)
    assert (accuracies[:, 0] > 0.5).all()
    assert (accuracies.sum(1) <= 1 + 1e-6).all()
    tokens, _ = data
    hidden = jax.jit(training.hidden_states, static_argnums=0)(MODEL, params, tokens)
    for k in range(HEADS):
        guess = np.argmax(medusa.head_logits(MODEL, params, trained[0], k, hidden), -1)
        is_right = guess == (tokens + 2 + k) % VOCAB
        assert is_right[:, 1 : 16 - 2 - k].mean() > 0.5


def test_padding_teaches_nothing(params):
    heads = medusa.init(CONFIG, MODEL, params)
    tokens = np.arange(16, dtype=np.int32)[None] + 1
    spans = np.array([[0, 9]], np.int32)
    other = np.where(np.arange(16)[None] < 9, tokens, 50)
    losses = jax.jit(medusa_training.losses, static_argnums=0)
    got = losses(MODEL, params, heads, tokens, spans)
    want = losses(MODEL, params, heads, other, spans)
    np.testing.assert_array_equal(got, want)


def test_of_a_prompt_nothing_is_learnt(params):
    _, spans = training.windows([(list(range(10)), 3)], 6)
    assert spans.tolist() == [[3, 6], [0, 4]]
    heads = medusa.init(CONFIG, MODEL, params)
    tokens = np.arange(16, dtype=np.int32)[None] + 1
    losses = jax.jit(medusa_training.losses, static_argnums=0)

    def total(begin, end):
        num_targets = np.array([end - max(begin, k + 2) for k in range(HEADS)], np.float32)
        span = np.array([[begin, end]], np.int32)
        return num_targets * losses(MODEL, params, heads, tokens, span)

    np.testing.assert_allclose(total(0, 9), total(0, 5) + total(5, 9), rtol=1e-5)


def test_a_run_that_was_cut_ends_with_the_same_bits(params, data, trained, tmp_path):
    class Cut(Exception):
        pass

    def cut(step, _):
        if step == 47:
            raise Cut

    heads = medusa.init(CONFIG, MODEL, params)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(Cut):
        training.train(LOSS, params, heads, *data, TRAINING, checkpoints=checkpoints, on_step=cut)
    checkpoints.close()
    steps = []
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    resumed = training.train(
        LOSS,
        params,
        heads,
        *data,
        TRAINING,
        checkpoints=checkpoints,
        on_step=lambda step, _: steps.append(step),
    )
    checkpoints.close()
    assert steps == list(range(41, 81))  # from the checkpoint of step 40 on
    jax.tree.map(np.testing.assert_array_equal, resumed, trained[0])


def test_saved_heads_load_as_they_were(params, trained, tmp_path):
    accuracies = [[0.5, 0.2], [0.3, 0.1]]
    tree = fit_tree(accuracies, num_nodes=4)
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
        (((0,), (0,)), "stands twice"),
        (((-1,),), "ranks from 0"),
    ],
)
def test_what_is_no_tree_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        check_tree(tree, num_heads=2)


def test_the_fitted_tree_is_the_best_of_its_size():
    """Against all trees of 3 nodes with 2 heads of 2 ranks."""
    accuracies = [[0.6, 0.3], [0.5, 0.2]]
    nodes = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    tree = fit_tree(accuracies, num_nodes=3)
    check_tree(tree, num_heads=2)
    best = 0.0
    for chosen in itertools.combinations(nodes, 3):
        if all(len(node) == 1 or node[:1] in chosen for node in chosen):
            best = max(best, expected_tokens(chosen, accuracies))
    assert expected_tokens(tree, accuracies) == pytest.approx(best)
    assert len(fit_tree(accuracies, num_nodes=100)) == 6
    assert fit_tree([[1.0], [1.0]], num_nodes=2) == ((0,), (0, 0))


def test_each_window_comes_once_before_any_comes_twice():
    config = TrainingConfig(num_steps=5, batch_size=3)
    rows = np.concatenate([training.batch_rows(step, 5, config) for step in range(5)])
    for epoch in rows.reshape(3, 5):
        assert sorted(epoch) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="nothing to learn from"):
        training.windows([([1, 2], 0)], 8)
