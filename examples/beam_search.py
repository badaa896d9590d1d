"""Finds the most likely continuations: python examples/beam_search.py"""

from jinfer import LLM, BeamSearchParams

llm = LLM("smollm2")
params = BeamSearchParams(beam_width=4, max_tokens=8, length_penalty=1.0)
for text in llm.beam_search("The capital of France is", params)[0].sequences:
    print(f"{text.score:.3f} {text.output_text!r}")
