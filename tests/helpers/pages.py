"""Markdown pages as data: their fenced blocks, in order, with the marks that stand before them."""

import dataclasses
import re
from pathlib import Path

# Why a block of a page cannot run in a test; a page names one in <!-- not run: NAME --> before it.
REASONS = {
    "gpu": "needs an NVIDIA GPU",
    "tpu": "needs a TPU",
    "install": "installs packages; .ci/run does that in fresh environments",
    "hub": "fetches a model from the Hugging Face hub",
    "files": "needs files of the reader's own",
    "hours": "takes hours",
    "peer": "is code for another library, shown for comparison",
}
_FENCE = re.compile(
    r"(?:^<!-- (?:not run: (?P<reason>[a-z]+)|(?P<apart>in its own process)) -->\n+)?"
    r"^```(?P<language>[a-z]*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Attributes:
      line: number of its first line in the page.
      language: "python", "sh", "json", "text", "mermaid" or "".
      title: file name of the block, or None.
      reason: key of REASONS if the block cannot run, else None.
      is_apart: its commands run in a process of their own, with fully optimized programs. Tests
        compile quickly to slow programs, which does not suit commands that compute for long.
      text: what stands in it.
    """

    line: int
    language: str
    title: str | None
    reason: str | None
    is_apart: bool
    text: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, continued lines joined, without comments."""
        if self.language not in ("sh", ""):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        fields = match.group("language", "title", "reason")
        found.append(Block(line, *fields, match["apart"] is not None, match["text"]))
    return found
