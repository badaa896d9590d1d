"""config.json and tensor names: laws and real spellings, without transformers."""

import dataclasses

import numpy as np
import pytest

from jinfer.checkpoints import families
from jinfer.config.model import RopeConfig

SIZES = dict(
    vocab_size=32,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
EXTRAS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "phi3": {"head_dim": None},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
}


def config_of(family, **overrides):
    fields = {**SIZES, **EXTRAS.get(family, {}), **overrides}
    return families.config_from_hf({"model_type": family, **fields})


@pytest.mark.parametrize("family", families.SUPPORTED)
def test_a_published_checkpoint_fills_every_parameter_once(family):
    config = config_of(family)
    filled = {path: np.zeros(shape) for path, shape in families.expected_shapes(config).items()}
    for name in families.tensor_names(config):
        for place in families.placements(config, name):
            part = filled[place.path]
            if place.expert is None:
                part += 1
            else:
                part[place.expert] += 1
    assert all((part == 1).all() for part in filled.values())


@pytest.mark.parametrize("family", families.SUPPORTED)
def test_export_undoes_import(family):
    config = config_of(family)
    rng = np.random.default_rng(0)
    flat = {
        path: rng.normal(size=shape) for path, shape in families.expected_shapes(config).items()
    }
    restored = {path: np.zeros_like(leaf) for path, leaf in flat.items()}
    for name in families.tensor_names(config):
        tensor = families.assemble(config, name, flat.__getitem__)
        for place in families.placements(config, name):
            target = restored[place.path]
            (target if place.expert is None else target[place.expert])[...] = place.take(tensor)
            assert name in families.names_of(config, place.path)
    for path, leaf in flat.items():
        np.testing.assert_array_equal(restored[path], leaf)


def test_pieces_are_views():
    """A loader holds one tensor in memory: splitting and transposing must not copy it."""
    config = config_of("phi3")
    tensor = np.zeros((2 * 20, 24))
    for place in families.placements(config, "model.layers.0.mlp.gate_up_proj.weight"):
        assert np.shares_memory(place.take(tensor), tensor)


def test_fused_projections_split_by_rows():
    config = config_of("phi3", num_attention_heads=3, num_key_value_heads=1)  # heads of 8
    tensor = np.arange(5 * 8)[:, None] * np.ones((1, 24))
    q, k, v = (
        place.take(tensor)[0]
        for place in families.placements(config, "model.layers.2.self_attn.qkv_proj.weight")
    )
    np.testing.assert_array_equal(q, np.arange(24))
    np.testing.assert_array_equal(k, np.arange(24, 32))
    np.testing.assert_array_equal(v, np.arange(32, 40))


def test_experts_may_come_one_by_one_or_stacked():
    config = config_of("qwen3_moe")
    path = ("layers", 0, "mlp", "up", "w")
    (single,) = families.placements(config, "model.layers.0.mlp.experts.2.up_proj.weight")
    assert (single.path, single.expert) == (path, 2)
    (old,) = families.placements(config, "model.layers.0.block_sparse_moe.experts.2.w3.weight")
    assert old == single
    gate, up = families.placements(config, "model.layers.0.mlp.experts.gate_up_proj")
    stack = np.random.default_rng(0).normal(size=(3, 2 * 768, 24))
    assert up.path == path and up.expert is None
    np.testing.assert_array_equal(gate.take(stack), stack[:, :768].swapaxes(1, 2))
    np.testing.assert_array_equal(up.take(stack), stack[:, 768:].swapaxes(1, 2))
    (alone,) = families.placements(config, "model.layers.0.mlp.experts.up_proj.weight")
    assert alone.path == path and alone.rows is None


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model.", "model.language_model."])
def test_prefixes_of_every_era_are_known(prefix):
    config = config_of("gemma3_text")
    (place,) = families.placements(config, f"{prefix}layers.1.self_attn.q_norm.weight")
    assert place.path == ("layers", 1, "attn", "q_norm", "scale")
    (place,) = families.placements(config, f"{prefix}embed_tokens.weight")
    assert place.path == ("embed", "w")


def test_what_is_not_needed_has_no_place():
    tied = config_of("gemma3_text")
    for name in (
        "lm_head.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.post_layernorm.weight",
        "model.vision_tower.head.probe",
        "multi_modal_projector.mm_soft_emb_norm.weight",
    ):
        assert families.placements(tied, name) == ()
    llama = config_of("llama")
    assert families.placements(llama, "model.layers.0.self_attn.rotary_emb.inv_freq") == ()
    assert len(families.placements(llama, "lm_head.weight")) == 1


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.3.input_layernorm.weight"),  # there are 3 layers
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("llama", "model.layers.0.pre_feedforward_layernorm.weight"),
        ("llama", "model.layers.0.mlp.experts.0.w1.weight"),
        ("llama", "model.layers.0.mlp.experts.gate_up_proj"),
        ("llama", "model.layers.0.self_attn.q_proj.qweight"),
        ("llama", "vision_tower.head.probe"),
        ("llama", "score.weight"),
        ("qwen2", "model.layers.0.self_attn.o_proj.bias"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight"),  # there are 3 experts
        ("qwen3_moe", "model.layers.0.mlp.up_proj.bias"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),  # a dense layer
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w4.weight"),
    ],
)
def test_an_unknown_tensor_is_named_with_what_is_known(family, name):
    with pytest.raises(ValueError, match="no place for") as error:
        families.placements(config_of(family), name)
    assert name in str(error.value) and "model.layers.0.input_layernorm.weight" in str(error.value)


def test_expert_weights_do_not_pass_for_dense_ones():
    """An expert layer has a parameter mlp.gate.w too, of another shape."""
    with pytest.raises(ValueError, match="no place for"):
        families.placements(config_of("qwen3_moe"), "model.layers.0.mlp.gate_proj.weight")
    with pytest.raises(ValueError, match="no place for"):
        families.placements(config_of("qwen3_moe"), "model.layers.1.mlp.experts.0.up_proj.weight")


def test_an_unknown_architecture_is_named_with_what_is_supported():
    hf = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    with pytest.raises(ValueError, match=r"mamba.*MambaForCausalLM") as error:
        families.config_from_hf(hf)
    assert all(family in str(error.value) for family in (*families.SUPPORTED, "gemma3"))
    with pytest.raises(ValueError, match="None"):
        families.config_from_hf({})


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="'hidden_size'"):
        families.config_from_hf(
            {"model_type": "llama", **{k: v for k, v in SIZES.items() if k != "hidden_size"}}
        )


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"hidden_act": "relu2"}, "relu2"),
        ("llama", {"rope_scaling": {"type": "spiral", "factor": 2.0}}, "spiral"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor'"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope"}}, "'short_factor'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("mistral", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("llama", {"rope_scaling": {"factor": 4.0}}, "no rope_type"),
        ("llama", {"rope_scaling": 4.0}, "rope_scaling must be an object"),
        ("llama", {"rope_scaling": {"full_attention": 5}}, "full_attention of the rope must be"),
        ("llama", {"rope_parameters": {"sliding_attention": []}}, "sliding_attention of the rope"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts must be a positive integer"),
        ("qwen3_moe", {"num_experts": ""}, "num_experts must be a positive integer"),
        (
            "llama",
            {"hidden_size": "24"},
            "hidden_size must be a positive integer up to .*, got '24'",
        ),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ("llama", {"rope_theta": None}, "rope_theta must be a positive number .*, got None"),
        ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar must be"),
        (
            "qwen2",
            {"sliding_window": [4]},
            "sliding_window must be 0 or a positive integer or null",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers must be a list"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_mscale": 1.2}}, "'long_mscale'"),
        (
            "llama",
            {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3},
            "no window is in force: llama has none",
        ),
        (
            "qwen3",
            {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3},
            "no window is in force: set sliding_window and use_sliding_window",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(family, overrides, message):
    with pytest.raises(ValueError, match=message):
        config_of(family, **overrides)


def test_old_and_new_spellings_of_rope_agree():
    old = config_of(
        "llama",
        rope_theta=5e5,
        rope_scaling={
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    new = config_of(
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    assert old == new
    assert old.rope == RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_position=64)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_rope_stated_under_both_names_is_stated_once(family):
    """Guides say to add rope_scaling, also to a file that already has rope_parameters."""
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64}
    plain = {"rope_type": "default", "rope_theta": 1e6}
    new = {"rope_type": "yarn", "rope_theta": 1e6, **yarn}
    if family == "gemma3_text":
        plain, new = ({"full_attention": rope, "sliding_attention": {}} for rope in (plain, new))
    for stated, old in (
        (plain, {"type": "yarn", **yarn}),
        (new, {"type": "yarn", **yarn, "factor": 2.0}),
        (new, {"type": "linear", "factor": 4.0}),
    ):
        with pytest.raises(ValueError, match="both rope_parameters and rope_scaling"):
            config_of(family, rope_parameters=stated, rope_scaling=old)
    both = config_of(family, rope_parameters=new, rope_scaling={"type": "yarn", **yarn})
    assert both == config_of(family, rope_parameters=new)
    assert both.rope.factor == 4.0


def test_gemma_has_its_own_name_for_the_activation():
    """As in transformers: what hidden_act says is another model's business."""
    for stated, meant in (
        ({"hidden_act": "silu"}, "gelu_tanh"),
        ({"hidden_activation": None}, "gelu_tanh"),
        ({"hidden_act": "silu", "hidden_activation": "gelu"}, "gelu"),
    ):
        assert config_of("gemma2", **stated).activation == meant
    assert config_of("llama", hidden_activation="gelu").activation == "silu"


def test_old_and_new_spellings_of_gemma_3_agree():
    """Old files name the local base apart, and count the pattern instead of listing layers."""
    old = config_of(
        "gemma3_text",
        rope_theta=2e6,
        rope_local_base_freq=3e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=3,
    )
    new = config_of(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        },
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    assert old == new
    assert old.rope.factor == 8.0 and old.rope_local == RopeConfig(theta=3e4)


def test_a_published_gemma_3_with_images_is_mostly_silence():
    """The text part of gemma-3-4b-it's config.json, all of it."""
    config = families.config_from_hf(
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {},
        }
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262208 and config.eos_token_ids == (1, 106)
    assert config.layer_types[:6] == ("sliding",) * 5 + ("full",)
    assert config.rope == RopeConfig(theta=1e6, scaling="linear", factor=8.0)
    assert config.rope_local == RopeConfig(theta=1e4)
    assert config.attention_scale == 256**-0.5 and config.tie_word_embeddings


def test_phi_3_spellings_of_longrope():
    factors = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    configs = [
        config_of(
            "phi3",
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling={"type": kind, **factors},
        )
        for kind in ("su", "yarn", "longrope")
    ]
    assert configs[0] == configs[1] == configs[2]
    rope = configs[0].rope
    assert (rope.scaling, rope.factor, rope.original_max_position) == ("longrope", 32.0, 4096)


@pytest.mark.parametrize(
    ("family", "overrides", "types", "window"),
    [
        ("llama", {"sliding_window": 4}, "fff", None),
        ("mistral", {"sliding_window": 4}, "sss", 4),
        ("mistral", {"sliding_window": None}, "fff", None),
        ("mistral", {}, "sss", 4096),
        ("phi3", {"sliding_window": 4}, "sss", 4),
        ("qwen2", {"sliding_window": 4}, "fff", None),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True}, "fff", None),
        (
            "qwen2",
            {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
            "ffs",
            4,
        ),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, "sss", 4096),
        ("qwen3_moe", {"sliding_window": 4, "use_sliding_window": True}, "sss", 4),
        ("mixtral", {}, "fff", None),
        ("gemma2", {}, "sfs", 4096),
        ("gemma3_text", {}, "sss", 4096),
        ("gemma3_text", {"_sliding_window_pattern": 2}, "sfs", 4096),
        (
            "qwen2",
            {
                "sliding_window": 4,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            "sff",
            4,
        ),
    ],
)
def test_which_layers_have_a_window(family, overrides, types, window):
    config = config_of(family, **overrides)
    assert "".join(kind[0] for kind in config.layer_types) == types
    assert config.sliding_window == window


def test_transformers_5_counts_qwen_experts_under_another_name():
    old = config_of("qwen3_moe", num_experts=3)
    fields = {k: v for k, v in EXTRAS["qwen3_moe"].items() if k != "num_experts"}
    new = families.config_from_hf(
        {"model_type": "qwen3_moe", **SIZES, **fields, "num_local_experts": 3}
    )
    assert old == new
    assert old.dense_layers == (1,)
    assert config_of("qwen3_moe", decoder_sparse_step=2).dense_layers == (0, 1, 2)


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    classes = {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "gemma2": "Gemma2",
        "gemma3_text": "Gemma3Text",
        "phi3": "Phi3",
        "mixtral": "Mixtral",
        "qwen3_moe": "Qwen3Moe",
    }
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    for family, name in classes.items():
        stated = getattr(transformers, f"{name}Config")().to_dict()
        silent = {k: stated[k] for k in (*required, "num_attention_heads")}
        assert families.config_from_hf({"model_type": family, **silent}) == (
            families.config_from_hf(stated)
        )


def test_unflatten_builds_the_tree_of_the_model():
    config = config_of("mixtral")
    tree = families.unflatten(families.expected_shapes(config), config)
    assert tree["layers"][2]["mlp"]["down"]["w"] == (3, 20, 24)
    assert isinstance(tree["layers"], tuple) and len(tree["layers"]) == 3
    assert dataclasses.is_dataclass(families.Placement)
