"""GGUF checkpoints hold the same model as the Hugging Face folder they were made from."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from jinfer import load
from jinfer.checkpoints.gguf.checkpoint import gguf_config
from jinfer.checkpoints.gguf.file import GGUFFile
from jinfer.models import rope

ARCHITECTURES = {
    "llama": "llama",
    "llama_with_biases": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def interleave(w: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k ([O, ...]) in the order of interleaved rotation, which llama.cpp wants."""
    halves = w.reshape(-1, 2, head_dim // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def gguf_tensors(model, arch: str) -> dict[str, np.ndarray]:
    """The tensors of a file, spelled out from the params, not from the loader's tables."""
    c, params = model.config, model.params
    gamma = 1.0 if c.norm_plus_one else 0.0
    out = {"token_embd.weight": params["embed"]["w"]}
    out["output_norm.weight"] = params["final_norm"]["scale"] + gamma
    if "lm_head" in params:
        out["output.weight"] = params["lm_head"]["w"].T
    for i, layer in enumerate(params["layers"]):
        attn, mlp, at = layer["attn"], layer["mlp"], f"blk.{i}."
        linears = {"attn_q": attn["q"], "attn_k": attn["k"], "attn_v": attn["v"]}
        linears["attn_output"] = attn["o"]
        stack = "_exps" if "router" in mlp else ""
        linears |= {f"ffn_{part}{stack}": mlp[part] for part in ("gate", "up", "down")}
        if "router" in mlp:
            linears["ffn_gate_inp"] = mlp["router"]
        for name, linear in linears.items():
            w, b = linear["w"].swapaxes(-1, -2), linear.get("b")
            if arch == "llama" and name in ("attn_q", "attn_k"):
                w = interleave(w, c.head_dim)
                b = b if b is None else interleave(b, c.head_dim)
            out[f"{at}{name}.weight"] = w
            if b is not None:
                out[f"{at}{name}.bias"] = b
        if arch == "phi3":
            qkv = [out.pop(f"{at}attn_{part}.weight") for part in "qkv"]
            out[f"{at}attn_qkv.weight"] = np.concatenate(qkv)
            gate_up = [out.pop(f"{at}ffn_{part}.weight") for part in ("gate", "up")]
            out[f"{at}ffn_up.weight"] = np.concatenate(gate_up)
        norms = {"attn_norm": layer["attn_norm"], "ffn_norm": layer["mlp_norm"]}
        if c.post_norms:
            norms["post_attention_norm"] = layer["attn_post_norm"]
            norms["post_ffw_norm"] = layer["mlp_post_norm"]
        if c.qk_norm:
            norms |= {"attn_q_norm": attn["q_norm"], "attn_k_norm": attn["k_norm"]}
        for name, norm in norms.items():
            out[f"{at}{name}.weight"] = norm["scale"] + gamma
    return out


def write_gguf(
    path,
    model,
    arch,
    *,
    kind="F32",
    metadata=None,
    tensors=None,
    extra=None,
    tokens=None,
    types=None,
):
    """Writes a model as llama.cpp's converter would; matrices in `kind`, vectors in F32."""
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if tokens is not None:
        writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    if c.num_experts:
        writer.add_expert_count(c.num_experts)
        writer.add_expert_used_count(c.num_experts_per_token)
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(c.expert_intermediate_size)
    if arch.startswith("gemma"):
        writer.add_sliding_window(c.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(c.attention_soft_cap)
        writer.add_final_logit_softcapping(c.final_soft_cap)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
        add[list] = writer.add_array
        add.get(type(value), writer.add_uint32)(key, value)
    tensors = gguf_tensors(model, arch) if tensors is None else tensors
    for name, tensor in {**tensors, **(extra or {})}.items():
        is_vector = tensor.ndim == 1 or "ffn_gate_inp" in name
        quant = GGMLQuantizationType["F32" if is_vector else kind]
        tensor = np.ascontiguousarray(tensor, np.float32)
        writer.add_tensor(name, gguf.quantize(tensor, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=sorted(ARCHITECTURES))
def made(request, tiny, tmp_path):
    """(family, tiny model, path of its GGUF file in F32)."""
    model = tiny(request.param)
    path = write_gguf(tmp_path / "model.gguf", model, ARCHITECTURES[request.param])
    return request.param, model, path


def test_metadata_gives_the_config_of_the_same_model(made):
    _, model, path = made
    config = gguf_config(GGUFFile(path))
    assert dataclasses.asdict(config) == dataclasses.asdict(model.config)


def test_tensors_give_the_params_of_the_same_model(made):
    _, model, path = made
    loaded, params = load(path)
    assert loaded.config == model.config
    expected = model.params
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    near = 2e-7 if model.config.norm_plus_one else 0.0  # 1 + gamma is rounded in the file
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=near, rtol=0), params, expected)


def test_a_folder_with_one_file_stands_for_it(tiny, tmp_path, one_line):
    model = tiny("llama")
    write_gguf(tmp_path / "a.gguf", model, "llama")
    assert load(tmp_path)[0].config == model.config
    write_gguf(tmp_path / "b.gguf", model, "llama")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    one_line(error.value, "a.gguf", "b.gguf")


@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTIZED])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_quantized_files_hold_what_the_gguf_package_decodes(kind, family, tiny, write_hf, tmp_path):
    model = tiny(family)
    path = write_gguf(tmp_path / "model.gguf", model, ARCHITECTURES[family], kind=kind)
    quant = GGMLQuantizationType[kind]

    def through(leaf_path, w):  # blocks lie along the input axis: I, the last but one
        is_norm = w.ndim == 1 or any(getattr(key, "key", None) == "router" for key in leaf_path)
        if is_norm:
            return w
        rows = w if leaf_path[0].key == "embed" else w.swapaxes(-1, -2)
        rows = np.ascontiguousarray(rows)
        decoded = gguf.dequantize(gguf.quantize(rows, quant), quant).reshape(rows.shape)
        return decoded if leaf_path[0].key == "embed" else decoded.swapaxes(-1, -2)

    expected = jax.tree_util.tree_map_with_path(through, model.params)
    _, params = load(path)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    _, halves = load(path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(halves)} == {jnp.dtype(jnp.bfloat16)}


def llama3_divisors(theta, head_dim, factor, low=1.0, high=4.0, original=8192):
    """rope_freqs.weight as llama.cpp's converter computes it, dimension by dimension."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def frequencies(config: rope.RopeConfig, head_dim: int) -> np.ndarray:
    """What the model multiplies position 1 with."""
    one = jnp.ones((1,), jnp.int32)
    cos, sin = rope.tables(config, head_dim, one, one)
    return np.arctan2(np.asarray(sin), np.asarray(cos))[0]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequency_divisors_become_llama3_scaling(factor, tiny, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny("llama", head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    divisors = {"rope_freqs.weight": llama3_divisors(500000.0, 64, factor)}
    path = write_gguf(tmp_path / "model.gguf", model, "llama", extra=divisors)
    assert load(path)[0].config.rope == model.config.rope


def test_other_frequency_divisors_are_applied_as_they_are(tiny, tmp_path):
    model = tiny("llama")
    divisors = np.linspace(1.0, 3.0, 16).astype(np.float32)
    extra = {"rope_freqs.weight": divisors}
    path = write_gguf(tmp_path / "model.gguf", model, "llama", extra=extra)
    plain = frequencies(model.config.rope, 32)
    found = frequencies(load(path)[0].config.rope, 32)
    np.testing.assert_allclose(found, plain / divisors, rtol=1e-5)


def test_frequency_divisors_of_another_length_are_refused(tiny, tmp_path, one_line):
    extra = {"rope_freqs.weight": np.ones(5, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), "llama", extra=extra)
    with pytest.raises(ValueError) as error:
        load(path)
    one_line(error.value, "rope_freqs.weight", "5", "16")


@pytest.mark.parametrize(
    "stated, scaling",
    [
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scalings_are_those_of_the_metadata(stated, scaling, tiny, tmp_path):
    model = tiny("qwen2", rope_scaling=scaling)
    metadata = {f"qwen2.{key}": value for key, value in stated.items()}
    path = write_gguf(tmp_path / "model.gguf", model, "qwen2", metadata=metadata)
    found, expected = load(path)[0].config.rope, model.config.rope
    np.testing.assert_array_equal(frequencies(found, 32), frequencies(expected, 32))
    assert rope.attention_factor(found) == rope.attention_factor(expected)
    assert found.scaling == expected.scaling


def test_phi3_long_factors_become_longrope(tiny, tmp_path):
    short, long = np.linspace(1, 2, 12), np.linspace(2, 9, 12)
    model = tiny(
        "phi3",
        original_max_position_embeddings=32,
        partial_rotary_factor=0.75,
        rope_scaling={
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
        },
    )
    metadata = {
        "phi3.rope.dimension_count": 24,
        "phi3.rope.scaling.original_context_length": 32,
        "phi3.rope.scaling.attn_factor": float(np.sqrt(1 + np.log(4) / np.log(32))),
    }
    extra = {f"rope_factors_{n}.weight": f for n, f in (("short", short), ("long", long))}
    path = write_gguf(tmp_path / "model.gguf", model, "phi3", metadata=metadata, extra=extra)
    found, expected = load(path)[0].config.rope, model.config.rope
    assert found.original_max_position == expected.original_max_position == 32
    assert found.partial_factor == 0.75
    np.testing.assert_allclose(found.short_factor, expected.short_factor, rtol=1e-6)
    np.testing.assert_allclose(found.long_factor, expected.long_factor, rtol=1e-6)
    assert rope.attention_factor(found) == pytest.approx(rope.attention_factor(expected))


def test_gemma3_linear_scaling_is_for_full_layers_alone(tiny, tmp_path):
    metadata = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    model = tiny("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
    path = write_gguf(tmp_path / "model.gguf", model, "gemma3", metadata=metadata)
    config = load(path)[0].config
    assert (config.rope.scaling, config.rope.factor) == ("linear", 8.0)
    assert config.rope_local == model.config.rope_local
    assert config.layer_types == (*("sliding",) * 5, "full", "sliding")


@pytest.mark.parametrize("family, depth", [("gemma2", 46), ("gemma3_text", 62)])
def test_the_27b_gemmas_scale_by_width_a_head(family, depth, tiny, tmp_path):
    model = tiny(family, num_hidden_layers=depth, query_pre_attn_scalar=16)
    path = write_gguf(tmp_path / "model.gguf", model, ARCHITECTURES[family])
    assert gguf_config(GGUFFile(path)).attention_scale == 0.25  # (64 / 4 heads) ** -0.5


def test_every_end_of_turn_is_collected_beside_those_of_the_keys(tiny, tmp_path):
    model = tiny("llama")
    tokens = [f"t{i}" for i in range(90)] + ["<|eot_id|>", "<|eom_id|>", *"abcd"]
    path = write_gguf(tmp_path / "by-text.gguf", model, "llama", tokens=tokens)
    assert gguf_config(GGUFFile(path)).eos_token_ids == (2, 90, 91)
    metadata = {"tokenizer.ggml.eot_token_id": 5}
    path = write_gguf(tmp_path / "by-key.gguf", model, "llama", tokens=tokens, metadata=metadata)
    assert gguf_config(GGUFFile(path)).eos_token_ids == (2, 5, 90, 91)


NORMAL, CONTROL = 1, 3
TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
TEXT = (
    *("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|return|>", "<|call|>", "<turn|>"),
    *("<｜end▁of▁sentence｜>", "<EOT>", "[EOS]", "<end_of_utterance>"),
)


@pytest.fixture
def ends_of(tiny, tmp_path):
    """Ends of a file whose vocabulary is padded in front with 90 plain tokens."""

    def read(special, kind=CONTROL, **metadata):
        tokens = [f"t{i}" for i in range(90)] + list(special)
        tokens += [f"u{i}" for i in range(96 - len(tokens))]
        types = [NORMAL] * 90 + [kind] * len(special) + [NORMAL] * (6 - len(special))
        keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
        args = (tmp_path / "m.gguf", tiny("llama"), "llama")
        path = write_gguf(*args, tokens=tokens, types=types, metadata=keys)
        return gguf_config(GGUFFile(path)).eos_token_ids

    return read


@pytest.mark.parametrize("token", [*TURN, *TEXT])
def test_a_control_token_that_ends_texts_ends_them(token, ends_of):
    assert ends_of([token]) == (2, 90)
    assert ends_of([token], eot_token_id=5) == (2, 5, 90)
    assert ends_of([token], kind=NORMAL) == ((2, 90) if token in TURN else (2,))
    assert ends_of([token], eos_token_ids=[7, 3]) == (7, 3)  # a stated list is all of them
    assert ends_of(["<|fim_pad|>", "<tool_call>", "<|im_start|>"]) == (2,)


@pytest.mark.parametrize("marks", [("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>")])
def test_where_a_text_goes_on_after_a_message_its_end_is_none(marks, ends_of):
    assert ends_of(["<|end|>", *marks]) == (2, 91, 92)
    assert ends_of(["<|end|>", *marks], eot_token_id=90) == (2, 91, 92)
    assert ends_of(["<|end|>", marks[0]]) == (2, 90, 91)
    assert ends_of(["<|end|>", *marks], eos_token_ids=[90]) == (90,)


@pytest.mark.parametrize("wrong", [[2, 96], [-1], ["</s>"], [1.5], "2", True])
def test_a_list_of_ends_that_is_none_is_refused(wrong, ends_of):
    with pytest.raises(ValueError, match=r"m\.gguf: tokenizer\.ggml\.eos_token_ids must be"):
        ends_of([], eos_token_ids=wrong)


def test_a_file_and_a_folder_of_a_qwen2_instruct_end_alike(tiny, write_hf, tmp_path):
    model = tiny("qwen2")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [f"t{i}" for i in range(92)] + ["</s>", *special]
    types = [NORMAL] * 93 + [CONTROL] * 3
    ids = {"eos": 95, "padding": 93, "bos": 93}
    keys = {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items()}
    args = (tmp_path / "m.gguf", model, "qwen2")
    path = write_gguf(*args, tokens=tokens, types=types, metadata=keys)
    folder = write_hf(tmp_path / "folder", model.hf, model.tensors())
    (folder / "generation_config.json").write_text('{"eos_token_id": [95, 93]}')
    assert load(path)[0].config.eos_token_ids == load(folder)[0].config.eos_token_ids == (95, 93)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 95}')  # the folder's word
    assert load(tmp_path)[0].config.eos_token_ids == (95,)
    assert load(path)[0].config.eos_token_ids == (95, 93)


@pytest.mark.parametrize(
    "metadata, tensors, parts",
    [
        ({"llama.logit_scale": 0.5}, {}, ("llama.logit_scale", "not supported")),
        ({"llama.attention.causal": False}, {}, ("llama.attention.causal to False",)),
        ({"llama.rope.scaling.yarn_attn_factor": 0.5}, {}, ("yarn_attn_factor to 0.5",)),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, ("yarn_log_multiplier",)),
        ({"llama.expert_weights_scale": 2.5}, {}, ("expert_weights_scale to 2.5",)),
        ({"split.count": 3}, {}, ("one of 3 parts", "merge")),
        (
            {},
            {"blk.0.attn_sinks.weight": (4,)},
            ("unknown tensor 'blk.0.attn_sinks.weight'", "attn_q"),
        ),
        ({}, {"blk.1.ffn_up.weight": None}, ("lacks blk.1.ffn_up.weight",)),
        ({}, {"blk.1.attn_k.bias": None}, ("lacks blk.1.attn_k.bias",)),
        ({}, {"token_embd.weight": None}, ("no tensor 'token_embd.weight'",)),
        ({}, {"blk.0.ffn_down.weight": (64, 64)}, ("ffn_down.weight", "[64, 64]", "[64, 96]")),
        ({}, {"blk.7.attn_q.weight": (128, 64)}, ("blk.7.attn_q.weight",)),
    ],
)
def test_what_is_wrong_is_named_in_one_line(metadata, tensors, parts, tiny, tmp_path, one_line):
    model = tiny("llama_with_biases")
    all_tensors = gguf_tensors(model, "llama")
    for name, shape in tensors.items():
        all_tensors.pop(name, None)
        if shape is not None:
            all_tensors[name] = np.zeros(shape, np.float32)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, "llama", metadata=metadata, tensors=all_tensors)
    with pytest.raises(ValueError) as error:
        load(path)
    one_line(error.value, *parts)


def test_keys_that_change_nothing_are_no_hindrance(tiny, tmp_path):
    model = tiny("llama")
    metadata = {"attention.causal": True, "rope.scaling.yarn_attn_factor": 1.0}
    metadata |= {"expert_weights_scale": 0.0, "rope.scaling.yarn_ext_factor": -1.0}
    stated = {f"llama.{key}": value for key, value in metadata.items()}
    path = write_gguf(tmp_path / "model.gguf", model, "llama", metadata=stated)
    assert gguf_config(GGUFFile(path)).rope == model.config.rope


def test_an_unknown_architecture_is_named(tiny, tmp_path, one_line):
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), "mamba")
    with pytest.raises(ValueError) as error:
        load(path)
    one_line(error.value, "'mamba'", "qwen3moe", "phi3")


def test_a_missing_key_is_named(tiny, tmp_path, one_line):
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), "llama")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama.embedding_length", b"llama.embedding_lenght"))
    with pytest.raises(ValueError) as error:
        load(path)
    one_line(error.value, "llama.embedding_length")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_logits_equal_those_of_transformers_on_the_same_file(family, tiny, tmp_path):
    """transformers' own reading of the file: an oracle that shares no code with ours."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    arch = ARCHITECTURES[family]
    # transformers reads no head length and no scale from these files: its defaults then.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 256}
    model = tiny(family, **heads, head_dim=128 if family == "qwen3" else 32)
    tokens = [f"t{i}" for i in range(model.config.vocab_size)]
    metadata = {f"{arch}.attention.scale": 0.0625} if arch.startswith("gemma") else {}
    path = tmp_path / "model.gguf"
    write_gguf(path, model, arch, kind="Q8_0", tokens=tokens, metadata=metadata)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    ids = np.random.default_rng(0).integers(3, 96, (2, 24))
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    loaded, params = load(path)
    logits = loaded.logits(params, jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_the_default_model_loads_with_its_own_end(smollm2_path):
    model, params = load("smollm2", dtype="bfloat16")
    assert model.config.num_layers == 30 and model.config.tie_word_embeddings
    assert model.config.eos_token_ids == (2, 0)  # <|im_end|>, <|endoftext|>
    assert params["embed"]["w"].shape == (49152, 576)
    assert params["embed"]["w"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_the_default_models_logits_equal_those_of_transformers(smollm2_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    ids = np.random.default_rng(0).integers(0, 49152, (2, 64))
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    model, params = load("smollm2")
    logits = model.logits(params, jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(logits, expected, atol=5e-4)
