"""compressed-tensors files, as llm-compressor writes and vLLM reads them.

    pack-quantized   weight_packed int32 [O, ceil(I * b / 32)] inputs packed, code + 2^(b-1);
                     weight_scale [O, G]; weight_shape [O, I]; asymmetric: weight_zero_point int32
                     [ceil(O * b / 32), G]; act-order of old: weight_g_idx [I]
    int-quantized    weight int8 [O, I] (also for 4 bits), weight_scale [O, 1] or [1]
    float-quantized  weight e4m3 [O, I], weight_scale [1], [O, 1] or [ceil(O/128), ceil(I/128)]
    all              static inputs: input_scale [1]; KV cache: self_attn.k_scale, v_scale [1]

Before 0.18 widths that do not divide 32 were padded to whole codes a word: `bitpack`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jinfer.checkpoints.formats.bitpack import pack_words, unpack_padded_words, unpack_words
from jinfer.checkpoints.formats.interop import (
    Dense,
    Sign,
    Tensors,
    Weight,
    check_dtype,
    check_scales,
    check_writable,
    make_qtensor,
    matches,
    sort_groups,
    unsigned_parts,
)
from jinfer.config.fields import require
from jinfer.config.quant_format import CHANNEL, TENSOR, QFormat
from jinfer.linear.grids import expand_groups
from jinfer.linear.qtensor import QTensor, dequantize, from_codes

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
RESTRICTED = {"grid": "restricted"}
DENSE_SINCE = (0, 18)  # version whose 3, 5, 6 and 7-bit streams are dense


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One of the config's groups: which modules, and how their weights and inputs are kept."""

    targets: tuple[str, ...]
    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class CTReader:
    """A compressed-tensors checkpoint."""

    schemes: tuple[Scheme, ...]
    is_dense_stream: bool
    leaves: tuple[str, ...] = (
        *("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point"),
        *("weight_g_idx", "input_scale", "input_zero_point"),
    )
    scales: tuple[tuple[str, Sign], ...] = (("weight_scale", "any"),)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> CTReader:
        """Reads a `quantization_config`."""
        transforms = (config.get("transform_config") or {}).get("config_groups")
        require(
            not transforms,
            "compressed-tensors with a transform_config (online rotations) is not supported",
        )
        sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
        require(sparsity == "dense", f"compressed-tensors sparsity {sparsity!r} is not supported")
        schemes = []
        for group in (config.get("config_groups") or {}).values():
            name = str(group.get("format") or config.get("format"))
            require(
                name in FORMATS,
                f"compressed-tensors format {name!r} is not supported; supported: "
                f"{', '.join(FORMATS)}",
            )
            scheme = Scheme(
                tuple(group.get("targets") or ("Linear",)),
                name,
                group.get("weights") or {},
                group.get("input_activations"),
            )
            for target in scheme.targets:
                re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
            if scheme.weights or "weights" not in group:  # else of attention: see `kv_scales`
                schemes.append(scheme)
        require(bool(schemes), "compressed-tensors config has no config_groups")
        version = str(config.get("version") or "0.18").split(".")[:2]
        numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version)
        return cls(tuple(schemes), numbers >= DENSE_SINCE)

    def scheme(self, module: str) -> Scheme:
        """The group whose target fits `module` best: by name before by class."""
        named = [s for s in self.schemes if any(matches(t, module, "") for t in s.targets)]
        fitting = named or [s for s in self.schemes if any(matches(t, module) for t in s.targets)]
        require(bool(fitting), f"no config group of this checkpoint targets {module}")
        return fitting[0]

    def shape(self, module: str, tensors: Tensors) -> tuple[int, int]:
        if "weight" in tensors:
            num_outputs, num_inputs = tensors["weight"].shape
        else:
            require("weight_shape" in tensors, f"{module} has no weight_shape")
            num_outputs, num_inputs = (int(n) for n in tensors["weight_shape"])
        return num_outputs, num_inputs

    def read(self, module: str, tensors: Tensors) -> Weight:
        scheme = self.scheme(module)
        bits = scheme.weights.get("num_bits")
        require(isinstance(bits, int), f"{module}: its config group has num_bits {bits!r}")
        require("weight_scale" in tensors, f"{module} has no weight_scale")
        if scheme.weights.get("type", "int") == "float":
            return _read_float(module, tensors, scheme)
        if "weight_packed" in tensors:
            return self._read_packed(module, tensors, scheme)
        return _read_int(module, tensors, scheme)

    def _read_packed(self, module: str, tensors: Tensors, scheme: Scheme) -> Weight:
        packed, scale = tensors["weight_packed"], _by_group(tensors["weight_scale"])
        num_outputs, num_inputs = self.shape(module, tensors)
        bits = int(scheme.weights["num_bits"])
        require(2 <= bits <= 8, f"{module}: {bits} bits are not supported; supported: 2 to 8")
        check_dtype(module, "weight_packed", packed, np.int32)
        fmt = _format(module, scheme, scale, num_inputs)

        def unpack(words: np.ndarray, count: int) -> np.ndarray:
            dense, padded = -(-count * bits // 32), -(-count // (32 // bits))
            width = words.shape[-1]
            require(
                width in (dense, padded),
                f"{module}: {count} codes of {bits} bits make {dense} words, got {width}",
            )
            is_dense = width == dense and (dense != padded or self.is_dense_stream)
            return (unpack_words if is_dense else unpack_padded_words)(words, bits, count)

        unsigned = unpack(packed, num_inputs).T
        zero = tensors.get("weight_zero_point")
        if zero is not None:
            zero = unpack(np.ascontiguousarray(zero.T), num_outputs)
        group = fmt.group_size(num_inputs)
        perm, reason = sort_groups(module, tensors.get("weight_g_idx"), num_inputs, group)
        if reason is not None:
            g_idx = tensors["weight_g_idx"]
            offset = 2 ** (bits - 1) if zero is None else zero[g_idx].astype(np.float32)
            return Dense((unsigned - offset) * scale[g_idx].astype(np.float32), reason, bits)
        unsigned = unsigned if perm is None else unsigned[perm]
        return _make(module, unsigned, scale, zero, fmt, tensors, perm=perm)


def _by_group(scale: np.ndarray) -> np.ndarray:
    """[O, G], [O] or [1] of the file -> [G, O] or [1, 1]."""
    if scale.size == 1:
        return scale.reshape(1, 1)
    return np.ascontiguousarray((scale[:, None] if scale.ndim == 1 else scale).T)


def _format(module: str, scheme: Scheme, scale: np.ndarray, num_inputs: int) -> QFormat:
    """The QFormat of an integer scheme, with the scales' shape as witness."""
    weights, bits = scheme.weights, int(scheme.weights["num_bits"])
    group = weights.get("group_size")
    if scale.shape == (1, 1) and weights.get("strategy") == "tensor":
        group = TENSOR
    elif not group or group < 0 or (scale.shape[0] == 1 and group < num_inputs):
        group = CHANNEL
    num_groups = -(-num_inputs // group) if group > 0 else 1
    require(
        scale.shape[0] == num_groups,
        f"{module}: {num_inputs} inputs in groups of {group} need {num_groups} scales an output, "
        f"got {scale.shape[0]}",
    )
    return QFormat(bits=bits, group=group, act=_act(module, scheme))


def _act(module: str, scheme: Scheme) -> str | None:
    """What `input_activations` asks for, as QFormat.act.

    compressed-tensors' integer grid is the full one (amax / 127.5); `RESTRICTED` among the
    observer's arguments is our own note of the other (amax / 127), which other readers pass over. A
    dynamic scale for the whole tensor becomes one for each token: finer, and independent of batch
    mates.
    """
    inputs = scheme.inputs
    if inputs is None or scheme.format == "naive-quantized":
        return None
    kind = inputs.get("type", "int")
    require(
        kind == scheme.weights.get("type", "int") and inputs.get("num_bits", 8) == 8,
        f"{module}: {inputs.get('num_bits')}-bit {kind} inputs with such weights are not supported",
    )
    require(inputs.get("symmetric", True), f"{module}: asymmetric inputs are not supported")
    if not inputs.get("dynamic"):
        return "static"
    is_restricted = (inputs.get("observer_kwargs") or {}).items() >= RESTRICTED.items()
    return "dyn-full" if kind == "int" and not is_restricted else "dyn"


def _read_int(module: str, tensors: Tensors, scheme: Scheme) -> Weight:
    """int8 [O, I], one code a byte."""
    check_dtype(module, "weight", tensors["weight"], np.int8)
    codes, scale = tensors["weight"].T, _by_group(tensors["weight_scale"])
    fmt = _format(module, scheme, scale, codes.shape[0])
    least, most = fmt.code_range
    require(
        codes.min() >= least and codes.max() <= most,
        f"{module}: {fmt.bits}-bit codes must lie in {least}..{most}, "
        f"got {codes.min()}..{codes.max()}",
    )
    unsigned = (codes.astype(np.int16) - least).astype(np.uint8)
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        zero = _by_group(zero).astype(np.int16) - least
    return _make(module, unsigned, scale, zero, fmt, tensors)


def _make(
    module: str,
    unsigned: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    fmt: QFormat,
    tensors: Tensors,
    *,
    perm: np.ndarray | None = None,
) -> Weight:
    """A QTensor; with zero points and quantized inputs, which no QTensor has, their floats."""
    act_scale = _static(module, tensors, fmt)
    if zero is None or fmt.act is None or np.all(zero == 2 ** (fmt.bits - 1)):
        return make_qtensor(unsigned, scale, zero, fmt, act_scale=act_scale, perm=perm)
    plain = dataclasses.replace(fmt, act=None)
    values = np.asarray(dequantize(make_qtensor(unsigned, scale, zero, plain, perm=perm)))
    return Dense(values, "asymmetric weights with quantized inputs run in float", fmt.bits)


def _static(module: str, tensors: Tensors, fmt: QFormat) -> np.ndarray | None:
    if fmt.act != "static":
        return None
    scale = tensors.get("input_scale")
    require(
        scale is not None and scale.size == 1,
        f"{module}: its config says that the scale of its inputs is static: it needs an "
        f"input_scale of one number, got {'none' if scale is None else list(scale.shape)}",
    )
    assert scale is not None
    check_scales(module, tensors, [("input_scale", "positive")])
    return scale.astype(np.float32)


def _read_float(module: str, tensors: Tensors, scheme: Scheme) -> Weight:
    """e4m3 [O, I] with tensor, channel or block scales."""
    q, scale = tensors["weight"], tensors["weight_scale"]
    require(
        q.dtype == jnp.float8_e4m3fn,
        f"{module}: float weights must be F8_E4M3, got {q.dtype}",
    )
    check_scales(module, tensors, [("weight_scale", "not negative")])
    return read_fp8(module, q, scale, act=_act(module, scheme), tensors=tensors)


def read_fp8(
    module: str, q: np.ndarray, scale: np.ndarray, *, act: str | None, tensors: Tensors
) -> QTensor:
    """fp8 [O, I] and multipliers of any of the three shapes -> QTensor."""
    num_outputs, num_inputs = q.shape
    kind = "fp8-e4m3" if q.dtype == jnp.float8_e4m3fn else "fp8-e5m2"
    blocks = (-(-num_outputs // 128), -(-num_inputs // 128))
    if scale.size == 1 and blocks != (1, 1):
        fmt, scale = QFormat(8, kind, TENSOR, act=act), scale.reshape(1, 1)
    elif scale.shape in ((num_outputs, 1), (num_outputs,)):
        fmt, scale = QFormat(8, kind, CHANNEL, act=act), scale.reshape(1, num_outputs)
    elif scale.shape == blocks:
        fmt, scale = QFormat(8, kind, 128, act=act, block=128), scale.T
    elif scale.size == 1:
        fmt, scale = QFormat(8, kind, TENSOR, act=act), scale.reshape(1, 1)
    else:
        raise ValueError(
            f"{module}: scales of fp8 [{num_outputs}, {num_inputs}] must be one, one an output or "
            f"{list(blocks)} for blocks of 128, got {list(scale.shape)}"
        )
    _check_fp8_scales(module, q, scale, fmt)
    act_scale = _static(module, tensors, fmt)
    return from_codes(
        jnp.asarray(np.ascontiguousarray(q.T)),
        jnp.asarray(np.ascontiguousarray(scale)),
        None,
        fmt,
        act_scale=None if act_scale is None else jnp.asarray(act_scale).reshape(()),
    )


def _check_fp8_scales(module: str, q: np.ndarray, scale: np.ndarray, fmt: QFormat) -> None:
    """Raises ValueError if codes with a scale of zero are not zero."""
    if np.all(scale > 0):
        return
    is_zero = (q.T.view(np.uint8) & 0x7F) == 0  # +0 and -0, [I, O]
    rows = np.asarray(expand_groups(jnp.asarray(scale, jnp.float32), fmt, *is_zero.shape))
    require(
        bool(np.all(is_zero | (rows > 0))),
        f"{module}: a scale of fp8 is 0, but its codes are not: the file is damaged, make it again",
    )


def write_ct(x: QTensor) -> dict[str, np.ndarray]:
    """Returns one module's tensors: packed integers, int8 with quantized inputs, or fp8.

    Raises:
      ValueError: a kind or a permutation that the format has no place for.
    """
    require(x.ndim == 2, f"compressed-tensors holds weights [I, O], got {list(x.shape)}")
    fmt, (num_inputs, num_outputs) = x.fmt, x.shape
    scale = np.asarray(x.scale)
    out: dict[str, np.ndarray] = {}
    if fmt.act == "static":
        out["input_scale"] = np.asarray(x.act_scale, np.float32).reshape(1)
    if fmt.kind == "fp8-e4m3":
        require(
            fmt.block == 128 or (fmt.block == 1 and fmt.num_groups(num_inputs) == 1),
            f"compressed-tensors holds fp8 by tensor, channel or 128 x 128 blocks, got {fmt}",
        )
        layout = scale.reshape(1) if fmt.group == TENSOR else np.ascontiguousarray(scale.T)
        return out | {"weight": np.ascontiguousarray(np.asarray(x.q).T), "weight_scale": layout}
    check_writable(x, "compressed-tensors", tuple(range(2, 9)), has_groups=False)
    require(fmt.block == 1, f"compressed-tensors holds no blocks of integers, got {fmt}")
    require(
        fmt.symmetric or fmt.group != TENSOR,
        f"compressed-tensors holds no zero point of a whole tensor, got {fmt}",
    )
    require(
        x.perm is None,
        "compressed-tensors has no g_idx any more: quantize with static groups or group order",
    )
    require(fmt.act != "outlier", "compressed-tensors has no outlier inputs: use int8-channel:dyn")
    codes, _, zero = unsigned_parts(x)
    out["weight_scale"] = scale.reshape(1) if fmt.group == TENSOR else np.ascontiguousarray(scale.T)
    if fmt.act is not None:
        out["weight"] = np.ascontiguousarray(np.asarray(x.codes()).T)
        return out
    out["weight_packed"] = pack_words(codes.T, fmt.bits)
    out["weight_shape"] = np.array([num_outputs, num_inputs], np.int64)
    if not fmt.symmetric:
        out["weight_zero_point"] = np.ascontiguousarray(pack_words(zero, fmt.bits).T)
    return out


def ct_config(
    weights: Mapping[str, QTensor],
    *,
    skipped: tuple[str, ...] = ("lm_head",),
) -> dict[str, Any]:
    """Returns the `quantization_config` for modules and their weights; one group a format.

    Args:
      weights: quantized modules.
      skipped: linears that stay in float.
    """
    by_format: dict[QFormat, list[str]] = {}
    for module, x in weights.items():
        by_format.setdefault(x.fmt, []).append(module)
    groups = {}
    for i, (fmt, modules) in enumerate(by_format.items()):
        is_only = len(by_format) == 1
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if is_only else sorted(modules),
            **_scheme_of(fmt),
            "output_activations": None,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(skipped),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": "0.19.0",
    }


def _scheme_of(fmt: QFormat) -> dict[str, Any]:
    is_float = fmt.kind == "fp8-e4m3"
    strategy = "group" if fmt.group > 0 else "channel" if fmt.group == CHANNEL else "tensor"
    weights: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "float" if is_float else "int",
        "symmetric": fmt.symmetric,
        "strategy": "block" if fmt.block > 1 else strategy,
        "group_size": fmt.group if fmt.group > 0 and fmt.block == 1 else None,
        "block_structure": [fmt.block, fmt.block] if fmt.block > 1 else None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    inputs: dict[str, Any] | None = None
    if fmt.act is not None:
        is_static = fmt.act == "static"
        inputs = {
            "num_bits": 8,
            "type": weights["type"],
            "symmetric": True,
            "strategy": "tensor" if is_static else "group" if fmt.block > 1 else "token",
            "group_size": fmt.block if fmt.block > 1 else None,
            "dynamic": not is_static,
            "observer": None if not is_static else "minmax",
            "observer_kwargs": dict(RESTRICTED) if fmt.act == "dyn" and not is_float else {},
        }
    layout = "float-quantized" if is_float else "pack-quantized"
    if inputs is not None and not is_float:
        layout = "int-quantized"
    return {"format": layout, "weights": weights, "input_activations": inputs}
