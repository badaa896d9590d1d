"""Lets the model choose one of several answers: python examples/constrained_choice.py

`allowed_token_ids` bans every other token, on the device. It suits answers of one token each.
"""

from jinfer import LLM, SamplingParams

llm = LLM("smollm2")
tokenizer = llm.get_tokenizer()
choices = {}
for word in (" positive", " negative"):
    ids = tokenizer.encode(word, add_special_tokens=False)
    assert len(ids) == 1, f"{word!r} has {len(ids)} tokens: choose a word of one"
    choices[ids[0]] = word.strip()

params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=list(choices), logprobs=0)
for review in ("I loved every minute of it.", "It was boring and far too long."):
    prompt = f"Review: {review}\nSentiment (positive or negative):"
    completion = llm.generate(prompt, params)[0].outputs[0]
    print(f"{choices[completion.token_ids[0]]}: {review}")
