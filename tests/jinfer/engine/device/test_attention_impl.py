"""The engine gives the same greedy tokens whichever backend attends, kernels being simulated."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jinfer import LLM, SamplingParams
from jinfer.config.cache import CacheConfig
from jinfer.config.model import ModelConfig
from jinfer.kv import cache as kv_cache
from jinfer.models.model import Model
from jinfer.sampling.state import init_state
from jinfer.steps import blocks
from jinfer.steps.batch import StepBatch
from pallas_kernels import compat, dispatch, target

MODEL = Model(
    ModelConfig(
        family="llama",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        max_position_embeddings=64,
    )
)
LIMITS = {
    "max_model_len": 32,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "block_size": 16,
    "skip_tokenizer_init": True,
}
PROMPTS = [{"prompt_token_ids": [5, 9, 2]}, {"prompt_token_ids": [17, 3, 44, 8, 1]}]


@pytest.fixture(scope="module")
def params():
    made = MODEL.init(jax.random.key(3), jnp.bfloat16)
    return jax.tree.map(lambda x: x * 2 if x.ndim == 2 else x, made)  # clear-cut logits


def chosen_for_attention(found):
    return {decision.chosen for decision in found if decision.op == "paged_attention"}


def serve(params, attention_impl):
    llm = LLM(MODEL, params=params, attention_impl=attention_impl, **LIMITS)
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    return [o.outputs[0].token_ids for o in outputs], llm


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "kind"), [("mosaic_tpu", "tpu"), ("mosaic_gpu", "gpu")])
def test_the_engine_gives_the_same_tokens_on_every_backend(params, impl, kind):
    if reason := compat.why_not_interpret(kind):
        pytest.skip(reason)
    expected, _ = serve(params, "xla")
    with compat.interpret(detect_races=kind == "tpu"):
        tokens, llm = serve(params, impl)
        assert not (kind == "tpu" and compat.races_found())
        assert chosen_for_attention(llm.explain_kernels()) == {impl}
    assert tokens == expected


def test_a_backend_that_cannot_run_here_gives_its_reason(params):
    with pytest.raises(
        ValueError, match="attention_impl must be one of auto, xla, native, mosaic_gpu"
    ):
        serve(params, "triton")
    for impl, need in (("mosaic_gpu", "needs a Hopper GPU"), ("mosaic_tpu", "needs a TPU")):
        with pytest.raises(ValueError, match=f"impl '{impl}' cannot run here: {need}"):
            LLM(MODEL, params=params, attention_impl=impl, **LIMITS)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("dtype", "page_size"), [("bfloat16", 16), ("fp8", 128), ("int8", 128)])
def test_on_a_tpu_the_kernel_attends_whatever_the_width_of_a_head(head_dim, dtype, page_size):
    model = Model(dataclasses.replace(MODEL.config, head_dim=head_dim))
    cache = CacheConfig(num_pages=4, page_size=page_size, dtype=dtype)
    batch = StepBatch.padding(8, 2, max_pages=2, num_slots=cache.num_slots, num_rows=2)

    def step(params, kv, state):
        return blocks.run_blocks(model, params, kv, state, batch, "auto")

    with target.state("v6e"):
        args = jax.eval_shape(
            lambda: (
                model.init(jax.random.key(0), jnp.bfloat16),
                kv_cache.init(model.config, cache),
                init_state(2, model.config.vocab_size),
            )
        )
        found = dispatch.explain(step, *args)
    assert chosen_for_attention(found) == {"mosaic_tpu"}, found
