"""jinfer: language-model inference in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinfer.config.beam_params import BeamSearchParams as BeamSearchParams
    from jinfer.config.outputs import BeamSearchOutput as BeamSearchOutput
    from jinfer.config.outputs import BeamSearchSequence as BeamSearchSequence
    from jinfer.config.outputs import CompletionOutput as CompletionOutput
    from jinfer.config.outputs import Logprob as Logprob
    from jinfer.config.outputs import RequestOutput as RequestOutput
    from jinfer.config.sampling_params import RequestOutputKind as RequestOutputKind
    from jinfer.config.sampling_params import SamplingParams as SamplingParams
    from jinfer.engine.loop import QueueFullError as QueueFullError
    from jinfer.functional import Generated as Generated
    from jinfer.functional import generate as generate
    from jinfer.llm import LLM as LLM
    from jinfer.llm import AsyncLLM as AsyncLLM
    from jinfer.models.model import Model as Model
    from jinfer.quant.on_load import load as load

__version__ = "0.1.0"

# Public names and their modules; loaded when first used, so that `import jinfer` stays light.
_MODULES = {
    "Generated": "jinfer.functional",
    "AsyncLLM": "jinfer.llm",
    "LLM": "jinfer.llm",
    "QueueFullError": "jinfer.engine.loop",
    "Model": "jinfer.models.model",
    "BeamSearchOutput": "jinfer.config.outputs",
    "BeamSearchParams": "jinfer.config.beam_params",
    "BeamSearchSequence": "jinfer.config.outputs",
    "CompletionOutput": "jinfer.config.outputs",
    "Logprob": "jinfer.config.outputs",
    "RequestOutput": "jinfer.config.outputs",
    "RequestOutputKind": "jinfer.config.sampling_params",
    "SamplingParams": "jinfer.config.sampling_params",
    "generate": "jinfer.functional",
    "load": "jinfer.quant.on_load",
}
__all__ = [*_MODULES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jinfer' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
