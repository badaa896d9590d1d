"""Every checkpoint of ../shared/data/quantized gives the logits of the library that it is from.

`peft-lora-r8` is an adapter, not a checkpoint, and no part of this.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import load
from jinfer.linear.matmul import matmul

GOLDEN = pathlib.Path(__file__).parents[4] / "shared" / "data" / "quantized"
NAMES = sorted(p.parent.name for p in GOLDEN.glob("*/golden.npz") if p.parent.name[:4] != "peft")
# name -> format of its linears; None: plain floats
FORMATS = {
    "awq-gptqmodel-gemm-g64": "int4-g64-asym",
    "awq-gptqmodel-gemm-g64-qwen2": "int4-g64-asym",
    "bnb-int8": "int8-channel:outlier",
    "bnb-nf4": "nf4-g64",
    "ct-fp8-dynamic": "fp8-e4m3-channel:dyn",
    "ct-fp8-static": "fp8-e4m3-tensor:static",
    "ct-w3a16-sym-g64": "int3-g64",
    "ct-w4a16-sym-g128": "int4-g128",
    "ct-w8a16-sym-g128": "int8-g128",
    "ct-w8a8-int8-smoothquant": "int8-channel:dyn-full",
    "gptq-v1-w3-sym-g64": "int3-g64",
    "gptq-v1-w4-sym-g128": "int4-g128",
    "gptq-v1-w8-sym-g128": "int8-g128",
    "gptq-v2-w4-asym-g64": "int4-g64-asym",
    "hf-fp8-block128": "fp8-e4m3-block128:dyn",
}
# The array of golden.npz that exact dequantization gives; "logits" for the others.
WEIGHTS_ONLY = {
    "bnb-nf4": "logits_fp32_dequant",  # "logits" rounds weights to f16
    "ct-fp8-dynamic": "logits_weights_only",
    "ct-fp8-static": "logits_weights_only",
    "ct-w8a8-int8-smoothquant": "logits_weights_only",
}
# The array that forwards with quantized inputs give, and how far from it ours may be on average,
# as a share of what quantizing the inputs does: rounding flips cascade.
QUANTIZED_INPUTS = {
    "bnb-int8": ("logits_official", 1.5),  # outliers by token here, by batch there
    "ct-fp8-dynamic": ("logits", 0.1),
    "ct-fp8-static": ("logits", 0.1),
    "ct-w8a8-int8-smoothquant": ("logits", 0.1),
    "hf-fp8-block128": ("logits_act_emulated", 0.1),
}
EXACT = 1e-4  # f32 logits of the same weights; the other libraries' readers get within 1e-5
pytestmark = pytest.mark.skipif(not NAMES, reason="../shared/data/quantized is not there")


@pytest.mark.parametrize("name", NAMES)
def test_every_checkpoint_gives_the_logits_of_its_library(name, linears, dense):
    golden = np.load(GOLDEN / name / "golden.npz")
    tolerance = json.loads((GOLDEN / name / "meta.json").read_text())["tolerance"]
    model, params = load(GOLDEN / name, dtype="float32")
    weights = linears(params)
    assert {str(x.fmt) for x in weights} == ({FORMATS[name]} if name in FORMATS else set())
    assert len(weights) in (0, 14)

    array = WEIGHTS_ONLY.get(name, "logits")
    assert EXACT < tolerance[array] <= 5e-4
    logits = jax.jit(model.logits)
    tokens = jnp.asarray(golden["input_ids"], jnp.int32)
    np.testing.assert_allclose(logits(dense(params), tokens), golden[array], atol=EXACT)
    if not weights:
        return
    served = np.asarray(logits(params, tokens))
    if name not in QUANTIZED_INPUTS:
        np.testing.assert_allclose(served, golden[array], atol=EXACT)
        return
    official, share = QUANTIZED_INPUTS[name]
    effect = np.abs(golden[official] - golden[array]).mean()
    assert np.abs(served - golden[official]).mean() < share * effect


@pytest.mark.parametrize("name", [n for n in NAMES if "ct-w8a8" in n or "ct-fp8" in n])
def test_quantized_inputs_follow_the_official_forward(name):
    golden = np.load(GOLDEN / name / "golden.npz")
    _, params = load(GOLDEN / name)
    layer = params["layers"][0]
    for module, w in {
        "self_attn_q_proj": layer["attn"]["q"],
        "mlp_down_proj": layer["mlp"]["down"],
    }.items():
        x, y = (golden[f"probe_{a}/model_layers_0_{module}"] for a in "xy")
        got = np.asarray(matmul(jnp.asarray(x), w["w"]))
        assert np.abs(got - y).max() <= 1e-5 * np.abs(y).max()
