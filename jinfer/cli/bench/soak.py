"""`jinfer bench soak`: random load, aborts and failures on a tiny model, for minutes or days.

Greedy outputs are compared with the same requests run alone before, pages and rows are counted, and
this process's memory must not grow after the first tenth of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinfer.cli.bench.report import Row, finish
from jinfer.cli.terminal import check

SUMMARY = "random arrivals, aborts and failures in a tiny memory"
POISON = 1  # a token whose embedding is NaN
MAX_GROWTH_MB = 16.0
_VOCAB_SIZE, _MAX_LEN, _NUM_KNOWN = 512, 96, 24
_MB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer bench soak`."""
    parser.add_argument("--minutes", type=float, default=20.0, help="duration (default: 20)")
    parser.add_argument("--pages", type=int, default=20, help="KV pages of 8 tokens (default: 20)")
    parser.add_argument(
        "--max-num-seqs", type=int, default=8, help="most sequences in one step (default: 8)"
    )
    parser.add_argument(
        "--max-waiting", type=int, default=40, help="most open requests (default: 40)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the load (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Runs random requests on an engine and counts errors.

    Requests arrive and are aborted at any time, share prefixes, have several samples, outgrow the
    memory (and are preempted), or hold a token that computes NaN; now and then a step fails or the
    cache is reset. The bench fails if a token is wrong, a page is lost, a request is stuck or ends
    wrongly, or the process's memory grows.
    """
    with _errors_only():
        soak = _Soak(args)
        soak.run(args.minutes * 60)
    rows = soak.rows()
    finish(
        rows,
        command=f"jinfer bench soak --minutes {args.minutes:g} --seed {args.seed}",
        json_file=args.json,
        rss_mb=[round(value, 1) for value in soak.rss_mb],
    )
    bad = [row.metric for row in rows if row.limit is not None and row.value > row.limit]
    if bad:
        raise RuntimeError(f"the soak failed: {', '.join(bad)}")
    return 0


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Silences warnings, since the load fails on purpose thousands of times."""
    logger = logging.getLogger("jinfer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _make_llm(args: argparse.Namespace) -> Any:
    import jax
    import jax.numpy as jnp

    from jinfer import LLM
    from jinfer.config.model import ModelConfig
    from jinfer.models.model import Model

    model = Model(
        ModelConfig(
            family="llama",
            vocab_size=_VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            max_position_embeddings=_MAX_LEN,
        )
    )
    params = model.init(jax.random.key(0))
    embed = params["embed"]["w"].at[POISON].set(jnp.nan)
    params = {**params, "embed": {**params["embed"], "w": embed}}
    return LLM(
        model,
        params=params,
        max_model_len=_MAX_LEN,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=16,
        block_size=8,
        num_gpu_blocks_override=args.pages,
        skip_tokenizer_init=True,
    )


class _Soak:
    """The load, the expected outputs, and the errors found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.llm, self.max_waiting = _make_llm(args), args.max_waiting
        self.draw = random.Random(args.seed)
        self.live: dict[
            str, tuple[float, list[int] | None, bool]
        ] = {}  # since, tokens, is poisoned
        self.num_added = self.num_finished = self.num_aborted = self.num_poisoned = 0
        self.num_wrong = self.num_unexpected = self.num_steps = self.num_checks = 0
        self.num_stuck = self.num_tokens = self.num_resets = 0
        self.longest_s = self.seconds = 0.0
        self.rss_mb: list[float] = []
        self.llm.warmup()
        beginnings = [self._tokens(self.draw.choice((5, 16, 24, 40))) for _ in range(6)]
        self.known = []
        for _ in range(_NUM_KNOWN):
            prompt = self.draw.choice(beginnings) + self._tokens(self.draw.randint(1, 12))
            params = self._params(self.draw.randint(1, 40), temperature=0)
            [output] = check(self.llm.generate([prompt], params, use_tqdm=False))
            self.known.append((prompt, params, output.outputs[0].token_ids))
        self.llm.reset_prefix_cache()
        self.num_compiled = self.llm.num_compilations

    def _tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(POISON + 1, _VOCAB_SIZE) for _ in range(count)]

    def _params(self, max_tokens: int, **fields: Any) -> Any:
        from jinfer import SamplingParams

        return SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, logit_bias={POISON: -1e9}, **fields
        )

    def run(self, seconds: float) -> None:
        """Runs the load for `seconds`, then lets all requests end."""
        begin = time.monotonic()
        next_look = next_note = begin
        while (now := time.monotonic()) - begin < seconds:
            self._disturb()
            self._step()
            if now >= next_look:
                next_look = now + 0.5
                self._look()
            if now >= next_note:
                next_note = now + max(seconds / 120, 0.5)
                self._note_memory()
        deadline = time.monotonic() + 120
        while self.llm.has_unfinished_requests() and time.monotonic() < deadline:
            self._step()
        while self.llm.loop.engine.has_work() and time.monotonic() < deadline:
            self.llm.step()
        self._look()
        self._note_memory()
        self.seconds = time.monotonic() - begin

    def _disturb(self) -> None:
        draw = self.draw
        if len(self.live) < self.max_waiting and draw.random() < 0.3:
            for _ in range(draw.choice((1, 1, 1, 6))):
                self._add()
        if self.live and draw.random() < 0.03:
            request_id = draw.choice(tuple(self.live))
            self.llm.abort(request_id)
            del self.live[request_id]
            self.num_aborted += 1
        if draw.random() < 0.001:
            self.llm.reset_prefix_cache()
            self.num_resets += 1
        if draw.random() < 0.0005:
            self.llm.loop.call(self.llm.loop.engine.lose_steps)

    def _add(self) -> None:
        draw = self.draw
        request_id, expected, is_poisoned = str(self.num_added), None, False
        if draw.random() < 0.6:
            prompt, params, expected = draw.choice(self.known)
        else:
            prompt = list(draw.choice(self.known)[0]) + self._tokens(draw.randint(1, 20))
            params = self._params(draw.randint(1, 50), n=draw.choice((1, 1, 2, 3)), temperature=1.0)
            is_poisoned = draw.random() < 0.05
            if is_poisoned:
                prompt[draw.randrange(len(prompt))] = POISON
        request: Any = {"prompt_token_ids": prompt}
        if draw.random() < 0.1:
            request["cache_salt"] = draw.choice("ab")
        self.llm.add_request(request_id, request, params, priority=draw.choice((0, 0, 0, 1)))
        self.live[request_id] = (time.monotonic(), expected, is_poisoned)
        self.num_added += 1

    def _step(self) -> None:
        self.num_steps += 1
        for output in self.llm.step():
            if not output.finished:
                continue
            since, expected, is_poisoned = self.live.pop(output.request_id)
            self.longest_s = max(self.longest_s, time.monotonic() - since)
            self.num_finished += 1
            self.num_tokens += sum(len(c.token_ids) for c in output.outputs)
            reasons = {completion.finish_reason for completion in output.outputs}
            self.num_poisoned += is_poisoned
            self.num_unexpected += reasons != ({"error"} if is_poisoned else {"length"})
            if expected is not None:
                self.num_wrong += output.outputs[0].token_ids != expected

    def _look(self) -> None:
        self.llm.check_integrity()
        self.num_checks += 1
        self.num_stuck = max(self.num_stuck, int(self.llm.get_metrics()["num_stuck"]))

    def _note_memory(self) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rss_mb.append(pages * os.sysconf("SC_PAGE_SIZE") / _MB)

    def rows(self) -> list[Row]:
        """Returns the counts of work, and those that must be zero or small."""
        metrics = self.llm.get_metrics()
        num_lost = metrics["num_pages"] - metrics["num_free_pages"] - metrics["num_cached_pages"]
        begin = self.rss_mb[len(self.rss_mb) // 10 :]
        growth = max(0.0, max(begin[-len(begin) // 10 :]) - max(begin[: len(begin) // 10 + 1]))
        done = {
            "minutes": ("min", self.seconds / 60),
            "steps": ("1", self.num_steps),
            "requests_finished": ("1", self.num_finished),
            "requests_aborted": ("1", self.num_aborted),
            "requests_ended_by_nan": ("1", self.num_poisoned),
            "output_tokens": ("1", self.num_tokens),
            "preemptions": ("1", metrics["num_preemptions"]),
            "evicted_pages": ("1", metrics["num_evicted_pages"]),
            "cached_prompt_tokens": ("1", metrics["num_cached_tokens"]),
            "lost_steps": ("1", metrics["num_failed_steps"]),
            "cache_resets": ("1", self.num_resets),
            "integrity_checks": ("1", self.num_checks),
            "longest_request": ("s", self.longest_s),
            "memory": ("MB", self.rss_mb[-1]),
        }
        bounded = {
            "requests_with_wrong_tokens": ("1", self.num_wrong, 0),
            "requests_ended_otherwise": ("1", self.num_unexpected, 0),
            "requests_left": ("1", len(self.live), 0),
            "requests_stuck": ("1", self.num_stuck, 0),
            "pages_lost": ("1", num_lost, 0),
            "programs_compiled": ("1", self.llm.num_compilations - self.num_compiled, 0),
            "memory_growth": ("MB", growth, MAX_GROWTH_MB),
        }
        rows = [Row(case="soak", metric=m, unit=u, value=float(v)) for m, (u, v) in done.items()]
        return rows + [
            Row(case="soak", metric=m, unit=u, value=float(v), limit=float(limit))
            for m, (u, v, limit) in bounded.items()
        ]
