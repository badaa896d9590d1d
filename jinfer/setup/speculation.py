"""Loads or makes what a `speculative_config` names: Medusa heads, or a drafter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jinfer.config.fields import require
from jinfer.config.model import ModelConfig
from jinfer.config.speculative import SpeculativeConfig
from jinfer.config.typing import Params
from jinfer.engine.device.drafter import Drafter
from jinfer.linear.placement import Placement
from jinfer.linear.weight import is_weight, weights
from jinfer.models.model import Model
from jinfer.setup import weights as setup_weights
from jinfer.setup.options import LLMOptions, take_tokenizer
from jinfer.speculation import medusa_tree


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How an engine drafts, and the weights that go with it, placed.

    Attributes:
      config: None if the engine does not draft.
      heads: Medusa heads, for method "medusa".
      drafter: the draft model, for methods "self" and "draft".
    """

    config: SpeculativeConfig | None = None
    heads: Params | None = None
    drafter: Drafter | None = None


@dataclasses.dataclass(frozen=True)
class DraftSource:
    """The draft model of a `speculative_config`, in the forms that `LLM` takes; all None if none.

    Attributes:
      model: a `Model`, or a path or name to load.
      params: weights of a `Model`.
      tokenizer: its tokenizer, or a path or name to load one from; None: that of `model`.
    """

    model: Any = None
    params: Any = None
    tokenizer: Any = None

    @classmethod
    def of(cls, fields: Mapping[str, Any] | None) -> DraftSource:
        """Returns the draft model of fields that `SpeculativeConfig.of` has checked."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: (fields or {}).get(name) for name in names})


@dataclasses.dataclass(frozen=True)
class Target:
    """The model that verifies the drafts: its weights, their placement, and its tokenizer."""

    model: Model
    params: Params
    placement: Placement
    tokenizer: Any | None


def take_speculation(options: LLMOptions, source: DraftSource, target: Target) -> Speculation:
    """Loads the heads or makes the drafter that the options ask for.

    Raises:
      FileNotFoundError: the heads do not exist.
      ValueError: the heads or the draft model do not fit the target, or the tree the heads.
    """
    config = options.speculation
    if config is None:
        return Speculation()
    if config.method == "medusa":
        config, heads = _take_heads(config, target.model.config)
        return Speculation(config, heads=target.placement.bind(heads))
    if config.method == "self":
        return Speculation(config, drafter=_self_drafter(config, target))
    if config.method == "draft":
        return Speculation(config, drafter=_draft_model(options, source, target))
    return Speculation(config)


def _take_heads(
    config: SpeculativeConfig, model: ModelConfig
) -> tuple[SpeculativeConfig, dict[str, Any]]:
    """Loads Medusa heads; returns them and the config completed by their tree."""
    from jinfer.speculation import medusa

    assert config.heads is not None
    shape, heads, tree = medusa.load(config.heads, model)
    if config.tree is not None:
        tree = medusa_tree.read_tree(config.tree)
        medusa_tree.check_tree(tree, num_heads=shape.num_heads)
    highest = max(max(node) for node in tree)
    require(
        highest < shape.num_guessable,
        f"the tree asks for the guess of rank {highest}, but the heads rank only "
        f"{shape.num_guessable} tokens",
    )
    return dataclasses.replace(config, tree=tree, num_speculative_tokens=len(tree)), heads


def _self_drafter(config: SpeculativeConfig, target: Target) -> Drafter:
    """Returns a drafter that runs the target's weights in fewer bits."""
    if any(map(is_weight, weights(target.params))):
        raise ValueError(
            f'speculative_config: method "self" rounds float weights to {config.format}, but these '
            "are quantized already: load the model without quantization, or use another method"
        )

    def follow(params: Params) -> Params:
        try:
            return setup_weights.place(params, target.placement, config.format)
        except ValueError as error:
            raise ValueError(
                f"speculative_config: format {config.format!r} does not fit this model ({error})"
            ) from error

    return Drafter(target.model, follow(target.params), follow)


def _draft_model(options: LLMOptions, source: DraftSource, target: Target) -> Drafter:
    """Returns a drafter that is another model of the same vocabulary."""
    is_loaded = not isinstance(source.model, Model)
    draft, params = setup_weights.take_model(
        source.model,
        source.params,
        LLMOptions(dtype=options.dtype if is_loaded else "auto", linear_impl=options.linear_impl),
    )
    name = str(source.model) if is_loaded else "the draft model"
    sizes = draft.config.vocab_size, target.model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"speculative_config: {name} has a vocabulary of {sizes[0]} tokens, the target model "
            f"one of {sizes[1]}: they must be equal"
        )
    if target.tokenizer is not None and (source.tokenizer is not None or is_loaded):
        path = source.model if is_loaded else None
        _check_tokenizers(take_tokenizer(source.tokenizer, path, None), target.tokenizer, name)
    return Drafter(draft, target.placement.bind(params))


def _check_tokenizers(own: Any, target: Any, name: str) -> None:
    """Refuses a drafter whose tokenizer maps some token to another id."""
    for tokenizer in (own, target):
        if not hasattr(tokenizer, "get_vocab"):
            kind = type(tokenizer).__name__
            raise TypeError(f"speculative_config: the tokenizer ({kind}) has no vocabulary")
    ours, theirs = own.get_vocab(), target.get_vocab()
    if ours == theirs:
        return
    token = min(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
    raise ValueError(
        f"speculative_config: the tokenizer of {name} ({type(own).__name__}) differs from the "
        f"model's ({type(target).__name__}): token {token!r} is {ours.get(token)} there and "
        f"{theirs.get(token)} here"
    )
