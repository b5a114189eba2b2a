"""Several runs on one page: their figures overlaid, what they have in common shown once, and a row of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolkit.report.curves import CURVES, StageCurves
from toolkit.report.figures import Figure, dashes, overlaid, share_axes
from toolkit.report.reading import ResultRow, Run
from toolkit.report.tables import verdict
from toolkit.report.views import View

# The field of a view that has the figures of a section.
FIGURES_OF_SECTION = {
    "rounds": "round_figures",
    "frontier": "frontier",
    "overoptimization": "overoptimization",
    "best-of-n": "best_of_n",
    "quality": "reliability",
    "lengths": "lengths",
}
# A dash as the lengths of its strokes and gaps in pixels.
STROKES = {
    "solid": "none",
    "dash": "7 4",
    "dot": "2 3",
    "dashdot": "7 3 2 3",
    "longdash": "12 4",
    "longdashdot": "12 3 2 3",
}


@dataclass(frozen=True)
class RunKey:
    """A run in the legend of overlaid figures. ``strokes`` is a ``stroke-dasharray``."""

    name: str
    strokes: str


@dataclass(frozen=True)
class Summary:
    """The row of a run among many. ``rate`` is the win rate of RM + PPO over DPO that the verdict rests on."""

    name: str
    headline: str
    winner: str
    judge: str
    rate: Mapping[str, Any]
    kl_nats: dict[str, float | None]


def figures_by_section(views: Sequence[View]) -> dict[str, list[Figure]]:
    """The figures above the tables of each section: those of the run, or of all runs overlaid."""
    if len(views) == 1:
        return {section: getattr(views[0], field) for section, field in FIGURES_OF_SECTION.items()}
    return {
        section: overlaid({view.name: getattr(view, field) for view in views})
        for section, field in FIGURES_OF_SECTION.items()
    }


def training_of(views: Sequence[View]) -> list[StageCurves]:
    """The training curves of the run, or of all runs overlaid, stage by stage."""
    if len(views) == 1:
        return views[0].training
    kinds = {stage.title: stage.kind for view in views for stage in view.training}
    curves_of = {view.name: {stage.title: stage.figures for stage in view.training} for view in views}
    return [
        StageCurves(kind, title, overlaid({name: by_title.get(title, []) for name, by_title in curves_of.items()}))
        for title, kind in sorted(kinds.items(), key=lambda item: list(CURVES).index(item[1]))
    ]


def with_common_figures(views: Sequence[View]) -> list[View]:
    """Views whose margins have the same axes; where two runs have the same margins, they are one figure."""
    if len(views) == 1:
        return list(views)
    share_axes(figure for view in views for figure in view.margins)
    first: list[Figure] = []

    def common(figure: Figure) -> Figure:
        for other in first:
            if replace(figure, id=other.id) == other:
                return other
        first.append(figure)
        return figure

    return [replace(view, margins=[common(figure) for figure in view.margins]) for view in views]


def run_keys(views: Sequence[View]) -> list[RunKey]:
    """The legend of the runs. Empty for one run."""
    if len(views) == 1:
        return []
    return [RunKey(name, STROKES[dash]) for name, dash in dashes(view.name for view in views).items()]


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """A row for each run, where they are too many to be read side by side."""
    return [_summary(run) for run in runs] if len(runs) > 2 else []


def _summary(run: Run) -> Summary:
    result, words = run.results["verdict"], verdict(run)
    rows: dict[str, ResultRow] = {row["policy"]: row for row in run.results["policies"]}
    # A rate by a training signal alone is no verdict. A run of an earlier duel does not list its judges.
    rate = result if result.get("judges", True) else {}
    return Summary(
        name=run.name,
        headline=words.headline,
        winner=words.winner,
        judge=rate.get("judge") or "",
        rate={"value": rate.get("win_rate"), "ci_low": rate.get("ci_low"), "ci_high": rate.get("ci_high")},
        kl_nats={arm: rows[arm]["kl_nats"] if arm in rows else None for arm in ("rm_ppo", "dpo")},
    )
