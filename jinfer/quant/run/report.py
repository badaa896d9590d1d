"""The report of a quantization run, as JSON, Markdown and an SVG plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinfer.quant.evaluate import Evaluation
from jinfer.quant.sensitivity import Choice
from jinfer.quant.solve import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Facts and measurements of a quantized model.

    Attributes:
      model: as the user named it.
      recipe: method and format, or the recipe's name.
      export: format of the files.
      calibration: source, sequences, tokens a sequence, seed; empty if none was used.
      rows: one for each linear, in order.
      quantized_params, quantized_bytes: of the quantized linears, resident on an accelerator.
      other_params, other_bytes: embeddings, norms, head, as resident.
      disk_bytes: all files of the artefact.
      quantized_disk_bytes: of the quantized linears in them; 0 if unknown (a GGUF file).
      seconds: by phase ("quantize", "evaluate", "save").
      peak_bytes: largest resident memory of the process, 0 if unknown.
      quality: name ("float", "quantized") -> Evaluation on held-out text.
      held_out: where that text is from.
      choices: what `sensitivity.choose` gave each group of linears; empty without target bits.
      rules: the recipe, in the form in which `--recipe` reads it.
      versions: of jax and jinfer.
    """

    model: str
    recipe: str
    export: str
    calibration: Mapping[str, Any]
    rows: Sequence[Row]
    quantized_params: int
    quantized_bytes: int
    other_params: int
    other_bytes: int
    disk_bytes: int
    quantized_disk_bytes: int
    seconds: Mapping[str, float]
    peak_bytes: int
    quality: Mapping[str, Evaluation]
    held_out: str
    versions: Mapping[str, str]
    choices: Sequence[Choice] = ()
    rules: Sequence[Mapping[str, Any]] = ()

    @property
    def bytes_per_param(self) -> float:
        """Resident bytes of a quantized parameter, scales included."""
        return self.quantized_bytes / max(self.quantized_params, 1)

    @property
    def disk_bytes_per_param(self) -> float | None:
        """Bytes on disk of a quantized parameter, scales included; None if unknown."""
        return self.quantized_disk_bytes / max(self.quantized_params, 1) or None

    def summary(self) -> list[str]:
        """Returns a few lines for a terminal."""
        on_disk = self.disk_bytes_per_param
        lines = [
            f"{self.recipe} -> {self.export}: {self.bytes_per_param:.3f} bytes a quantized "
            f"parameter resident ({self.bytes_per_param * 8:.2f} bits)"
            + (f", {on_disk:.3f} on disk" if on_disk else "")
            + f", {self.quantized_params:,} of them; {self.disk_bytes:,} bytes on disk in all",
        ]
        if (ratio := self.error_ratio) is not None:
            lines.append(f"output error {ratio:.2f} times that of round-to-nearest (mean)")
        before, after = self.quality.get("float"), self.quality.get("quantized")
        if before is not None and after is not None:
            kl = f", KL {after.kl:.4f}, same top token {after.top1:.1%}" if after.kl else ""
            lines.append(
                f"perplexity {before.perplexity:.3f} -> {after.perplexity:.3f}{kl} "
                f"({after.num_scored} tokens of {self.held_out})"
            )
        folds = [row.fold_error for row in self.rows if row.fold_error is not None]
        if folds:
            lines.append(f"folding alone moved float outputs of blocks by at most {max(folds):.1e}")
        fallbacks = [row.module for row in self.rows if "->" in row.method]
        if fallbacks:
            lines.append(f"{len(fallbacks)} fell back to round-to-nearest: {', '.join(fallbacks)}")
        lines.append(
            ", ".join(f"{phase} {s:.1f} s" for phase, s in self.seconds.items())
            + (f", peak memory {self.peak_bytes / 2**30:.2f} GiB" if self.peak_bytes else "")
        )
        return lines

    @property
    def error_ratio(self) -> float | None:
        """Mean over linears of output error against round-to-nearest's; None without data."""
        ratios = [r.error / r.rtn_error for r in self.rows if r.error and r.rtn_error]
        return sum(ratios) / len(ratios) if ratios else None

    def to_json(self) -> str:
        """Returns all fields as JSON."""
        data = dataclasses.asdict(self)
        for name in ("bytes_per_param", "disk_bytes_per_param", "error_ratio"):
            data[name] = getattr(self, name)
        return json.dumps(data, indent=1)

    def to_markdown(self) -> str:
        """Returns tables of the model, its quality, and each linear."""
        lines = [f"# {self.model}, {self.recipe}", ""]
        lines += [f"- {line}" for line in self.summary()]
        if self.calibration:
            facts = ", ".join(f"{k} {v}" for k, v in self.calibration.items())
            lines.append(f"- calibrated on {facts}")
        lines.append(f"- {', '.join(f'{k} {v}' for k, v in self.versions.items())}")
        if self.quality:
            lines += ["", "| | perplexity | KL to float | same top token |", "|---|---|---|---|"]
            for name, e in self.quality.items():
                kl = "" if e.kl is None else f"{e.kl:.5f}"
                spread = "" if e.kl_se is None else f" ± {e.kl_se:.5f}"
                top1 = "" if e.top1 is None else f"{e.top1:.2%}"
                lines.append(f"| {name} | {e.perplexity:.3f} | {kl}{spread} | {top1} |")
        if self.choices:
            lines += ["", "| linears | KL of them alone at the lowest width | format |"]
            lines.append("|---|---|---|")
            for choice in self.choices:
                names = ", ".join(choice.modules)
                lines.append(f"| {names} | {choice.lowest_kl:.2e} | {choice.format} |")
        lines += ["", "| linear | method | format | bits | error | / rtn | notes |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in self.rows:
            error = "" if row.error is None else f"{row.error:.4f}"
            ratio = f"{row.error / row.rtn_error:.2f}" if row.error and row.rtn_error else ""
            lines.append(
                f"| {row.module} | {row.method} | {row.format} | {row.bits:.2f} | {error} | "
                f"{ratio} | {'; '.join(row.notes)} |"
            )
        return "\n".join(lines) + "\n"

    def to_svg(self) -> str:
        """Returns a plot of each linear's output error by layer, with round-to-nearest's."""
        return plot_errors(self.rows, f"{self.model}: {self.recipe}")


_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3")


def plot_errors(rows: Sequence[Row], title: str) -> str:
    """Returns an SVG: relative output error by layer, one line per kind of linear; dashed: rtn."""
    width, height, left, bottom = 760, 360, 60, 40
    lines: dict[str, list[tuple[int, float, float | None]]] = {}
    for row in rows:
        if row.error is not None:
            _, layer, part = row.module.split(".", 2)
            lines.setdefault(part, []).append((int(layer), row.error, row.rtn_error))
    top = max([max(e, r or 0.0) for points in lines.values() for _, e, r in points] or [1.0]) * 1.05
    last = max([layer for points in lines.values() for layer, _, _ in points] or [1]) or 1

    def place(layer: int, error: float) -> str:
        x = left + (width - left - 130) * layer / last
        return f"{x:.1f},{height - bottom - (height - bottom - 40) * error / top:.1f}"

    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{escaped}</text>',
        f'<text x="{width / 2 - 60}" y="{height - 8}">layer</text>',
        f'<text transform="translate(14,{height / 2 + 60}) rotate(-90)">'
        f"relative output error (dashed: round-to-nearest)</text>",
    ]
    for i in range(5):
        y = float(place(0, top * i / 4).split(",")[1])
        out.append(f'<line x1="{left}" x2="{width - 130}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{top * i / 4:.3f}</text>')
    for i, (part, points) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        line = " ".join(place(layer, e) for layer, e, _ in points)
        plain = " ".join(place(layer, r) for layer, _, r in points if r is not None)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(
            f'<polyline points="{plain}" fill="none" stroke="{colour}" stroke-dasharray="4 3"/>'
        )
        y = 50 + 18 * i
        out.append(f'<rect x="{width - 120}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        out.append(f'<text x="{width - 104}" y="{y}">{part}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
