"""The drafter that a `speculative_config` names: loaded or made, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinfer.config.speculative import SpeculativeConfig
from jinfer.config.typing import Params
from jinfer.engine.device.drafter import Drafter
from jinfer.linear.placement import Placement
from jinfer.linear.weight import is_weight, weights
from jinfer.models.model import Model
from jinfer.setup import options
from jinfer.setup import weights as setup_weights


def take_drafter(
    fields: Mapping[str, Any] | None,
    model: Model,
    params: Params,
    tokenizer: Any | None,
    dtype: str,
    placement: Placement,
) -> tuple[SpeculativeConfig | None, Drafter | None]:
    """Reads a `speculative_config` and returns it with the model that drafts, if there is one.

    Args:
      fields: as given to `LLM`.
      model, params, tokenizer: the target's.
      dtype: of a draft model's weights, as for `LLM`.
      placement: of the target's weights; the drafter's come to the same device.

    Raises:
      ValueError: the fields are not understood, or that model cannot draft for this one.
    """
    if fields is None:
        return None, None
    config = SpeculativeConfig.of(fields)
    if config.method == "self":
        return config, _self_drafter(config, model, params, placement)
    if config.method == "draft":
        return config, _draft_model(config, model, tokenizer, dtype, placement)
    return config, None


def _self_drafter(
    config: SpeculativeConfig, model: Model, params: Params, placement: Placement
) -> Drafter:
    if any(map(is_weight, weights(params))):
        raise ValueError(
            f'speculative_config: method "self" rounds float weights to {config.format}, and these '
            "are quantized already: load the model without quantization, or draft otherwise"
        )

    def follow(params: Params) -> Params:
        try:
            return setup_weights.place(params, placement, config.format)
        except ValueError as error:
            raise ValueError(
                f"speculative_config: format {config.format!r} does not suit this model ({error})"
            ) from error

    return Drafter(model, follow(params), follow)


def _draft_model(
    config: SpeculativeConfig,
    target: Model,
    tokenizer: Any | None,
    dtype: str,
    placement: Placement,
) -> Drafter:
    draft, params = setup_weights.take_model(
        config.model,
        config.params,
        "auto" if isinstance(config.model, Model) else dtype,
        None,
        quantization=None,
        linear_impl=placement.impl,
    )
    name = "the draft model" if isinstance(config.model, Model) else str(config.model)
    sizes = draft.config.vocab_size, target.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"speculative_config: {name} has a vocabulary of {sizes[0]} tokens, the model that it "
            f"is to draft for one of {sizes[1]}: they must be the same"
        )
    source = None if isinstance(config.model, Model) else config.model
    if tokenizer is not None and (config.tokenizer is not None or source is not None):
        own = options.take_tokenizer(config.tokenizer, source, None)
        _check_tokenizers(own, tokenizer, name)
    return Drafter(draft, placement.bind(params))


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
