"""Extreme and foreign values of every field: applied as a plain number, or refused by its name."""

import dataclasses
import decimal
import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import byte_tokenizer, make_model

from jinfer import LLM, BeamSearchParams, SamplingParams, functional
from jinfer.config.sampling_params import MAX_TOP_K
from jinfer.sampling.args import arg_row, pack_args
from jinfer.sampling.check import check_request
from jinfer.sampling.draw import sample
from jinfer.sampling.process import process_logits
from jinfer.sampling.state import init_state, pack_row, reset_row

VOCAB = 300
MODEL = make_model(VOCAB)
PROMPT = [30, 31, 32]
REALS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
REALS += ("repetition_penalty",)
COUNTS = ("n", "top_k", "min_tokens", "max_tokens", "seed", "logprobs", "prompt_logprobs")
IDS = ("stop_token_ids", "allowed_token_ids")
FLAGS = ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens")
FLAGS += ("include_stop_str_in_output", "skip_reading_prefix_cache")
TEXTS = ("stop", "bad_words")


class Opaque:
    def __repr__(self):
        raise RuntimeError("no text")


NUMBERS = [
    *(0, -1, 1, 2, 0.5, -0.0, 1e-50, 1e-46, 1e-38, 1e38, 1e39, 1e300, -1e300, math.nan, math.inf),
    *(-math.inf, True, False, 2**31, 2**32, 2**63, 2**64, 10**30, -(10**30), 10**400, 10**5000),
    *(np.int8(1), np.int64(2), np.uint64(2**64 - 1), np.float16(0.5), np.float32(0.25)),
    *(np.bool_(True), np.bool_(False), np.array(1), np.array(0.5), np.array([0.5]), np.array([1])),
    *(np.array([1, 2]), np.float32("nan"), np.complex64(1), np.datetime64("2020-01-01"), 1j),
    *(jnp.float32(0.5), jnp.bfloat16(0.5), jnp.int32(3), jnp.bool_(True), jnp.zeros(2)),
    *(decimal.Decimal("0.5"), decimal.Decimal("sNaN"), fractions.Fraction(1, 2), "1", b"1", ""),
    *(None, [], [1], (), {}, {"a": 1}, object(), Opaque(), print, "x" * 500, np.zeros((40, 40))),
]
LISTS = [
    *([x] for x in NUMBERS),
    *NUMBERS,
    *({1: 2}, {3}, range(3), np.array([[1]]), "ab", ["a", "\ud800"], [b"a"], ["a", 3]),
]


def take(name, make, *args, **kwargs):
    """Returns what `make` makes, or None where it is refused in one line that names the field."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        message = str(error)
        assert name in message, f"{name}: {message}"
        assert "\n" not in message and len(message) < 500, message
        return None


def served(params):
    """Packs the fields as a step does: nothing may overflow, what is cut leaves a token."""
    check_request(params, VOCAB)
    row = arg_row(params, seed=params.seed or 0, prompt_len=3)
    assert np.isfinite(row.floats).all()
    state = init_state(1, VOCAB)
    setup = pack_row(params, PROMPT, [40, 40], vocab_size=VOCAB)
    return row, reset_row(state, 0, setup)


@pytest.mark.parametrize("name", [*REALS, *COUNTS])
def test_a_number_is_applied_or_refused_by_name(name):
    draw = jax.jit(
        lambda args, state, logits: sample(
            process_logits(logits, args, state, jnp.zeros(1, jnp.int32), jnp.full(1, 5, jnp.int32)),
            args,
            jnp.full(1, 5, jnp.int32),
        )
    )
    logits = jax.random.normal(jax.random.key(0), (1, VOCAB)) * 1e4
    num_applied = 0
    for value in NUMBERS:
        others = {} if name == "max_tokens" else {"max_tokens": None}
        params = take(name, SamplingParams, **{name: value}, **others)
        if params is None:
            continue
        got = getattr(params, name)
        assert got is None or type(got) in (int, float)
        assert not isinstance(value, (str, bytes, bool, np.bool_, list, tuple, dict))
        packed = take(name, served, params)
        if packed is not None:
            num_applied += 1
            args = pack_args([packed[0]], 1)
            assert 0 <= int(draw(args, packed[1], logits)[0]) < VOCAB
    assert num_applied >= 4


@pytest.mark.parametrize("name", [*IDS, *TEXTS, *FLAGS, "logit_bias", "output_kind"])
def test_a_list_or_flag_is_applied_or_refused_by_name(name):
    values = [*LISTS, *({x: 1.0} for x in ("5", 5, np.int64(5), "9" * 5000, "x", 5.0, True, None))]
    values += [{5: x} for x in NUMBERS] + [{"5": 1.0, 5: 2.0}, "delta", "final_only"]
    num_applied = 0
    for value in values:
        params = take(name, SamplingParams, **{name: value})
        if params is not None and take(name, served, params) is not None:
            num_applied += 1
    assert num_applied


def test_large_numbers_mean_what_they_say():
    """More than there can be is all there is."""
    params = SamplingParams(top_k=2**40, min_tokens=2**50, max_tokens=None, seed=2**64 - 1)
    assert params.top_k == MAX_TOP_K
    row, _ = served(params)
    args = pack_args([row], 1)
    assert int(args.top_k[0]) == MAX_TOP_K and int(args.min_position[0]) == 2**31 - 1
    assert SamplingParams(max_tokens=2**63).max_tokens == 2**63


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(BeamSearchParams)])
def test_a_field_of_beam_search_is_applied_or_refused_by_name(name):
    for value in LISTS:
        given = {"beam_width": 2, "max_tokens": 4, name: value}
        params = take(name, BeamSearchParams, **given)
        if params is not None:
            length = 10**7  # scores of the longest texts are numbers
            assert math.isfinite(-1e6 / length**params.length_penalty)
            assert params.temperature == 0 or np.float32(1) / np.float32(params.temperature) < 1e3


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p"])
def test_a_number_of_functional_generate_is_applied_or_refused_by_name(name):
    params = MODEL.init(jax.random.key(0))
    key = jax.random.key(0)
    for value in NUMBERS:
        if isinstance(value, Opaque) or value is None:
            continue
        fields = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, name: value}
        out = None
        try:
            functional._sample_args(1, **fields)
        except (ValueError, TypeError) as error:
            assert name in str(error) and "\n" not in str(error)
            out = error
        assert out is not None or np.isfinite(np.asarray(value).astype(np.float64)).all()
    for value in (math.nan, -1, "x"):
        with pytest.raises((ValueError, TypeError), match=name):
            fields = {"temperature": 1.0, name: value}
            functional.generate(MODEL, params, [PROMPT], max_new_tokens=1, key=key, **fields)


def test_the_doors_of_the_engine_name_what_they_refuse():
    llm = LLM(
        MODEL,
        params=MODEL.init(jax.random.key(0)),
        tokenizer=byte_tokenizer(VOCAB),
        max_model_len=32,
        max_num_seqs=2,
        num_gpu_blocks_override=4,
    )
    params = SamplingParams(temperature=0, max_tokens=1)
    for value in NUMBERS:
        if value is None:
            continue
        take("priority", llm.add_request, "x", PROMPT, params, priority=value)
        llm.abort("x")
        beam = BeamSearchParams(beam_width=2, max_tokens=1)
        limit = value if not isinstance(value, (int, np.integer)) or value < 1 else 10**30
        take("concurrency_limit", llm.beam_search, [], beam, concurrency_limit=limit)
    for order in ([1, 0], np.array([1, 0])):
        outputs = llm.generate([PROMPT, PROMPT], params, use_tqdm=False, priority=order)
        assert all(output.outputs[0].finish_reason == "length" for output in outputs)
    for result in ([VOCAB], [-1], 5, "ab", [0.5], None):
        with pytest.raises(ValueError, match="prefix_allowed_tokens_fn"):
            llm.beam_search(
                [PROMPT],
                BeamSearchParams(beam_width=2, max_tokens=2),
                prefix_allowed_tokens_fn=lambda i, tokens, result=result: result,
            )
    llm.check_integrity()
