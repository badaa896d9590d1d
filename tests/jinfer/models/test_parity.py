"""Every family and every rope scaling against transformers, on tiny random models in float32."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from tiers import thorough_but

from jinfer import LLM, SamplingParams
from jinfer.checkpoints import families
from jinfer.models.model import Model

torch = pytest.importorskip("torch", reason="the parity oracle, torch, is not installed")
import transformers  # noqa: E402

# Two float32 programs of the same maths: sums in another order, at logits of size 5 to 20.
TOLERANCE = 2e-4
NUM_NEW_TOKENS = 64
PROMPT_LENGTHS = (3, 17, 9, 14)
VOCAB = 97

DENSE = dict(
    vocab_size=VOCAB,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=None,  # or generation would stop there
    pad_token_id=0,
)
WIDE = {**DENSE, "head_dim": 16}  # heads wider than hidden_size / num_attention_heads
GEMMA = {**WIDE, "num_hidden_layers": 4, "sliding_window": 5, "query_pre_attn_scalar": 7}
LONG = {"short_factor": [1.0, 1.3, 2.0], "long_factor": [1.5, 3.0, 9.0]}
VISION = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=8,
    patch_size=4,
)


def rope(kind, theta=100.0, **parameters):
    """A low base frequency, so that a short text turns every dimension."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


CASES = {
    "llama-gqa": ("Llama", WIDE),
    "llama-mha-tied": ("Llama", {**DENSE, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-biases": (
        "Llama",
        {**WIDE, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-gelu": ("Llama", {**WIDE, "hidden_act": "gelu"}),
    "llama-linear": ("Llama", {**WIDE, **rope("linear", factor=4.0)}),
    "llama-dynamic": (
        "Llama",
        {**WIDE, "max_position_embeddings": 12, **rope("dynamic", factor=3.0)},
    ),
    "llama-llama3": (
        "Llama",
        {
            **WIDE,
            **rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "llama-yarn": (
        "Llama",
        {**WIDE, **rope("yarn", factor=8.0, original_max_position_embeddings=32)},
    ),
    "llama-yarn-mscale": (
        "Llama",
        {
            **WIDE,
            **rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=32,
                mscale=0.7,
                mscale_all_dim=1.3,
                beta_fast=4.0,
                beta_slow=2.0,
                truncate=False,
            ),
        },
    ),
    "llama-yarn-attention-factor": (
        "Llama",
        {
            **WIDE,
            **rope("yarn", factor=8.0, original_max_position_embeddings=32, attention_factor=1.4),
        },
    ),
    "llama-longrope": (
        "Llama",
        {
            **DENSE,
            "hidden_size": 24,
            **rope("longrope", factor=8.0, original_max_position_embeddings=8, **LONG),
        },
    ),
    "mistral-window": ("Mistral", {**WIDE, "sliding_window": 5}),
    "mistral-full": ("Mistral", {**WIDE, "sliding_window": None}),
    "qwen2": ("Qwen2", {**DENSE, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {**DENSE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**WIDE, "tie_word_embeddings": True}),
    "qwen3-window-biases": (
        "Qwen3",
        {
            **WIDE,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "gemma2": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0},
    ),
    "gemma2-uncapped-untied-biases": (
        "Gemma2",
        {
            **GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3-text": (
        "Gemma3Text",
        {
            **GEMMA,
            "sliding_window_pattern": 3,
            "final_logit_softcapping": 8.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "gemma3-multimodal": ("Gemma3", {"text_config": GEMMA, "vision_config": VISION}),
    "phi3-window": ("Phi3", {**DENSE, "num_key_value_heads": 4, "sliding_window": 5}),
    "phi3-partial": ("Phi3", {**DENSE, "hidden_size": 48, "partial_rotary_factor": 0.5}),
    # Every prompt is longer than the trained context.
    "phi3-longrope-long": (
        "Phi3",
        {
            **DENSE,
            "hidden_size": 48,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 2,
            "max_position_embeddings": 8,  # a factor of 4 sharpens attention
            **rope("longrope", **LONG),
        },
    ),
    # No text grows beyond the trained context.
    "phi3-longrope-short": (
        "Phi3",
        {
            **DENSE,
            "hidden_size": 24,
            "original_max_position_embeddings": 100,
            **rope("longrope", **LONG),
        },
    ),
    "mixtral": ("Mixtral", {**WIDE, "num_local_experts": 5, "sliding_window": 6}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **WIDE,
            "num_hidden_layers": 4,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    "qwen3-moe-normed": (
        "Qwen3Moe",
        {
            **WIDE,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
        },
    ),
}

# Families that transformers has no class for: model_type -> the file of tests/jinfer/models whose
# test compares them with a reference of its own.
WITHOUT_ORACLE: dict[str, str] = {}


def build_oracle(name):
    """A transformers model with every parameter random, norms and biases too."""
    family, kwargs = CASES[name]
    config = getattr(transformers, f"{family}Config")(**kwargs)
    config._attn_implementation = "eager"  # the others know no soft cap
    torch.manual_seed(sorted(CASES).index(name))
    if family == "Gemma3":
        oracle = transformers.Gemma3ForConditionalGeneration(config)
    else:
        oracle = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, p in oracle.named_parameters():
            if "norm" in path:
                p.uniform_(-0.5, 0.5) if "gemma" in name else p.uniform_(0.5, 1.5)
            elif p.ndim == 1:
                p.normal_(0.0, 0.5)
            else:
                p.normal_(0.0, 1.5 * p.shape[-1] ** -0.5)
    return oracle.eval()


def right_padded(texts, length):
    out = np.zeros((len(texts), length), np.int32)
    for row, text in zip(out, texts):
        row[: len(text)] = text
    return out


def generate_with_oracle(oracle, prompts, one_by_one):
    """Greedy texts. One by one where frequencies depend on the longest text of a batch."""
    texts = []
    for batch in [[p] for p in prompts] if one_by_one else [prompts]:
        oracle(torch.zeros((1, 1), dtype=torch.long))  # resets what dynamic ropes remember
        longest = max(map(len, batch))
        tokens = np.stack([np.pad(p, (longest - len(p), 0)) for p in batch])
        mask = np.stack([np.arange(longest) >= longest - len(p) for p in batch])
        out = oracle.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
            ),
        ).numpy()
        texts += [row[longest - len(p) :] for row, p in zip(out, batch)]
    return texts


DEFAULT = (
    "llama-gqa",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma3-text",
    "phi3-partial",
    "mixtral",
)


@pytest.mark.parametrize("name", thorough_but(CASES, default=DEFAULT))
def test_logits_and_greedy_tokens_equal_those_of_transformers(name, load_tensors):
    oracle = build_oracle(name)
    config = families.config_from_hf(oracle.config.to_dict())
    params = load_tensors(config, {k: v.numpy() for k, v in oracle.state_dict().items()})
    model = Model(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n) for n in PROMPT_LENGTHS]

    with torch.no_grad():
        want_texts = generate_with_oracle(oracle, prompts, model.needs_context_lens)
        length = max(PROMPT_LENGTHS) + NUM_NEW_TOKENS
        texts = right_padded(want_texts, length)
        want = oracle(torch.tensor(texts, dtype=torch.long)).logits.numpy()

    logits = jax.jit(model.logits)
    got = np.asarray(logits(params, texts))
    assert np.abs(want).max() > 3  # or else the tolerance would be generous
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)

    # Dynamic ropes are made to go beyond their config's positions, which the engine would refuse.
    roomy = Model(dataclasses.replace(config, max_position_embeddings=length))
    llm = LLM(
        roomy,
        params=params,
        skip_tokenizer_init=True,
        max_model_len=length,
        max_num_seqs=4,
        max_num_batched_tokens=max(PROMPT_LENGTHS) // 2,
        block_size=8,
    )
    greedy = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate([p.tolist() for p in prompts], greedy, use_tqdm=False)
    for prompt, output, want_text in zip(prompts, outputs, want_texts):
        assert prompt.tolist() + output.outputs[0].token_ids == want_text.tolist()


def test_every_family_has_a_case():
    classes = {family for family, _ in CASES.values()}
    spelled = {getattr(transformers, f"{family}Config").model_type for family in classes}
    assert not spelled & WITHOUT_ORACLE.keys()
    assert spelled | WITHOUT_ORACLE.keys() == {*families.SUPPORTED, "gemma3"}
    for name in WITHOUT_ORACLE.values():
        assert (pathlib.Path(__file__).parent / name).is_file(), name


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "phi3-partial", "gemma3-multimodal"])
@pytest.mark.thorough
def test_a_saved_checkpoint_and_the_model_in_memory_load_alike(name, load_tensors, tmp_path):
    """On disk experts are apart and prefixes older; in memory they are stacked."""
    import json

    from safetensors.numpy import load_file

    oracle = build_oracle(name)
    oracle.save_pretrained(tmp_path)
    config = families.config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config == families.config_from_hf(oracle.config.to_dict())
    saved = load_file(tmp_path / "model.safetensors")
    assert set(families.tensor_names(config)) <= set(saved) or name == "gemma3-multimodal"
    from_disk = load_tensors(config, saved)
    in_memory = load_tensors(config, {k: v.numpy() for k, v in oracle.state_dict().items()})
    jax.tree.map(np.testing.assert_array_equal, from_disk, in_memory)
