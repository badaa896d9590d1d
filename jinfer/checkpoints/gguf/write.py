"""Writes params, quantized or not, as a GGUF file for llama.cpp and for our own reader.

The inverse of `gguf.checkpoint`: rows of q and k of "llama" files interleaved, Gemma's gammas + 1,
Llama 3.1's rope scaling as a tensor of divisors. Metadata are read back before the file is renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jinfer.checkpoints.families import Path, expected_shapes, is_linear
from jinfer.checkpoints.files import writing
from jinfer.checkpoints.gguf.checkpoint import gguf_config
from jinfer.checkpoints.gguf.file import GGUFFile
from jinfer.checkpoints.gguf.kquants import encode_rows, fitting_type, pack_q4_0, pack_q8_0
from jinfer.config.fields import require
from jinfer.config.model import ModelConfig, RopeConfig
from jinfer.config.quant_format import CHANNEL
from jinfer.config.typing import Params
from jinfer.linear.qtensor import QTensor
from jinfer.linear.weight import format_of, to_dense
from jinfer.models.model import Model
from jinfer.models.rope import attention_factor

ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "mixtral": "llama", "phi3": "phi3"},
    **{"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"},
    **{"gemma2": "gemma2", "gemma3_text": "gemma3"},
}
"""Hugging Face's model_type -> general.architecture."""
MATRIX_TYPES = {"Q8_0": "Q8_0"}  # of embedding and head; with 4 bits in the linears Q6_K
_PARTS = {
    **{"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"},
    **{"attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"},
    **{"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output"},
    **{"attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm"},
    **{"mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down"},
    "mlp.router": "ffn_gate_inp",
}
_FUSED = {  # Phi-3: the first tensor contains the others
    **{"attn_q": ("attn_qkv", ("q", "k", "v")), "ffn_gate": ("ffn_up", ("gate", "up"))},
    **{"attn_k": None, "attn_v": None, "ffn_up": None},
}
# What a file does not say, or only by its vocabulary.
_NOT_COMPARED = ("family", "bos_token_id", "eos_token_ids", "pad_token_id")

Tensor = tuple[str, np.ndarray, str]  # name, data or bytes, type


def write_gguf(
    path: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    kind: str | None = None,
    importance: Mapping[Path, np.ndarray] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    name: str = "",
) -> dict[str, int]:
    """Writes one GGUF file atomically.

    Args:
      path: of the file; must not exist.
      model: the model.
      params: its parameters, layers as a tuple.
      kind: type of the linears of the blocks, one of `kquants.BLOCK`, or its fallback where their
        rows are no whole blocks; embedding and head become Q8_0, with 4-bit types Q6_K. None: no
        rounding at all. Then quantized linears keep their codes and scales (symmetric integers:
        up to 4 bits as Q4_0, others as Q8_0), floats are F16, BF16 or F32, whatever holds them.
      importance: mean squares of a linear's inputs [I], by the path of its weight.
      tokenizer: metadata "tokenizer.*" (`gguf_vocabulary.tokenizer_metadata`).
      name: general.name.

    Returns:
      Number of tensors of each type.

    Raises:
      FileExistsError: there is such a file.
      ValueError: GGUF cannot hold a weight, or what the config says, by name.
    """
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType

    path = pathlib.Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another output file")
    config = model.config
    architecture = architecture_of(config)
    partial = path.with_name(f"{path.name}.writing-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    writer = GGUFWriter(partial, architecture, use_temp_file=True)
    try:
        with writing(path, left="nothing of it is left"):
            for key, value in metadata_of(config, name, tokenizer).items():
                _add(writer, key, value)
            for tensor_name, data, type_name in _tensors(config, params, kind, importance or {}):
                dtype = GGMLQuantizationType[type_name]
                writer.add_tensor(tensor_name, data, raw_dtype=dtype)
                counts[type_name] = counts.get(type_name, 0) + 1
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()  # flushes
            _check_config(config, gguf_config(GGUFFile(partial)))
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what they could not write is given up
            if writer.temp_file is not None:
                writer.temp_file.close()
            writer.close()
    return counts


def architecture_of(config: ModelConfig) -> str:
    """Returns general.architecture; raises ValueError if there is none for the family."""
    require(
        config.family in ARCHITECTURES,
        f"GGUF has no architecture for {config.family}; written: {', '.join(ARCHITECTURES)}",
    )
    return ARCHITECTURES[config.family]


def check_gguf(module: str, x: QTensor) -> None:
    """Raises ValueError unless a file can hold a quantized weight as it is."""
    fits = _why_not_as_it_is(x)
    require(not fits, f"{module}: GGUF cannot hold {x.fmt} as it is: {fits}")


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, (list, np.ndarray)):
        writer.add_array(key, list(value) if isinstance(value, list) else value.tolist())
    else:
        kinds = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        kinds.get(type(value), writer.add_uint32)(key, value)


def _as_stored(config: ModelConfig) -> ModelConfig:
    """The same config with a longrope as a file spells it: in f32, its factor on attention told."""
    rope = config.rope
    if rope.scaling != "longrope":
        return config
    short, long = (
        tuple(np.asarray(values, np.float32).tolist())
        for values in (rope.short_factor, rope.long_factor)
    )
    rope = dataclasses.replace(
        rope,
        short_factor=short,
        long_factor=long,
        attention_factor=float(str(np.float32(attention_factor(rope)))),
        factor=config.max_position_embeddings / (rope.original_max_position or 1),  # of no account
    )
    return dataclasses.replace(config, rope=rope)


def _check_config(meant: ModelConfig, found: ModelConfig) -> None:
    meant = _as_stored(meant)
    different = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _NOT_COMPARED
        and getattr(meant, field.name) != getattr(found, field.name)
    ]
    require(
        not different,
        f"a GGUF file of a {meant.family} model cannot hold this config's "
        + ", ".join(
            f"{n} ({getattr(meant, n)} would read as {getattr(found, n)})" for n in different
        ),
    )


def metadata_of(
    config: ModelConfig, name: str = "", tokenizer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A config as a file's metadata, with those of its tokenizer.

    Raises:
      ValueError: more than three tokens end a text, or a rope scaling that GGUF does not know.
    """
    vocabulary = dict(tokenizer or {})
    arch, rope = ARCHITECTURES[config.family], config.rope
    own: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": int(config.head_dim * rope.partial_factor),
        "rope.freq_base": rope.theta,
        **_scaling(rope),
    }
    if config.sliding_window:
        own["attention.sliding_window"] = config.sliding_window
    if config.rope_local is not None:
        own["rope.freq_base_swa"] = config.rope_local.theta
    if config.attention_soft_cap is not None:
        own["attn_logit_softcapping"] = config.attention_soft_cap
    if config.final_soft_cap is not None:
        own["final_logit_softcapping"] = config.final_soft_cap
    if config.num_experts:
        own["expert_count"] = config.num_experts
        own["expert_used_count"] = config.num_experts_per_token
        own["expert_feed_forward_length"] = config.expert_intermediate_size
        own["expert_weights_norm"] = config.norm_topk_prob
    out: dict[str, Any] = {f"{arch}.{key}": value for key, value in own.items()}
    out |= {"general.quantization_version": 2} | ({"general.name": name} if name else {})
    # The tokenizer's own end goes first: chat templates write it.
    own_end = vocabulary.get("tokenizer.ggml.eos_token_id")
    ends = [i for i in dict.fromkeys((own_end, *config.eos_token_ids)) if i is not None]
    require(len(ends) <= 3, f"a GGUF file names three tokens that end a text, these are {ends}")
    ids = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    ids |= {"bos": config.bos_token_id, "padding": config.pad_token_id}
    named: dict[str, Any] = {
        f"tokenizer.ggml.{key}_token_id": i for key, i in ids.items() if i is not None
    }
    if ends:  # else our reader would add the end tokens that it finds in the vocabulary
        stated = [i for i in ends if i in config.eos_token_ids]
        named["tokenizer.ggml.eos_token_ids"] = stated or ends
    return out | named | vocabulary


def _scaling(rope: RopeConfig) -> dict[str, Any]:
    require(rope.scaling != "dynamic", "GGUF has no name for dynamic rope scaling")
    if rope.scaling in ("none", "llama3"):  # the latter is a tensor
        return {}
    if rope.scaling == "longrope":
        out: dict[str, Any] = {
            "type": "longrope",
            "original_context_length": rope.original_max_position,
            "attn_factor": attention_factor(rope),  # llama.cpp derives none
        }
        return {f"rope.scaling.{key}": value for key, value in out.items()}
    out = {"type": rope.scaling, "factor": rope.factor}
    if rope.original_max_position is not None:
        out["original_context_length"] = rope.original_max_position
    if rope.scaling == "yarn":
        out |= {"yarn_beta_fast": rope.beta_fast, "yarn_beta_slow": rope.beta_slow}
    return {f"rope.scaling.{key}": value for key, value in out.items()}


def _rope_tensors(config: ModelConfig) -> Iterator[Tensor]:
    rope = config.rope
    if rope.scaling == "longrope":
        for part, values in (("short", rope.short_factor), ("long", rope.long_factor)):
            yield f"rope_factors_{part}.weight", np.array(values, np.float32), "F32"
    if rope.scaling == "llama3":
        rotated = int(config.head_dim * rope.partial_factor)
        exponents = np.arange(0, rotated, 2, dtype=np.float64) / rotated
        wavelengths = 2 * np.pi * rope.theta**exponents
        turns = (rope.original_max_position or 8192) / wavelengths
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        divisors = 1.0 / ((1 - smooth) / rope.factor + smooth)
        yield "rope_freqs.weight", divisors.astype(np.float32), "F32"


def _tensors(
    config: ModelConfig,
    params: Params,
    kind: str | None,
    importance: Mapping[Path, np.ndarray],
) -> Iterator[Tensor]:
    matrix = None if kind is None else MATRIX_TYPES.get(kind, "Q6_K")
    yield from _rope_tensors(config)
    for path in expected_shapes(config):
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        if path[0] != "layers":
            top = {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"}
            name = f"{top[str(path[0])]}.weight"
            rows = leaf.T if path[0] == "lm_head" and format_of(leaf) is None else leaf
            yield (
                _matrix(config, name, rows, matrix, None)
                if leaf.ndim > 1
                else _vector(config, name, leaf)
            )
            continue
        module, leaf_name = ".".join(map(str, path[2:-1])), path[-1]
        name = _PARTS[module]
        pieces = [(path, leaf)]
        if config.family == "phi3" and name in _FUSED:
            fused = _FUSED[name]
            if fused is None:
                continue
            name, parts = fused
            siblings = params["layers"][path[1]][path[2]]
            pieces = [((*path[:-2], p, leaf_name), siblings[p][leaf_name]) for p in parts]
        if is_linear(path) and leaf.ndim == 3:
            name += "_exps"
        name = f"blk.{path[1]}.{name}.{'bias' if leaf_name == 'b' else 'weight'}"
        if not is_linear(path):
            floats = [to_dense(x) for _, x in pieces]
            joined = np.concatenate([np.asarray(x, np.float32) for x in floats])
            yield _vector(config, name, joined if leaf_name != "w" else joined.T)
            continue
        try:
            made = [_matrix(config, name, x, kind, importance.get(p)) for p, x in pieces]
        except ValueError as error:
            raise ValueError(f"layers.{path[1]}.{module}: {error}") from error
        types = {type_name for _, _, type_name in made}
        require(len(types) == 1, f"layers.{path[1]}.{module}: its parts would be {sorted(types)}")
        yield name, np.concatenate([data for _, data, _ in made]), types.pop()


def _vector(config: ModelConfig, name: str, x: Any) -> Tensor:
    """A norm, a bias or a router: F32."""
    values = np.asarray(x, np.float32)
    if config.norm_plus_one and name.endswith("norm.weight"):
        values = values + np.float32(1)
    return name, np.ascontiguousarray(_interleaved(config, name, values)), "F32"


def _interleaved(config: ModelConfig, name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of a "llama" file's q and k in the order of interleaved rotation."""
    is_llama = ARCHITECTURES[config.family] == "llama"
    if not is_llama or name.split(".")[-2] not in ("attn_q", "attn_k"):
        return rows
    halves = rows.reshape(-1, 2, config.head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _matrix(
    config: ModelConfig, name: str, w: Any, kind: str | None, importance: np.ndarray | None
) -> Tensor:
    """A weight: linears [I, O] or [E, I, O], quantized or not; embedding and head [O, I]."""
    is_stored_transposed = name.startswith("blk.") or format_of(w) is not None
    if format_of(w) is not None:
        fits = _why_not_as_it_is(w)
        type_name = "Q4_0" if w.fmt.bits <= 4 else "Q8_0"
        require(kind is not None or not fits, f"GGUF cannot hold {w.fmt} as it is: {fits}")
        if not fits and kind in (None, type_name):
            experts = range(w.shape[0]) if w.ndim == 3 else [None]
            parts = [jax.tree.map(lambda a, e=e: a if e is None else a[e], w) for e in experts]
            packed = [_as_it_is(part) for part in parts]
            data = np.stack(packed) if w.ndim == 3 else packed[0]
            return name, _interleaved(config, name, data), type_name
        w = to_dense(w)
    values = np.asarray(w, np.float32)
    if is_stored_transposed:
        values = values.swapaxes(-1, -2)
    values = np.ascontiguousarray(_interleaved(config, name, values))
    if kind is None:
        return name, *_exact(values)
    type_name = fitting_type(kind, values.shape[-1])
    return name, encode_rows(values, type_name, importance), type_name


def _exact(x: np.ndarray) -> tuple[np.ndarray, str]:
    """Returns the smallest float type that represents every value."""
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    if np.array_equal(half.astype(np.float32), x):
        return half, "F16"
    brain = x.astype(ml_dtypes.bfloat16)
    if np.array_equal(brain.astype(np.float32), x):
        return brain.view(np.uint8), "BF16"
    return x, "F32"


def _why_not_as_it_is(x: QTensor) -> str:
    """Returns why neither Q4_0 nor Q8_0 represents a weight exactly; empty if one does."""
    fmt, num_inputs = x.fmt, x.shape[-2]
    if fmt.kind != "int":
        return "its types are integers"
    if fmt.act is not None:
        return "it does not say what happens to the inputs"
    if not fmt.symmetric:
        return "Q4_0 and Q8_0 have no zero points"
    if x.perm is not None:
        return "it has no order of inputs (g_idx)"
    group = num_inputs if fmt.group == CHANNEL else fmt.group
    if group < 32 or num_inputs % 32 or (group % 32 and group < num_inputs):
        return f"groups of {group} in {num_inputs} inputs are no whole blocks of 32"
    scale = np.asarray(x.scales())
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scale):
        return "f16 does not hold its scales"
    return ""


def _as_it_is(x: QTensor) -> np.ndarray:
    """Blocks [O, bytes] of the same codes and scales."""
    num_inputs, num_outputs = x.shape
    codes = np.asarray(x.codes()).T.reshape(-1, 32)
    per_block = np.arange(num_inputs // 32) * 32 // x.fmt.group_size(num_inputs)
    scale = np.broadcast_to(np.asarray(x.scales()), (x.fmt.num_groups(num_inputs), num_outputs))
    d = np.ascontiguousarray(scale.T[:, per_block if x.fmt.group > 0 else np.zeros_like(per_block)])
    pack = pack_q4_0 if x.fmt.bits <= 4 else pack_q8_0
    return pack(codes, d.reshape(-1)).reshape(num_outputs, -1)
