"""Output containers: names and derived times."""

import pytest

from jinfer.config.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def test_a_completion_is_finished_once_it_has_a_reason():
    completion = CompletionOutput(index=0, text="", token_ids=[])
    assert not completion.finished()
    completion.finish_reason = "length"
    assert completion.finished()


def test_the_names_are_those_users_know():
    completion = CompletionOutput(index=0, text="b", token_ids=[1], logprobs=[{1: Logprob(-0.5)}])
    output = RequestOutput(
        request_id="7", prompt="a", prompt_token_ids=[0], outputs=[completion], finished=False
    )
    for name in ("prompt_logprobs", "metrics", "num_cached_tokens"):
        assert not getattr(output, name)
    for name in ("cumulative_logprob", "finish_reason", "stop_reason"):
        assert getattr(completion, name) is None
    assert output.outputs[0].logprobs == [{1: Logprob(-0.5, rank=None, decoded_token=None)}]


def test_times_are_none_until_the_event():
    metrics = RequestMetrics()
    assert metrics.time_to_first_token is None and metrics.latency is None
    metrics = RequestMetrics(arrival_time=1.0, first_token_time=1.5, finished_time=3.0)
    assert metrics.time_to_first_token == pytest.approx(0.5)
    assert metrics.latency == pytest.approx(2.0)


def test_drafts_are_counted_by_position():
    metrics = RequestMetrics()
    assert metrics.acceptance_at == ()
    for num_drafted, num_accepted in [(2, 2), (0, 0), (3, 1), (1, 0)]:
        metrics.note_drafts(num_drafted, num_accepted)
    assert (metrics.num_drafted_tokens, metrics.num_accepted_tokens) == (6, 3)
    assert (metrics.num_drafted_at, metrics.num_accepted_at) == ([3, 2, 1], [2, 1, 0])
    assert metrics.acceptance_at == (2 / 3, 1 / 2, 0.0)
