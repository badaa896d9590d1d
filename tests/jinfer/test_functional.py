"""`generate` as a pure function: the dense forward pass is its oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jinfer
from jinfer.config.model import ModelConfig, RopeConfig
from jinfer.models.model import Model, stack_layers

CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    sliding_window=5,
    layer_types=("full", "sliding"),
    rope=RopeConfig(theta=100.0),
)
MODEL = Model(CONFIG)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, 61, jnp.int32)
    return tokens, jnp.array([7, 3, 1], jnp.int32)


def greedy_by_logits(params, prompt, num_new):
    width = len(prompt) + num_new
    logits = jax.jit(MODEL.logits)
    tokens = list(prompt)
    logprobs = []
    for _ in range(num_new):
        padded = np.zeros(width, np.int32)
        padded[: len(tokens)] = tokens
        row = np.asarray(logits(params, jnp.asarray(padded)))[len(tokens) - 1]
        tokens.append(int(row.argmax()))
        logprobs.append(row.max() - np.log(np.exp(row - row.max()).sum()) - row.max())
    return tokens[len(prompt) :], logprobs


def test_greedy_rows_of_unequal_length_equal_the_dense_forward_pass(params, prompts):
    tokens, lens = prompts
    out = jinfer.generate(MODEL, params, tokens, max_new_tokens=9, prompt_lens=lens)
    for b in range(3):
        prompt = np.asarray(tokens[b, : int(lens[b])]).tolist()
        expected, logprobs = greedy_by_logits(params, prompt, 9)
        assert np.asarray(out.tokens[b]).tolist() == expected
        np.testing.assert_allclose(out.logprobs[b], logprobs, atol=1e-4)
    assert np.asarray(out.lengths).tolist() == [9, 9, 9]


def test_an_end_token_ends_its_row_alone(params, prompts):
    tokens, lens = prompts
    free = jinfer.generate(MODEL, params, tokens, max_new_tokens=8, prompt_lens=lens)
    eos = int(free.tokens[0, 2])
    out = jinfer.generate(
        MODEL, params, tokens, max_new_tokens=8, prompt_lens=lens, eos_token_ids=(eos,)
    )
    rows = np.asarray(free.tokens)
    for b in range(3):
        hits = np.flatnonzero(rows[b] == eos)
        length = hits[0] + 1 if hits.size else 8
        assert int(out.lengths[b]) == length
        assert np.asarray(out.tokens[b, :length]).tolist() == rows[b, :length].tolist()
        assert np.all(np.asarray(out.tokens[b, length:]) == eos)
        assert np.all(np.asarray(out.logprobs[b, length:]) == 0.0)


def test_sampled_tokens_follow_the_processed_distribution(params):
    prompt = jnp.array([[5, 9, 2]], jnp.int32)
    num_draws = 20_000

    def draw(key):
        return jinfer.generate(
            MODEL, params, prompt, max_new_tokens=1, temperature=0.7, top_k=6, key=key
        ).tokens[0, 0]

    drawn = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), num_draws))
    logits = np.asarray(MODEL.logits(params, prompt)[0, -1], np.float64) / 0.7
    keep = np.argsort(logits)[-6:]
    expected = np.exp(logits[keep] - logits[keep].max())
    expected /= expected.sum()
    counts = np.bincount(np.asarray(drawn), minlength=61)
    assert counts.sum() == counts[keep].sum()
    chi_square = (((counts[keep] - num_draws * expected) ** 2) / (num_draws * expected)).sum()
    assert chi_square < 20.5  # 99.9 % of a chi-square of 5 degrees


def test_the_transforms_of_jax_apply(params, prompts):
    tokens, lens = prompts

    def run(tokens, lens):
        return jinfer.generate(MODEL, params, tokens, max_new_tokens=4, prompt_lens=lens).tokens

    plain = run(tokens, lens)
    np.testing.assert_array_equal(jax.jit(run)(tokens, lens), plain)
    mapped = jax.vmap(run)(tokens[:, None], lens[:, None])
    np.testing.assert_array_equal(mapped[:, 0], plain)


def test_the_gradient_of_logprobs_is_that_of_the_dense_forward_pass(params, prompts):
    tokens, _ = prompts
    new = jinfer.generate(MODEL, params, tokens, max_new_tokens=3).tokens

    def by_generate(params):
        return jinfer.generate(MODEL, params, tokens, max_new_tokens=3).logprobs.sum()

    def by_logits(params):
        text = jnp.concatenate([tokens, new], axis=1)
        logprobs = jax.nn.log_softmax(MODEL.logits(params, text)[:, 6:-1])
        return jnp.take_along_axis(logprobs, new[:, :, None], axis=2).sum()

    got, expected = jax.grad(by_generate)(params), jax.grad(by_logits)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, expected)


def test_stacked_layers_give_the_same_tokens(prompts):
    import dataclasses

    model = Model(dataclasses.replace(CONFIG, layer_types=("full", "full")))
    params = model.init(jax.random.key(4))
    tokens, lens = prompts
    kwargs = {"max_new_tokens": 5, "prompt_lens": lens}
    expected = jinfer.generate(model, params, tokens, **kwargs)
    got = jinfer.generate(model, stack_layers(model.config, params), tokens, **kwargs)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokens": jnp.zeros((2, 2), jnp.int32), "prompt_lens": jnp.ones((1,), jnp.int32)},
            r"prompt_lens must be \[B\] = \[2\], got \[1\]",
        ),
        ({"tokens": jnp.zeros((3,), jnp.int32)}, "tokens must be"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": 1.0}, "needs key"),
    ],
)
def test_wrong_arguments_are_explained(params, change, message):
    arguments = {"tokens": jnp.zeros((1, 2), jnp.int32), "max_new_tokens": 1, **change}
    with pytest.raises(ValueError, match=message):
        jinfer.generate(MODEL, params, **arguments)


def test_prompts_may_be_lists(params, prompts):
    tokens, lens = prompts
    expected = jinfer.generate(MODEL, params, tokens, prompt_lens=lens, max_new_tokens=3)
    lists = tokens.tolist(), lens.tolist()
    found = jinfer.generate(MODEL, params, lists[0], prompt_lens=lists[1], max_new_tokens=3)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
