"""GGUF files kept quantized: the values of the dequantized load, exactly."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from jinfer import load
from jinfer.checkpoints.gguf.blocks import FORMATS, qtensor_of, read_blocks
from jinfer.checkpoints.gguf.kquants import encode_rows
from jinfer.checkpoints.gguf.write import write_gguf
from jinfer.linear.placement import Placement
from jinfer.models.model import Model
from jinfer.setup.options import LLMOptions
from jinfer.setup.weights import place, take_model


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_hold_what_the_gguf_package_decodes(name, dense):
    w = np.random.default_rng(0).standard_normal((24, 512)).astype(np.float32)
    rows = encode_rows(w, name)
    x = qtensor_of(*read_blocks(rows, name), name)
    assert str(x.fmt) == FORMATS[name]
    want = gguf.dequantize(rows, GGMLQuantizationType[name])
    np.testing.assert_array_equal(np.asarray(dense(x)).T, want)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "Q8_0"),
        ("phi3", "Q4_0"),
        ("qwen3_moe", "Q8_0"),
        ("llama", "Q6_K"),
        ("qwen2", "Q4_K"),
    ],
)
def test_logits_equal_those_of_the_dequantized_load(family, kind, tiny, tmp_path, linears, dense):
    made = tiny(family, intermediate_size=256)
    path = tmp_path / "m.gguf"
    write_gguf(path, Model(made.config), made.params, kind=kind)
    model, floats = load(path, dtype="float32")
    _, params = load(path, dtype="float32", quantization="gguf")
    kept = {str(x.fmt) for x in linears(params)}
    by_kind = {"Q8_0": {"int8-g32"}, "Q4_0": {"int4-g32"}, "Q4_K": {"int5-g32"}}
    assert kept == by_kind.get(kind, {"int6-g16", "int8-g32"})  # 64 inputs fall back
    for a, b in zip(jax.tree.leaves(dense(params)), jax.tree.leaves(floats), strict=True):
        np.testing.assert_array_equal(a, b)
    logits = jax.jit(model.logits)
    tokens = jnp.arange(3, 12)[None]
    # XLA sums the products of a stack of experts in another order when it decodes them beside.
    atol = 1e-6 if family == "qwen3_moe" else 0
    np.testing.assert_allclose(logits(params, tokens), logits(floats, tokens), atol=atol, rtol=0)


def test_gguf_is_for_gguf_files(tiny, write_hf, tmp_path):
    made = tiny("llama")
    folder = write_hf(tmp_path / "m", made.hf, made.tensors())
    with pytest.raises(ValueError, match=r"keeps the types of a GGUF file, .* is none"):
        load(folder, quantization="gguf")
    with pytest.raises(ValueError, match="pass the path of one"):
        take_model(Model(made.config), made.params, LLMOptions(quantization="gguf"))
    placement = Placement.of(made.params, "xla")
    for before, after in zip(
        jax.tree.leaves(bound := placement.bind(made.params)),
        jax.tree.leaves(place(bound, placement, "gguf")),
        strict=True,
    ):
        assert after is before
