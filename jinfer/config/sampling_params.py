"""Sampling parameters of a request; every field is applied, or refused by name with the reason.

`jinfer/sampling/process.py` applies these fields.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar
from typing import Any

from jinfer.config import refusals
from jinfer.config.fields import (
    MAX_FLOAT32,
    check_keywords,
    one_line,
    read_bool,
    read_float,
    read_int,
    read_strings,
    read_token_ids,
    require,
    shown,
)

MIN_TEMPERATURE = 0.01
"""Temperatures in (0, 0.01) are raised to this: f32 logits divided by less lose precision."""

MAX_LOGIT_BIAS_VALUE = 100.0
"""Biases are clamped to plus or minus this, as the OpenAI API does."""

MAX_REPETITION_PENALTY = 1e6
"""Limit, also of the inverse, so that a logit times the penalty stays in the range of f32."""

MAX_N = 16384
"""Most samples of a request; each is queued as a sequence of its own."""

MAX_TOP_K = 2**31 - 1
"""Larger values become this, which keeps the whole of any vocabulary."""

NO_TOKEN = -2
"""Takes the place of a sampled token where a request's constraints leave none."""


class RequestOutputKind(enum.Enum):
    """Content of each `RequestOutput` of a streamed request."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # nothing until the request has finished


def _as_logit_bias(value: Any) -> dict[int, float] | None:
    """Returns token id -> bias, clamped; ids may be strings of digits, as JSON has them."""
    if value is None:
        return None
    require(
        isinstance(value, Mapping),
        f"logit_bias must map token ids to biases, got {shown(value)}",
    )
    bias: dict[int, float] = {}
    for key, amount in value.items():
        is_digits = isinstance(key, str) and key.strip().isdecimal() and len(key) < 100
        token_id = read_int("logit_bias key", int(key) if is_digits else key)
        require(token_id >= 0, f"logit_bias holds the negative token id {token_id}")
        require(token_id not in bias, f"logit_bias holds the token id {token_id} twice")
        number = read_float(f"logit_bias[{token_id}]", amount)
        bias[token_id] = min(max(number, -MAX_LOGIT_BIAS_VALUE), MAX_LOGIT_BIAS_VALUE)
    return bias or None


def _as_output_kind(value: Any) -> RequestOutputKind:
    if isinstance(value, RequestOutputKind):
        return value
    names = ", ".join(kind.name for kind in RequestOutputKind)
    require(
        isinstance(value, str) and value.upper() in RequestOutputKind.__members__,
        f"output_kind must be a RequestOutputKind or one of {names}, got {shown(value)}",
    )
    return RequestOutputKind[value.upper()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled, stopped and reported.

    `sampling.process.process_logits` documents the order in which they are applied. Names and
    defaults are those of other engines. Everything is validated and normalized here: greedy
    decoding (temperature 0) resets top_p, top_k and min_p, which cannot change it;
    temperatures in (0, 0.01) become 0.01; top_k = -1 becomes 0; seed = -1 becomes None;
    logit_bias is clamped to +-100; lists become tuples without repetitions.

    Attributes:
      n: independent samples of one prompt, at most 16384; must be 1 when greedy.
      temperature: 0 = greedy; otherwise logits are divided by it.
      top_p: in (0, 1]; keeps the most likely tokens whose mass reaches it.
      top_k: keeps the k most likely tokens; 0 or -1 = all.
      min_p: in [0, 1]; cuts tokens less likely than min_p times the most likely one.
      presence_penalty, frequency_penalty: in [-2, 2]; over output tokens.
      repetition_penalty: in [1e-6, 1e6]; over prompt and output tokens.
      logit_bias: token id -> amount added to its logit.
      allowed_token_ids: all other tokens are banned.
      bad_words: words that the output never completes, wherever they begin in it.
      min_tokens: end-of-sequence and stop ids are banned before this number of output tokens.
      max_tokens: most output tokens; None = to the end of the context.
      stop: strings that end the text; need `detokenize`.
      stop_token_ids: ids that end it, besides the model's end tokens.
      ignore_eos: continue after the model's end tokens.
      seed: in [0, 2**64); the result then depends on the request alone; None = random.
      logprobs: number of most likely tokens to report with each sampled one; 0 = the sampled one
        alone; -1 = the whole vocabulary.
      prompt_logprobs: the same for the prompt's tokens.
      detokenize: whether to make text.
      skip_special_tokens, spaces_between_special_tokens, include_stop_str_in_output: of the text.
      output_kind: content of each streamed output.
      skip_reading_prefix_cache: compute the whole prompt even if cached, as for `prompt_logprobs`.

    Raises:
      ValueError: a value out of range, fields that contradict each other, or a name that is not
        applied here, with the reason and what to use instead.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_reading_prefix_cache: bool = False

    # Init-only names, refused at any other value than these; the reasons are in `refusals`.
    structured_outputs: InitVar[Any] = None
    guided_decoding: InitVar[Any] = None
    best_of: InitVar[int | None] = None
    use_beam_search: InitVar[bool] = False
    length_penalty: InitVar[float] = 1.0
    early_stopping: InitVar[bool] = False
    logits_processors: InitVar[Any] = None
    truncate_prompt_tokens: InitVar[int | None] = None
    logprob_token_ids: InitVar[Any] = None
    prompt_logprob_token_ids: InitVar[Any] = None
    prompt_logprob_start: InitVar[int | None] = None
    flat_logprobs: InitVar[bool] = False
    stream_interval: InitVar[int | None] = None
    thinking_token_budget: InitVar[int | None] = None
    repetition_detection: InitVar[Any] = None
    routed_experts_prompt_start: InitVar[int] = 0
    trace_decode_token_ids: InitVar[Any] = None
    extra_args: InitVar[Any] = None
    skip_clone: InitVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        """Explains unknown names, for which the dataclass would raise a bare TypeError."""
        example = "SamplingParams(temperature=0.8, max_tokens=64)"
        check_keywords(cls, args, kwargs, refusals.SAMPLING_NAMES, example)
        return super().__new__(cls)

    def __post_init__(self, *refused: Any) -> None:
        for name, value in zip(_REFUSED_IN_ORDER, refused, strict=True):
            refusal = refusals.SAMPLING_FIELDS[name]
            if not refusal.allows(value):
                raise ValueError(
                    one_line(f"{name}={shown(value)} is not supported: {refusal.reason}")
                )
        self._normalise()
        self._check_ranges()
        self._check_contradictions()

    def _normalise(self) -> None:
        """Converts every field to its type; refuses values of a wrong kind."""

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        ):
            put(name, read_float(name, getattr(self, name)))
        for name in ("n", "top_k", "min_tokens"):
            put(name, read_int(name, getattr(self, name)))
        for name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            put(name, None if value is None else read_int(name, value))
        if self.skip_reading_prefix_cache is None:
            put("skip_reading_prefix_cache", False)
        for field in dataclasses.fields(self):
            if field.type == "bool":
                read_bool(field.name, getattr(self, field.name))
        put("stop", read_strings("stop", self.stop))
        put("bad_words", read_strings("bad_words", self.bad_words))
        ids = self.stop_token_ids
        put("stop_token_ids", () if ids is None else read_token_ids("stop_token_ids", ids))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", read_token_ids("allowed_token_ids", self.allowed_token_ids))
        put("logit_bias", _as_logit_bias(self.logit_bias))
        put("output_kind", _as_output_kind(self.output_kind))
        if self.seed == -1:
            put("seed", None)
        if self.top_k == -1:
            put("top_k", 0)
        put("top_k", min(self.top_k, MAX_TOP_K))
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            put("temperature", MIN_TEMPERATURE)

    def _check_ranges(self) -> None:
        t, r = self.temperature, self.repetition_penalty
        require(self.n >= 1, f"n must be at least 1, got {self.n}")
        require(self.n <= MAX_N, f"n must be at most {MAX_N}, got {self.n}; ask several times")
        require(
            0.0 <= t <= MAX_FLOAT32,
            f"temperature must be finite and not negative, got {t}; 0 = greedy",
        )
        require(0.0 < self.top_p <= 1.0, f"top_p must lie in (0, 1], got {self.top_p}")
        require(self.top_k >= 0, f"top_k must be positive, or 0 or -1 for all, got {self.top_k}")
        require(0.0 <= self.min_p <= 1.0, f"min_p must lie in [0, 1], got {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-2.0 <= value <= 2.0, f"{name} must lie in [-2, 2], got {value}")
        require(0.0 < r < math.inf, f"repetition_penalty must be finite and positive, got {r}")
        least, most = 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        require(
            least <= r <= most, f"repetition_penalty must lie in [{least}, {most:.0f}], got {r}"
        )
        require(
            self.max_tokens is None or self.max_tokens >= 1,
            f"max_tokens must be at least 1, or None for the whole context, got {self.max_tokens}",
        )
        require(self.min_tokens >= 0, f"min_tokens must not be negative, got {self.min_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(
                value is None or value >= -1,
                f"{name} must be 0 or more, -1 for the whole vocabulary, or None, got {value}",
            )
        require(
            self.seed is None or 0 <= self.seed < 2**64,
            f"seed must lie in [0, 2**64), or be -1 or None for a fresh one, got {self.seed}",
        )
        require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids is empty, so no token could be sampled; use None to allow all",
        )

    def _check_contradictions(self) -> None:
        if self.is_greedy:
            require(
                self.n == 1,
                f"n={self.n} with temperature=0 would give {self.n} times the same text; "
                f"set temperature > 0 or n=1",
            )
            for name, value in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                object.__setattr__(self, name, value)
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
        )
        require(
            self.detokenize or not self.stop,
            "stop strings are found in the text: set detokenize=True, or use stop_token_ids",
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @classmethod
    def from_optional(cls, **kwargs: Any) -> SamplingParams:
        """Builds parameters from values; None is the default (of max_tokens: no limit)."""
        given: dict[str, Any] = {
            k: v for k, v in kwargs.items() if v is not None or k == "max_tokens"
        }
        return cls(**given)

    def clone(self) -> SamplingParams:
        """Returns an equal copy; change fields with `dataclasses.replace`."""
        return dataclasses.replace(self)

    def check_vocab(self, vocab_size: int) -> None:
        """Checks every token id and count that the request names against the vocabulary.

        Raises:
          ValueError: an id >= vocab_size, or more log probabilities than there are tokens.
        """
        named = {
            "logit_bias": tuple(self.logit_bias or ()),
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in named.items():
            wrong = [i for i in ids if i >= vocab_size]
            require(
                not wrong,
                f"{name} holds token ids outside the vocabulary of {vocab_size}: {wrong[:5]}",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(
                value is None or value <= vocab_size,
                f"{name}={value} exceeds the vocabulary of {vocab_size}; use -1 for all of it",
            )


_REFUSED_IN_ORDER = [
    name for name in SamplingParams.__dataclass_fields__ if name in refusals.SAMPLING_FIELDS
]


def child_seed(seed: int, index: int) -> int:
    """Returns the seed of sample `index` of a request with n samples, in [0, 2**64).

    Sample 0 keeps the seed, so that the first of n samples equals the one of n = 1. The others are
    mixed (SplitMix64; Steele et al. 2014), so that seeds 7 and 8 with n = 2 share no sample.
    """
    if index == 0:
        return seed
    mask = 2**64 - 1
    x = (seed + index * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
