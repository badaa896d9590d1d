"""Prompt lookup, against a search through the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from jinfer.spec.ngram import NgramIndex


def search(tokens, shortest, longest, count):
    """The specification: the longest n-gram, its newest occurrence but the end itself."""
    for n in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if n <= len(tokens) and tokens[end - n : end] == tokens[len(tokens) - n :]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    shortest=st.integers(1, 3),
    more=st.integers(0, 2),
    count=st.integers(0, 6),
    cuts=st.lists(st.integers(1, 40), max_size=4),
)
def test_the_newest_longest_match_is_copied(tokens, shortest, more, count, cuts):
    index = NgramIndex(shortest, shortest + more)
    for end in sorted({min(cut, len(tokens)) for cut in [*cuts, len(tokens)]}):
        text = tokens[:end]
        assert index.propose(text, count) == search(text, shortest, shortest + more, count)


def test_a_loop_is_drafted_as_a_loop():
    assert NgramIndex(1, 3).propose([5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]
    assert NgramIndex(1, 3).propose([4, 4], 3) == [4, 4, 4]
    assert NgramIndex(2, 3).propose([1, 2, 3], 3) == []
