"""Lookahead's window and n-grams, against a model that is a table."""

import numpy as np

from jinfer.speculation.lookahead import Lookahead
from jinfer.speculation.trees import depths


def run(text, follows, num_tokens, **sizes):
    """Decodes with a model in which token t is followed by follows[t]; returns text and steps."""
    lookahead = Lookahead(**sizes, seed=0)
    text, steps, goal = list(text), 0, len(text) + num_tokens
    while len(text) < goal:
        tokens, parents = lookahead.grow(text)
        assert len(tokens) <= (sizes["window"] + sizes["num_guesses"]) * (sizes["ngram_size"] - 1)
        assert len(set(zip(parents, tokens))) == len(tokens)
        said = [follows[t] for t in (text[-1], *tokens)]
        node, new = 0, []
        while True:
            new.append(said[node])
            children = [
                i + 1
                for i, (p, t) in enumerate(zip(parents, tokens))
                if p == node and t == said[node]
            ]
            if not children or depths(parents)[children[0] - 1] >= sizes["ngram_size"]:
                break
            node = children[0]
        lookahead.learn(said, len(new))
        text += new
        steps += 1
    return text, steps


def test_the_window_finds_what_the_text_has_not():
    """No n-gram comes twice here, so that prompt lookup has nothing to look up."""
    size = 60
    follows = [(t + 1) % size for t in range(size)]
    prompt = np.random.default_rng(0).permutation(size).tolist()
    text, steps = run(prompt, follows, 50, window=5, ngram_size=3, num_guesses=3)
    assert all(b == follows[a] for a, b in zip(text[size - 1 :], text[size:]))
    assert steps < 35


def test_a_repeated_text_comes_n_tokens_a_step():
    follows = [(t + 1) % 12 for t in range(12)]
    _, steps = run(list(range(12)), follows, 40, window=2, ngram_size=4, num_guesses=2)
    assert steps <= 11


def test_the_window_is_a_tree_of_columns():
    lookahead = Lookahead(window=2, ngram_size=3, num_guesses=1, seed=0)
    tokens, parents = lookahead.grow([1, 2])
    lookahead.learn(range(10, 11 + len(tokens)), 1)
    tokens, parents = lookahead.grow([1, 2, 3])
    assert len(tokens) == 4
    assert parents == (0, 1, 1, 3)
    assert depths(parents) == (1, 2, 2, 3)
