"""Asks two questions about one text, which is computed once: python examples/shared_prefix.py"""

from jinfer import LLM, SamplingParams

text = "The library opens at nine and closes at six. On Sundays it is closed. " * 4
llm = LLM("smollm2")
params = SamplingParams(temperature=0, max_tokens=8)
for question in ("When does it open?", "When does it close?"):
    output = llm.generate(f"{text}\nQuestion: {question}\nAnswer:", params)[0]
    num_tokens, num_cached = len(output.prompt_token_ids), output.num_cached_tokens
    print(f"{question} {output.outputs[0].text!r} ({num_cached} of {num_tokens} tokens cached)")
