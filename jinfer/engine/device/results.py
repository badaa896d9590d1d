"""Results of a step: from device arrays under way to what each request of its plan gets."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jinfer.engine.plan import Plan
from jinfer.steps import blocks


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Logprobs of one position.

    Attributes:
      token_id, logprob, rank: of the sampled (or given) token; rank 1 is the most likely.
      ids, logprobs: [k] the most likely tokens, best first; k = V for "all".
    """

    token_id: int
    logprob: float
    rank: int
    ids: np.ndarray
    logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step under way: its plan and the device arrays to fetch."""

    plan: Plan
    tokens: jax.Array
    counts: jax.Array | None
    guesses: jax.Array | None
    top: tuple[jax.Array, ...] | None
    full: jax.Array | None
    prompt_top: tuple[jax.Array, ...] | None
    prompt_full: jax.Array | None


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Fetched results, in the order of `plan.seqs`.

    Attributes:
      samples: token ids sampled for each sequence.
      is_sound: for each sequence, whether all its logits and hidden states were finite; if not,
        some of its samples are no tokens.
      logprobs: for each sequence one `TokenLogprobs` a sample, or None.
      prompt_logprobs: for each sequence `(position, TokenLogprobs)` of prompt tokens.
      guesses: for each sequence what may come next, see `tree_steps.tree_step`, or None.
    """

    samples: list[list[int]]
    is_sound: list[bool]
    logprobs: list[list[TokenLogprobs] | None]
    prompt_logprobs: list[list[tuple[int, TokenLogprobs]]]
    guesses: list[list[list[int]]] | None = None


def fetch(launched: Launched) -> StepResult:
    """Waits for a step and returns its results."""
    plan = launched.plan
    tokens = np.asarray(launched.tokens)
    counts = [seq.num_samples for seq in plan.seqs]
    if launched.counts is not None:
        counts = np.asarray(launched.counts).tolist()
    samples = [tokens[: counts[s], s].tolist() for s in range(len(plan.seqs))]
    is_sound = [
        bool((tokens[: max(1, counts[s]), s] != blocks.NOT_FINITE).all())
        for s in range(len(plan.seqs))
    ]
    return StepResult(
        samples,
        is_sound,
        _fetch_logprobs(launched, samples),
        _fetch_prompt_logprobs(launched),
        None if launched.guesses is None else np.asarray(launched.guesses).tolist(),
    )


def _fetch_logprobs(
    launched: Launched, samples: list[list[int]]
) -> list[list[TokenLogprobs] | None]:
    rows: list[list[TokenLogprobs] | None] = [None] * len(samples)
    if launched.top is None:
        return rows
    top = [np.asarray(x) for x in launched.top]
    full = None
    if launched.full is not None:
        full = np.asarray(launched.full)
        full = full.reshape(-1, full.shape[-1])
    size = launched.tokens.shape[1]
    for s, seq in enumerate(launched.plan.seqs):
        wanted = seq.request.params.logprobs
        if wanted is not None:
            rows[s] = [
                _token_logprobs(wanted, i * size + s, token, top, full)
                for i, token in enumerate(samples[s])
            ]
    return rows


def _fetch_prompt_logprobs(launched: Launched) -> list[list[tuple[int, TokenLogprobs]]]:
    rows: list[list[tuple[int, TokenLogprobs]]] = [[] for _ in launched.plan.seqs]
    if launched.prompt_top is None:
        return rows
    top = [np.asarray(x) for x in launched.prompt_top]
    full = None if launched.prompt_full is None else np.asarray(launched.prompt_full)
    begin = 0
    for s, seq in enumerate(launched.plan.seqs):
        prompt = seq.request.prompt_token_ids
        wanted = seq.request.params.prompt_logprobs
        if seq.wants_prompt_logprobs and wanted is not None:
            last = min(seq.start + seq.num_tokens, len(prompt) - 1)
            for position in range(seq.start + 1, last + 1):
                t = begin + position - 1 - seq.start
                entry = _token_logprobs(wanted, t, prompt[position], top, full)
                rows[s].append((position, entry))
        begin += seq.num_tokens
    return rows


def _token_logprobs(
    wanted: int, row: int, token: int, top: list[np.ndarray], full: np.ndarray | None
) -> TokenLogprobs:
    ids, logprobs, token_logprob, rank = (x[row] for x in top)
    if wanted == -1:
        assert full is not None
        ids = np.argsort(-full[row], kind="stable")
        logprobs = full[row][ids]
    else:
        ids, logprobs = ids[:wanted], logprobs[:wanted]
    return TokenLogprobs(token, float(token_logprob), int(rank), ids, logprobs)
