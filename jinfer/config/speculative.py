"""Configuration of speculative decoding."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jinfer.config.fields import check_fields, shown
from jinfer.config.fields import require as require

MAX_SPECULATIVE_TOKENS = 16


DRAFT_SOURCE = ("model", "params", "tokenizer")  # of a draft model; they travel beside the config
_SPECULATIVE_FIELDS = {
    "ngram": ("num_speculative_tokens", "adaptive", "prompt_lookup_max", "prompt_lookup_min"),
    "medusa": ("adaptive", "heads", "tree", "acceptance", "epsilon", "alpha"),
    "lookahead": ("adaptive", "window", "ngram_size", "num_guesses"),
    "self": ("num_speculative_tokens", "adaptive", "format"),
    "draft": ("num_speculative_tokens", "adaptive", *DRAFT_SOURCE),
}


TREE_METHODS = ("medusa", "lookahead")


MAX_TREE_NODES = 63


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Speculative decoding: several tokens are drafted and then verified in one step of the model.

    The dict of a user has "model", "params" and "tokenizer" as well for "draft", as `LLM` takes
    them. They travel beside the config, which holds no weights.

    Attributes:
      method: "ngram": the most frequent continuation of the text's last tokens in the same text.
        "self": the model itself with linears rounded to fewer bits, in the same KV pages.
        "draft": another model of the same vocabulary. "medusa": a tree of guesses of trained
        heads. "lookahead": the model's own parallel guesses, as n-grams.
      num_speculative_tokens: most drafts per sequence and step; for a tree its nodes.
      adaptive: use fewer drafts (a tree: none), or none, where steps with drafts are measured to
        yield fewer tokens per second; otherwise always all.
      prompt_lookup_max, prompt_lookup_min: ("ngram") limits of the number of last tokens to look
        for; the longest match is used.
      format: ("self") of the rounded weights, as in `LLM(quantization=)`.
      heads: ("medusa") the folder that `jinfer train-medusa` wrote.
      tree: ("medusa") guesses to verify, each a list of ranks, see `speculation.medusa_tree`;
        None: the tree that was fitted to the heads.
      acceptance: ("medusa") "lossless": the tokens are those of plain decoding; "typical": lossy,
        sampled rows keep drafts that are likely enough, see `speculation.accept_tree`.
      epsilon, alpha: ("medusa") of typical acceptance.
      window, ngram_size, num_guesses: ("lookahead") W, N and G of `speculation.lookahead`; its
        trees have (W + G) (N - 1) nodes, at most 63.
    """

    method: str
    num_speculative_tokens: int = 4
    adaptive: bool = True
    prompt_lookup_max: int = 3
    prompt_lookup_min: int = 1
    format: str = "int4-g128"
    heads: str | os.PathLike[str] | None = None
    tree: tuple[tuple[int, ...], ...] | None = None
    acceptance: str = "lossless"
    epsilon: float = 0.09
    alpha: float = 0.3
    window: int = 5
    ngram_size: int = 4
    num_guesses: int = 5

    def __post_init__(self) -> None:
        positive = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        for name in (*positive, "window", "ngram_size", "num_guesses"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                f"speculative_config: {name} must be a positive integer, got {value!r}",
            )
        check_fields(self, "speculative_config: ")
        require(
            self.is_tree or self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS,
            f"speculative_config: num_speculative_tokens must be at most {MAX_SPECULATIVE_TOKENS}, "
            f"got {self.num_speculative_tokens}",
        )
        require(
            self.prompt_lookup_min <= self.prompt_lookup_max,
            f"speculative_config: prompt_lookup_min ({self.prompt_lookup_min}) must not exceed "
            f"prompt_lookup_max ({self.prompt_lookup_max})",
        )
        require(
            self.acceptance in ("lossless", "typical"),
            f'speculative_config: acceptance must be "lossless" or "typical", got '
            f"{self.acceptance!r}",
        )
        for name in ("epsilon", "alpha"):
            value = getattr(self, name)
            require(
                isinstance(value, (int, float)) and 0 < value <= 1,
                f"speculative_config: {name} must be above 0 and at most 1, got {value!r}",
            )
        require(
            self.method != "medusa" or isinstance(self.heads, (str, os.PathLike)),
            'speculative_config: method "medusa" needs "heads", the folder that jinfer '
            f"train-medusa wrote; got {self.heads!r}",
        )
        nodes = (self.window + self.num_guesses) * (self.ngram_size - 1)
        require(
            self.method != "lookahead" or 0 < nodes <= MAX_TREE_NODES,
            "speculative_config: (window + num_guesses) * (ngram_size - 1) must be 1 to "
            f"{MAX_TREE_NODES}, got {nodes}",
        )

    @property
    def is_tree(self) -> bool:
        """Whether the drafts of a sequence are a tree."""
        return self.method in TREE_METHODS

    @property
    def max_depth(self) -> int:
        """Most drafts of a sequence that can be accepted in one step."""
        if not self.is_tree:
            return self.num_speculative_tokens
        if self.method == "lookahead":
            return self.ngram_size - 1
        return max(map(len, self.tree or ()), default=0)

    @property
    def num_levels(self) -> int:
        """Levels of a tree below its root."""
        return self.max_depth + (self.window - 1 if self.method == "lookahead" else 0)

    @property
    def num_ranks(self) -> int:
        """Guesses of each Medusa head that the tree needs."""
        return 1 + max((max(node) for node in self.tree or ()), default=0)

    @property
    def typical(self) -> tuple[float, float] | None:
        """(epsilon, alpha), or None for lossless acceptance."""
        return (self.epsilon, self.alpha) if self.acceptance == "typical" else None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> SpeculativeConfig:
        """Makes a config from a user's dict, without the draft model that it may name.

        Raises:
          ValueError: an unknown method, or a key that the method does not have.
          TypeError: it is not a dict.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(
                'speculative_config must be a dict like {"method": "ngram"}, got '
                f"{type(fields).__name__}"
            )
        method = fields.get("method")
        methods = ", ".join(_SPECULATIVE_FIELDS)
        require(
            isinstance(method, str) and method in _SPECULATIVE_FIELDS,
            f"speculative_config: method must be one of {methods}, got {method!r}",
        )
        known = _SPECULATIVE_FIELDS[str(method)]
        for name in fields:
            require(
                name == "method" or name in known,
                f'speculative_config: method "{method}" has no {name!r}; it takes '
                f"{', '.join(known)}",
            )
        config = cls(**{name: x for name, x in fields.items() if name not in DRAFT_SOURCE})
        require(
            method != "draft" or fields.get("model") is not None,
            'speculative_config: method "draft" needs a "model"',
        )
        for name in ("epsilon", "alpha"):
            require(
                config.typical is not None or name not in fields,
                f'speculative_config: {name} goes with "acceptance": "typical"',
            )
        is_tree = config.tree is None or isinstance(config.tree, (list, tuple))
        require(is_tree, f"speculative_config: tree must be a list, got {shown(config.tree)}")
        nodes = len(config.tree or ())
        if method == "lookahead":
            nodes = (config.window + config.num_guesses) * (config.ngram_size - 1)
        return dataclasses.replace(config, num_speculative_tokens=nodes) if nodes else config
