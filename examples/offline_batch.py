"""Answers a list of prompts in one batch: python examples/offline_batch.py"""

from jinfer import LLM, SamplingParams

prompts = [
    "The capital of France is",
    "The opposite of hot is",
    "Water freezes at",
]
llm = LLM("smollm2")
greedy = SamplingParams(temperature=0, max_tokens=8)
for output in llm.generate(prompts, greedy):
    completion = output.outputs[0]
    print(f"{output.prompt!r} -> {completion.text!r} ({completion.finish_reason})")

# One SamplingParams for each prompt. A seed makes a request independent of its batch mates.
sampled = [SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=8) for i in range(3)]
for output in llm.generate(prompts, sampled):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
