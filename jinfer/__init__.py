"""jinfer: language-model inference in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinfer.beam_params import BeamSearchParams as BeamSearchParams
    from jinfer.functional import Generated as Generated
    from jinfer.functional import generate as generate
    from jinfer.llm import LLM as LLM
    from jinfer.models.model import Model as Model
    from jinfer.outputs import BeamSearchOutput as BeamSearchOutput
    from jinfer.outputs import BeamSearchSequence as BeamSearchSequence
    from jinfer.outputs import CompletionOutput as CompletionOutput
    from jinfer.outputs import Logprob as Logprob
    from jinfer.outputs import RequestOutput as RequestOutput
    from jinfer.sampling_params import RequestOutputKind as RequestOutputKind
    from jinfer.sampling_params import SamplingParams as SamplingParams
    from jinfer.weights.load import load as load

__version__ = "0.1.0"

# Public names and their modules; loaded when first used, so that `import jinfer` stays light.
_MODULES = {
    "Generated": "jinfer.functional",
    "LLM": "jinfer.llm",
    "Model": "jinfer.models.model",
    "BeamSearchOutput": "jinfer.outputs",
    "BeamSearchParams": "jinfer.beam_params",
    "BeamSearchSequence": "jinfer.outputs",
    "CompletionOutput": "jinfer.outputs",
    "Logprob": "jinfer.outputs",
    "RequestOutput": "jinfer.outputs",
    "RequestOutputKind": "jinfer.sampling_params",
    "SamplingParams": "jinfer.sampling_params",
    "generate": "jinfer.functional",
    "load": "jinfer.weights.load",
}
__all__ = [*_MODULES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jinfer' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
