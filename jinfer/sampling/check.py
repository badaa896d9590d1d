"""Refuses sampling parameters that a model or the sampler cannot serve."""

from __future__ import annotations

from collections.abc import Sequence

from jinfer.config.fields import require
from jinfer.config.sampling_params import SamplingParams
from jinfer.sampling.state import SamplerLimits


def check_request(
    params: SamplingParams,
    vocab_size: int,
    *,
    eos_token_ids: Sequence[int] = (),
    bad_words_token_ids: Sequence[Sequence[int]] = (),
    limits: SamplerLimits | None = None,
) -> None:
    """Checks the parameters of a request against the model's vocabulary and the sampler's limits.

    Raises:
      ValueError: an id outside the vocabulary, more entries than `limits` allow, or constraints
        that leave no token to sample.
    """
    limits = limits or SamplerLimits()
    params.check_vocab(vocab_size)
    num_bias = len(params.logit_bias or ())
    require(
        num_bias <= limits.max_logit_bias,
        f"logit_bias has {num_bias} entries, at most {limits.max_logit_bias} are allowed; "
        f"to ban many tokens use allowed_token_ids",
    )
    for word in bad_words_token_ids:
        require(len(word) > 0, "bad_words: a word has no tokens")
        require(
            all(0 <= i < vocab_size for i in word),
            f"bad_words holds token ids outside the vocabulary of {vocab_size}: {list(word)}",
        )
        require(
            len(word) <= limits.max_bad_word_tokens,
            f"bad_words: a word of {len(word)} tokens exceeds the limit of "
            f"{limits.max_bad_word_tokens}; ban a shorter part of it",
        )
    num_long = sum(len(word) > 1 for word in bad_words_token_ids)
    require(
        num_long <= limits.max_bad_words,
        f"bad_words make {num_long} sequences of several tokens, at most "
        f"{limits.max_bad_words} are allowed; give fewer words",
    )
    singles = {word[0] for word in bad_words_token_ids if len(word) == 1}
    if params.allowed_token_ids is None:
        left = vocab_size - len(singles)
    else:
        allowed = set(params.allowed_token_ids) - singles
        if params.min_tokens:
            allowed -= set(eos_token_ids) | set(params.stop_token_ids)
        left = len(allowed)
    require(
        left > 0,
        "allowed_token_ids, bad_words and min_tokens together leave no token to sample",
    )
