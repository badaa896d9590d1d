"""Prompt lookup, against a search through the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from jinfer.speculation.ngram import MAX_PLACES, NgramIndex


def search(tokens, shortest, longest, count):
    """The specification: the longest n-gram, and what most of its newest occurrences say."""
    for n in range(longest, shortest - 1, -1):
        last = tokens[len(tokens) - n :]
        ends = [e for e in range(n, len(tokens)) if n <= len(tokens) and tokens[e - n : e] == last]
        if not ends:
            continue
        ends, text = ends[-MAX_PLACES:], list(tokens)
        for i in range(count):
            drafts = text[len(tokens) :]
            said = [text[end + i] for end in ends if text[end : end + i] == drafts]
            most = max(map(said.count, said))
            text.append([token for token in said if said.count(token) == most][-1])
        return text[len(tokens) :]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    shortest=st.integers(1, 3),
    more=st.integers(0, 2),
    count=st.integers(0, 6),
    cuts=st.lists(st.integers(1, 60), max_size=4),
)
def test_what_most_matches_say_is_copied(tokens, shortest, more, count, cuts):
    index = NgramIndex(shortest, shortest + more)
    for end in sorted({min(cut, len(tokens)) for cut in [*cuts, len(tokens)]}):
        text = tokens[:end]
        assert index.propose(text, count) == search(text, shortest, shortest + more, count)


def test_most_places_decide_and_among_as_many_the_newest():
    assert NgramIndex(1, 1).propose([1, 2, 1, 2, 1, 3, 1], 2) == [2, 1]
    assert NgramIndex(1, 1).propose([1, 2, 1, 3, 1], 2) == [3, 1]
    # Older places have no vote.
    text = [1, 2] * MAX_PLACES + [1, 3] * (MAX_PLACES // 2) + [1]
    assert NgramIndex(1, 1).propose(text, 1) == [3]


def test_a_loop_is_drafted_as_a_loop():
    assert NgramIndex(1, 3).propose([5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]
    assert NgramIndex(1, 3).propose([4, 4], 3) == [4, 4, 4]
    assert NgramIndex(2, 3).propose([1, 2, 3], 3) == []
