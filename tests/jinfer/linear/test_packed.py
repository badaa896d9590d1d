"""Weights packed for native kernels stand for the same numbers, and engines serve them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_model

from jinfer import LLM, SamplingParams
from jinfer.config.quant_format import QFormat
from jinfer.linear.packed import PackedLinear, pack_weight, why_not_packed
from jinfer.linear.placement import place
from jinfer.linear.qtensor import dequantize, quantize
from pallas_kernels import target
from pallas_kernels.native import native
from pallas_kernels.packed_matmul import unpack

pytestmark = pytest.mark.skipif(native().why_not is not None, reason=str(native().why_not))

FORMATS = ("int4-g32", "int4-g64-asym", "int4-g128-asymf", "int8-g32", "int8-channel", "int3-g64")
W = jax.random.normal(jax.random.key(0), (256, 40))
CPU = target.TARGETS["cpu"]


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [*FORMATS, "int2-g32", "int5-g32", "int6-g32-asym"])
def test_values_do_not_change(name, scale_dtype):
    w = quantize(W, QFormat.parse(name), scale_dtype=scale_dtype)
    packed = pack_weight(w)
    group = packed.packed.group
    codes, scale, low = map(np.asarray, unpack(packed.packed))
    found = codes * np.repeat(scale, group, axis=0) + np.repeat(low, group, axis=0)
    np.testing.assert_allclose(found, np.asarray(dequantize(w)), atol=2e-6)
    assert packed.shape == w.shape and packed.fmt == w.fmt
    assert packed.packed.bits == (4 if w.fmt.bits <= 4 else 8)


@pytest.mark.parametrize("name", FORMATS)
def test_products_differ_by_the_rounding_of_inputs(name):
    w = quantize(W, QFormat.parse(name))
    packed = place({"w": w}, impl="native")["w"]
    assert isinstance(packed, PackedLinear)
    x = jax.random.normal(jax.random.key(1), (2, 5, 256))
    y, expected = (np.asarray(v) for v in (packed.matmul(x), x @ dequantize(w)))
    assert y.shape == (2, 5, 40) and y.dtype == np.float32
    assert 1e-4 < np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2)) < 8e-3


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("nf4-g64", (128, 8), "integers with float inputs only"),
        ("int8-channel:dyn", (128, 8), "integers with float inputs only"),
        ("int4-g32", (2, 64, 8), "weights of experts"),
        ("int4-g16", (64, 8), "groups must be multiples of 32"),
        ("int4-g64", (96, 8), "divide the 96 inputs"),
        ("int8-tensor", (64, 8), "outputs share scales"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(name, shape, reason):
    w = quantize(jnp.ones(shape), QFormat.parse(name))
    assert reason in why_not_packed(w, CPU)
    with pytest.raises(NotImplementedError, match=reason):
        place({"w": w}, impl="native")
    assert "needs a CPU" in why_not_packed(w, target.TARGETS["h100"])


def test_an_engine_serves_packed_weights():
    """Log probabilities of a prompt differ from the reference's by the rounding of inputs."""
    model = make_model(96, hidden_size=64, intermediate_size=96, head_dim=16)
    params = model.init(jax.random.key(0))
    limits = {"max_model_len": 48, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    sampling = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
    prompt = {"prompt_token_ids": list(range(30))}
    found = {}
    for impl in ("xla", "native"):
        llm = LLM(
            model,
            params=params,
            skip_tokenizer_init=True,
            quantization="int8-g32:rtn",
            linear_impl=impl,
            **limits,
        )
        (output,) = llm.generate(prompt, sampling, use_tqdm=False)
        entries = zip(prompt["prompt_token_ids"][1:], output.prompt_logprobs[1:], strict=True)
        found[impl] = np.array([entry[token].logprob for token, entry in entries])
        chosen = {d.op: d.chosen for d in llm.explain_kernels()}
        assert ("packed_matmul" in chosen) == (impl == "native")
    assert chosen["packed_matmul"] == chosen["paged_attention"] == "native"
    difference = np.abs(found["native"] - found["xla"])
    assert 1e-5 < difference.max() < 0.05
