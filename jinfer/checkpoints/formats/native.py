"""jinfer's own quantized file format, for any QTensor, in a Hugging Face folder of safetensors.

    P.qcodes  uint8 [ceil(I * b / 8), O], a little-endian bit stream along I of codes + 2^(b-1)
              (codebook indices as they are); fp8 codes as they are, [I, O]
    P.qshape  int64 [2], I and O
    P.qscale, and where there are any P.qzero, P.act_scale, P.perm
    double scales: P.qscale uint8, P.qscale_absmax, P.qscale_offset

The config names the format of every module: {"quant_method": "jinfer", "formats": {module: text}}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jinfer.checkpoints.formats.interop import Sign, Tensors, Weight, check_dtype
from jinfer.config.fields import require
from jinfer.config.quant_format import CODEBOOKS, QFormat
from jinfer.linear.grids import FP8_DTYPES
from jinfer.linear.qtensor import DoubleScale, QTensor, from_codes, pack_bits, unpack_bits


@dataclasses.dataclass(frozen=True)
class NativeReader:
    """A checkpoint of our own; `formats` by module."""

    formats: Mapping[str, str]
    leaves: tuple[str, ...] = (
        *("qcodes", "qshape", "qscale", "qzero", "act_scale", "perm"),
        *("qscale_absmax", "qscale_offset"),
    )
    scales: tuple[tuple[str, Sign], ...] = (
        *(("qscale", "any"), ("qzero", "any"), ("act_scale", "positive")),
        *(("qscale_absmax", "not negative"), ("qscale_offset", "any")),
    )

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> NativeReader:
        """Reads a `quantization_config`."""
        formats = config.get("formats")
        if not isinstance(formats, Mapping) or not all(
            isinstance(f, str) for f in formats.values()
        ):
            raise ValueError("the config of a jinfer checkpoint must list its formats")
        return cls(formats)

    def shape(self, module: str, tensors: Tensors) -> tuple[int, int]:
        stored = tensors["qshape"]
        is_shape = stored.shape == (2,) and stored.dtype.kind in "iu" and np.all(stored > 0)
        require(bool(is_shape), f"{module}: qshape must be two sizes, got {stored!r}")
        num_inputs, num_outputs = (int(n) for n in stored)
        return num_outputs, num_inputs

    def read(self, module: str, tensors: Tensors) -> Weight:
        require(module in self.formats, f"the config names no format for {module}")
        fmt = QFormat.parse(self.formats[module])
        missing = {"qcodes", "qshape", "qscale"} - tensors.keys()
        require(not missing, f"{module} lacks {sorted(missing)}")
        num_outputs, num_inputs = self.shape(module, tensors)
        check_dtype(module, "qcodes", tensors["qcodes"], FP8_DTYPES.get(fmt.kind, jnp.uint8))
        codes = jnp.asarray(tensors["qcodes"])
        if fmt.kind not in FP8_DTYPES:
            rows = -(-num_inputs * fmt.bits // 8)
            require(
                codes.shape == (rows, num_outputs),
                f"{module}: {fmt} of [{num_inputs}, {num_outputs}] takes qcodes "
                f"[{rows}, {num_outputs}], got {list(codes.shape)}",
            )
            middle = 0 if fmt.kind in CODEBOOKS else 2 ** (fmt.bits - 1)
            unsigned = unpack_bits(codes, fmt.bits, num_inputs).astype(jnp.int16)
            codes = (unsigned - jnp.int16(middle)).astype(jnp.int8)

        def array(name: str) -> Any:
            return jnp.asarray(tensors[name]) if name in tensors else None

        scale = array("qscale")
        if fmt.double_quant:
            scale = DoubleScale(scale, array("qscale_absmax"), array("qscale_offset"))
        return from_codes(
            codes, scale, array("qzero"), fmt, act_scale=array("act_scale"), perm=array("perm")
        )


def write_native(x: QTensor) -> dict[str, np.ndarray]:
    """Returns one module's tensors.

    Raises:
      ValueError: a stack of weights: write them one by one.
    """
    require(x.ndim == 2, f"weights are written one by one, got {list(x.shape)}")
    fmt, codes = x.fmt, x.codes()
    if fmt.kind not in FP8_DTYPES:
        middle = 0 if fmt.kind in CODEBOOKS else 2 ** (fmt.bits - 1)
        codes = pack_bits((codes.astype(jnp.int16) + jnp.int16(middle)).astype(jnp.uint8), fmt.bits)
    zero = x.zero
    if zero is not None and not fmt.float_zero:
        zero = zero.astype(jnp.int8)
    arrays: dict[str, Any] = {"qcodes": codes, "qscale": x.scale, "qzero": zero}
    arrays |= {"act_scale": x.act_scale, "perm": x.perm}
    if isinstance(x.scale, DoubleScale):
        arrays |= {"qscale": x.scale.codes, "qscale_absmax": x.scale.absmax}
        arrays["qscale_offset"] = x.scale.offset
    out = {name: np.asarray(a) for name, a in arrays.items() if a is not None}
    return out | {"qshape": np.array(x.shape, np.int64)}


def native_config(
    weights: Mapping[str, QTensor], *, skipped: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Returns the `quantization_config`; it lists what is quantized, not what is `skipped`."""
    return {"quant_method": "jinfer", "formats": {m: str(x.fmt) for m, x in weights.items()}}
