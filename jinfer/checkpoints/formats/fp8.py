"""fp8 files outside compressed-tensors: Hugging Face's and vLLM's "fp8", and GPTQModel's.

weight e4m3 [O, I] with one of
weight_scale      f32 [] or [1]: a multiplier; static inputs: input_scale (activation_scale)
weight_scale_inv  f32 [ceil(O/128), ceil(I/128)]: despite its name a multiplier (DeepSeek,
                  Qwen); but 448 / amax, a true inverse, in GPTQModel's files, whose config says
                  weight_scale_semantics "inverse"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jinfer.checkpoints.formats.compressed_tensors import read_fp8
from jinfer.checkpoints.formats.interop import Sign, Tensors, Weight, check_scales
from jinfer.config.fields import require
from jinfer.config.quant_format import TENSOR
from jinfer.linear.qtensor import QTensor

LARGEST_WEIGHT = 100.0  # a larger weight means that a scale was read as its inverse


@dataclasses.dataclass(frozen=True)
class FP8Reader:
    """An "fp8" checkpoint.

    Attributes:
      act: QFormat.act of every weight.
      is_inverse: stored scales divide.
    """

    act: str | None
    is_inverse: bool
    leaves: tuple[str, ...] = (
        *("weight", "weight_scale", "weight_scale_inv", "input_scale", "activation_scale"),
    )
    scales: tuple[tuple[str, Sign], ...] = (
        *(("weight_scale", "not negative"), ("weight_scale_inv", "not negative")),
    )

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> FP8Reader:
        """Reads a `quantization_config`."""
        block = config.get("weight_block_size")
        require(
            block is None or list(block) == [128, 128],
            f"fp8 weight_block_size must be [128, 128], got {block}",
        )
        kind = config.get("fmt") or config.get("format") or "e4m3"
        require(
            str(kind).removeprefix("float8_").removesuffix("fn") == "e4m3",
            f"fp8 format {kind!r} is not supported; supported: e4m3",
        )
        scheme = config.get("activation_scheme")
        require(
            scheme in (None, "dynamic", "static"),
            f"fp8 activation_scheme must be dynamic or static, got {scheme!r}",
        )
        act = {None: None, "dynamic": "dyn", "static": "static"}[scheme]
        is_inverse = (
            config.get("weight_scale_semantics") == "inverse"
            or config.get("weight_scale_method") is not None
        )
        return cls(act, is_inverse)

    def shape(self, module: str, tensors: Tensors) -> tuple[int, int]:
        num_outputs, num_inputs = tensors["weight"].shape
        return num_outputs, num_inputs

    def read(self, module: str, tensors: Tensors) -> Weight:
        q = tensors["weight"]
        require(q.dtype == jnp.float8_e4m3fn, f"{module}: expected F8_E4M3, got {q.dtype}")
        names = [n for n in ("weight_scale", "weight_scale_inv") if n in tensors]
        require(len(names) == 1, f"{module} must have weight_scale or weight_scale_inv")
        scale = tensors[names[0]].astype(np.float32)
        other = " / " if self.is_inverse else " * "
        if self.is_inverse:
            check_scales(module, {names[0]: scale}, [(names[0], "positive")])
            scale = np.float32(1) / scale
        inputs = dict(tensors)
        if "activation_scale" in inputs:
            inputs.setdefault("input_scale", inputs["activation_scale"])
        x = read_fp8(module, q, scale, act=self.act, tensors=inputs)
        peak = float(np.abs(q.astype(np.float32)).max()) * float(scale.max())
        require(
            peak <= LARGEST_WEIGHT,
            f"{module}: as weight{other}{names[0]} weights reach {peak:.3g}: the scale seems to "
            f"be the inverse of what quantization_config says (weight_scale_semantics)",
        )
        return x


def write_fp8(x: QTensor) -> dict[str, np.ndarray]:
    """Returns `weight` and `weight_scale` (tensor) or `weight_scale_inv` (blocks of 128).

    Raises:
      ValueError: another format.
    """
    is_block = x.fmt.block == 128
    require(
        x.fmt.kind == "fp8-e4m3" and x.ndim == 2 and (is_block or x.fmt.group == TENSOR),
        f"an fp8 file holds fp8-e4m3-tensor or fp8-e4m3-block128, got {x.fmt}; "
        "compressed-tensors holds channel scales",
    )
    require(
        x.fmt.act is not None,
        f"an fp8 file quantizes the inputs: use {x.fmt}:dyn, got {x.fmt}; compressed-tensors holds "
        "weights alone",
    )
    out = {"weight": np.ascontiguousarray(np.asarray(x.q).T)}
    scale = np.asarray(x.scale, np.float32)
    if is_block:
        return out | {"weight_scale_inv": np.ascontiguousarray(scale.T)}
    if x.act_scale is not None:
        out["input_scale"] = np.asarray(x.act_scale, np.float32).reshape(())
    return out | {"weight_scale": scale.reshape(())}


def fp8_config(
    weights: Mapping[str, QTensor], *, skipped: tuple[str, ...] = ("lm_head",)
) -> dict[str, Any]:
    """Returns the `quantization_config`; all weights must have one format.

    Raises:
      ValueError: the formats differ.
    """
    formats = {x.fmt for x in weights.values()}
    require(len(formats) == 1, f"an fp8 file has one format, got {sorted(map(str, formats))}")
    fmt = formats.pop()
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "static" if fmt.act == "static" else "dynamic",
        "modules_to_not_convert": list(skipped),
    }
    return config | ({"fmt": "e4m3", "weight_block_size": [128, 128]} if fmt.block > 1 else {})
