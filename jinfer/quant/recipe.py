"""Assigns a quantization method to each linear: presets by name, rules by pattern.

Modules are named as the params tree names them: "layers.3.mlp.down".
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from jinfer.config.fields import one_line, require, shown
from jinfer.config.quant_format import QFormat

FOLDS = ("none", "awq", "smoothquant")
SOLVERS = ("rtn", "gptq", "hqq")
ORDERS = ("none", "act", "group")
SCALES = ("extremes", "mse", "hessian")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How one linear is quantized.

    Attributes:
      name: for the report.
      format: the target.
      fold: scales that are folded into the producer of the inputs first.
      solver: how codes are found.
      scales: how ranges are chosen: "extremes"; "mse", a search (rtn, gptq); "hessian", a search
        with GPTQ's weights of errors (gptq only).
      grid: symmetric integer grid, see `qformat.find_scales`.
      order, static_groups, damp: GPTQ's.
      correct: how far GPTQ first moves weights to compensate for quantized inputs, 0 .. 1; see
        `correction`.
      alpha: SmoothQuant's.
      clip: AWQ's clip search.
      scale_dtype: storage of scales.
    """

    name: str
    format: QFormat
    fold: str = "none"
    solver: str = "rtn"
    scales: str = "extremes"
    grid: str = "full"
    order: str = "act"
    static_groups: bool = True
    damp: float = 0.01
    correct: float = 0.0
    alpha: float = 0.5
    clip: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("fold", FOLDS),
            ("solver", SOLVERS),
            ("order", ORDERS),
            ("scales", SCALES),
            ("grid", ("full", "restricted")),
            ("scale_dtype", ("float16", "bfloat16", "float32")),
        ):
            value = getattr(self, field)
            is_known = isinstance(value, str) and value in allowed
            require(is_known, f"{field} must be one of {allowed}, got {value!r}")
        for field in ("damp", "correct", "alpha"):
            value = getattr(self, field)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            is_number = is_number and value == value
            require(is_number, f"{field} must be a number, got {value!r}")
        for field in ("static_groups", "clip"):
            value = getattr(self, field)
            require(isinstance(value, bool), f"{field} must be true or false, got {value!r}")
        require(self.damp > 0, f"damp must be positive, got {self.damp}")
        require(0 <= self.alpha <= 1, f"alpha must lie in 0 .. 1, got {self.alpha}")
        require(0 <= self.correct <= 1, f"correct must lie in 0 .. 1, got {self.correct}")
        require(
            not self.correct or (self.solver == "gptq" and self.fold == "none"),
            "correct is an option of gptq, without folds",
        )
        fmt = self.format
        require(
            self.solver != "hqq" or (fmt.kind == "int" and not fmt.symmetric),
            f"hqq takes an asymmetric integer format such as int4-g64-asymf, got {fmt}",
        )
        has_groups = fmt.block == 1 and fmt.group != 0
        require(
            self.solver != "gptq" or (has_groups and not fmt.float_zero and not fmt.double_quant),
            f"gptq takes scales by group or channel and integer zero points, got {fmt}",
        )
        require(
            self.fold != "awq" or (has_groups and fmt.act is None),
            f"awq takes weight-only formats with scales by group or channel, got {fmt}",
        )
        require(
            self.scales != "hessian" or self.solver == "gptq",
            "scales=hessian is an option of gptq: other methods have no Hessian; use mse",
        )
        require(
            self.scales == "extremes" or self.solver != "hqq",
            f"hqq finds its own scales; scales={self.scales} is for rtn and gptq",
        )
        require(
            self.scales == "extremes" or not fmt.double_quant,
            f"scales={self.scales} searches, which excludes double scales, {fmt}",
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether text must be run through the model."""
        return self.solver == "gptq" or self.fold != "none" or self.format.act == "static"


_PRESETS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("int4-g64", {}),
    "gptq": ("int4-g64", {"solver": "gptq", "scales": "hessian"}),
    "awq": ("int4-g64-asym", {"fold": "awq"}),
    "smoothquant": (
        "int8-channel:dyn",
        {"fold": "smoothquant", "grid": "restricted", "scale_dtype": "float32"},
    ),
    "fp8": ("fp8-e4m3-channel:dyn", {"scale_dtype": "float32"}),
    "int8": ("int8-channel:outlier", {"grid": "restricted", "scale_dtype": "float32"}),
    "nf4": ("nf4-g64", {"scale_dtype": "float32"}),
    "hqq": ("int4-g64-asymf", {"solver": "hqq"}),
}
METHODS = tuple(_PRESETS)
# Options that mean nothing without a solver or fold.
_OWNERS = {
    **dict.fromkeys(("order", "static_groups", "damp"), ("solver", "gptq")),
    **{"alpha": ("fold", "smoothquant"), "clip": ("fold", "awq")},
}
# Kinds that a method's name promises.
_KINDS = {"fp8": ("fp8-e4m3", "fp8-e5m2"), "nf4": ("nf4",), "int8": ("int",)}


def make_method(name: str, fmt: str | QFormat | None = None, /, **options: Any) -> Method:
    """Returns a preset with another format or options.

    Args:
      name: one of `METHODS`.
      fmt: such as "int4-g64"; None: the method's own.
      **options: fields of `Method`.

    Raises:
      ValueError: an unknown method or option, or a format that the method cannot take.
    """
    is_known = isinstance(name, str) and name in _PRESETS
    require(is_known, f"method must be one of {', '.join(METHODS)}, got {name!r}")
    default, fields = _PRESETS[name]
    require(
        fmt is None or isinstance(fmt, str | QFormat),
        f"format must be a string such as {default}, got {fmt!r}",
    )
    parsed = QFormat.parse(fmt) if isinstance(fmt, str) else fmt or QFormat.parse(default)
    kinds = _KINDS.get(name)
    bits = (8,) if name == "int8" else range(2, 9)
    require(
        (kinds is None or parsed.kind in kinds) and parsed.bits in bits,
        f"method {name} does not take format {parsed}; its own is {default}",
    )
    known = {f.name for f in dataclasses.fields(Method)} - {"name", "format"}
    unknown = sorted(set(options) - known)
    require(not unknown, f"method {name} has no options {unknown}; options: {sorted(known)}")
    method = Method(name=name, format=parsed, **{**fields, **options})
    for option in options:
        field, owner = _OWNERS.get(option, ("name", name))
        require(
            getattr(method, field) == owner,
            f"method {name} has no use for {option}, an option of {owner}",
        )
    return method


def parse_quantization(text: str) -> Method:
    """Reads `LLM(quantization=...)`: "int4-g64:rtn", "int4-g64", "fp8", "int8", "nf4", "hqq".

    Only methods without data: "int8" is int8-channel:dyn here, W8A8.

    Raises:
      ValueError: not understood, or a method that needs calibration.
    """
    require(isinstance(text, str), f"quantization must be a string such as fp8, got {shown(text)}")
    head, _, tail = text.rpartition(":")
    try:
        if text == "int8":
            fmt = "int8-channel:dyn"
            method = make_method("rtn", fmt, grid="restricted", scale_dtype="float32")
        elif text in _PRESETS:
            method = make_method(text)
        elif tail in _PRESETS and head:
            method = make_method(tail, head)
        else:
            method = make_method("rtn", text)
    except ValueError as error:
        expected = "fp8, int8, nf4, hqq, or a format and a method such as int4-g64:rtn"
        message = f"quantization must be {expected}, got {text[:100]!r} ({error})"
        raise ValueError(one_line(message)) from error
    require(
        not method.needs_calibration,
        f"quantization {text!r} needs calibration: run `jinfer quantize` and load its output (a "
        f"checkpoint that is quantized already needs no quantization=)",
    )
    return method


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules from module patterns to methods; the first match decides, and none means float.

    Attributes:
      rules: (pattern, method or None); a pattern is a shell one, "layers.*.mlp.*".
    """

    rules: tuple[tuple[str, Method | None], ...]

    @classmethod
    def uniform(cls, method: Method) -> Recipe:
        """One method for every linear of the blocks."""
        return cls((("layers.*", method),))

    @classmethod
    def read(cls, path: str | pathlib.Path, default: Method | None = None) -> Recipe:
        """Reads {"rules": [{"match": ..., "method": ..., "format": ..., <options>}, ...]}.

        `"method": null` keeps a module in float; what no rule fits gets `default`.

        Raises:
          ValueError: the file is not such an object, or a rule is refused, with its place.
        """
        expected = f'recipe {path} must be a JSON object {{"rules": [...]}}'
        try:
            data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{expected}: {error}") from error
        require(isinstance(data, dict), f"{expected}, got {type(data).__name__}")
        require(set(data) == {"rules"}, f"{expected}, got the fields {sorted(data)}")
        rows = data["rules"]
        require(isinstance(rows, list), f"{expected}, got rules of {type(rows).__name__}")
        rules: list[tuple[str, Method | None]] = []
        for i, row in enumerate(rows):
            try:
                require(isinstance(row, Mapping), f"a rule must be an object, got {row!r}")
                options = dict(row)
                for key in ("match", "method"):
                    require(key in options, f"a rule needs {key!r}, got {sorted(row)}")
                pattern, name = options.pop("match"), options.pop("method")
                require(isinstance(pattern, str), f"match must be a pattern, got {pattern!r}")
                if name is None:
                    require(not options, f"method null takes nothing else, got {sorted(options)}")
                    rules.append((pattern, None))
                    continue
                fmt = options.pop("format", None)
                rules.append((pattern, make_method(name, fmt, **options)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"recipe {path}, rule {i + 1}: {error}") from error
        return cls((*rules, *((("layers.*", default),) if default is not None else ())))

    def to_rows(self) -> list[dict[str, Any]]:
        """The rules as `read` takes them, with options that differ from the method's own."""
        rows = []
        for pattern, method in self.rules:
            row: dict[str, Any] = {"match": pattern, "method": None}
            if method is not None:
                row |= {"method": method.name, "format": str(method.format)}
                preset = make_method(method.name, method.format)
                for field in dataclasses.fields(Method):
                    value = getattr(method, field.name)
                    if value != getattr(preset, field.name):
                        row[field.name] = value
            rows.append(row)
        return rows

    def of(self, module: str) -> Method | None:
        """Returns the method of a module; None: it stays in float."""
        for pattern, method in self.rules:
            if fnmatch.fnmatchcase(module, pattern):
                return method
        return None

    def check(self, modules: Iterable[str]) -> None:
        """Raises ValueError for a pattern that fits no module."""
        modules = list(modules)
        for pattern, _ in self.rules:
            require(
                any(fnmatch.fnmatchcase(m, pattern) for m in modules),
                f"recipe pattern {pattern!r} fits no linear; they are named like "
                f"{', '.join(modules[:7])}",
            )
        require(any(self.of(m) for m in modules), "this recipe quantizes nothing")

    @property
    def needs_calibration(self) -> bool:
        """Whether any of its methods does."""
        return any(method is not None and method.needs_calibration for _, method in self.rules)
