"""Measures how long callers wait while a device step sleeps: python scripts/bench_loop.py

    python scripts/bench_loop.py [--sleep 2] [--limit-ms 20] [--repeats 5] [--json FILE]

One step of a running engine sleeps. Meanwhile a thread, and then an asyncio task, adds requests,
aborts them, and reads outputs of other requests that were computed before that step. The table has
the median and the worst time of each call. Exits with 1 if one took longer than the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jinfer import AsyncLLM, SamplingParams  # noqa: E402
from jinfer.cli.bench.report import Row, add_json_argument, finish  # noqa: E402

RUNNING = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
PROMPT = "Once upon a time"
TIMEOUT_S = 60.0


class SleepingStep:
    """Makes the next device step of an engine sleep before it is launched.

    Args:
      engine: of the loop; `arm` is called in no step of it.
      seconds: how long.
    """

    def __init__(self, engine: Any, seconds: float) -> None:
        self.begun = threading.Event()
        self.ended = threading.Event()
        self._is_armed = False
        launch = engine.runner.launch

        def slow_launch(plan: Any) -> Any:
            if self._is_armed:
                self._is_armed = False
                self.begun.set()
                time.sleep(seconds)
                self.ended.set()
            return launch(plan)

        engine.runner.launch = slow_launch

    def arm(self) -> None:
        """Returns when a step sleeps."""
        self.begun.clear()
        self.ended.clear()
        self._is_armed = True
        if not self.begun.wait(TIMEOUT_S):
            raise TimeoutError("no step was made")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, GGUF file or folder")
    parser.add_argument("--sleep", type=float, default=2.0, help="seconds of the step (2)")
    parser.add_argument("--limit-ms", type=float, default=20.0, help="most that a call takes (20)")
    parser.add_argument("--repeats", type=int, default=5, help="sleeps for each kind of caller (5)")
    add_json_argument(parser)
    args = parser.parse_args(argv)
    engine = AsyncLLM(args.model, max_model_len=2048)
    step = SleepingStep(engine.llm.loop.engine, args.sleep)
    times: dict[str, list[float]] = {}
    for repeat in range(args.repeats + 1):
        found = measure_thread(engine, step) | asyncio.run(measure_asyncio(engine, step))
        if repeat:  # the first one warms up
            for name, seconds in found.items():
                times.setdefault(name, []).append(seconds * 1e3)
    engine.llm.close()
    rows = [
        Row(case=name, metric=metric, unit="ms", value=value(values), limit=args.limit_ms)
        for name, values in times.items()
        for metric, value in (("median", statistics.median), ("worst", max))
    ]
    words = argv if argv is not None else sys.argv[1:]
    command = " ".join(["python scripts/bench_loop.py", *words])
    finish(rows, command=command, json_file=args.json, is_printed=False, times_ms=times)
    print(f"{'call during a step of ' + format(args.sleep, 'g') + ' s':42} median ms  worst ms")
    for name, values in times.items():
        print(f"{name:42} {statistics.median(values):9.2f} {max(values):9.2f}")
    worst = max(max(values) for values in times.values())
    if worst > args.limit_ms:
        print(f"a call took {worst:.1f} ms, more than {args.limit_ms:g} ms")
        return 1
    return 0


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what a call returns, and its seconds."""
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def measure_thread(engine: AsyncLLM, step: SleepingStep) -> dict[str, float]:
    """Returns the seconds of each call in this thread."""
    llm, seconds = engine.llm, {}
    other, session = llm.submit(PROMPT, RUNNING), llm.session()
    session.add("read", PROMPT, RUNNING)
    next(other), session.read()
    wait_for_outputs(engine)
    step.arm()
    added, seconds["thread: submit"] = timed(lambda: llm.submit(PROMPT, RUNNING))
    _, seconds["thread: session.add"] = timed(lambda: session.add("added", PROMPT, RUNNING))
    _, seconds["thread: add_request"] = timed(lambda: llm.add_request("mine", PROMPT, RUNNING))
    output, seconds["thread: next(handle)"] = timed(lambda: next(other))
    [first, *_], seconds["thread: session.read"] = timed(session.read)
    _, seconds["thread: handle.abort"] = timed(added.abort)
    _, seconds["thread: session.abort"] = timed(lambda: session.abort("added"))
    _, seconds["thread: abort"] = timed(lambda: llm.abort("mine"))
    check_during(step, output, first)
    other.abort()
    session.close()
    return seconds


async def measure_asyncio(engine: AsyncLLM, step: SleepingStep) -> dict[str, float]:
    """Returns the seconds of each call in an event loop, and of one turn of that loop."""
    seconds = {}
    other = engine.generate(PROMPT, RUNNING, "other")
    await anext(other)
    await asyncio.to_thread(wait_for_outputs, engine)
    await asyncio.to_thread(step.arm)
    added, seconds["asyncio: generate"] = timed(lambda: engine.generate(PROMPT, RUNNING, "added"))
    begin = time.perf_counter()
    output = await anext(other)
    seconds["asyncio: anext(iterator)"] = time.perf_counter() - begin
    waiting = asyncio.ensure_future(anext(added))
    begin = time.perf_counter()
    await asyncio.sleep(0)
    seconds["asyncio: a turn of the event loop"] = time.perf_counter() - begin
    _, seconds["asyncio: abort"] = timed(lambda: engine.abort("added"))
    check_during(step, output)
    assert (await waiting).outputs[0].finish_reason == "abort"
    await other.aclose()
    return seconds


def wait_for_outputs(engine: AsyncLLM) -> None:
    """Returns when the engine has made some more tokens, which nobody reads."""
    wanted = engine.llm.get_metrics()["num_output_tokens"] + 8
    while engine.llm.get_metrics()["num_output_tokens"] < wanted:
        time.sleep(0.005)


def check_during(step: SleepingStep, *outputs: Any) -> None:
    """Raises if the step is over, so that nothing was measured, or no token was read."""
    if step.ended.is_set():
        raise RuntimeError("the step was over before the calls were made: give a longer --sleep")
    assert all(output.outputs[0].token_ids for output in outputs)


if __name__ == "__main__":
    sys.exit(main())
