"""Drafts several tokens a step and verifies them at once: python examples/speculation.py

The tokens are those of plain decoding; only their number a step changes.
"""

from jinfer import LLM, SamplingParams

prompt = (
    "Repeat this list three times: apple, pear, plum, apple, pear, plum, apple, pear, plum, apple,"
)
params = SamplingParams(temperature=0, max_tokens=32)

plain = LLM("smollm2").generate(prompt, params)[0].outputs[0]
# N-grams of the text itself are the drafts. "adaptive": False drafts in every step; by default
# the engine drafts as much as measured costs and acceptance say.
llm = LLM(
    "smollm2",
    speculative_config={"method": "ngram", "num_speculative_tokens": 4, "adaptive": False},
)
output = llm.generate(prompt, params)[0]
print(output.outputs[0].text)
print(f"{output.metrics.tokens_per_step:.2f} tokens a step")
print("same tokens as plain decoding:", output.outputs[0].token_ids == plain.token_ids)
