"""GGUF files byte by byte, also such as no writer would write, of tiny models with a tokenizer."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"}
CODES |= {U64: "Q", I64: "q", F64: "d"}
INTEGERS = (U8, I8, U16, I16, U32, I32, U64, I64)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + CODES[kind], value)


def array(kind: int, values, count: int | None = None) -> bytes:
    head = struct.pack("<IQ", kind, len(values) if count is None else count)
    return head + b"".join(scalar(kind, value) for value in values)


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", ARRAY, 1) * depth + array(U32, [1])


@dataclasses.dataclass
class Header:
    """Metadata as (type, bytes of the value) by key, and tensors in F32."""

    metadata: dict[str, tuple[int, bytes]]
    tensors: dict[str, np.ndarray]

    def dump(self, **changes: tuple[int, bytes]) -> tuple[bytes, int]:
        """The file, and how many bytes of it are its header."""
        metadata = self.metadata | changes
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(metadata))
        for key, (kind, value) in metadata.items():
            head += text(key) + struct.pack("<I", kind) + value
        data = b""
        for name, tensor in self.tensors.items():
            head += text(name) + struct.pack("<I", tensor.ndim)
            head += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape))
            head += struct.pack("<IQ", 0, len(data))
            data += tensor.astype("<f4").tobytes()
            data += bytes(-len(data) % 32)
        return head + bytes(-len(head) % 32) + data, len(head)


TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁", "<0x0A>"]
TYPES = [2, 3, 3, 1, 1, 1, 1, 6]
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, FF, EXPERTS = 2, 16, 4, 2, 8, 32, 4


def tiny_header(arch: str) -> Header:
    """A model of `arch` with everything that such files say, and random weights."""
    is_moe, is_gemma = arch == "qwen3moe", arch == "gemma3"
    own: dict[str, tuple[int, object]] = {
        "block_count": (U32, LAYERS),
        "context_length": (U32, 64),
        "embedding_length": (U32, WIDTH),
        "feed_forward_length": (U32, FF),
        "attention.head_count": (U32, HEADS),
        "attention.head_count_kv": (U32, KV_HEADS),
        "attention.key_length": (U32, HEAD),
        "attention.value_length": (U32, HEAD),
        "attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "attention.causal": (BOOL, 1),
        "rope.dimension_count": (U32, HEAD),
        "rope.freq_base": (F32, 1e4),
        "rope.scaling.type": (STRING, "yarn"),
        "rope.scaling.factor": (F32, 4.0),
        "rope.scaling.original_context_length": (U32, 16),
        "rope.scaling.attn_factor": (F32, 1.0),
        "rope.scaling.yarn_beta_fast": (F32, 32.0),
        "rope.scaling.yarn_beta_slow": (F32, 1.0),
        "rope.scaling.yarn_ext_factor": (F32, 1.0),
        "rope.scaling.yarn_attn_factor": (F32, 1.0),
        "rope.scaling.yarn_log_multiplier": (F32, 0.0),
        "logit_scale": (F32, 0.0),
        "expert_shared_count": (U32, 0),
    }
    if is_moe:
        own |= {"expert_count": (U32, EXPERTS), "expert_used_count": (U32, 2)}
        own |= {"expert_feed_forward_length": (U32, FF), "expert_weights_norm": (BOOL, 1)}
        own |= {"expert_weights_scale": (F32, 1.0)}
    if is_gemma:
        own |= {"attention.sliding_window": (U32, 8), "rope.freq_base_swa": (F32, 1e4)}
        own |= {"attention.sliding_window_pattern": (U32, 2), "attention.scale": (F32, 0.25)}
        own |= {"final_logit_softcapping": (F32, 30.0)}
    vocabulary: dict[str, tuple[int, object]] = {
        "model": (STRING, "llama" if is_gemma else "gpt2"),
        "pre": (STRING, "llama-bpe"),
        "add_bos_token": (BOOL, 1),
        "add_eos_token": (BOOL, 0),
        "add_space_prefix": (BOOL, 0),
        "bos_token_id": (U32, 1),
        "eos_token_id": (U32, 2),
        "eot_token_id": (U32, 2),
        "eom_token_id": (U32, 2),
        "unknown_token_id": (U32, 0),
        "padding_token_id": (U32, 0),
    }
    scalars = {"general.architecture": (STRING, arch), "general.name": (STRING, "tiny")}
    scalars |= {"general.alignment": (U32, 32), "split.count": (U16, 1)}
    scalars |= {f"{arch}.{key}": value for key, value in own.items()}
    scalars |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    scalars |= {"tokenizer.chat_template": (STRING, "{{ messages }}")}
    scalars |= {"tokenizer.chat_template.tool_use": (STRING, "{{ tools }}")}
    metadata = {key: (kind, scalar(kind, value)) for key, (kind, value) in scalars.items()}
    for key, kind, values in (
        ("tokens", STRING, TOKENS),
        ("token_type", I32, TYPES),
        ("scores", F32, [-float(i) for i in range(len(TOKENS))]),
        ("merges", STRING, ["a b"]),
        ("eos_token_ids", U32, [2]),
    ):
        metadata[f"tokenizer.ggml.{key}"] = (ARRAY, array(kind, values))
    return Header(metadata, _tensors(is_moe, is_gemma))


def _tensors(is_moe: bool, is_gemma: bool) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), WIDTH)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (WIDTH,),
            f"blk.{i}.attn_q.weight": (HEADS * HEAD, WIDTH),
            f"blk.{i}.attn_k.weight": (KV_HEADS * HEAD, WIDTH),
            f"blk.{i}.attn_v.weight": (KV_HEADS * HEAD, WIDTH),
            f"blk.{i}.attn_output.weight": (WIDTH, HEADS * HEAD),
            f"blk.{i}.ffn_norm.weight": (WIDTH,),
        }
        stack, lead = ("_exps", (EXPERTS,)) if is_moe else ("", ())
        shapes |= {f"blk.{i}.ffn_{p}{stack}.weight": (*lead, FF, WIDTH) for p in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down{stack}.weight"] = (*lead, WIDTH, FF)
        if is_moe:
            shapes[f"blk.{i}.ffn_gate_inp.weight"] = (EXPERTS, WIDTH)
        if is_moe or is_gemma:
            shapes |= {f"blk.{i}.attn_{part}_norm.weight": (HEAD,) for part in "qk"}
        if is_gemma:
            shapes |= {f"blk.{i}.post_{p}_norm.weight": (WIDTH,) for p in ("attention", "ffw")}
    shapes |= {"output_norm.weight": (WIDTH,), "output.weight": (len(TOKENS), WIDTH)}
    if is_gemma:
        del shapes["output.weight"]
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
