"""What a `speculative_config` names: Medusa heads or a drafter, loaded, made or refused."""

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
      config: None: it does not draft.
      heads: Medusa heads.
      drafter: the model that drafts.
    """

    config: SpeculativeConfig | None = None
    heads: Params | None = None
    drafter: Drafter | None = None


@dataclasses.dataclass(frozen=True)
class DraftSource:
    """The draft model of a `speculative_config`, as `LLM` takes a model; all None: there is none.

    Attributes:
      model: a `Model`, or a path or name to load.
      params: weights of a `Model`.
      tokenizer: its tokenizer, or where to load one from; None: that of `model`.
    """

    model: Any = None
    params: Any = None
    tokenizer: Any = None

    @classmethod
    def of(cls, fields: Mapping[str, Any] | None) -> DraftSource:
        """Returns what the fields name that `SpeculativeConfig.of` has checked."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: (fields or {}).get(name) for name in names})


@dataclasses.dataclass(frozen=True)
class Target:
    """The model that drafts are made for: its weights, where they lie, and its tokenizer."""

    model: Model
    params: Params
    placement: Placement
    tokenizer: Any | None


def take_speculation(options: LLMOptions, source: DraftSource, target: Target) -> Speculation:
    """Returns how the options say that an engine drafts, with heads loaded or a drafter made.

    Raises:
      FileNotFoundError: there are no heads.
      ValueError: the heads or the draft model do not suit the target, or the tree the heads.
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
    """Loads Medusa heads; returns them with the config that has the tree to use."""
    from jinfer.speculation import medusa

    assert config.heads is not None
    shape, heads, tree = medusa.load(config.heads, model)
    if config.tree is not None:
        tree = medusa_tree.read_tree(config.tree)
        medusa_tree.check_tree(tree, num_heads=shape.num_heads)
    highest = max(max(node) for node in tree)
    require(
        highest < shape.num_guessable,
        f"the tree asks for the guess of rank {highest}, the heads guess among "
        f"{shape.num_guessable} tokens",
    )
    return dataclasses.replace(config, tree=tree, num_speculative_tokens=len(tree)), heads


def _self_drafter(config: SpeculativeConfig, target: Target) -> Drafter:
    """Returns a drafter of the target's weights in fewer bits."""
    if any(map(is_weight, weights(target.params))):
        raise ValueError(
            f'speculative_config: method "self" rounds float weights to {config.format}, and these '
            "are quantized already: load the model without quantization, or draft otherwise"
        )

    def follow(params: Params) -> Params:
        try:
            return setup_weights.place(params, target.placement, config.format)
        except ValueError as error:
            raise ValueError(
                f"speculative_config: format {config.format!r} does not suit this model ({error})"
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
            f"speculative_config: {name} has a vocabulary of {sizes[0]} tokens, the model that it "
            f"is to draft for one of {sizes[1]}: they must be the same"
        )
    if target.tokenizer is not None and (source.tokenizer is not None or is_loaded):
        path = source.model if is_loaded else None
        _check_tokenizers(take_tokenizer(source.tokenizer, path, None), target.tokenizer, name)
    return Drafter(draft, target.placement.bind(params))


def _check_tokenizers(own: Any, target: Any, name: str) -> None:
    """Refuses a drafter that gives other ids to some tokens."""
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
