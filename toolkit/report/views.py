"""What the report shows of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolkit.report import curves, plots, provenance, tables
from toolkit.report.figures import Figure
from toolkit.report.process import process_table
from toolkit.report.reading import ResultRow, Run
from toolkit.report.rounds import RoundTable, round_figures, round_table
from toolkit.report.sheets import Sheet, missing_estimates, outputs_sheets, with_names
from toolkit.report.temperatures import TemperatureTable, temperature_table


@dataclass(frozen=True)
class View:
    """Everything that the template shows of one run. A part is None or empty where the run lacks it."""

    name: str
    confidence: float
    progress: list[provenance.StageProgress]
    verdict: tables.Verdict | None
    differences: list[ResultRow]
    policies: tables.PolicyTable
    win_rates: list[tables.WinRateRow]
    temperatures: TemperatureTable | None
    missing_estimates: list[str]
    judges: list[ResultRow]
    rounds: RoundTable | None
    round_figures: list[Figure]
    frontier: list[Figure]
    overoptimization: list[Figure]
    best_of_n: list[Figure]
    peaks: list[str]
    agreement: tables.EstimateTable | None
    margins: list[Figure]
    quality: tables.EstimateTable | None
    process: tables.EstimateTable | None
    reliability: list[Figure]
    outputs: list[Sheet]
    drift: tables.DriftTable | None
    lengths: list[Figure]
    training: list[curves.StageCurves]
    completions: list[ResultRow]
    cost: provenance.Cost | None
    warnings: list[str]
    settings: provenance.ArmSettings | None
    data: provenance.DataSummary | None
    reproduction: provenance.Reproduction | None


def view_of(run: Run, prefix: str) -> View:
    """``prefix`` begins the ids of the figures, which are unique on the page."""

    def identified(figures: Sequence[Figure]) -> list[Figure]:
        return [replace(figure, id=f"{prefix}-{figure.name}") for figure in figures]

    return View(
        name=run.name,
        confidence=run.confidence,
        progress=provenance.progress(run),
        verdict=tables.verdict(run) if "verdict" in run.results else None,
        differences=run.results.get("arm_differences", []),
        policies=tables.policies(run),
        win_rates=tables.win_rates(run),
        temperatures=temperature_table(run.results),
        missing_estimates=missing_estimates(with_names(run.results["win_rates"])),
        judges=run.results.get("judge_tests", []),
        rounds=round_table(run.results),
        round_figures=identified(round_figures(run)),
        frontier=identified(plots.frontier(run)),
        overoptimization=identified(plots.overoptimization(run)),
        best_of_n=identified(plots.best_of_n(run)),
        peaks=tables.peaks(run),
        agreement=tables.agreement(run),
        margins=identified(plots.margins(run)),
        quality=tables.quality(run),
        process=process_table(run.results),
        reliability=identified(plots.reliability(run)),
        outputs=outputs_sheets(run.results.get("reward_outputs"), run.confidence),
        drift=tables.drift(run),
        lengths=identified(plots.lengths(run)),
        training=[replace(stage, figures=identified(stage.figures)) for stage in curves.training(run)],
        completions=run.completions,
        cost=provenance.cost(run),
        warnings=tables.warnings(run),
        settings=provenance.settings(run),
        data=provenance.data(run),
        reproduction=provenance.reproduction(run),
    )
