"""The jitted steps of one engine, each with the static choices that the engine makes for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jinfer.config.engine import EngineConfig
from jinfer.models.model import Model
from jinfer.steps import beam, decode, draft, forward, tree, verify
from jinfer.steps.inputs import Pool, StepInputs, Weights


class Call(NamedTuple):
    """A step with its static choices: `call(weights, pool, inputs) -> (output, pool)`.

    Attributes:
      fn: the jitted function.
      model: static.
      static: its other static arguments.
      pick: which of an engine's weights the function takes.
    """

    fn: Any
    model: Model
    static: Mapping[str, Any]
    pick: Callable[[Weights], Any]

    def __call__(self, weights: Weights, pool: Pool, inputs: StepInputs) -> tuple[Any, Pool]:
        return self.fn(self.model, self.pick(weights), pool, inputs, **self.static)


def _target(weights: Weights) -> Any:
    return weights.target


def _drafter(weights: Weights) -> Any:
    return weights.drafter


def _both(weights: Weights) -> Weights:
    return weights


class Calls:
    """Chooses the function and the static arguments of every kind of step.

    Args:
      model: the model.
      config: of the engine.
      drafter: the model that drafts, if there is one.
    """

    def __init__(self, model: Model, config: EngineConfig, drafter: Model | None) -> None:
        self.model = model
        self.config = config
        self.drafter = drafter
        self._impl = {"impl": config.attention_impl}

    def forward(self) -> Call:
        """Returns the step over a ragged batch."""
        return Call(forward.forward_step, self.model, self._impl, _target)

    def decode(self) -> Call:
        """Returns the loop of decode steps."""
        static = {"max_steps": self.config.num_decode_steps, **self._impl}
        return Call(decode.decode_loop, self.model, static, _target)

    def feed(self) -> Call:
        """Returns the step that fills the KV cache of a draft model."""
        assert self.drafter is not None
        return Call(draft.feed_step, self.drafter, self._impl, _drafter)

    def verify(self, max_drafts: int) -> Call:
        """Returns the step that verifies chains of drafts, and makes them if a model drafts."""
        static = {"max_drafts": max_drafts, **self._impl}
        if self.drafter is None:
            return Call(verify.verify_step, self.model, static, _target)
        static["drafter"] = self.drafter
        return Call(draft.draft_step, self.model, static, _both)

    def tree(self, max_drafts: int) -> Call:
        """Returns the step that verifies trees of drafts, or without drafts only guesses."""
        speculation = self.config.speculation
        assert speculation is not None
        static = {
            "max_depth": speculation.max_depth if max_drafts else 0,
            "num_ranks": speculation.num_ranks,
            "typical": speculation.typical,
            **self._impl,
        }
        return Call(tree.tree_step, self.model, static, _both)

    def beams(self, num_beams: int, k: int) -> Call:
        """Returns the step of a beam search with `k` continuations of each group."""
        static = {"num_beams": num_beams, "k": k, **self._impl}
        return Call(beam.beam_step, self.model, static, _target)
