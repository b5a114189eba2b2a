"""The power curves of simulated studies as an SVG: legible in light and dark, without a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WIDTH, HEIGHT = 860, 400
PANEL, TOP, TALL, LEFT, APART = 340, 62, 250, 70, 74  # of a panel: width, upper edge, height, left edge, distance
X_LOW, X_HIGH = 0.5, 0.8
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; }
.axis { stroke: #57606a; fill: none; }
.grid { stroke: #d0d7de; }
.line { fill: none; stroke-width: 2.2; }
.three { stroke: #b35900; } .five { stroke: #0969da; }
.few { stroke-dasharray: 6 4; }
.page { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .axis { stroke: #9198a1; } .grid { stroke: #30363d; } .page { fill: #0d1117; }
  .three { stroke: #f0883e; } .five { stroke: #58a6ff; }
}
"""


def svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """One panel for each seed effect; a line for each number of seeds and prompts."""
    effects = sorted({row["seed_sd"] for row in rows})
    panels = [_panel(rows, effect, LEFT + i * (PANEL + APART)) for i, effect in enumerate(effects)]
    what = "Share of simulated studies that find the better arm, against its true win rate"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{what}">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        *(line for panel in panels for line in panel),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _kind(seeds: int, prompts: int) -> str:
    return f"line {'three' if seeds == 3 else 'five'}{' few' if prompts == 100 else ''}"


def _panel(rows: Sequence[Mapping[str, Any]], effect: float, left: float) -> list[str]:
    def at(x: float, y: float) -> str:
        return f"{left + (x - X_LOW) / (X_HIGH - X_LOW) * PANEL:.1f},{TOP + (1 - y) * TALL:.1f}"

    out = [f'<text class="title" x="{left}" y="{TOP - 38}">Seed effect {effect:g} of a response\'s noise</text>']
    out.append(f'<text x="{left}" y="{TOP - 16}">studies that find the better arm</text>')
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        (x1, y), (x2, _) = (at(x, tick).split(",") for x in (X_LOW, X_HIGH))
        out.append(f'<line class="grid" x1="{x1}" y1="{y}" x2="{x2}" y2="{y}"/>')
        out.append(f'<text x="{left - 8}" y="{float(y) + 5:.1f}" text-anchor="end">{tick:.0%}</text>')
    for percent in range(50, 81, 5):
        x, y = at(percent / 100, 0.0).split(",")
        out.append(f'<line class="axis" x1="{x}" y1="{y}" x2="{x}" y2="{float(y) + 5:.1f}"/>')
        out.append(f'<text x="{x}" y="{float(y) + 21:.1f}" text-anchor="middle">{percent}%</text>')
    out.append(f'<polyline class="axis" points="{at(X_LOW, 1)} {at(X_LOW, 0)} {at(X_HIGH, 0)}"/>')
    middle = left + PANEL / 2
    out.append(f'<text x="{middle}" y="{TOP + TALL + 42}" text-anchor="middle">true win rate of the better arm</text>')
    for seeds, prompts in sorted({(row["seeds"], row["prompts"]) for row in rows}):
        line = [row for row in rows if (row["seeds"], row["prompts"], row["seed_sd"]) == (seeds, prompts, effect)]
        rates, found = np.transpose(sorted((row["true_win_rate"], row["rm_ppo"]) for row in line))
        within = [*rates[(rates > X_LOW) & (rates < X_HIGH)].tolist(), X_HIGH]
        shown = " ".join(at(x, float(np.interp(x, rates, found))) for x in (X_LOW, *within))
        out.append(f'<polyline class="{_kind(seeds, prompts)}" points="{shown}"/>')
    return out


def _legend() -> list[str]:
    out = []
    for i, (seeds, prompts) in enumerate(((3, 100), (3, 300), (5, 100), (5, 300))):
        x, y = 24 + 212 * i, HEIGHT - 20
        out.append(f'<line class="{_kind(seeds, prompts)}" x1="{x}" y1="{y}" x2="{x + 32}" y2="{y}"/>')
        out.append(f'<text x="{x + 40}" y="{y + 5}">{seeds} seeds, {prompts} prompts</text>')
    return out
