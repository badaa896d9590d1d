"""`LLM.beam_search`: runs the engine's beam searcher over prompts and makes the outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jinfer.config.beam_params import BeamSearchParams
from jinfer.config.fields import read_token_ids, require
from jinfer.config.outputs import BeamSearchOutput, BeamSearchSequence, Logprob
from jinfer.engine.beam.hypotheses import Finished, Token
from jinfer.engine.beam.searcher import BeamSearcher
from jinfer.engine.loop import EngineLoop
from jinfer.sampling.state import pack_bits
from jinfer.text.prompts import Prompt

logger = logging.getLogger(__name__)

PrefixAllowedTokens = Callable[[int, list[int]], Sequence[int]]
"""Takes a prompt's index and a beam's token ids (prompt included); returns the ids allowed next."""


def search(
    loop: EngineLoop,
    prompts: Sequence[Prompt],
    params: BeamSearchParams,
    *,
    tokenizer: Any | None,
    concurrency_limit: int | None,
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None,
    bar: Any,
) -> list[BeamSearchOutput]:
    """Runs one beam search per prompt to its end; see `LLM.beam_search`.

    Each search step runs in the engine's thread, between two steps of other requests.

    Args:
      loop: the engine's loop; its other requests continue meanwhile.
      prompts: one search each.
      params: shared by all searches.
      tokenizer: decodes the outputs; None for token ids only.
      concurrency_limit: most searches at a time.
      prefix_allowed_tokens_fn: restricts each beam; called in the engine's thread.
      bar: a progress bar over prompts.

    Raises:
      ValueError: a prompt cannot be served; no search starts.
      RuntimeError: no search can start though the engine is idle, or a step fails.
    """
    loop.refuse_own_thread()
    engine = loop.engine
    searcher = BeamSearcher(engine, params, concurrency_limit=concurrency_limit)
    for i, prompt in enumerate(prompts):
        masks = None
        if prefix_allowed_tokens_fn is not None:
            masks = _AllowedTokens(
                prefix_allowed_tokens_fn, i, prompt.token_ids, engine.runner.vocab_size
            )
        searcher.add(prompt.token_ids, cache_salt=prompt.cache_salt, token_masks=masks)
    found: dict[int, BeamSearchOutput] = {}

    def step() -> tuple[list[tuple[int, list[Finished]]], bool]:
        try:
            return searcher.step(), engine.has_work()
        except BaseException:
            searcher.close()  # before the engine notices that the pool is lost
            raise

    try:
        while searcher.has_work():
            over, has_requests = loop.call(step)
            for i, texts in over:
                found[i] = _output(texts, prompts[i].token_ids, params, tokenizer)
                if not texts:
                    found[i].error = (
                        f"beam search over prompt {i}: allowed_token_ids and "
                        "prefix_allowed_tokens_fn left no token for any beam before a text had "
                        "ended; allow more of them"
                    )
                    logger.warning("%s", found[i].error)
                bar.update()
            if has_requests:
                loop.step()
            elif searcher.is_stuck:
                raise RuntimeError(
                    "no beam search can start though the engine is idle: its pages are held by "
                    "another search; end that one first"
                )
    finally:
        loop.call(searcher.close)
    return [found[i] for i in range(len(prompts))]


class _AllowedTokens:
    """Masks that allow one prompt's beams the tokens that a user's function returns."""

    def __init__(self, fn: PrefixAllowedTokens, idx: int, prompt: list[int], vocab_size: int):
        self._fn = fn
        self._idx = idx
        self._prompt = prompt
        self._vocab_size = vocab_size

    def mask(self, token_ids: Sequence[int], drafts: Sequence[int]) -> np.ndarray:
        """Returns the mask after a beam's tokens; see `TokenMasks`.

        Raises:
          ValueError, TypeError: the function did not return ids of the vocabulary.
        """
        allowed = self._fn(self._idx, [*self._prompt, *token_ids, *drafts])
        ids = read_token_ids("prefix_allowed_tokens_fn's result", allowed)
        foreign = [i for i in ids if i >= self._vocab_size][:1]
        require(
            not foreign,
            f"prefix_allowed_tokens_fn's result holds {foreign}: expected ids in "
            f"0..{self._vocab_size - 1}",
        )
        return pack_bits(ids, self._vocab_size)


def _output(
    texts: Sequence[Finished],
    prompt_token_ids: Sequence[int],
    params: BeamSearchParams,
    tokenizer: Any | None,
) -> BeamSearchOutput:
    """Makes the user's output from the finished beams, best first."""

    def decode(token_ids: list[int]) -> str | None:
        if tokenizer is None:
            return None
        return tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)

    def entry(token: Token) -> dict[int, Logprob]:
        return {token.token: Logprob(token.logprob, None, decode([token.token]))}

    def sequence(text: Finished) -> BeamSearchSequence:
        path = text.last.path()
        found = [node.token for node in path]
        is_hidden = text.is_stopped and not params.include_stop_str_in_output
        shown = found[:-1] if is_hidden else found
        return BeamSearchSequence(
            tokens=[*prompt_token_ids, *found],
            logprobs=[entry(node) for node in path],
            cum_logprob=text.total,
            score=text.score,
            num_prompt_tokens=len(prompt_token_ids),
            text=decode([*prompt_token_ids, *shown]),
            output_text=decode(shown),
            finish_reason="stop" if text.is_stopped else "length",
            stop_reason=found[-1] if found[-1] in params.stop_token_ids else None,
        )

    return BeamSearchOutput(sequences=[sequence(text) for text in texts[: params.num_returned]])
