"""What every figure of the report is made of: Plotly traces and layouts as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolkit.files import fingerprint

Trace = dict[str, Any]
"""One Plotly trace."""
Layout = dict[str, Any]
"""A Plotly layout, or a part of one."""
# The dashes of several runs in one figure, in their order.
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Figure:
    """A figure of the page. ``name`` becomes part of the element's ``id``, and ``alt`` says in words what is drawn."""

    name: str
    title: str
    alt: str
    traces: list[Trace]
    layout: Layout
    note: str = ""
    id: str = ""


def of_judge(name: str, judge: str) -> str:
    """The name of a judge's figure: figures of several runs are joined by name, and their judges may differ."""
    return f"{name}-{fingerprint(judge)}"


def axis(title: str, **more: Any) -> Layout:
    return {"title": {"text": title}, **more}


def level(y: float) -> Layout:
    """A dotted line across the figure at this height."""
    line = {"color": "@muted", "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line, "layer": "below"}


def interval_bars(points: Sequence[tuple[float, Mapping[str, Any]]], color: str) -> Trace:
    """Error bars from ``ci_low`` to ``ci_high`` of each (value, estimate). There is no bar without an interval."""
    up = [None if e["ci_high"] is None else e["ci_high"] - value for value, e in points]
    down = [None if e["ci_low"] is None else value - e["ci_low"] for value, e in points]
    bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return bars | {"color": f"{color}/0.45", "thickness": 1, "width": 3}


def rounded(values: Iterable[float]) -> list[float]:
    """The values with five significant digits, which are more than a pixel shows, and a third of the bytes."""
    return [float(f"{value:.5g}") for value in values]


def share_axes(figures: Iterable[Figure]) -> None:
    """Give figures of the same name in several runs the same ranges, so that a reader can compare them."""
    by_name: dict[str, list[Figure]] = {}
    for figure in figures:
        by_name.setdefault(figure.name, []).append(figure)
    for group in by_name.values():
        for name in "xy":
            ends = [end for figure in group for trace in figure.traces for end in _ends(trace, name)]
            margin = 0.06 * (max(ends) - min(ends)) or 0.5
            for figure in group:
                figure.layout[f"{name}axis"].setdefault("range", [min(ends) - margin, max(ends) + margin])


def overlaid(by_run: Mapping[str, Sequence[Figure]]) -> list[Figure]:
    """One figure for those of the same name of several runs: colours stay, and each run has its dash.

    ``by_run`` has the figures of each run by its name, which becomes the ``meta`` of its traces.
    """
    by_name: dict[str, list[tuple[str, Figure]]] = {}
    for run, figures in by_run.items():
        for figure in figures:
            by_name.setdefault(figure.name, []).append((run, figure))
    dash_of = dashes(by_run)
    return [
        replace(
            group[0][1],
            id=f"all-{name}",
            alt=" ".join(f"{run}: {figure.alt}" for run, figure in group),
            traces=[_of_run(trace, run, dash_of[run]) for run, figure in group for trace in figure.traces],
            layout=_joined([figure.layout for _, figure in group]),
        )
        for name, group in by_name.items()
    ]


def dashes(runs: Iterable[str]) -> dict[str, str]:
    """The dash of each run, by its name."""
    return {run: DASHES[number % len(DASHES)] for number, run in enumerate(runs)}


def _of_run(trace: Trace, run: str, dash: str) -> Trace:
    named = trace | {"meta": run}
    if "hovertemplate" in trace:
        name, mark, extra = trace["hovertemplate"].partition("<extra>")
        named["hovertemplate"] = (
            name + mark + extra.replace("</extra>", (", " if extra[0] != "<" else "") + "%{meta}</extra>")
        )
    return named | {"line": trace["line"] | {"dash": dash}} if "lines" in trace.get("mode", "") else named


def _joined(layouts: Sequence[Layout]) -> Layout:
    """The first layout, with each of its ranges as wide as all of them together."""
    joined = dict(layouts[0])
    for name in ("xaxis", "yaxis"):
        ranges = [layout[name]["range"] for layout in layouts if "range" in layout[name]]
        if ranges:
            joined[name] = joined[name] | {"range": [min(low for low, _ in ranges), max(high for _, high in ranges)]}
    return joined


def _ends(trace: Trace, axis_name: str) -> list[float]:
    """The values of a trace on one axis, and the ends of their error bars."""
    values, bars = trace[axis_name], trace.get(f"error_{axis_name}", {})
    up = bars.get("array") or [None] * len(values)
    down = bars.get("arrayminus") or up
    out = list(values)
    out += [value + more for value, more in zip(values, up, strict=True) if more is not None]
    return out + [value - less for value, less in zip(values, down, strict=True) if less is not None]
