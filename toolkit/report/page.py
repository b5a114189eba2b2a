"""The HTML report: one self-contained page from what run folders hold on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.report import curves, plots, provenance, sample_browser, tables
from toolkit.report.figures import Figure, overlaid, share_axes
from toolkit.report.process import process_table
from toolkit.report.reading import ResultRow, Run, read_live, read_runs
from toolkit.report.render import render
from toolkit.report.rounds import RoundTable, round_figures, round_table
from toolkit.report.sheets import Sheet, missing_estimates, outputs_sheets
from toolkit.report.temperatures import TemperatureTable, temperature_table


def build(run_folders: Sequence[Path], *, title: str | None, max_samples: int) -> str:
    """The page of one run, or of several side by side. ``max_samples`` prompts are shown with their samples.

    The page makes no request: scripts, styles and data are inside, about 4.8 MB of it plotly.js.

    Raises:
        StoreError: a folder that holds no finished evaluation.
    """
    return page_of(read_runs(run_folders), title, max_samples)


def build_live(run_folder: Path, *, version: str, max_samples: int) -> str:
    """The page of a run that may still go on, for the server of ``duel watch``.

    It takes plotly.js from that server and asks it for newer versions of itself than ``version``.

    Raises:
        StoreError: a folder without a run.
    """
    return page_of([read_live(run_folder)], None, max_samples, version)


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

    @property
    def figures(self) -> Iterator[Figure]:
        for group in (
            self.round_figures,
            self.frontier,
            self.overoptimization,
            self.best_of_n,
            self.margins,
            self.reliability,
            self.lengths,
        ):
            yield from group
        for stage in self.training:
            yield from stage.figures


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
        missing_estimates=missing_estimates(run.results["win_rates"]),
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


def page_of(runs: Sequence[Run], title: str | None, max_samples: int, live: str | None = None) -> str:
    """The page of runs that were read. With ``live``, a version, it is the page of :func:`build_live`."""
    views = [view_of(run, f"run{number}") for number, run in enumerate(runs)]
    between = provenance.between_runs(runs)
    sections = _sections(views, bool(between))
    together: dict[str, list[Figure]] = {}
    if len(runs) > 1:
        together = {
            "frontier": overlaid({view.name: view.frontier for view in views}),
            "lengths": overlaid({view.name: view.lengths for view in views}),
        }
        views = [replace(view, frontier=[], lengths=[]) for view in views]
        share_axes(figure for view in views for figure in view.figures)
    browser = sample_browser.browser(runs, max_samples)
    subjects = [provenance.subject(run) for run in runs]
    if title is None and len(runs) == 1 and subjects[0]:
        title, subjects = f"DPO and RM + PPO on {subjects[0]}", []
    return render(
        "page.html.j2",
        title=title or " and ".join(run.name for run in runs) + ": RM + PPO against DPO",
        sections=sections + ([("samples", "Samples")] if browser is not None else []),
        together=together,
        figures=[
            *(figure for figures in together.values() for figure in figures),
            *(figure for view in views for figure in view.figures),
        ],
        live=live,
        has_rft=any(row["policy"] == "rft" for run in runs for row in run.results["policies"]),
        samples=browser,
        subjects=list(dict.fromkeys(filter(None, subjects))),
        views=views,
        between=between,
        browser=browser,
    )


SECTIONS = (
    ("progress", "Progress", ("progress",)),
    ("verdict", "Verdict", ("verdict",)),
    ("win-rates", "Win rates", ("win_rates",)),
    ("temperatures", "Sampling temperature", ("temperatures",)),
    ("rounds", "Rounds", ("rounds",)),
    ("frontier", "Reward and KL", ("frontier",)),
    ("overoptimization", "Over-optimisation", ("overoptimization",)),
    ("best-of-n", "Best of n", ("best_of_n",)),
    ("agreement", "Implicit and explicit reward", ("agreement",)),
    ("quality", "Reward model quality", ("quality",)),
    ("process", "Rewards of steps", ("process",)),
    ("drift", "Drift from SFT", ("drift",)),
    ("lengths", "Lengths", ("lengths",)),
    ("training", "Training", ("training", "completions")),
    ("cost", "Cost", ("cost",)),
    ("settings", "Settings of the arms", ("settings",)),
    ("reproduction", "Data and reproduction", ("reproduction", "data")),
)
"""(id, title, the fields of :class:`View` that it shows), in the order of the page."""


def _sections(views: Sequence[View], runs_differ: bool) -> list[tuple[str, str]]:
    """(id, title) of the sections for which at least one run has data."""
    shown = [
        (name, title)
        for name, title, fields in SECTIONS
        if any(getattr(view, field) for view in views for field in fields)
    ]
    if runs_differ:
        shown.insert(1, ("between", "What differs between the runs"))
    return shown
