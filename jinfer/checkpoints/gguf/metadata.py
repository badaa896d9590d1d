"""Table of GGUF metadata keys and their allowed values, checked when a file is opened.

After the check every key of `FIELDS` has a value of its kind and range, or is absent. Keys outside
the table are not read and may have any value.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import reprlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jinfer.checkpoints.hf_fields import MAX_EXPERTS, MAX_LAYERS


@dataclasses.dataclass(frozen=True)
class Field:
    """Allowed values of a key.

    Attributes:
      kind: of one value; a number may be an integer, a switch is true or false.
      low, high: inclusive bounds of integers and numbers.
      or_zero: whether 0 is allowed below `low`; it means that the key is absent.
      shape: "one"; "layers": one, or an array of a value a layer, all equal; "switches": one, or
        an array of a switch a layer; "list": an array; "tokens": an array of as many as the
        vocabulary has tokens.
      choices: allowed texts; empty: any.
      is_token: whether the value is the id of a token.
    """

    kind: Literal["integer", "number", "switch", "text"]
    low: float = -math.inf
    high: float = math.inf
    or_zero: bool = False
    shape: Literal["one", "layers", "switches", "list", "tokens"] = "one"
    choices: tuple[str, ...] = ()
    is_token: bool = False

    def holds(self, value: Any) -> bool:
        """Whether one value is of the right kind and in range."""
        if self.kind == "text":
            return isinstance(value, str) and (not self.choices or value in self.choices)
        if self.kind == "switch":
            return isinstance(value, bool)
        kinds = int if self.kind == "integer" else int | float
        is_right = isinstance(value, kinds) and not isinstance(value, bool)
        return is_right and (self.low <= value <= self.high or (self.or_zero and value == 0))

    def holds_all(self, values: list[str] | np.ndarray) -> bool:
        """Whether the values of an array are of the right kind and in range."""
        if isinstance(values, list):
            return self.kind == "text" and all(isinstance(value, str) for value in values)
        codes = {"integer": "iu", "number": "iuf", "switch": "b", "text": ""}[self.kind]
        if self.shape == "switches" and values.dtype.kind in "iu":
            return bool(np.isin(values, (0, 1)).all())
        if values.dtype.kind not in codes:
            return False
        in_range = (values >= self.low) & (values <= self.high) | (self.or_zero & (values == 0))
        return self.kind == "switch" or bool(in_range.all())

    def describe(self, num_layers: int | None, num_tokens: int | None) -> str:
        """Describes the allowed values, for an error."""
        one = {
            "switch": "true or false",
            "text": "text" if not self.choices else f"one of {', '.join(self.choices)}",
            "integer": f"an integer from {self.low} to {self.high}",
            "number": "a finite number"
            if math.isinf(self.low)
            else f"a number from {self.low} to {self.high}",
        }[self.kind]
        layers = "layer" if num_layers is None else f"of the {num_layers} layers"
        tokens = "token" if num_tokens is None else f"of the {num_tokens} tokens"
        one = f"0 or {one}" if self.or_zero else one
        return {
            "one": one,
            "layers": f"{one}, or that same value for each {layers}",
            "switches": f"{one}, or true or false for each {layers}",
            "list": f"a list with {one}" if self.kind != "text" else "a list of texts",
            "tokens": f"a list with {one} for each {tokens}",
        }[self.shape]


_TINY, _HUGE = 1e-30, 1e30  # a square, and its inverse, of what lies between is finite
_SWITCH, _TEXT = Field("switch"), Field("text")
_NUMBER = Field("number", -3e38, 3e38)
_POSITIVE = Field("number", _TINY, _HUGE)
_POSITIVE_OR_ZERO = dataclasses.replace(_POSITIVE, or_zero=True)
_WIDTH = Field("integer", 1, 1 << 24)
_TOKEN = Field("integer", 0, (1 << 31) - 1, is_token=True)
_LENGTH = Field("integer", 1, (1 << 31) - 1)


def _each(field: Field) -> Field:
    return dataclasses.replace(field, shape="layers")


FIELDS: Mapping[str, Field] = {
    "general.architecture": _TEXT,
    "general.name": _TEXT,
    "general.alignment": Field("integer", 1, 1 << 20),
    "split.count": Field("integer", 0, 1 << 16),
    "{arch}.block_count": Field("integer", 1, MAX_LAYERS),
    "{arch}.context_length": _LENGTH,
    "{arch}.embedding_length": _WIDTH,
    "{arch}.feed_forward_length": _each(_WIDTH),
    "{arch}.attention.head_count": _each(Field("integer", 1, 1 << 16)),
    "{arch}.attention.head_count_kv": _each(Field("integer", 1, 1 << 16)),
    "{arch}.attention.key_length": _each(Field("integer", 1, 1 << 16)),
    "{arch}.attention.value_length": _each(Field("integer", 1, 1 << 16)),
    "{arch}.attention.layer_norm_rms_epsilon": Field("number", _TINY, 1.0),
    "{arch}.attention.scale": Field("number", 1e-12, 1e12, or_zero=True),
    "{arch}.attention.sliding_window": _each(Field("integer", 0, (1 << 31) - 1)),
    "{arch}.attention.sliding_window_pattern": Field("integer", 1, MAX_LAYERS, shape="switches"),
    "{arch}.attention.causal": _SWITCH,
    "{arch}.attention.clamp_kqv": _NUMBER,
    "{arch}.attention.max_alibi_bias": _NUMBER,
    "{arch}.attention.output_scale": _NUMBER,
    "{arch}.attention.temperature_length": Field("integer", 0, (1 << 31) - 1),
    "{arch}.attn_logit_softcapping": _POSITIVE_OR_ZERO,
    "{arch}.final_logit_softcapping": _POSITIVE_OR_ZERO,
    "{arch}.router_logit_softcapping": _NUMBER,
    "{arch}.logit_scale": _NUMBER,
    "{arch}.residual_scale": _NUMBER,
    "{arch}.embedding_scale": _NUMBER,
    "{arch}.expert_count": _each(Field("integer", 0, MAX_EXPERTS)),
    "{arch}.expert_used_count": _each(Field("integer", 0, MAX_EXPERTS)),
    "{arch}.expert_shared_count": _each(Field("integer", 0, MAX_EXPERTS)),
    "{arch}.expert_feed_forward_length": _each(Field("integer", 0, 1 << 24)),
    "{arch}.expert_weights_norm": _SWITCH,
    "{arch}.expert_weights_scale": _NUMBER,
    "{arch}.rope.dimension_count": _each(Field("integer", 1, 1 << 16)),
    "{arch}.rope.freq_base": _POSITIVE,
    "{arch}.rope.freq_base_swa": _POSITIVE,
    "{arch}.rope.scale_linear": _POSITIVE_OR_ZERO,
    "{arch}.rope.scaling.type": Field("text", choices=("none", "linear", "yarn", "longrope")),
    "{arch}.rope.scaling.factor": _POSITIVE_OR_ZERO,
    "{arch}.rope.scaling.original_context_length": _LENGTH,
    "{arch}.rope.scaling.attn_factor": _POSITIVE,
    "{arch}.rope.scaling.yarn_attn_factor": _NUMBER,
    "{arch}.rope.scaling.yarn_ext_factor": _NUMBER,
    "{arch}.rope.scaling.yarn_log_multiplier": _NUMBER,
    "{arch}.rope.scaling.yarn_beta_fast": _POSITIVE,
    "{arch}.rope.scaling.yarn_beta_slow": _POSITIVE,
    "tokenizer.ggml.model": _TEXT,
    "tokenizer.ggml.pre": _TEXT,
    "tokenizer.ggml.tokens": Field("text", shape="list"),
    "tokenizer.ggml.merges": Field("text", shape="list"),
    "tokenizer.ggml.scores": Field("number", shape="tokens"),
    "tokenizer.ggml.token_type": Field("integer", 0, 6, shape="tokens"),
    "tokenizer.ggml.bos_token_id": _TOKEN,
    "tokenizer.ggml.eos_token_id": _TOKEN,
    "tokenizer.ggml.eot_token_id": _TOKEN,
    "tokenizer.ggml.eom_token_id": _TOKEN,
    "tokenizer.ggml.eos_token_ids": dataclasses.replace(_TOKEN, shape="list"),
    "tokenizer.ggml.unknown_token_id": _TOKEN,
    "tokenizer.ggml.padding_token_id": _TOKEN,
    "tokenizer.ggml.add_bos_token": _SWITCH,
    "tokenizer.ggml.add_eos_token": _SWITCH,
    "tokenizer.ggml.add_space_prefix": _SWITCH,
    "tokenizer.chat_template": _TEXT,
}
"""Every key that is read, `{arch}` for general.architecture. Also "tokenizer.chat_template.NAME":
text."""

_TEMPLATE = "tokenizer.chat_template"
_LAYER = re.compile(r"blk\.(\d+)\.")


def check_metadata(path: pathlib.Path, metadata: dict[str, Any]) -> None:
    """Checks metadata in place; an array of equal values, one per layer, is replaced by the value.

    Args:
      path: of the file, for messages.
      metadata: key -> str, bool, int, float, list, or a numpy array of numbers.

    Raises:
      ValueError: a value is not what `FIELDS` asks for, or does not fit the others.
    """
    arch = metadata.get("general.architecture")
    fields = {key.replace("{arch}", str(arch)): field for key, field in FIELDS.items()}
    fields |= dict.fromkeys((k for k in metadata if k.startswith(f"{_TEMPLATE}.")), _TEXT)
    num_layers = metadata.get(f"{arch}.block_count")
    tokens = metadata.get("tokenizer.ggml.tokens")
    num_tokens = None if tokens is None else _count_tokens(path, tokens)
    for key, field in fields.items():
        if key not in metadata:
            continue
        value = metadata[key]
        if not _is_right(field, value, num_layers, num_tokens):
            asked = field.describe(num_layers if isinstance(num_layers, int) else None, num_tokens)
            raise _wrong(path, key, value, asked)
        if isinstance(value, np.ndarray) and field.shape == "layers":
            metadata[key] = value[0].item()
        if field.is_token and num_tokens is not None:
            _check_tokens(path, key, value, num_tokens)
    alignment = metadata.get("general.alignment", 1)
    if alignment & (alignment - 1):
        raise _wrong(path, "general.alignment", alignment, "a power of two")
    _check_relations(path, metadata, f"{arch}.")


def _count_tokens(path: pathlib.Path, tokens: Any) -> int:
    is_list = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    if not is_list or not tokens:
        raise _wrong(path, "tokenizer.ggml.tokens", tokens, "a list of at least one text")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens has the same token twice")
    return len(tokens)


def _is_right(field: Field, value: Any, num_layers: Any, num_tokens: int | None) -> bool:
    is_array = isinstance(value, list | np.ndarray)
    if not is_array:
        return field.shape in ("one", "layers", "switches") and field.holds(value)
    if field.shape == "list" and len(value) == 0:
        return True
    if field.shape == "one" or len(value) == 0 or not field.holds_all(value):
        return False
    if field.shape == "list":
        return True
    if field.shape == "tokens":
        return num_tokens is None or len(value) == num_tokens
    is_whole = len(value) == num_layers
    return is_whole and (field.shape == "switches" or bool((np.asarray(value) == value[0]).all()))


def _wrong(path: pathlib.Path, key: str, value: Any, asked: str) -> ValueError:
    shown = value if not isinstance(value, np.ndarray) else value[:8].tolist()
    size = f" ({len(value)} values)" if isinstance(value, list | np.ndarray) else ""
    return ValueError(f"{path}: {key[:255]} must be {asked}, got {reprlib.repr(shown)}{size}")


def _check_tokens(path: pathlib.Path, key: str, value: Any, num_tokens: int) -> None:
    if int(np.max(value, initial=0)) >= num_tokens:
        raise _wrong(path, key, value, f"tokens of the vocabulary, whose ids end at {num_tokens}")


def _check_relations(path: pathlib.Path, metadata: Mapping[str, Any], arch: str) -> None:
    """Raises ValueError for values that contradict each other."""
    heads = metadata.get(arch + "attention.head_count")
    width = metadata.get(arch + "embedding_length")
    if heads is not None:
        kv_heads = metadata.get(key := arch + "attention.head_count_kv", heads)
        if heads % kv_heads:
            raise _wrong(path, key, kv_heads, f"a divisor of attention.head_count ({heads})")
        head_width = metadata.get(arch + "attention.key_length")
        if head_width is None and width is not None and width % heads:
            key = arch + "attention.head_count"
            raise _wrong(path, key, heads, f"a divisor of embedding_length ({width})")
        if head_width is None and width is not None:
            head_width = width // heads
        if head_width is not None and head_width % 2:
            key = arch + "attention.key_length"
            raise _wrong(path, key, head_width, "even, for halves of a head rotate together")
        rotated = metadata.get(key := arch + "rope.dimension_count", head_width)
        if head_width is not None and (rotated % 2 or rotated > head_width):
            raise _wrong(
                path, key, rotated, f"an even number up to attention.key_length ({head_width})"
            )
    experts = metadata.get(arch + "expert_count", 0)
    used = metadata.get(key := arch + "expert_used_count", 1)
    if experts and not 0 < used <= experts:
        raise _wrong(path, key, used, f"an integer from 1 to expert_count ({experts})")


def check_sizes(
    path: pathlib.Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks the numbers of layers and tokens against the tensor table.

    Args:
      path: of the file, for messages.
      metadata: as `check_metadata` left them.
      shapes: of the tensors, by name; none: a file with a vocabulary only, which is not checked.

    Raises:
      ValueError: there are fewer layers or rows of the embedding than the metadata say.
    """
    arch = metadata.get("general.architecture")
    found = {match[1] for name in shapes if (match := _LAYER.match(name))}
    num_layers = metadata.get(key := f"{arch}.block_count")
    if shapes and num_layers is not None and num_layers > len(found):
        raise ValueError(
            f"{path}: {key} is {num_layers}, but the tensor table has {len(found)} layers"
        )
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        return
    if len(embedding) != 2:
        raise ValueError(f"{path}: token_embd.weight must have 2 dimensions, got {len(embedding)}")
    num_rows, width = embedding
    if metadata.get(key := f"{arch}.embedding_length", width) != width:
        raise ValueError(
            f"{path}: {key} is {metadata[key]}, but rows of token_embd.weight have {width}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    if len(tokens) > num_rows:
        raise ValueError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens)} tokens, but token_embd.weight only "
            f"{num_rows} rows"
        )
    for key, field in FIELDS.items():
        if field.is_token and key in metadata:
            _check_tokens(path, key, metadata[key], num_rows)
