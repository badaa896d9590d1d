"""With `jax_enable_x64` every kind of step gives the tokens that it gives without."""

import functools

import jax
import numpy as np
import pytest
from tiers import thorough_but
from tiny_models import make_model

import jinfer
from jinfer import LLM, BeamSearchParams, SamplingParams
from jinfer.config.quant_format import QFormat
from jinfer.quant.methods.gptq import quantize_gptq
from jinfer.quant.on_load import quantize_params

VOCAB = 96
MODEL = make_model(VOCAB, num_layers=1)
EXPERTS = make_model(
    VOCAB,
    num_layers=1,
    num_experts=4,
    num_experts_per_token=2,
    expert_intermediate_size=32,
)
PROMPTS = [[5, 17, 3, 60, 5, 17, 3, 60, 5, 17], [9, 2, 9, 2, 9]]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LOGPROBS = SamplingParams(temperature=0, max_tokens=4, logprobs=2)
BIASED = SamplingParams(
    temperature=0,
    max_tokens=6,
    prompt_logprobs=2,
    repetition_penalty=1.3,
    presence_penalty=0.2,
    logit_bias={4: 2.0},
    allowed_token_ids=list(range(60)),
    min_tokens=2,
    stop_token_ids=[7],
)
DRAWN = SamplingParams(
    temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, seed=3, max_tokens=6, ignore_eos=True
)
FREE = SamplingParams(temperature=1.0, top_p=0.8, seed=5, max_tokens=6, ignore_eos=True)


@functools.cache
def params(model=MODEL):
    return model.init(jax.random.key(1))


def serve(model=MODEL, *, mixes=((GREEDY, DRAWN),), **options):
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "block_size": 16}
    llm = LLM(
        model,
        params=params(model),
        skip_tokenizer_init=True,
        **{**limits, "num_gpu_blocks_override": 8, **options},
    )
    outputs = [llm.generate(PROMPTS, mix, use_tqdm=False) for mix in mixes]
    assert all(out.outputs[0].error is None for batch in outputs for out in batch)
    return [list(out.outputs[0].token_ids) for batch in outputs for out in batch]


def beams():
    llm = LLM(
        MODEL,
        params=params(),
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        block_size=16,
        num_gpu_blocks_override=24,
    )
    found = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=5))
    return [text.tokens for out in found for text in out.sequences]


def speculate(fields, **options):
    return serve(speculative_config={"adaptive": False, **fields}, **options)


def pure(model=MODEL, **options):
    out = jinfer.generate(
        model, params(model), np.asarray([PROMPTS[0]]), max_new_tokens=5, **options
    )
    return np.asarray(out.tokens).tolist()


def quantized(format):
    made = quantize_params(params(), format)
    return np.asarray(MODEL.logits(made, np.asarray(PROMPTS[0]))).argmax(-1).tolist()


NGRAM = {"method": "ngram", "num_speculative_tokens": 2}
SELF = {"method": "self", "format": "int8", "num_speculative_tokens": 2}
LOOKAHEAD = {"method": "lookahead", "window": 3, "ngram_size": 3, "num_guesses": 2}
CASES = {
    "plain": lambda: serve(mixes=((LOGPROBS, DRAWN), (BIASED, FREE))),
    "decode loop, experts": lambda: serve(EXPERTS, num_decode_steps=3),
    "ngram, weights int8, pages on the host": lambda: speculate(
        NGRAM, quantization="int8", cpu_offload_gb=1e-4
    ),
    "self, kv fp8": lambda: speculate(SELF, kv_cache_dtype="fp8"),
    "tree, kv int4": lambda: speculate(LOOKAHEAD, kv_cache_dtype="int4"),
    "beams": beams,
    "generate": lambda: pure(temperature=0.8, top_k=9, top_p=0.9, key=jax.random.key(1)),
    **{
        f"logits of {form}": functools.partial(quantized, form)
        for form in ("int3-g32:rtn", "nf4", "fp8")
    },
}


@pytest.mark.parametrize(
    "name", thorough_but(CASES, default=("plain", "generate", "logits of fp8"))
)
def test_the_tokens_are_those_without_x64(name):
    case = CASES[name]
    params()
    params(EXPERTS)
    expected = case()
    with jax.enable_x64(True):
        assert case() == expected


def test_calibrated_quantization_is_that_without_x64():
    w = np.random.default_rng(0).standard_normal((2, 32, 8)).astype(np.float32)
    hessian = np.asarray(w[0] @ w[0].T + 32 * np.eye(32), np.float32)

    def codes():
        made = quantize_gptq(w[1], hessian, QFormat.parse("int4-g16"))
        return jax.tree.map(np.asarray, made)

    expected = codes()
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, codes(), expected)
