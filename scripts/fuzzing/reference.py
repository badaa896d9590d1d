"""What a completion must be, by plain numpy over the logits of the dense forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fuzzing.oracle import expect

TOLERANCE = 2e-3  # of logits of about one, between programs that sum in another order


class Reference:
    """The dense forward pass of one model, compiled once for one width."""

    def __init__(self, model: Any, params: Any, width: int) -> None:
        self.width = width
        self._run = jax.jit(model.logits)
        self._params = params

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns [len(tokens), V] float64 logits of a text."""
        padded = np.zeros(self.width, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._run(self._params, jnp.asarray(padded)), np.float64)[: len(tokens)]

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Returns the most likely continuation."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Returns log probabilities over the last axis."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def processed(
    x: np.ndarray,
    params: Any,
    prompt: Sequence[int],
    out: Sequence[int],
    ends: frozenset[int],
    bad: Sequence[Sequence[int]],
) -> np.ndarray:
    """Returns the logits of the token after prompt and out, constrained and penalised."""
    x = x.copy()
    if params.allowed_token_ids is not None:
        is_allowed = np.zeros(len(x), bool)
        is_allowed[list(params.allowed_token_ids)] = True
        x[~is_allowed] = -np.inf
    for word in bad:
        if len(word) == 1 or list(out[len(out) - len(word) + 1 :]) == list(word[:-1]):
            x[word[-1]] = -np.inf
    if len(out) < params.min_tokens:
        x[list(ends)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    seen = sorted({*prompt, *out})
    r = params.repetition_penalty
    x[seen] = np.where(x[seen] > 0, x[seen] / r, x[seen] * r)
    for token in set(out):
        x[token] -= params.frequency_penalty * list(out).count(token) + params.presence_penalty
    return x


def may_come(x: np.ndarray, token: int, params: Any) -> bool:
    """Whether the filters of a sampled request leave a token, give or take the tolerance."""
    if not np.isfinite(x[token]):
        return False
    scaled = x / params.temperature
    slack = TOLERANCE * 3 * max(1.0, abs(x[token])) / params.temperature
    p = np.exp(scaled - np.nanmax(scaled))
    keeps = np.ones(len(x), bool)
    if params.min_p > 0:
        keeps &= p >= params.min_p * np.exp(-slack)
    if 0 < params.top_k < len(x):
        keeps &= scaled >= np.sort(scaled)[-params.top_k] - slack
    above = p[keeps & (scaled > scaled[token] + slack)].sum() / p[keeps].sum()
    return bool(keeps[token]) and above < params.top_p + 0.01


def check_tokens(
    reference: Reference,
    prompt: Sequence[int],
    params: Any,
    completion: Any,
    *,
    eos: Sequence[int],
    bad: Sequence[Sequence[int]],
    is_exact: bool,
) -> None:
    """Checks each token of a completion against the constraints and the distribution."""
    out = list(completion.token_ids)
    logits = reference.logits([*prompt, *out])
    ends = frozenset((*(() if params.ignore_eos else eos), *params.stop_token_ids))
    for i, token in enumerate(out):
        expect(0 <= token < logits.shape[1], "a token outside the vocabulary", token)
        x = processed(logits[len(prompt) + i - 1], params, prompt, out[:i], ends, bad)
        expect(np.isfinite(x[token]), "a token that is banned", f"token {token} at {i}")
        if not is_exact:
            continue
        if params.temperature == 0:
            gap = np.max(x) - x[token]
            limit = TOLERANCE * max(1.0, abs(np.max(x))) * max(1.0, params.repetition_penalty)
            expect(gap <= limit, "a token that is not the best", f"{token} at {i}, gap {gap:.4g}")
        else:
            expect(may_come(x, token, params), "a token that filters cut", f"{token} at {i}")
    if completion.finish_reason == "error":
        x = processed(logits[-1], params, prompt, out, ends, bad)
        expect(
            not np.isfinite(x).any() and completion.error,
            "an error without reason",
            f"{completion.error} after {len(out)} tokens",
        )


def check_logprobs(
    reference: Reference, prompt: Sequence[int], params: Any, completion: Any, tolerance: float
) -> None:
    """Checks the log probabilities of a completion."""
    out = list(completion.token_ids)
    if params.logprobs is None:
        expect(completion.logprobs is None, "logprobs that nobody asked for")
        return
    expect(completion.logprobs is not None, "logprobs are missing")
    expect(len(completion.logprobs) == len(out), "logprobs of other length")
    table = log_softmax(reference.logits([*prompt, *out])[len(prompt) - 1 : -1])
    total = 0.0
    for i, (token, entry) in enumerate(zip(out, completion.logprobs, strict=True)):
        expect(token in entry, "logprobs without the sampled token", f"{token} at {i}")
        total += entry[token].logprob
        check_entry(table[i], entry, params.logprobs, tolerance)
    expect(
        abs(total - completion.cumulative_logprob) <= 1e-3 * max(1, abs(total)),
        "a cumulative_logprob that is not the sum",
        total,
        completion.cumulative_logprob,
    )


def check_entry(row: np.ndarray, entry: Any, wanted: int, tolerance: float) -> None:
    """Checks one position: as many as asked for, the largest, with the right values."""
    count = len(row) if wanted == -1 else wanted
    expect(count <= len(entry) <= count + 1, "another number of logprobs", len(entry), wanted)
    for token, value in entry.items():
        gap = abs(value.logprob - row[token])
        expect(gap <= tolerance, "a wrong logprob", token, value.logprob, row[token])
    best = np.sort(row)[::-1][:count]
    found = sorted((v.logprob for v in entry.values()), reverse=True)[:count]
    expect(np.allclose(best, found, atol=tolerance), "logprobs that are not the largest")


def check_end(
    prompt: Sequence[int],
    params: Any,
    completion: Any,
    *,
    eos: Sequence[int],
    tokenizer: Any,
    max_model_len: int,
) -> None:
    """Checks where a completion ended, the reason it gives and its text."""
    out, reason = list(completion.token_ids), completion.finish_reason
    room = max_model_len - len(prompt)
    limit = room if params.max_tokens is None else min(room, params.max_tokens)
    expect(len(out) <= limit, "more tokens than max_tokens", len(out), limit)
    if reason == "error":
        return
    ends = () if params.ignore_eos else tuple(eos)
    early = [
        i
        for i, t in enumerate(out)
        if i + 1 >= params.min_tokens and t in (*ends, *params.stop_token_ids)
    ]
    has_end = bool(early)
    expect(not early or early[0] == len(out) - 1, "tokens after an end", early, len(out))
    if has_end:
        expect(reason == "stop", "an end token without finish reason stop", reason)
        wanted = None if out[-1] in ends else out[-1]
        expect(completion.stop_reason == wanted, "a wrong stop_reason", completion.stop_reason)
    if reason == "length":
        expect(len(out) == limit and not has_end, "ended by length too early", len(out), limit)
    if reason == "stop" and not has_end:
        expect(completion.stop_reason in params.stop, "stopped by nothing", completion.stop_reason)
    expect(reason in ("stop", "length"), "another finish_reason", reason)
    if tokenizer is None or not params.detokenize:
        expect(completion.text == "", "text that nobody asked for")
        return
    shown = out[:-1] if has_end and not params.include_stop_str_in_output else out
    text = tokenizer.decode(shown, skip_special_tokens=params.skip_special_tokens)
    is_plain = all(stop.isascii() for stop in params.stop) and params.min_tokens == 0
    if not params.stop:
        expect(completion.text == text, "another text", completion.text, text)
    elif is_plain:
        _check_stops(text, params, completion, has_end)


def _check_stops(text: str, params: Any, completion: Any, has_end: bool) -> None:
    found = [(text.index(stop) + len(stop), stop) for stop in params.stop if stop in text]
    if has_end and not found:
        expect(completion.text == text, "another text", completion.text, text)
    elif found:
        end = min(found)[0]
        candidates = {
            text[: end if params.include_stop_str_in_output else end - len(stop)]
            for e, stop in found
            if e == end
        }
        expect(completion.text in candidates, "a text not cut at its stop", completion.text, text)
    else:
        expect(completion.finish_reason != "stop", "a stop string that is not there", text)
        expect(completion.text == text, "another text", completion.text, text)
