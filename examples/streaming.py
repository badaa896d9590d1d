"""Prints texts while they are made: python examples/streaming.py"""

from jinfer import LLM, SamplingParams

llm = LLM("smollm2")
params = SamplingParams(temperature=0, max_tokens=16)

# Each output holds what is new since the last one.
for delta in llm.stream("Once upon a time", params):
    print(delta.outputs[0].text, end="", flush=True)
print()

# Several prompts stream at once; request ids tell them apart, in the order of the prompts.
texts: dict[str, str] = {}
for delta in llm.stream(["The sun is", "The moon is"], params):
    texts[delta.request_id] = texts.get(delta.request_id, "") + delta.outputs[0].text
for request_id, text in texts.items():
    print(f"{request_id}: {text!r}")

# Closing an iterator early ends its requests and frees what they hold.
stream = llm.stream("Count: 1, 2, 3,", SamplingParams(temperature=0, max_tokens=1000))
print("first piece:", repr(next(stream).outputs[0].text))
stream.close()
print("still running:", llm.has_unfinished_requests())
