"""Trains Medusa heads for SmolLM2 on its own greedy answers, on a CPU: one command, one recipe.

    python scripts/train_medusa_smollm2.py --prompts DIR --output heads

DIR has `t0_mix_3k.jsonl.gz` and `self_instruct_seed_tasks.jsonl` (yizhongw/self-instruct): prompts
that are not in Spec-Bench, on which `jinfer bench spec` measures. A run that was cut goes on where
it was. Further flags are those of `jinfer train-medusa`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jinfer.cli.main import main

NUM_PROMPTS = 1536
SHORTEST, LONGEST = 100, 400  # characters: the answers are to be learnt, not the prompts
MORE = "\n\nExplain your answer."  # most tasks of the mix ask for a word or two
RECIPE = {
    "model": "smollm2",
    "dtype": "float32",
    "num-heads": 3,
    "draft-vocab-size": 4096,
    "temperature": 0,
    "max-texts": NUM_PROMPTS,
    "max-tokens": 128,
    "max-model-len": 512,
    "max-num-seqs": 64,
    "max-num-batched-tokens": 160,  # 64 decodes and one short prompt
    "window": 384,
    "epochs": 4,
    "batch-size": 512,
    "tree-nodes": 63,
    "checkpoint-every": 100,
}


def read_prompts(folder: Path) -> list[str]:
    """Returns the seed tasks, and as many of the others, evenly spaced, as make `NUM_PROMPTS`."""
    seeds = [
        json.loads(line)
        for line in (folder / "self_instruct_seed_tasks.jsonl").read_text().splitlines()
    ]
    asked = [f"{s['instruction']}\n\n{s['instances'][0]['input']}".strip() for s in seeds]
    with gzip.open(folder / "t0_mix_3k.jsonl.gz", "rt") as file:
        others = [json.loads(line)["prompt"] for line in file]
    asked = [text for text in asked if len(text) <= LONGEST]
    others = [text + MORE for text in others if SHORTEST <= len(text) <= LONGEST]
    missing = NUM_PROMPTS - len(asked)
    return asked + [others[i * len(others) // missing] for i in range(missing)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args, others = parser.parse_known_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data = args.output / "prompts.jsonl"
    lines = [
        json.dumps({"messages": [{"role": "user", "content": text}]})
        for text in read_prompts(args.prompts)
    ]
    data.write_text("\n".join(lines) + "\n")
    recipe = [f"--{name}={value}" for name, value in RECIPE.items()]
    where = [f"--data={data}", f"--output={args.output}", "--shared-unembedding"]
    sys.exit(main(["train-medusa", *recipe, *where, *others]))
