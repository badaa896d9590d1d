"""Engines inside functions that JAX transforms: refused at once, in one line."""

import jax
import jax.numpy as jnp
import pytest
from tiny_models import byte_tokenizer, make_model

from jinfer import LLM, BeamSearchParams, SamplingParams

MODEL = make_model(300)
PARAMS = MODEL.init(jax.random.key(0))
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = [5, 17, 3]

TRANSFORMS = {
    "jit": lambda f: jax.jit(f)(1.0),
    "grad": lambda f: jax.grad(f)(1.0),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
    "scan": lambda f: jax.lax.scan(lambda carry, x: (f(carry), x), 1.0, jnp.ones(2)),
    "eval_shape": lambda f: jax.eval_shape(f, 1.0),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(1.0),
    "compile-time": lambda f: jax.jit(lambda x: inside_eval(f, x))(1.0),
}


def inside_eval(f, x):
    with jax.ensure_compile_time_eval():
        return f(x)


def make_llm():
    return LLM(
        MODEL,
        params=PARAMS,
        tokenizer=byte_tokenizer(300),
        chat_template="{{ messages[0].content }}",
        max_num_seqs=2,
        max_num_batched_tokens=8,
        num_gpu_blocks_override=8,
        block_size=16,
    )


@pytest.fixture(scope="module")
def llm():
    llm = make_llm()
    llm.add_request("open", PROMPT, GREEDY)
    return llm


CALLS = {
    "LLM": lambda llm: make_llm(),
    "LLM.generate": lambda llm: llm.generate([PROMPT], GREEDY),
    "LLM.chat": lambda llm: llm.chat([{"role": "user", "content": "hi"}], GREEDY),
    "LLM.stream": lambda llm: next(llm.stream([PROMPT], GREEDY)),
    "LLM.beam_search": lambda llm: llm.beam_search(
        [PROMPT], BeamSearchParams(beam_width=2, max_tokens=2)
    ),
    "LLM.add_request": lambda llm: llm.add_request("a", PROMPT, GREEDY),
    "LLM.submit": lambda llm: llm.submit(PROMPT, GREEDY),
    "LLM.step": lambda llm: llm.step(),
    "LLM.warmup": lambda llm: llm.warmup(),
    "LLM.update_weights": lambda llm: llm.update_weights(PARAMS),
    "LLM.reset_prefix_cache": lambda llm: llm.reset_prefix_cache(),
    "a step of the engine": lambda llm: llm.loop.engine.step(),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_engine_inside_a_transform_is_refused_in_one_line(llm, call, transform):
    def traced(x):
        call(llm)
        return x * 2

    with pytest.raises(ValueError, match=r"^an LLM has state and cannot be") as error:
        transform(traced)
    assert "\n" not in str(error.value)


def test_every_public_method_is_tried_or_runs_nothing():
    run_nothing = {"abort", "check_integrity", "explain_kernels", "get_default_sampling_params"}
    run_nothing |= {"get_metrics", "get_tokenizer", "has_unfinished_requests", "num_compilations"}
    run_nothing |= {"close", "drain", "read_chat", "session"}
    public = {name for name in vars(LLM) if not name.startswith("_")}
    assert public == run_nothing | {name.partition(".")[2] for name in CALLS} - {""}


def test_a_refused_call_leaves_the_engine_as_it_was(llm):
    with pytest.raises(ValueError, match="cannot be used inside"):
        jax.jit(lambda x: llm.generate([PROMPT], GREEDY) and x)(1.0)
    llm.generate([PROMPT], GREEDY, use_tqdm=False)
    llm.check_integrity()


def test_a_callback_of_a_compiled_function_may_use_an_engine(llm):
    def ask(x):
        return x + len(llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0].token_ids)

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    assert jax.jit(lambda x: jax.pure_callback(ask, shape, x))(jnp.float32(1.0)) == 5.0
