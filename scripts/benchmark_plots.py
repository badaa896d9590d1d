"""Draws a benchmark's ratios to its peers as SVG text; no plotting library."""

from __future__ import annotations

from html import escape
from typing import Any

BAR, GAP, LABEL, WIDTH, MARGIN = 16, 8, 430, 360, 70  # pixels
MET, MISSED, NO_GOAL, INK, GOAL = "#2a7d4f", "#b3541e", "#8899aa", "#222222", "#1a4fa3"


def draw(name: str, report: dict[str, Any]) -> str | None:
    """Returns an SVG of the rows that have a ratio, or None if no row has one.

    A bar is a row's ratio as its table has it: green if it meets the row's goal, red if it misses
    it, grey without a goal. A grey line marks 1, a blue mark the goal.
    """
    rows = [row for row in report["rows"] if row["ratio"] is not None]
    if not rows:
        return None
    most = max(1.0, *(max(row["ratio"], row.get("goal") or 0) for row in rows))
    height = len(rows) * (BAR + GAP) + 40
    total = LABEL + WIDTH + MARGIN

    def at(ratio: float) -> float:
        return round(LABEL + WIDTH * ratio / most, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" '
        f'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(name)}: ratio to the peer</title>",
        f'<rect width="{total}" height="{height}" fill="#ffffff"/>',
        f'<line x1="{at(1)}" y1="8" x2="{at(1)}" y2="{height - 28}" stroke="#999999"/>',
        f'<text x="{at(1)}" y="{height - 10}" text-anchor="middle" fill="{INK}">'
        "1x = the peer</text>",
    ]
    for i, row in enumerate(rows):
        top = 12 + i * (BAR + GAP)
        label = f"{row['metric']}: {row['case']}"
        label = label if len(label) <= 66 else label[:65] + "…"
        goal = row.get("goal")
        color = NO_GOAL if not goal else MET if row["ratio"] >= goal else MISSED
        width = round(at(row["ratio"]) - LABEL, 1)
        text = f'y="{top + 12}" fill="{INK}"'
        parts.append(f'<text x="{LABEL - 8}" {text} text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect x="{LABEL}" y="{top}" width="{width}" height="{BAR}" fill="{color}"/>')
        end = max(at(row["ratio"]), at(goal or 0)) + 6
        parts.append(f'<text x="{end}" {text}>{row["ratio"]:.2f}x</text>')
        if goal:
            x = at(goal)
            parts.append(
                f'<line x1="{x}" y1="{top - 3}" x2="{x}" y2="{top + BAR + 3}" stroke="{GOAL}" '
                'stroke-width="3"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"
