"""Serves requests of asyncio tasks from one engine: python examples/asyncio_serving.py"""

import asyncio

from jinfer import AsyncLLM, SamplingParams

engine = AsyncLLM("smollm2", max_queued_requests=100)  # more than 100 waiting: QueueFullError
greedy = SamplingParams(temperature=0, max_tokens=12)


async def ask(prompt: str) -> str:
    """Reads outputs as they come; each holds all the text so far."""
    text = ""
    async for output in engine.generate(prompt, greedy):
        text = output.outputs[0].text
    return text


async def ask_briefly(prompt: str) -> int:
    """Leaves the iteration after three tokens, which ends the request."""
    num_tokens = 0
    async for output in engine.generate(prompt, SamplingParams(max_tokens=1000, ignore_eos=True)):
        num_tokens = len(output.outputs[0].token_ids)
        if num_tokens >= 3:
            break
    return num_tokens


async def abort_by_id() -> str | None:
    """Another task ends a request by its id; its reader gets a last output."""
    outputs = engine.generate("Count:", SamplingParams(max_tokens=1000, ignore_eos=True), "count")
    await anext(outputs)
    engine.abort("count")
    return [output.outputs[0].finish_reason async for output in outputs][-1]


async def main() -> None:
    # All tasks share the engine's batches.
    france, water, few, reason = await asyncio.gather(
        ask("The capital of France is"), ask("Water freezes at"), ask_briefly("Once"), abort_by_id()
    )
    print(f"{france!r}\n{water!r}\nstopped early: {few < 1000}\nfinish reason: {reason}")
    await engine.drain()  # takes no more requests, and waits for those under way
    await engine.close()


asyncio.run(main())
