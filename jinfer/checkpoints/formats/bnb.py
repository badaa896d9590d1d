"""bitsandbytes files: LLM.int8(), and NF4 or FP4 with plain or double scales.

8 bit   weight int8 [O, I], SCB f32 [O] (w = q SCB / 127), weight_format uint8 []
4 bit   weight uint8 [O I / 2, 1], codes of the flat [O, I], the first in the high nibble (the
        bytes may have another type, bnb_4bit_quant_storage)
        weight.absmax f32 [O I / 64]; weight.quant_map f32 [16]
        weight.quant_state.bitsandbytes__nf4: JSON with shape, blocksize, dtype, ...
double  weight.absmax uint8; weight.nested_absmax f32 [blocks of 256],
        weight.nested_quant_map f32 [256], nested_offset in the JSON
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jinfer.checkpoints.formats.interop import Dense, Sign, Tensors, Weight, check_scales
from jinfer.config.fields import require
from jinfer.config.quant_format import CHANNEL, CODEBOOKS, QFormat
from jinfer.linear.qtensor import DYNAMIC_MAP, DoubleScale, QTensor, from_codes
from jinfer.linear.quantized import OUTLIER_THRESHOLD

_STATE = "weight.quant_state.bitsandbytes__"
_MAP_ERROR = 1e-6


@dataclasses.dataclass(frozen=True)
class BNBReader:
    """A bitsandbytes checkpoint; `act` is QFormat.act of its 8-bit weights."""

    act: str | None
    leaves: tuple[str, ...] = (
        *("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map"),
        *("weight.nested_absmax", "weight.nested_quant_map", _STATE + "nf4", _STATE + "fp4"),
    )
    scales: tuple[tuple[str, Sign], ...] = (
        *(("SCB", "not negative"), ("weight.absmax", "not negative"), ("weight.quant_map", "any")),
        *(("weight.nested_absmax", "not negative"), ("weight.nested_quant_map", "any")),
    )

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> BNBReader:
        """Reads a `quantization_config`."""
        stated = config.get("llm_int8_threshold")
        threshold = OUTLIER_THRESHOLD if stated is None else float(stated)
        require(
            threshold in (0.0, OUTLIER_THRESHOLD),
            f"bitsandbytes llm_int8_threshold must be {OUTLIER_THRESHOLD} or 0, got {threshold}",
        )
        return cls("outlier" if threshold else "dyn")

    def shape(self, module: str, tensors: Tensors) -> tuple[int, int]:
        if "SCB" in tensors:
            num_outputs, num_inputs = tensors["weight"].shape
        else:
            num_outputs, num_inputs = _state(module, tensors)["shape"]
        return num_outputs, num_inputs

    def read(self, module: str, tensors: Tensors) -> Weight:
        if "SCB" in tensors:
            return self._read_int8(module, tensors)
        return _read_4bit(module, tensors)

    def _read_int8(self, module: str, tensors: Tensors) -> Weight:
        q, absmax = tensors["weight"], tensors["SCB"]
        kind = int(tensors.get("weight_format", np.zeros((), np.uint8)))
        require(kind == 0, f"{module}: weight_format {kind} is a GPU's tile order; expected 0")
        require(
            q.dtype == np.int8 and absmax.shape == (q.shape[0],),
            f"{module}: expected int8 [O, I] and SCB [O], got {q.dtype}{list(q.shape)} and "
            f"{list(absmax.shape)}",
        )
        scale = absmax.astype(np.float32)[None] / np.float32(127)
        fmt = QFormat(bits=8, group=CHANNEL, act=self.act)
        return from_codes(jnp.asarray(q.T), jnp.asarray(scale), None, fmt)


def _state(module: str, tensors: Tensors) -> dict[str, Any]:
    for kind in ("nf4", "fp4"):
        if _STATE + kind in tensors:
            try:
                state = json.loads(np.asarray(tensors[_STATE + kind]).tobytes())
            except ValueError as error:
                raise ValueError(f"{module}: its quant_state is not JSON ({error})") from error
            needed = {"shape", "blocksize"}
            if "weight.nested_absmax" in tensors:
                needed |= {"nested_blocksize", "nested_offset"}
            require(
                isinstance(state, dict)
                and state.get("quant_type") == kind
                and needed <= state.keys()
                and len(state["shape"]) == 2,
                f"{module}: quant_state {state} is not that of a {kind} matrix",
            )
            return state
    raise ValueError(f"{module} has 4-bit weights but no quant_state")


def _read_4bit(module: str, tensors: Tensors) -> Weight:
    state = _state(module, tensors)
    kind, (num_outputs, num_inputs) = state["quant_type"], state["shape"]
    block, absmax = int(state["blocksize"]), tensors["weight.absmax"]
    num_blocks = -(-num_outputs * num_inputs // block)
    require(
        absmax.shape == (num_blocks,),
        f"{module}: absmax must be [{num_blocks}], got {absmax.dtype}{list(absmax.shape)}"
        + (
            "; bitsandbytes on a CPU reorders it in the first forward pass: save before that"
            if absmax.ndim == 2
            else ""
        ),
    )
    # bnb_4bit_quant_storage may call the bytes bfloat16, say.
    raw = np.ascontiguousarray(tensors["weight"]).reshape(-1)
    packed = raw.view(np.uint8)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    unused = codes.size - num_outputs * num_inputs
    require(
        0 <= unused < 2 * raw.dtype.itemsize,  # more are another weight, a float one perhaps
        f"{module}: {codes.size} codes for a weight of {state['shape']}",
    )
    codes = codes[: num_outputs * num_inputs]

    double = None
    if "weight.nested_absmax" in tensors:
        absmax, double = _nested_scales(module, absmax, tensors, state)

    book = np.asarray(tensors["weight.quant_map"], np.float32)
    reason = None
    if num_inputs % block:
        reason = f"its blocks of {block} cross the ends of rows of {num_inputs}"
    elif np.abs(book - CODEBOOKS[kind]).max() > _MAP_ERROR:
        reason = f"its quant_map is not that of {kind}"
    if reason is not None:
        values = book[codes] * np.repeat(absmax.astype(np.float32), block)[: codes.size]
        return Dense(values.reshape(num_outputs, num_inputs).T, reason, 4)

    def by_group(flat: np.ndarray) -> jnp.ndarray:
        return jnp.asarray(np.ascontiguousarray(flat.reshape(num_outputs, -1).T))

    fmt = QFormat(bits=4, kind=kind, group=block, double_quant=double is not None)
    stored: jnp.ndarray | DoubleScale = by_group(absmax.astype(np.float32))
    if double is not None:
        stored = DoubleScale(by_group(double[0]), jnp.asarray(double[1]), jnp.asarray(double[2]))
    values = jnp.asarray(np.ascontiguousarray(codes.reshape(num_outputs, num_inputs).T))
    return from_codes(values.astype(jnp.int8), stored, None, fmt)


def _nested_scales(
    module: str, codes: np.ndarray, tensors: Tensors, state: Mapping[str, Any]
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray] | None]:
    """Flat f32 scales, and (codes, absmax, offset) if DoubleScale has the same map and blocks."""
    table = np.asarray(tensors["weight.nested_quant_map"], np.float32)
    absmax = np.asarray(tensors["weight.nested_absmax"], np.float32)
    inner, offset = int(state["nested_blocksize"]), np.float32(state["nested_offset"])
    check_scales(module, {"nested_offset": np.asarray(offset)}, [("nested_offset", "any")])
    scale = table[codes] * np.repeat(absmax, inner)[: codes.size] + offset
    is_ours = inner == 256 and np.abs(table - DYNAMIC_MAP).max() <= _MAP_ERROR
    return scale, (codes, absmax, np.asarray(offset)) if is_ours else None


def write_bnb(x: QTensor, *, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Returns one module's tensors: nf4 or fp4 (plain or double scales), or int8 by channel.

    Args:
      x: the weight.
      dtype: what bitsandbytes is to dequantize 4-bit weights to.

    Raises:
      ValueError: another format, or inputs that are no multiple of the group.
    """
    fmt = x.fmt
    require(x.ndim == 2, f"bitsandbytes holds weights [I, O] one by one, got {list(x.shape)}")
    num_inputs, num_outputs = x.shape
    if fmt.kind == "int":
        require(
            fmt.bits == 8 and fmt.group == CHANNEL and fmt.symmetric and x.perm is None,
            f"bitsandbytes holds int8-channel, nf4 and fp4, got {fmt}",
        )
        require(
            fmt.act in ("outlier", "dyn"),
            f"bitsandbytes quantizes the inputs of 8-bit weights, use int8-channel:outlier or "
            f"int8-channel:dyn, got {fmt}",
        )
        return {
            "weight": np.ascontiguousarray(np.asarray(x.q).T),
            "SCB": np.asarray(x.scales())[0] * np.float32(127),
            "weight_format": np.zeros((), np.uint8),
        }
    require(
        fmt.kind in CODEBOOKS and fmt.group > 0 and fmt.block == 1 and num_inputs % fmt.group == 0,
        f"bitsandbytes holds {fmt} only of inputs in whole groups, got {num_inputs}",
    )
    codes = np.asarray(x.codes(), np.uint8).T.reshape(-1, 2)
    state: dict[str, Any] = {
        "quant_type": fmt.kind,
        "blocksize": fmt.group,
        "dtype": dtype,
        "shape": [num_outputs, num_inputs],
    }
    out = {
        "weight": (codes[:, 0] << 4 | codes[:, 1])[:, None],
        "weight.quant_map": CODEBOOKS[fmt.kind],
    }
    if isinstance(x.scale, DoubleScale):
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": float(x.scale.offset),
        }
        out["weight.absmax"] = np.asarray(x.scale.codes).T.reshape(-1)
        out["weight.nested_absmax"] = np.asarray(x.scale.absmax)
        out["weight.nested_quant_map"] = DYNAMIC_MAP
    else:
        out["weight.absmax"] = np.asarray(x.scales()).T.reshape(-1)
    out[_STATE + fmt.kind] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return out


def bnb_config(
    weights: Mapping[str, QTensor], *, skipped: tuple[str, ...] = ("lm_head",)
) -> dict[str, Any]:
    """Returns the `quantization_config`; all weights must have one format.

    Raises:
      ValueError: the formats differ.
    """
    formats = {x.fmt for x in weights.values()}
    require(
        len(formats) == 1, f"a bitsandbytes file has one format, got {sorted(map(str, formats))}"
    )
    fmt = formats.pop()
    is_int8 = fmt.kind == "int"
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": is_int8,
        "load_in_4bit": not is_int8,
        "llm_int8_threshold": OUTLIER_THRESHOLD if fmt.act == "outlier" else 0.0,
        "llm_int8_skip_modules": list(skipped),
        "bnb_4bit_quant_type": "fp4" if is_int8 else fmt.kind,
        "bnb_4bit_use_double_quant": fmt.double_quant,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
