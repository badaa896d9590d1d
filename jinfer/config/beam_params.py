"""Parameters of beam search."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import InitVar
from typing import Any, Literal

from jinfer.config import refusals
from jinfer.config.fields import (
    MAX_FLOAT32,
    check_keywords,
    read_bool,
    read_float,
    read_int,
    read_token_ids,
    require,
    shown,
)
from jinfer.config.sampling_params import MIN_TEMPERATURE

MAX_LENGTH_PENALTY = 32
"""Beyond this the power of a length may leave the range of a float."""

EarlyStopping = bool | Literal["never"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Parameters of the beam search of one prompt.

    The search is that of `transformers`. A step considers the max(2, 1 + end tokens) * beam_width
    best continuations of all beams. Those among the first beam_width that end a text are finished
    with the score

        sum of log probabilities / (output tokens, the end token included) ** length_penalty

    and the best beam_width that do not end a text are kept. (vLLM counts the prompt's tokens, too.)

    Attributes:
      beam_width: beams kept.
      max_tokens: most output tokens; fewer where the context ends.
      ignore_eos: continue after the model's end tokens.
      stop_token_ids: ids that end a text, besides the model's end tokens.
      temperature: divides the logits; 0, vLLM's default, means 1; values in (0, 0.01) become 0.01.
      length_penalty: above 0 favours long texts, below 0 short ones; in [-32, 32].
      early_stopping: when the search ends after beam_width texts are finished. True: at once.
        False: when the best beam, if it ended now, would be worse than all of them. "never": when
        it cannot become better at any length.
      num_return_sequences: at most beam_width; None = beam_width.
      allowed_token_ids: all other tokens are banned, without renormalising.
      include_stop_str_in_output: keep the end token in the text.
      skip_special_tokens: of the text.
      structured_outputs: refused unless None.

    Raises:
      ValueError: a value out of range, with its name.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return_sequences: int | None = None
    allowed_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: InitVar[Any] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> BeamSearchParams:
        """Explains unknown names before the dataclass would answer with a bare TypeError."""
        example = "BeamSearchParams(beam_width=4, max_tokens=64)"
        check_keywords(cls, args, kwargs, refusals.BEAM_NAMES, example)
        return super().__new__(cls)

    def __post_init__(self, structured_outputs: Any) -> None:
        require(
            structured_outputs is None,
            "structured_outputs are not built for beam search; restrict single tokens with "
            "allowed_token_ids",
        )

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("beam_width", "max_tokens"):
            put(name, _positive(name, getattr(self, name)))
        if self.num_return_sequences is not None:
            put(
                "num_return_sequences", _positive("num_return_sequences", self.num_return_sequences)
            )
            require(
                self.num_returned <= self.beam_width,
                f"num_return_sequences={self.num_returned} is more than "
                f"beam_width={self.beam_width}",
            )
        for name in ("temperature", "length_penalty"):
            value = read_float(name, getattr(self, name))
            require(abs(value) <= MAX_FLOAT32, f"{name} must be finite, got {value!r}")
            put(name, value)
        require(self.temperature >= 0, f"temperature must be >= 0, got {self.temperature}")
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            put("temperature", MIN_TEMPERATURE)
        require(
            abs(self.length_penalty) <= MAX_LENGTH_PENALTY,
            f"length_penalty must lie in [-{MAX_LENGTH_PENALTY}, {MAX_LENGTH_PENALTY}], got "
            f"{self.length_penalty}",
        )
        require(
            isinstance(self.early_stopping, bool)
            or (isinstance(self.early_stopping, str) and self.early_stopping == "never"),
            f'early_stopping must be True, False or "never", got {shown(self.early_stopping)}',
        )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            read_bool(name, getattr(self, name))
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        put("stop_token_ids", read_token_ids("stop_token_ids", ids))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", read_token_ids("allowed_token_ids", self.allowed_token_ids))
            require(bool(self.allowed_token_ids), "allowed_token_ids is empty: no token may come")

    @property
    def num_returned(self) -> int:
        """Texts to return."""
        return self.beam_width if self.num_return_sequences is None else self.num_return_sequences


def _positive(name: str, value: Any) -> int:
    number = read_int(name, value)
    require(number > 0, f"{name} must be positive, got {number}")
    return number
