"""Reads log probabilities, of generated tokens and of given texts: python examples/logprobs.py"""

import math

from jinfer import LLM, SamplingParams

llm = LLM("smollm2")

# The three most likely tokens at each position, and the sampled one.
params = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
completion = llm.generate("The capital of France is", params)[0].outputs[0]
for token_id, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
    shares = {
        entry.decoded_token: round(math.exp(entry.logprob), 3) for entry in candidates.values()
    }
    print(f"{candidates[token_id].decoded_token!r} of {shares}")

# Scoring: the log probability of each text under the model.
texts = ["Paris is the capital of France.", "France is the capital of Paris."]
score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
for output in llm.generate(texts, score):
    # Nothing predicts the first token, so its entry is None.
    pairs = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[1:]
    total = sum(entries[token_id].logprob for token_id, entries in pairs)
    print(f"{total / len(pairs):.3f} a token: {output.prompt}")
