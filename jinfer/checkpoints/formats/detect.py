"""Finds the quantized modules of a checkpoint: the reader they need and the tensors of each.

The reader depends on the method in `quantization_config`.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jinfer.checkpoints.formats.awq import AWQReader
from jinfer.checkpoints.formats.bnb import BNBReader
from jinfer.checkpoints.formats.compressed_tensors import CTReader
from jinfer.checkpoints.formats.fp8 import FP8Reader
from jinfer.checkpoints.formats.gptq import GPTQReader
from jinfer.checkpoints.formats.interop import Dense, Reader, Weight, check_scales
from jinfer.checkpoints.formats.native import NativeReader
from jinfer.config.fields import one_line, require

READERS: Mapping[str, Callable[[Mapping[str, Any]], Reader]] = {
    "gptq": GPTQReader.parse,
    "awq": AWQReader.parse,
    "compressed-tensors": CTReader.parse,
    "fp8": FP8Reader.parse,
    "bitsandbytes": BNBReader.parse,
    "jinfer": NativeReader.parse,
}
# Every quantized module has a tensor of such a name, and no other module has.
_MARKS = (
    *("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "SCB", "weight.absmax"),
    "qcodes",
)
# Errors that readers raise for values of wrong kinds.
_MALFORMED = (TypeError, AttributeError, LookupError, ArithmeticError)
_NUM_ASKED = 8  # modules from which the version of a GPTQ file is inferred
_log = logging.getLogger(__name__)


def open_reader(config: Mapping[str, Any], where: str) -> Reader:
    """Returns the reader for a `quantization_config`.

    Raises:
      ValueError: the method, or a part of it, is not supported.
    """
    method = config.get("quant_method")
    if method is None and "bits" in config:
        method = "gptq"  # AutoGPTQ's quantize_config.json names no method
    require(
        isinstance(method, str) and method in READERS,
        f"{where} is quantized by {method!r}, which is not supported; "
        f"supported: {', '.join(READERS)}",
    )
    try:
        with _located(where):
            return READERS[str(method)](config)
    except (AttributeError, KeyError, TypeError, re.error) as error:
        raise ValueError(
            f"{where}: its {method} quantization_config is malformed: {error}"
        ) from error


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Prefixes errors with the checkpoint's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@contextlib.contextmanager
def _named(module: str) -> Iterator[None]:
    """Prefixes errors with the module's name, unless they have it."""
    try:
        yield
    except ValueError as error:
        if module in str(error):
            raise
        raise ValueError(f"{module}: {error}") from error
    except _MALFORMED as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            one_line(f"{module}: its quantization_config or its tensors are malformed ({what})")
        ) from error


class _Leaves(dict[str, np.ndarray]):
    """Tensors of one module by leaf; the error for a missing one names it."""

    def __init__(self, module: str, tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__(tensors)
        self._module = module

    def __missing__(self, leaf: str) -> np.ndarray:
        raise ValueError(f"{self._module} has {', '.join(sorted(self))} but no {leaf}")


class QuantizedModules:
    """Modules whose weights are stored in a quantized format.

    Attributes:
      reader: how they are read.
      shapes: {module + ".weight": [O, I]}.
      taken: names of all tensors that belong to them.
      dense_reasons: modules that were dequantized so far, and why.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        names: Iterable[str],
        read: Callable[[str], np.ndarray],
        where: str,
    ) -> None:
        """Finds the modules among tensor `names`.

        Args:
          config: the checkpoint's `quantization_config`.
          names: of all its tensors.
          read: returns a tensor as stored; may be lazy (a memory map).
          where: named in messages.

        Raises:
          ValueError: the format is not supported, or no tensor is in it.
        """
        self.reader = open_reader(config, where)
        self._modules = modules_of(self.reader, names)
        self._read, self._where = read, where
        require(
            bool(self._modules),
            f"{where} says that it is quantized (method {config.get('quant_method')}), but none of "
            f"its tensors are",
        )
        if isinstance(self.reader, GPTQReader):
            step = -(-len(self._modules) // _NUM_ASKED)
            asked = list(self._modules)[::step]
            with _located(where):
                self.reader = self.reader.believed((m, self._tensors(m)) for m in asked)
        self.taken = {name for leaves in self._modules.values() for name in leaves.values()}
        self.shapes = {}
        for module in self._modules:
            with _located(where), _named(module):
                shape = self.reader.shape(module, self._tensors(module))
                self.shapes[f"{module}.weight"] = shape
        self.dense_reasons: dict[str, str] = {}

    def _tensors(self, module: str) -> Mapping[str, np.ndarray]:
        leaves = self._modules[module]
        return _Leaves(module, {leaf: self._read(name) for leaf, name in leaves.items()})

    def read(self, name: str) -> Weight:
        """Returns the weight under a name of `shapes`.

        Raises:
          ValueError: its tensors do not fit each other.
        """
        module = name.removesuffix(".weight")
        with _located(self._where), _named(module):
            tensors = self._tensors(module)
            check_scales(module, tensors, self.reader.scales)
            weight = self.reader.read(module, tensors)
        if isinstance(weight, Dense):
            if weight.reason not in self.dense_reasons.values():
                _log.warning("%s: %s held dense: %s", self._where, module, weight.reason)
            self.dense_reasons[module] = weight.reason
        return weight


def modules_of(reader: Reader, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Groups tensor names by quantized module: {module: {leaf: name}}; others are left out."""
    names = list(names)
    quantized = {
        name.removesuffix("." + mark) for mark in _MARKS for name in names if _ends(name, mark)
    }
    modules: dict[str, dict[str, str]] = {}
    leaves = sorted(reader.leaves, key=len, reverse=True)
    for name in names:
        for leaf in leaves:
            if _ends(name, leaf) and name.removesuffix("." + leaf) in quantized:
                modules.setdefault(name.removesuffix("." + leaf), {})[leaf] = name
                break
    return modules


def _ends(name: str, leaf: str) -> bool:
    return name.endswith("." + leaf)


def first_marked(names: Iterable[str]) -> str | None:
    """Returns a tensor that only quantized modules have, if there is one."""
    return next((name for name in names if any(_ends(name, mark) for mark in _MARKS)), None)
