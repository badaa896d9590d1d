"""Quantizes a model to a folder and serves it: python examples/quantize_then_generate.py

Rounds weights to 8 bits in groups of 64, which needs no data. `jinfer quantize` has methods that
calibrate, too, and reports what they cost.
"""

import tempfile
from pathlib import Path

from jinfer import LLM, SamplingParams
from jinfer.cli.main import main

folder = Path(tempfile.mkdtemp()) / "smollm2-int8"
flags = "--method rtn --format int8-g64 --held-out 0"
status = main(["quantize", "--model", "smollm2", *flags.split(), "--output", str(folder)])
assert status == 0
print(sorted(path.name for path in folder.iterdir()))

llm = LLM(folder)
output = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))[0]
print(output.outputs[0].text)
