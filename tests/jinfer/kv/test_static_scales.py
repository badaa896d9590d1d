"""Static scales of K and V: the codes, and every kind of step against fake-quantized K and V."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_models import make_config

from jinfer import LLM, BeamSearchParams, SamplingParams
from jinfer.config.static_kv import StaticKV
from jinfer.kv import codes as kv_quant
from jinfer.linear import ops
from jinfer.models.model import Model

PLAIN = make_config(199, head_dim=16)
SCALES = {
    # Of K and V by layer; heads whose scale is small saturate.
    "float8_e4m3fn": ([[0.01, 0.002], [0.004, 0.02]], [[0.003, 0.01], [0.01, 0.004]]),
    "int8": ([[0.02], [0.03]], [[0.015], [0.008]]),
}


def fake_quantize(x, scale, dtype):
    """What compressed-tensors calls so, in numpy."""
    x = np.asarray(x, np.float32) / np.float32(scale)[:, None]
    if dtype == "int8":
        codes = np.clip(np.rint(x), -128, 127)
    else:
        codes = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return jnp.asarray(codes * np.float32(scale)[:, None])


@pytest.fixture(scope="module")
def params():
    return Model(PLAIN).init(jax.random.key(0))


def model_of(dtype, is_default=True):
    k, v = (tuple(map(tuple, rows)) for rows in SCALES[dtype])
    static = StaticKV(dtype=dtype, k=k, v=v, is_default=is_default)
    return Model(dataclasses.replace(PLAIN, static_kv=static))


def make_llm(model, params, **changes):
    options = {"num_decode_steps": 4, "max_model_len": 64, "max_num_seqs": 4}
    return LLM(
        model,
        params=params,
        skip_tokenizer_init=True,
        **{**options, "max_num_batched_tokens": 16, "block_size": 8, "seed": 1, **changes},
    )


def reference(params, tokens, dtype):
    """Logprobs [T, V] of a text whose K and V are fake-quantized."""

    def attend(layer, q, k, v, cache, *, window):
        k, v = (fake_quantize(x, SCALES[dtype][i][layer], dtype) for i, x in enumerate((k, v)))
        return ops.dense_attention(q, k, v, sm_scale=PLAIN.sm_scale, window=window, cap=None), None

    model = Model(PLAIN)
    places = jnp.arange(len(tokens))
    hidden, _ = model.apply(params, jnp.asarray(tokens), places, attend, None)
    return np.asarray(jax.nn.log_softmax(model.unembed(params, hidden)))


@pytest.mark.parametrize("dtype", SCALES)
def test_codes_are_those_of_the_given_scale(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 2, 16)), jnp.float32)
    scale = np.float32(SCALES[dtype][0][0])
    codes, stored = kv_quant.quantize_static(x, dtype, jnp.asarray(scale))
    assert stored.shape == (9, 2) and np.array_equal(stored, np.broadcast_to(scale, (9, 2)))
    back = kv_quant.dequantize(codes, stored)
    np.testing.assert_array_equal(back, fake_quantize(x, scale, dtype))
    for bad in (np.nan, np.inf):  # which codes would hide
        _, stored = kv_quant.quantize_static(x.at[3, 1, 5].set(bad), dtype, jnp.asarray(scale))
        assert np.argwhere(~np.isfinite(np.asarray(stored))).tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("dtype", "drafts"),
    [
        ("float8_e4m3fn", None),
        ("int8", {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False}),
        pytest.param(
            "int8",
            {"method": "lookahead", "window": 2, "ngram_size": 3, "num_guesses": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "float8_e4m3fn",
            {"method": "self", "format": "int8-channel:rtn"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["loop", "chain", "tree", "self"],
)
@pytest.mark.thorough
def test_every_kind_of_step_keeps_k_and_v_so(dtype, drafts, params):
    """Chunks of a prompt, decode loops, verified chains and trees, and beams."""
    llm = make_llm(model_of(dtype), params, speculative_config=drafts)
    assert llm.loop.engine.runner.cache.dtype == dtype  # "auto" is what the checkpoint asks for
    prompt = np.random.default_rng(0).integers(1, 199, 7).tolist() * 3
    asked = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)
    [output] = llm.generate([prompt], asked, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    assert len(tokens) == 12
    want = reference(params, prompt + tokens, dtype)[len(prompt) - 1 : -1]
    assert tokens == want.argmax(axis=-1).tolist()
    got = [row[token].logprob for row, token in zip(output.outputs[0].logprobs, tokens)]
    np.testing.assert_allclose(got, want.max(axis=-1), atol=1e-3)
    if drafts is not None:
        return
    [beams] = llm.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=4))
    best = beams.sequences[0]
    text = list(best.tokens)
    rows = reference(params, text, dtype)[len(prompt) - 1 : -1]
    total = sum(row[token] for row, token in zip(rows, text[len(prompt) :]))
    np.testing.assert_allclose(best.cum_logprob, total, atol=4e-3)


def test_scales_that_do_not_fit_the_model_are_refused():
    static = model_of("int8").config.static_kv
    with pytest.raises(
        ValueError, match=r"static_kv.v must have 2 rows of 1 or 2 scales, got \[1\]"
    ):
        dataclasses.replace(PLAIN, static_kv=dataclasses.replace(static, v=static.v[:1]))


@pytest.mark.parametrize(
    ("is_default", "asked", "found", "words"),
    [
        (True, "auto", "float8_e4m3fn", None),
        (False, "auto", "float32", "not used"),
        (False, "fp8", "float8_e4m3fn", None),
        (True, "int8", "int8", "not used"),
        (True, "float32", "float32", "not used"),
    ],
)
def test_one_line_says_what_becomes_of_static_scales(is_default, asked, found, words, caplog):
    config = model_of("float8_e4m3fn", is_default).config
    with caplog.at_level(logging.INFO):
        assert kv_quant.resolve_format(asked, config, "float32") == found
    (record,) = caplog.records
    assert (record.levelname == "WARNING") == (words is not None)
    assert (words or "static scales") in record.getMessage()
    is_used = kv_quant.static_scales(config, found) is not None
    assert is_used == (words is None)
