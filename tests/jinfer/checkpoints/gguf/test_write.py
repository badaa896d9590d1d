"""GGUF files that we write: the same config and weights come back, for every family."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from jinfer import load
from jinfer.checkpoints.families import is_linear, unflatten
from jinfer.checkpoints.gguf.file import GGUFFile
from jinfer.checkpoints.gguf.kquants import encode_rows, fitting_type
from jinfer.checkpoints.gguf.write import write_gguf
from jinfer.config.quant_format import QFormat
from jinfer.linear import qtensor
from jinfer.models import rope
from jinfer.models.model import Model

quantize = jax.jit(qtensor.quantize, static_argnames=("fmt", "scale_dtype"))


def paths_and_leaves(params):
    leaves, _ = jax.tree.flatten_with_path(params, is_leaf=lambda x: isinstance(x, qtensor.QTensor))
    return {tuple(getattr(k, "key", getattr(k, "idx", None)) for k in p): x for p, x in leaves}


def test_every_family_comes_back_without_rounding(any_tiny, tmp_path):
    model = Model(any_tiny.config)
    halves = jax.tree.map(lambda a: jnp.asarray(a.astype(np.float16), jnp.float32), any_tiny.params)
    counts = write_gguf(tmp_path / "m.gguf", model, halves)
    assert set(counts) == {"F32", "F16"}
    loaded, params = load(tmp_path / "m.gguf", dtype="float32")
    plus_one = any_tiny.config.norm_plus_one  # 1 + gamma rounds once
    for want, got in zip(jax.tree.leaves(halves), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 if plus_one else 0, rtol=0)
    assert loaded.config.layer_types == any_tiny.config.layer_types


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_encoded_weights_are_what_the_gguf_package_decodes(kind, family, tiny, tmp_path):
    made = tiny(family, hidden_size=256)
    rng = np.random.default_rng(1)
    importance = {
        path: np.exp(rng.normal(size=256)).astype(np.float32)
        for path in made.flat
        if is_linear(path) and made.flat[path].shape[-2] == 256
    }
    counts = write_gguf(
        tmp_path / "m.gguf", Model(made.config), made.params, kind=kind, importance=importance
    )
    assert kind in counts
    _, params = load(tmp_path / "m.gguf", dtype="float32")
    for path, got in paths_and_leaves(params).items():
        if not is_linear(path):
            continue
        w = np.ascontiguousarray(made.flat[path].swapaxes(-1, -2))
        own = fitting_type(kind, w.shape[-1])
        rows = encode_rows(w, own, importance.get(path))
        want = gguf.dequantize(rows, GGMLQuantizationType[own]).swapaxes(-1, -2)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("text", "kind"), [("int4-g32", "Q4_0"), ("int3-channel", "Q4_0"), ("int8-g64", "Q8_0")]
)
def test_quantized_linears_keep_codes_and_scales(text, kind, tiny, tmp_path, dense):
    made = tiny("llama")
    fmt = QFormat.parse(text)
    leaves = {
        path: quantize(jnp.asarray(w), fmt, scale_dtype=jnp.float16) if is_linear(path) else w
        for path, w in made.flat.items()
    }
    params = unflatten(leaves, made.config)
    model = Model(made.config)
    counts = write_gguf(tmp_path / "m.gguf", model, params)
    assert counts[kind] == 14
    _, loaded = load(tmp_path / "m.gguf", dtype="float32")
    for want, got in zip(
        jax.tree.leaves(dense(params)), jax.tree.leaves(dense(loaded)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_a_quantized_router_is_written_as_its_floats(tiny, tmp_path):
    model = tiny("mixtral")
    params = jax.tree.map(jnp.asarray, model.params)
    router = params["layers"][1]["mlp"]["router"]
    router["w"] = qtensor.quantize(router["w"], QFormat.parse("int8-channel"))
    write_gguf(tmp_path / "m.gguf", Model(model.config), params)
    _, found = load(tmp_path / "m.gguf")
    want = qtensor.dequantize(router["w"])
    np.testing.assert_array_equal(found["layers"][1]["mlp"]["router"]["w"], want)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4-g32-asym", "layers.0.attn.k: GGUF cannot hold int4-g32-asym as it is: Q4_0"),
        ("int4-g16", "no whole blocks of 32"),
        ("int8-channel:dyn", "what happens to the inputs"),
        ("nf4-g32", "its types are integers"),
    ],
)
def test_what_no_block_holds_is_refused_by_name_or_rounded_when_asked(text, words, tiny, tmp_path):
    made = tiny("llama")
    x = {
        path: quantize(jnp.asarray(w), QFormat.parse(text), scale_dtype=jnp.float16)
        if is_linear(path)
        else w
        for path, w in made.flat.items()
    }
    params = unflatten(x, made.config)
    with pytest.raises(ValueError, match=words):
        write_gguf(tmp_path / "m.gguf", Model(made.config), params)
    assert not list(tmp_path.iterdir())
    counts = write_gguf(tmp_path / "m.gguf", Model(made.config), params, kind="Q4_1")
    assert counts["Q4_1"] == 14
    with pytest.raises(FileExistsError):
        write_gguf(tmp_path / "m.gguf", Model(made.config), params, kind="Q4_1")


def test_a_config_that_no_file_holds_is_refused(tiny, tmp_path):
    made = tiny("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="no name for dynamic rope scaling"):
        write_gguf(tmp_path / "m.gguf", Model(made.config), made.params)
    made = tiny("qwen2")
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, norm_plus_one=True))
    with pytest.raises(ValueError, match=r"cannot hold this config's norm_plus_one \(True would"):
        write_gguf(tmp_path / "m.gguf", Model(made.config), made.params)
    assert not list(tmp_path.iterdir())


def test_every_end_of_text_is_kept_the_tokenizers_first(tiny, tmp_path):
    made = tiny("llama", eos_token_id=[2, 5])
    own = {"tokenizer.ggml.eos_token_id": 5}
    write_gguf(tmp_path / "m.gguf", Model(made.config), made.params, tokenizer=own)
    assert load(tmp_path / "m.gguf")[0].config.eos_token_ids == (5, 2)
    many = tiny("llama", eos_token_id=[2, 5, 6])
    with pytest.raises(ValueError, match=r"three tokens that end a text, these are \[7, 2, 5, 6\]"):
        own = {"tokenizer.ggml.eos_token_id": 7}
        write_gguf(tmp_path / "n.gguf", Model(many.config), many.params, tokenizer=own)


def test_a_written_file_ends_where_its_model_does_whatever_its_vocabulary_holds(tiny, tmp_path):
    made = tiny("qwen2", eos_token_id=95)
    tokens = [f"t{i}" for i in range(93)] + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    own = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 93}
    own["tokenizer.ggml.token_type"] = np.array([1] * 93 + [3] * 3, np.int32)
    write_gguf(tmp_path / "m.gguf", Model(made.config), made.params, tokenizer=own)
    assert load(tmp_path / "m.gguf")[0].config.eos_token_ids == (95,)


def test_llama3_scaling_becomes_divisors(tiny, tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    made = tiny("llama", rope_scaling={**scaling, "low_freq_factor": 1.0, "high_freq_factor": 4.0})
    write_gguf(tmp_path / "m.gguf", Model(made.config), made.params)
    assert "rope_freqs.weight" in GGUFFile(tmp_path / "m.gguf").tensors
    assert load(tmp_path / "m.gguf")[0].config.rope == made.config.rope


@pytest.mark.parametrize("stated", [{}, {"factor": 2.0}, {"attention_factor": 1.3}])
def test_longrope_is_written_whole(stated, tiny, tmp_path):
    """llama.cpp takes the factor on attention from the file alone: 1 where it says none."""
    factors = {
        "short_factor": [1.0, 1.05, *[1.1] * 10],
        "long_factor": [1.08 + i for i in range(12)],
    }
    made = tiny(
        "phi3",
        original_max_position_embeddings=32,
        partial_rotary_factor=0.75,
        rope_scaling={"rope_type": "longrope", **factors, **stated},
    )
    write_gguf(tmp_path / "m.gguf", Model(made.config), made.params)
    want = rope.attention_factor(made.config.rope)
    assert want > 1.05
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert metadata["phi3.rope.scaling.attn_factor"] == pytest.approx(want)
    found = load(tmp_path / "m.gguf")[0].config.rope
    assert rope.attention_factor(found) == pytest.approx(want)
    np.testing.assert_allclose(found.long_factor, factors["long_factor"], rtol=1e-6)


def test_a_longrope_without_sharpening_is_written_whole(tiny, tmp_path):
    factors = [1.0, 1.05, *[1.1] * 14]
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    made = tiny("llama", rope_scaling={**scaling, "factor": 1.0})
    write_gguf(tmp_path / "m.gguf", Model(made.config), made.params)
    found = load(tmp_path / "m.gguf")[0].config.rope
    assert rope.attention_factor(found) == 1.0
    np.testing.assert_allclose(found.short_factor, factors, rtol=1e-6)
