"""How a request ends: the order and the exact place of every stop rule."""

import pytest
from tokenizers import Tokenizer, decoders, models

from jinfer.config.sampling_params import NO_TOKEN, SamplingParams
from jinfer.engine.request import Request

A, B, EOS, STOP = 0, 1, 2, 3


def tokenizer():
    vocab = {"a": A, "b": B, "<eos>": EOS, "<stop>": STOP}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def run(tokens, max_model_len=100, prompt=(A,), **fields):
    """Accepts tokens until the end; returns what is left to see."""
    request = Request(
        request_id="r",
        prompt_token_ids=list(prompt),
        params=SamplingParams(**{"max_tokens": 8, **fields}),
        seed=0,
        arrival=0,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
        tokenizer=tokenizer(),
    )
    for token in tokens:
        if request.accept(token):
            break
    return request.output_token_ids, request.text, request.finish_reason, request.stop_reason


@pytest.mark.parametrize(
    ("fields", "tokens", "expected"),
    [
        pytest.param({}, [A, EOS, B], ([A, EOS], "a", "stop", None), id="eos"),
        pytest.param(
            {"ignore_eos": True, "max_tokens": 3},
            [A, EOS, B],
            ([A, EOS, B], "ab", "length", None),
            id="ignore_eos",
        ),
        pytest.param(
            {"include_stop_str_in_output": True, "skip_special_tokens": False},
            [A, EOS],
            ([A, EOS], "a<eos>", "stop", None),
            id="eos included",
        ),
        pytest.param(
            {"include_stop_str_in_output": True},
            [A, EOS],
            ([A, EOS], "a", "stop", None),
            id="eos included but skipped as special",
        ),
        pytest.param(
            {"stop_token_ids": [STOP]}, [A, STOP], ([A, STOP], "a", "stop", STOP), id="stop id"
        ),
        pytest.param(
            {"stop_token_ids": [STOP], "include_stop_str_in_output": True},
            [A, STOP],
            ([A, STOP], "a<stop>", "stop", STOP),
            id="stop id included",
        ),
        pytest.param(
            {"stop_token_ids": [EOS]}, [EOS], ([EOS], "", "stop", None), id="eos before stop id"
        ),
        pytest.param(
            {"stop_token_ids": [EOS], "ignore_eos": True},
            [EOS],
            ([EOS], "", "stop", EOS),
            id="eos as stop id only",
        ),
        pytest.param(
            {"stop": "<eos>"}, [A, EOS], ([A, EOS], "a", "stop", None), id="eos before its string"
        ),
        pytest.param(
            {"stop": "<eos>", "ignore_eos": True},
            [A, EOS, B],
            ([A, EOS], "a", "stop", "<eos>"),
            id="eos as stop string only",
        ),
        pytest.param(
            {"stop": "<eos>", "ignore_eos": True, "include_stop_str_in_output": True},
            [A, EOS, B],
            ([A, EOS], "a<eos>", "stop", "<eos>"),
            id="eos as stop string included",
        ),
        pytest.param(
            {"stop": "b"}, [A, NO_TOKEN, B], ([A], "a", "error", None), id="no token left"
        ),
        pytest.param({"stop": "ba"}, [A, B, A, B], ([A, B, A], "a", "stop", "ba"), id="stop"),
        pytest.param(
            {"stop": "ba", "include_stop_str_in_output": True},
            [A, B, A, B],
            ([A, B, A], "aba", "stop", "ba"),
            id="stop included",
        ),
        pytest.param(
            {"stop": ["bb", "b"]}, [A, B], ([A, B], "a", "stop", "b"), id="first complete stop"
        ),
        pytest.param(
            {"stop": "b", "max_tokens": 2},
            [A, B],
            ([A, B], "a", "stop", "b"),
            id="stop before length",
        ),
        pytest.param(
            {"max_tokens": 2, "stop": "bb"},
            [A, B],
            ([A, B], "ab", "length", None),
            id="held text is shown at the end",
        ),
        pytest.param(
            {"max_tokens": 2}, [A, EOS], ([A, EOS], "a", "stop", None), id="eos at max_tokens"
        ),
        pytest.param(
            {"max_tokens": None},
            [A] * 9,
            ([A] * 4, "aaaa", "length", None),
            id="context end",
        ),
        pytest.param(
            {"max_tokens": 9}, [A] * 9, ([A] * 4, "aaaa", "length", None), id="context is shorter"
        ),
        pytest.param(
            {"min_tokens": 3}, [EOS, EOS, EOS, A], ([EOS] * 3, "", "stop", None), id="min eos"
        ),
        pytest.param(
            {"min_tokens": 2, "stop_token_ids": [STOP]},
            [STOP, STOP],
            ([STOP] * 2, "<stop>", "stop", STOP),
            id="min stop id",
        ),
        pytest.param(
            {"min_tokens": 3, "stop": "b"},
            [B, B, A, B],
            ([B, B, A, B], "bba", "stop", "b"),
            id="min stop string",
        ),
        pytest.param(
            {"detokenize": False}, [A, B, EOS], ([A, B, EOS], "", "stop", None), id="no text"
        ),
    ],
)
def test_a_sequence_ends_at_the_right_token_for_the_right_reason(fields, tokens, expected):
    limit = {"max_model_len": 5} if fields.get("max_tokens", 0) in (None, 9) else {}
    assert run(tokens, **fields, **limit) == expected


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="request r: the prompt has no tokens"):
        run([], prompt=())
    with pytest.raises(ValueError, match=r"5 tokens leaves no room .* max_model_len 5"):
        run([], prompt=[A] * 5, max_model_len=5)
    assert run([B, B], prompt=[A] * 4, max_model_len=5)[2] == "length"


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match=r"no tokenizer .* use stop_token_ids"):
        Request(
            request_id="r",
            prompt_token_ids=[A],
            params=SamplingParams(stop="a"),
            seed=0,
            arrival=0,
            max_model_len=8,
        )


def test_the_first_prompt_token_has_no_logprobs_and_later_ones_come_once():
    params = SamplingParams(prompt_logprobs=1, logprobs=1)
    request = Request(
        request_id="r",
        prompt_token_ids=[A, B, A],
        params=params,
        seed=0,
        arrival=0,
        max_model_len=9,
    )
    for position, entry in [(1, "x"), (2, "y"), (1, "again"), (2, "again")]:
        request.set_prompt_logprob(position, entry)
    assert request.prompt_logprobs == [None, "x", "y"]
    request.accept(B, "lp")
    assert request.logprobs == ["lp"]
