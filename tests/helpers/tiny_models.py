"""Models, config.json fields and a tokenizer, all tiny, that files of tests share."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jinfer.config.model import ModelConfig
from jinfer.models.model import Model

HF_COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HF_FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "llama_with_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 32, "num_hidden_layers": 3},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 7,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "phi3": {"original_max_position_embeddings": 128, "tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}


def make_config(vocab_size: int, **changes) -> ModelConfig:
    """A Llama of two layers, 32 wide."""
    fields = {
        "family": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    return ModelConfig(**{**fields, **changes})


def make_model(vocab_size: int, **changes) -> Model:
    return Model(make_config(vocab_size, **changes))


def hf_llama(**changes) -> dict:
    """The config.json of a Llama whose layers are wide enough for groups of 32."""
    fields = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
    }
    return {**fields, **changes}


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token a byte, then ids that stand for nothing, the last of which ends texts."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"<{i}>": i for i in range(len(vocab), vocab_size)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"<{vocab_size - 1}>")
