"""SamplingParams: every field is normalised and checked, or refused by name with a reason."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from jinfer.config.sampling_params import RequestOutputKind, SamplingParams, child_seed


def refuse(match: str, **kwargs) -> None:
    with pytest.raises(ValueError, match=match):
        SamplingParams(**kwargs)


def test_the_defaults_are_those_that_users_know():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (p.max_tokens, p.min_tokens, p.seed, p.ignore_eos) == (16, 0, None, False)
    assert (p.stop, p.stop_token_ids, p.bad_words) == ((), (), ())
    assert (p.logprobs, p.prompt_logprobs, p.logit_bias, p.allowed_token_ids) == (None,) * 4
    assert (p.detokenize, p.skip_special_tokens, p.spaces_between_special_tokens) == (True,) * 3
    assert not p.include_stop_str_in_output
    assert p.output_kind is RequestOutputKind.CUMULATIVE


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"n": True}, "n must be an integer, got True"),
        ({"n": 1.5}, "n must be an integer, got 1.5"),
        ({"n": "2"}, "n must be an integer, got '2'"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0"),
        ({"temperature": -0.1}, "temperature must be finite and not negative"),
        ({"temperature": float("nan")}, "temperature must be a number, got NaN"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": float("nan")}, "top_p must be a number, got NaN"),
        ({"top_k": -2}, "top_k must be positive, or 0 or -1"),
        ({"top_k": 2.0}, "top_k must be an integer"),
        ({"top_k": False}, "top_k must be an integer, got False"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\]"),
        ({"min_p": 1.5}, r"min_p must lie in \[0, 1\]"),
        ({"min_p": float("nan")}, "min_p must be a number, got NaN"),
        ({"presence_penalty": 2.1}, "presence_penalty must lie in"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be a number"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must lie in"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and positive"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be finite"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be a number"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": True}, "max_tokens must be an integer, got True"),
        ({"min_tokens": -1}, "min_tokens must not be negative"),
        ({"min_tokens": 17}, r"min_tokens \(17\) must not exceed max_tokens \(16\)"),
        ({"logprobs": -2}, "logprobs must be 0 or more"),
        ({"logprobs": True}, "logprobs must be an integer, got True"),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be 0 or more"),
        ({"seed": -2}, "seed must lie in"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"stop": ""}, "stop holds an empty string"),
        ({"stop": ["a", ""]}, "stop holds an empty string"),
        ({"stop": [3]}, "stop must hold strings, got 3"),
        ({"stop": 3}, "stop must be a string or a list of strings"),
        ({"stop": "a", "detokenize": False}, "set detokenize=True"),
        ({"stop_token_ids": [-1]}, "stop_token_ids holds the negative token id -1"),
        ({"stop_token_ids": [True]}, r"stop_token_ids\[0\] must be an integer"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": "ab"}, "stop_token_ids must be a list of token ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [1.0]}, r"allowed_token_ids\[0\] must be an integer"),
        ({"bad_words": [""]}, "bad_words holds an empty string"),
        ({"bad_words": [[1, 2]]}, "bad_words must hold strings"),
        ({"logit_bias": {1: float("nan")}}, r"logit_bias\[1\] must be a number, got NaN"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias holds the negative token id -1"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias key must be an integer"),
        ({"logit_bias": [1]}, "logit_bias must map"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"detokenize": None}, "detokenize must be True or False"),
        ({"skip_special_tokens": "yes"}, "skip_special_tokens must be True or False"),
        ({"output_kind": "SOMETIMES"}, "one of CUMULATIVE, DELTA, FINAL_ONLY"),
    ],
)
def test_a_wrong_or_contradictory_value_is_named(kwargs, match):
    refuse(match, **kwargs)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("structured_outputs", {"json": {}}, "not built yet"),
        ("guided_decoding", {"json": {}}, "renamed structured_outputs"),
        ("best_of", 4, "ask for n samples"),
        ("use_beam_search", True, "not a sampling field"),
        ("length_penalty", 0.5, "belongs to beam search"),
        ("early_stopping", True, "belongs to beam search"),
        ("early_stopping", "never", "belongs to beam search"),
        ("logits_processors", [print], "logit_bias"),
        ("truncate_prompt_tokens", 8, "prompt_token_ids"),
        ("logprob_token_ids", [1], "logprobs=-1"),
        ("prompt_logprob_token_ids", [1], "prompt_logprobs=-1"),
        ("prompt_logprob_start", 1, "leading entries"),
        ("flat_logprobs", True, "one dict"),
        ("stream_interval", 2, "every step"),
        ("thinking_token_budget", 10, "reasoning"),
        ("repetition_detection", {"min_count": 2}, "penalties"),
        ("routed_experts_prompt_start", 1, "routed experts"),
        ("trace_decode_token_ids", [1], "forced decoding"),
        ("extra_args", {"a": 1}, "by its name"),
        ("skip_clone", True, "frozen"),
    ],
)
def test_a_known_but_unbuilt_field_is_refused_with_the_reason(name, value, reason):
    refuse(f"{name}=.*is not supported: .*{reason}", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("structured_outputs", v) for v in ({}, [], "", 0, False)),
        *(("guided_decoding", v) for v in ({}, False)), ("best_of", True), ("best_of", 0),
        ("length_penalty", True), ("length_penalty", False), ("use_beam_search", 0),
        ("early_stopping", 0), ("stream_interval", True), ("extra_args", []), ("n", True),
        ("logits_processors", {}), ("logprob_token_ids", np.array([1, 2])), ("seed", False),
    ],
)  # fmt: skip
def test_an_empty_or_false_value_is_not_an_absent_one(name, value):
    refuse(name, **{name: value})


def test_unbuilt_fields_pass_when_they_ask_for_nothing():
    p = SamplingParams(
        best_of=1, use_beam_search=False, length_penalty=1.0, early_stopping=False,
        structured_outputs=None, logits_processors=[], extra_args={}, skip_clone=False,
        skip_reading_prefix_cache=None,
    )  # fmt: skip
    assert p == SamplingParams()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("max_new_tokens", "use max_tokens"),
        ("min_new_tokens", "use min_tokens"),
        ("do_sample", "temperature=0"),
        ("num_beams", "beam search"),
        ("regex", "structured outputs are not built"),
        ("temprature", "did you mean temperature"),
        ("stop_token_id", "did you mean stop_token_ids"),
        ("frequency", "did you mean frequency_penalty"),
        ("zzz", "it has n, temperature"),
    ],
)
def test_an_unknown_name_is_answered_with_what_is_meant(name, match):
    refuse(f"no field '{name}'.*{match}", **{name: 1})


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError, match="keywords only"):
        SamplingParams(0.8)  # pyright: ignore[reportCallIssue]


def test_values_are_normalised():
    p = SamplingParams(
        temperature=0.001, top_k=-1, seed=-1, stop="x", stop_token_ids=[3, 3, np.int64(2)],
        allowed_token_ids=np.array([4, 5]), logit_bias={"7": 1000, 8: -float("inf")},
        bad_words=["a", "a", "b"], output_kind="delta", logprobs=0,
    )  # fmt: skip
    assert (p.temperature, p.top_k, p.seed, p.logprobs) == (0.01, 0, None, 0)
    assert (p.stop, p.stop_token_ids, p.bad_words) == (("x",), (3, 2), ("a", "b"))
    assert p.allowed_token_ids == (4, 5)
    assert p.logit_bias == {7: 100.0, 8: -100.0}
    assert p.output_kind is RequestOutputKind.DELTA
    assert all(type(i) is int for i in (*p.stop_token_ids, *p.allowed_token_ids))


def test_none_stands_for_no_stop_and_an_empty_bias_for_none():
    p = SamplingParams(stop=None, stop_token_ids=None, bad_words=None, logit_bias={})
    assert p == SamplingParams()


def test_greedy_resets_what_cannot_change_it():
    p = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.2)
    assert p.is_greedy
    assert (p.top_p, p.top_k, p.min_p) == (1.0, 0, 0.0)
    assert not SamplingParams(temperature=0.5).is_greedy


def test_greedy_does_not_hide_a_wrong_value():
    refuse("top_p must lie", temperature=0, top_p=2.0)


def test_from_optional_reads_none_as_the_default_except_for_max_tokens():
    p = SamplingParams.from_optional(
        n=None, temperature=None, stop=None, max_tokens=None, logit_bias={"1": 2}
    )
    assert p == SamplingParams(max_tokens=None, logit_bias={1: 2.0})
    with pytest.raises(ValueError, match="best_of=3"):
        SamplingParams.from_optional(best_of=3)


def test_params_are_frozen_hashable_and_survive_copies():
    p = SamplingParams(temperature=0.7, stop=["a"], logit_bias={1: 2.0}, seed=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.n = 2  # pyright: ignore[reportAttributeAccessIssue]
    for twin in (p.clone(), copy.copy(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert twin == p
        assert hash(twin) == hash(p)
    assert dataclasses.replace(p, max_tokens=None).max_tokens is None
    with pytest.raises(ValueError, match="top_p"):
        dataclasses.replace(p, top_p=3.0)


def test_the_callers_lists_are_not_shared():
    bias = {1: 1.0}
    p = SamplingParams(logit_bias=bias)
    bias[2] = 5.0
    assert p.logit_bias == {1: 1.0}


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_ids_outside_the_vocabulary_are_refused(name):
    inside, outside = ({9: 1.0}, {10: 1.0}) if name == "logit_bias" else ([9], [10])
    SamplingParams(**{name: inside}).check_vocab(10)
    with pytest.raises(ValueError, match=rf"{name} .*vocabulary of 10: \[10\]"):
        SamplingParams(**{name: outside}).check_vocab(10)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_logprobs_than_tokens_are_refused(name):
    SamplingParams(**{name: 10}).check_vocab(10)
    SamplingParams(**{name: -1}).check_vocab(10)
    with pytest.raises(ValueError, match=f"{name}=11 exceeds the vocabulary"):
        SamplingParams(**{name: 11}).check_vocab(10)


def test_child_seeds_are_distinct_and_the_first_is_the_seed_itself():
    assert child_seed(7, 0) == 7
    seeds = {child_seed(s, i) for s in range(50) for i in range(20)}
    assert len(seeds) == 50 * 20
    assert all(0 <= s < 2**64 for s in seeds)
