"""The HTML report: one self-contained page from what run folders hold on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from toolkit.recipe.schema import ReportSection
from toolkit.report import provenance, sample_browser, several
from toolkit.report.reading import Run, read_live, read_runs
from toolkit.report.render import render
from toolkit.report.views import View, view_of

LARGEST = 6_000_000  # bytes of a page that samples may fill


def build(run_folders: Sequence[Path], *, title: str | None, max_samples: int | None) -> str:
    """The page of one run, or of several. ``max_samples`` prompts at most are shown with their samples, by default as
    many as the recipe says, and of several recipes the largest number.

    There are fewer where the page would be larger than :data:`LARGEST` otherwise.

    The page makes no request: scripts, styles and data are inside, about 4.8 MB of it plotly.js.

    Raises:
        StoreError: a folder that holds no finished evaluation.
    """
    return page_of(read_runs(run_folders), title, max_samples)


def build_live(run_folder: Path, *, version: str, max_samples: int | None) -> str:
    """The page of a run that may still go on, for the server of ``duel watch``.

    It takes plotly.js from that server and asks it for newer versions of itself than ``version``.

    Raises:
        StoreError: a folder without a run.
    """
    return page_of([read_live(run_folder)], None, max_samples, version)


def page_of(runs: Sequence[Run], title: str | None, max_samples: int | None, live: str | None = None) -> str:
    """The page of runs that were read. With ``live``, a version, it is the page of :func:`build_live`."""
    views = [view_of(run, f"run{number}") for number, run in enumerate(runs)]
    between = provenance.between_runs(runs)
    sections = _sections(views, bool(between))
    drawn = several.figures_by_section(views)
    training = several.training_of(views)
    views = several.with_common_figures(views)
    title, subjects = _heading(runs, title)
    without_samples = partial(
        render,
        "page.html.j2",
        title=title,
        drawn=drawn,
        training=training,
        figures=[
            *(figure for figures in drawn.values() for figure in figures),
            *(figure for stage in training for figure in stage.figures),
            *(figure for view in views for figure in view.margins),
        ],
        live=live,
        has_rft=any(row["policy"] == "rft" for run in runs for row in run.results["policies"]),
        subjects=subjects,
        views=views,
        run_keys=several.run_keys(views),
        summaries=several.summaries(runs),
        between=between,
    )

    def page(browser: dict[str, Any] | None) -> str:
        shown = sections + ([("samples", "Samples")] if browser is not None else [])
        return without_samples(sections=shown, samples=browser, browser=browser)

    browser = sample_browser.browser(runs, _most_samples(runs) if max_samples is None else max_samples)
    html = page(browser)
    # Again where what the page says of fewer rows takes more bytes than they leave.
    while browser is not None and len(browser["rows"]) > 1 and (excess := len(html.encode()) - LARGEST) > 0:
        browser = sample_browser.browser(runs, sample_browser.n_rows_less(browser, excess))
        html = page(browser)
    return html


def _heading(runs: Sequence[Run], title: str | None) -> tuple[str, list[str]]:
    """The title, and what stands below it: a single run is called as its recipe says."""
    subjects = list(dict.fromkeys(filter(None, map(provenance.subject, runs))))
    if title is None and len(runs) == 1:
        title = runs[0].page_settings.get("title")
        if title is None and subjects:
            return f"DPO and RM + PPO on {subjects[0]}", []
    return title or f"{_named([run.name for run in runs])}: RM + PPO against DPO", subjects


def _most_samples(runs: Sequence[Run]) -> int:
    default = ReportSection().max_samples
    return max(int(run.page_settings.get("max_samples", default)) for run in runs)


def _named(runs: Sequence[str]) -> str:
    return " and ".join(runs) if len(runs) < 3 else f"{len(runs)} runs"


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
