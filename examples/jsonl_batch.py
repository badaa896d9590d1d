"""Runs a resumable batch job over a JSONL file: python examples/jsonl_batch.py

The same job from a shell: jinfer generate --input prompts.jsonl --output results.jsonl
"""

import json
import tempfile
from pathlib import Path

from jinfer.cli.main import main

folder = Path(tempfile.mkdtemp())
source, results = folder / "prompts.jsonl", folder / "results.jsonl"
lines = [
    {"id": "plain", "prompt": "The capital of France is"},
    {"id": "chat", "messages": [{"role": "user", "content": "Name a color."}]},
    {"id": "own", "prompt": "One, two,", "sampling_params": {"max_tokens": 4}},
]
source.write_text("".join(json.dumps(line) + "\n" for line in lines))

job = ["generate", "--input", str(source), "--output", str(results), "--max-tokens", "8"]
assert main(job) == 0
for line in results.read_text().splitlines():
    result = json.loads(line)
    print(result["id"], "->", repr(result["outputs"][0]["text"]))

# Lines that have a result are not done again, so that a killed job continues where it was.
assert main(job) == 0
