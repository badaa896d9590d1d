"""Every field of what users give, with values of every kind: taken, or refused by its name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import byte_tokenizer, make_model

from jinfer import LLM, BeamSearchParams, SamplingParams
from jinfer.cli import main as cli
from jinfer.config import fields

ODD = [
    *(None, True, "", "7", "a\nb", b"a", "x" * 5000, 1.5, float("nan"), 10**400, 1 + 2j, [], {}),
    *([[1]], [None], object(), np.bool_(True), np.complex64(1), np.datetime64("2020-01-01")),
    *(np.array(3), np.array(0.5), np.array([0.5]), np.array([1, 2]), np.zeros((0, 3)), np.ones(99)),
    *(jnp.int32(3), jnp.array([1, 2]), jnp.zeros((2, 2)), np.array([1, None], object)),
]
MODEL = make_model(61)
LIMITS = {"max_model_len": 32, "skip_tokenizer_init": True, "num_gpu_blocks_override": 8}


def check_refusal(make, name, value):
    try:
        make(**{name: value})
    except (ValueError, TypeError) as error:
        assert type(error) in (ValueError, TypeError)
        text = str(error)
        assert name in text and len(text.splitlines()) == 1 and len(text) < 1500, (name, value)


@pytest.mark.parametrize("name", SamplingParams.__dataclass_fields__)
def test_a_sampling_field_takes_or_names_any_value(name):
    for value in ODD:
        check_refusal(SamplingParams, name, value)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(BeamSearchParams)])
def test_a_beam_field_takes_or_names_any_value(name):
    for value in ODD:
        check_refusal(
            lambda **one: BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **one}), name, value
        )


def test_a_bool_is_no_number_and_a_text_no_bool():
    for name in ("n", "top_k", "temperature", "min_tokens", "max_tokens", "seed", "logprobs"):
        for value in (True, np.bool_(True), np.array(True), jnp.bool_(True)):
            with pytest.raises(ValueError, match=f"{name} must be a"):
                SamplingParams(**{name: value})
    with pytest.raises(ValueError, match="ignore_eos must be True or False"):
        SamplingParams(ignore_eos="False")


def test_numbers_of_all_libraries_are_taken():
    for value in (2, np.int32(2), np.array(2), jnp.int32(2)):
        assert SamplingParams(top_k=value).top_k == 2
    for value in (0.5, np.float16(0.5), np.array(0.5), jnp.float32(0.5)):
        assert SamplingParams(top_p=value).top_p == 0.5
    assert SamplingParams(allowed_token_ids=np.array([3, 4])).allowed_token_ids == (3, 4)


@pytest.fixture(scope="module")
def make_llm():
    params = MODEL.init(jax.random.key(0))
    return lambda **one: LLM(MODEL, params=params, **{**LIMITS, **one})


# Without those that are not looked at here: objects of their own kinds.
OPTIONS = sorted(LLM.__init__.__kwdefaults__.keys() - {"params", "tokenizer", "speculative_config"})


@pytest.mark.parametrize("name", OPTIONS)
def test_an_argument_of_llm_refuses_values_of_another_kind(make_llm, name):
    is_flag = isinstance(LLM.__init__.__kwdefaults__[name], bool)
    wrong = [True, 1 + 2j, [], {}, object(), np.array([1, 2]), np.zeros((2, 2)), jnp.ones(200)]
    for value in wrong[is_flag:]:
        with pytest.raises((ValueError, TypeError)) as error:
            make_llm(**{name: value})
        text = str(error.value)
        assert name in text and len(text.splitlines()) == 1 and len(text) < 1500, (value, text)
    if is_flag:
        with pytest.raises(ValueError, match=f"{name} must be True or False, got 'False'"):
            make_llm(**{name: "False"})


@pytest.mark.parametrize("request_id", [{}, [], None, 7, np.array([1])])
def test_a_request_id_that_is_no_text_spoils_nothing(make_llm, request_id):
    llm = make_llm()
    params = SamplingParams(max_tokens=1)
    for call in (lambda: llm.add_request(request_id, [1], params), lambda: llm.abort(request_id)):
        with pytest.raises(ValueError, match="request_id must be a string"):
            call()
    assert llm.generate([[1]], params, use_tqdm=False)[0].finished


@pytest.mark.parametrize("priority", [{}, float("nan"), True, np.datetime64("2020-01-01"), "1"])
def test_a_priority_that_is_no_integer_is_refused(make_llm, priority):
    llm = make_llm()
    llm.add_request("a", [1], SamplingParams(max_tokens=1))
    with pytest.raises(ValueError, match="priority must be an integer"):
        llm.add_request("b", [1], SamplingParams(max_tokens=1), priority=priority)
    llm.abort("a")
    llm.check_integrity()


def test_messages_are_one_line_of_limited_length():
    text = fields.one_line(f"x must be\n1, got {'y' * 10**5}; do this")
    assert len(text) < 1100 and text.startswith("x must be 1,") and text.endswith("; do this")


def test_a_tokenizer_that_is_none_is_refused(make_llm):
    for value in ({}, 7, [], b"ab", object(), np.array([1])):
        with pytest.raises(
            TypeError, match="tokenizer must be a tokenizer of transformers, or a path"
        ):
            make_llm(skip_tokenizer_init=False, tokenizer=value)


def test_tools_and_flags_of_a_chat_are_named(make_llm):
    llm = make_llm(
        skip_tokenizer_init=False,
        tokenizer=byte_tokenizer(300),
        chat_template="{{ messages[0].content }}{{ tools }}",
    )
    messages = [{"role": "user", "content": "a"}]
    for value in (jnp.zeros((2, 2)), np.array([]), 7, "ab", {"a": 1}, [1]):
        with pytest.raises((TypeError, ValueError), match="tools must be a list"):
            llm.chat(messages, tools=value)
    for name in ("add_generation_prompt", "continue_final_message"):
        for value in (jnp.zeros(2), 1, None, "False"):
            with pytest.raises(ValueError, match=f"{name} must be True or False"):
                llm.chat(messages, **{name: value})


def test_a_flag_without_its_value_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--dtype=--"])
    assert "argument --dtype: expected one argument" in capsys.readouterr().err
