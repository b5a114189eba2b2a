"""The HTML report: one self-contained page from what run folders hold on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from toolkit.report import curves, plots, samples, tables
from toolkit.report.reading import Run, read_live, read_runs

HERE = Path(__file__).parent


def build(run_folders: Sequence[Path], *, title: str | None, max_samples: int) -> str:
    """The page of one run, or of several side by side; ``max_samples`` prompts are shown with their samples.

    It makes no request: scripts, styles and data are inside, about 4.8 MB of it plotly.js. Raises StoreError where a
    folder holds no finished evaluation.
    """
    return page_of(read_runs(run_folders), title, max_samples)


def build_live(run_folder: Path, *, version: str, max_samples: int) -> str:
    """The page of a run that may still go on, for the server of ``duel watch``: it asks that server for a newer
    ``version`` of itself, and takes plotly.js from it. Raises StoreError where there is no run."""
    return page_of([read_live(run_folder)], None, max_samples, version)


def plotly_script() -> str:
    """plotly.js as its package ships it."""
    return str(get_plotlyjs())


def page_of(runs: Sequence[Run], title: str | None, max_samples: int, live: str | None = None) -> str:
    """The page of runs that were read; with ``live``, that of :func:`build_live`."""
    views = [_view(run) for run in runs]
    browser = samples.browser(runs, max_samples)
    between = tables.between_runs(runs)
    figures: dict[str, Any] = {}
    if len(runs) > 1:
        plots.share_axes([made for view in views for made in _figures(view)])
    for number, view in enumerate(views):
        for made in _figures(view):
            made["id"] = f"run{number}-{made['name']}"
            figures[made["id"]] = {"traces": made["traces"], "layout": made["layout"]}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent, "number": number_text, "count": count_text, "p": p_text}
    return environment.get_template("page.html.j2").render(
        title=title or " and ".join(run.name for run in runs) + ": RM + PPO against DPO",
        views=views,
        sections=_sections(views, bool(between), browser is not None),
        between=between,
        browser=browser,
        palette=plots.PALETTE,
        live=live,
        # Our own files; what a model or a data set wrote goes through autoescape or _embed.
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        live_script=Markup((HERE / "live.js").read_text(encoding="utf-8")) if live is not None else "",
        plotly=Markup(plotly_script()) if figures and live is None else "",
        figures=_embed({"figures": figures, "palette": plots.PALETTE}),
        samples=_embed(browser) if browser else "",
    )


def _view(run: Run) -> dict[str, Any]:
    """Everything that the template shows of one run; None or empty where the run lacks it."""
    return {
        "name": run.name,
        "confidence": run.confidence,
        "progress": tables.progress(run),
        "verdict": tables.verdict(run) if "verdict" in run.results else None,
        "policies": tables.policies(run),
        "win_rates": tables.win_rates(run),
        "frontier": plots.frontier(run),
        "overoptimization": plots.overoptimization(run),
        "peaks": tables.peaks(run),
        "agreement": tables.agreement(run),
        "margins": plots.margins(run),
        "quality": tables.quality(run),
        "reliability": plots.reliability(run),
        "drift": tables.drift(run),
        "lengths": plots.lengths(run),
        "training": curves.training(run),
        "cost": tables.cost(run),
        "warnings": run.results["warnings"],
        "settings": tables.settings(run),
        "data": tables.data(run),
        "reproduction": tables.reproduction(run),
    }


def _figures(view: dict[str, Any]) -> list[plots.Figure]:
    own = [view[name] for name in ("frontier", "overoptimization", "margins", "reliability", "lengths")]
    own += [stage["figures"] for stage in view["training"]]
    return [made for group in own for made in group]


def _sections(views: list[dict[str, Any]], runs_differ: bool, has_samples: bool) -> list[tuple[str, str]]:
    """(id, title) of the sections that at least one run has data for, in the order of the page."""
    wanted = (
        ("progress", "Progress", ("progress",)),
        ("verdict", "Verdict", ("verdict",)),
        ("win-rates", "Win rates", ("win_rates",)),
        ("frontier", "Reward and KL", ("frontier",)),
        ("overoptimization", "Over-optimisation", ("overoptimization",)),
        ("agreement", "Implicit and explicit reward", ("agreement",)),
        ("quality", "Reward model quality", ("quality",)),
        ("drift", "Drift from SFT", ("drift",)),
        ("lengths", "Lengths", ("lengths",)),
        ("training", "Training", ("training",)),
        ("cost", "Cost", ("cost",)),
        ("warnings", "Warnings", ("warnings",)),
        ("settings", "Settings of the arms", ("settings",)),
        ("reproduction", "Data and reproduction", ("reproduction", "data")),
    )
    found = [(name, title) for name, title, keys in wanted if any(view[key] for view in views for key in keys)]
    if runs_differ:
        found.insert(1, ("between", "What differs between the runs"))
    return found + ([("samples", "Samples")] if has_samples else [])


def _embed(value: object) -> Markup:
    """JSON that cannot end the script element around it, nor open a comment in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def percent(value: float | None, digits: int = 1) -> str:
    """0.5156 as ``51.6%``; nothing for None."""
    return "" if value is None else f"{value:.{digits}%}"


def number_text(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Fixed digits with a true minus sign; nothing for None, and no negative zero."""
    if value is None:
        return ""
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def p_text(value: float | None) -> str:
    """Three digits of a p-value, which is never 0."""
    return "" if value is None else "<0.001" if value < 0.0005 else f"{value:.3f}"


def count_text(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
