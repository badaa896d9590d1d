"""Holds a conversation of two turns: python examples/chat.py

The second turn finds most of its prompt in the prefix cache.
"""

from jinfer import LLM, SamplingParams

llm = LLM("smollm2")
params = SamplingParams(temperature=0, max_tokens=24)
messages = [{"role": "system", "content": "You answer in one short sentence."}]
for question in ("What is the capital of France?", "Which river flows through it?"):
    messages.append({"role": "user", "content": question})
    output = llm.chat(messages, params)[0]
    answer = output.outputs[0].text
    messages.append({"role": "assistant", "content": answer})
    num_tokens = len(output.prompt_token_ids)
    print(f"user: {question}\nassistant: {answer}")
    print(f"({output.num_cached_tokens} of {num_tokens} prompt tokens were cached)")
