"""Prepared weights give the products of their QTensors on every backend, in the engine too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import LLM, SamplingParams
from jinfer.config.model import ModelConfig
from jinfer.config.quant_format import QFormat
from jinfer.linear import qtensor
from jinfer.linear.matmul import matmul
from jinfer.linear.prepared import PreparedWeight, prepare
from jinfer.linear.qtensor import QTensor
from jinfer.models.model import Model
from pallas_kernels import compat, dispatch, target

H100, V6E = target.TARGETS["h100"], target.TARGETS["v6e"]
needs_gpu_simulator = pytest.mark.skipif(
    compat.why_not_interpret("gpu") is not None, reason=str(compat.why_not_interpret("gpu"))
)
KERNEL_FORMATS = [
    "int4-g64",
    "int4-g32-asym",
    "int4-channel-asym",
    "int8-g64-asymf",
    "int8-tensor",
    "fp8-e4m3-channel",
    "fp8-e4m3-block128",
    "fp8-e5m2-g128",
    "int8-channel:dyn",
    "int8-tensor:dyn-full",
    "int8-channel:outlier",
    "fp8-e4m3-channel:dyn",
    "fp8-e4m3-block128:dyn",
]
OTHER_FORMATS = {
    "int3-g64": "bit stream",
    "int6-channel": "bit stream",
    "nf4-g64-dq": "stand in a table",
    "fp4-g64": "stand in a table",
    "int8-g64:dyn": "groups are left to XLA",
    "int4-channel:dyn": "int8 weights only",
}
multiply = jax.jit(matmul)
quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "scale_dtype"))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("text", KERNEL_FORMATS)
def test_a_prepared_weight_is_worth_what_it_was(text):
    """Any target's layout multiplies as the QTensor does, here through the ops' XLA form."""
    w = quantize(normal(200, 96), QFormat.parse(text), scale_dtype=jnp.float16)
    perm = jnp.asarray(np.random.default_rng(1).permutation(200), jnp.int32)
    w = dataclasses.replace(w, perm=perm)
    x = normal(2, 3, 200, seed=1) * 7
    expected = multiply(x, w)
    for where in (H100, V6E):
        p = prepare(w, target=where)
        assert isinstance(p, PreparedWeight) and p.shape == (200, 96)
        assert p.q.shape == ((96, 200) if where is H100 else (200, 96))
        out = multiply(x, p)
        assert out.shape == expected.shape and out.dtype == expected.dtype
        assert relative(out, expected) < 1e-5


@pytest.mark.parametrize("text", OTHER_FORMATS)
def test_what_no_kernel_reads_stays_with_xla_and_says_why(text):
    w = quantize(normal(128, 64), QFormat.parse(text))
    with target.state("h100"):
        assert prepare(w) is w
        [decision] = dispatch.explain(matmul, normal(2, 128), w)
    assert decision.chosen == "xla"
    if decision.op != "int8_matmul":
        assert OTHER_FORMATS[text] in dict(decision.reasons)["mosaic_gpu"]
    with pytest.raises(NotImplementedError, match=f"'mosaic_gpu'.*{OTHER_FORMATS[text]}"):
        prepare(w, impl="mosaic_gpu")


def test_on_a_cpu_nothing_changes():
    w = quantize(normal(128, 64), QFormat.parse("int4-g64"))
    assert prepare(w) is w and prepare(w, impl="xla") is w
    [decision] = dispatch.explain(matmul, normal(2, 128), w)
    assert decision.chosen == "xla"
    assert dict(decision.reasons)["mosaic_gpu"] == "needs a GPU or TPU, the target is cpu"


def test_a_kernel_that_is_named_is_never_left_out_in_silence():
    w = quantize(normal(128, 64), QFormat.parse("int4-g64"))
    with (
        dispatch.use_impl(quant_matmul="mosaic_gpu"),
        target.state("h100"),
        pytest.raises(NotImplementedError, match=r"placement\.place"),
    ):
        matmul(normal(2, 128), w)


@pytest.mark.parametrize(
    ("name", "text", "chosen"),
    [
        ("h100", "int4-g64", ("quant_matmul", "mosaic_gpu")),
        ("v6e", "int4-g64", ("quant_matmul", "mosaic_tpu")),
        ("h100", "int4-channel", ("quant_matmul", "xla")),
        ("h100", "fp8-e4m3-block128:dyn", ("fp8_matmul", "mosaic_gpu")),
        ("v6e", "fp8-e4m3-block128:dyn", ("fp8_matmul", "mosaic_tpu")),
        ("h100", "fp8-e4m3-channel:dyn", ("fp8_matmul", "xla")),
        ("h100", "int8-channel:dyn", ("int8_matmul", "xla")),
    ],
)
def test_each_target_takes_its_kernel(name, text, chosen):
    w = quantize(normal(256, 128), QFormat.parse(text))
    with target.state(name):
        [d] = dispatch.explain(matmul, normal(4, 256).astype(jnp.bfloat16), prepare(w))
    assert (d.op, d.chosen) == chosen


CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=128,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
LIMITS = {
    "max_model_len": 32,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "block_size": 8,
    "skip_tokenizer_init": True,
}
PROMPTS = [{"prompt_token_ids": [5, 9, 2]}, {"prompt_token_ids": [17, 3, 44, 8, 1]}]


@pytest.fixture(scope="module")
def dense():
    params = Model(CONFIG).init(jax.random.key(3), jnp.bfloat16)
    return jax.tree.map(lambda x: x * 2 if x.ndim == 2 else x, params)  # clear-cut logits


def quantized(params, text, only=""):
    """The linears and the head whose path contains `only`, in format `text`."""

    def visit(path, x):
        name = jax.tree_util.keystr(path)
        is_linear = x.ndim == 2 and "embed" not in name and only in name
        return quantize(x, QFormat.parse(text)) if is_linear else x

    return jax.tree_util.tree_map_with_path(visit, params)


def serve(params, num_tokens=3, **options):
    llm = LLM(Model(CONFIG), params=params, attention_impl="xla", **LIMITS, **options)
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    return [o.outputs[0].token_ids for o in outputs], llm


@pytest.mark.parametrize(
    "text", ["int4-g64", pytest.param("fp8-e4m3-block128:dyn", marks=pytest.mark.slow)]
)
@pytest.mark.thorough
def test_the_engine_gives_the_same_tokens_through_the_tpu_kernels(dense, text):
    params = quantized(dense, text, only="mlp")
    expected, _ = serve(params)
    with compat.interpret(detect_races=True):
        tokens, llm = serve(params, linear_impl="mosaic_tpu")
        assert not compat.races_found()
        found = {d.op: d.chosen for d in llm.explain_kernels()}
    assert tokens == expected
    op = "fp8_matmul" if "dyn" in text else "quant_matmul"
    assert found[op] == "mosaic_tpu"


@needs_gpu_simulator
@pytest.mark.parametrize(
    "text", ["int4-g64", pytest.param("fp8-e4m3-block128:dyn", marks=pytest.mark.slow)]
)
def test_the_engine_gives_the_same_tokens_through_the_hopper_kernels(dense, text):
    params = quantized(dense, text, only="down")
    expected, _ = serve(params, num_tokens=2)
    with compat.interpret():
        tokens, llm = serve(params, num_tokens=2, linear_impl="mosaic_gpu")
        found = {d.op: d.chosen for d in llm.explain_kernels()}
    assert tokens == expected
    op = "fp8_matmul" if "dyn" in text else "quant_matmul"
    assert found[op] == "mosaic_gpu"


def test_the_engine_refuses_an_unknown_backend_and_explains_a_cpu(dense):
    with pytest.raises(
        ValueError, match="linear_impl must be one of auto, xla, native, mosaic_gpu"
    ):
        serve(dense, linear_impl="triton")
    with pytest.raises(ValueError, match="impl 'mosaic_tpu' cannot run here: needs a TPU"):
        LLM(Model(CONFIG), params=quantized(dense, "int4-g64"), linear_impl="mosaic_tpu", **LIMITS)
    llm = LLM(Model(CONFIG), params=quantized(dense, "int3-g64"), linear_impl="xla", **LIMITS)
    text = str(llm.explain_kernels())
    assert "a bit stream, which no kernel reads" in text and "paged_attention(" in text
    llm.update_weights(quantized(dense, "int3-g64"))


def test_new_weights_are_laid_out_like_the_old_ones(dense):
    old, new = (
        quantized(dense, "int4-g64"),
        quantized(jax.tree.map(lambda x: -x, dense), "int4-g64"),
    )
    with target.state("h100"):
        llm = LLM(Model(CONFIG), params=old, **LIMITS)
        llm.update_weights(new)
    leaves = jax.tree.leaves(
        llm.loop.engine.runner.params, is_leaf=lambda x: isinstance(x, PreparedWeight)
    )
    assert sum(isinstance(x, PreparedWeight) for x in leaves) == 8
    assert not any(isinstance(x, QTensor) for x in leaves)
    assert isinstance(old["lm_head"]["w"], QTensor) and not old["lm_head"]["w"].q.is_deleted()
    assert new["lm_head"]["w"].why_no_kernel() is None
