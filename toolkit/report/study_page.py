"""The page of a study: one self-contained HTML file from what ``study.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import StoreError
from toolkit.evals.study.study import SCHEMA_VERSION
from toolkit.report import study_plots, study_tables
from toolkit.report.figures import Figure
from toolkit.report.render import render
from toolkit.runs.store import STUDY_FILE
from toolkit.storage.integrity import read_sealed

SECTIONS = (
    ("verdict", "Verdict"),
    ("frontier", "Frontiers"),
    ("kl", "At equal KL"),
    ("compute", "At equal compute"),
    ("effort", "Tuning effort"),
    ("controls", "Where the gap comes from"),
    ("needed", "What would change the verdict"),
    ("trials", "Trials"),
    ("selection", "Splits and selection"),
    ("method", "How it was computed"),
)
"""(id, title) in the order of the page. Controls are there where the study has some."""


def is_study(folder: Path) -> bool:
    """Whether the folder is that of a study."""
    return (folder / STUDY_FILE).is_file()


def read_study_document(folder: Path) -> dict[str, Any]:
    """The ``study.json`` of a folder.

    Raises:
        StoreError: it is damaged, or of a version that this code does not know.
    """
    path = folder / STUDY_FILE
    fix = "write it again: duel study with --force"
    document = read_sealed(path, fix=fix)
    version = document.get("schema_version")
    # A document of the same version that an earlier duel wrote lacks what came later.
    if version != SCHEMA_VERSION or "gap" not in document or "needed" not in document.get("verdict", {}):
        raise StoreError(
            f"this study was written by another version of duel (layout {version})", where=str(path), fix=fix
        )
    return document


def build_study(folder: Path, *, title: str | None = None, live: str | None = None) -> str:
    """The page of the study in ``folder``. It makes no request: scripts, styles and data are inside.

    With ``live``, a version, it is a page of ``duel watch``.

    Raises:
        StoreError: the folder's ``study.json`` cannot be read.
    """
    document = read_study_document(folder)
    return study_page(document, title or study_title(document, folder), live)


def study_title(document: Mapping[str, Any], folder: Path) -> str:
    """The title that the study's recipe says, or one of its name; of a table without a recipe, the folder's name."""
    recipe = document["recipe"] or {}
    name = recipe.get("name") or folder.resolve().name
    return recipe.get("report", {}).get("title") or f"Study {name}: RM + PPO against DPO"


def study_page(document: Mapping[str, Any], title: str, live: str | None = None) -> str:
    """The page of a study's document."""
    headline, _, rest = str(document["verdict"]["sentence"]).partition(": ")
    by_section: dict[str, Sequence[Figure]] = {
        "frontier": _identified(study_plots.frontiers(document)),
        "kl": _identified(study_plots.matched(document, "matched_kl", "kl_nats")),
        "compute": _identified(study_plots.matched(document, "matched_compute", "train_tokens")),
        "effort": _identified(study_plots.effort(document)),
    }
    recipe = document["recipe"]
    return render(
        "study.html.j2",
        title=title,
        sections=[section for section in SECTIONS if section[0] != "controls" or document["controls"]],
        figures=[figure for figures in by_section.values() for figure in figures],
        live=live,
        document=document,
        headline=headline,
        rest=rest[:1].upper() + rest[1:],
        plots=by_section,
        comparisons=study_tables.comparisons(document),
        wall_range=study_tables.range_of("wall_s", document["verdict"]["matched_compute"]["wall_s"]),
        judges=study_tables.judges(document),
        needed=study_tables.needed(document),
        planned=study_tables.is_planned(document),
        trials=study_tables.trials(document),
        chosen=study_tables.chosen(document),
        splits=study_tables.splits_sentence(document),
        selection=study_tables.selection_sentence(document),
        gaps=study_tables.gaps(document),
        controls=study_tables.controls(document),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
    )


def _identified(figures: Sequence[Figure]) -> list[Figure]:
    return [replace(figure, id=f"study-{figure.name}") for figure in figures]
