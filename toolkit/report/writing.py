"""Writing the page of a run, of several runs such as those of a sweep, or of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import StoreError
from toolkit.files import read_json, refuse_others_file, write_text
from toolkit.report.page import build
from toolkit.report.render import is_page
from toolkit.report.study_page import build_study, is_study
from toolkit.runs.store import SWEEP_FILE


def write_page(
    folders: Sequence[Path], out: Path | None, title: str | None, max_samples: int | None, force: bool
) -> Path:
    """Writes the page to ``out``, by default into the first folder, and returns its path.

    The folder of a sweep stands for its runs. Raises StoreError for a study beside others, for a sweep without runs,
    and where somebody else's file is in the place of the page, unless ``force``.
    """
    studies = [path for path in folders if is_study(path)]
    if studies and len(folders) > 1:
        fix = "give it alone: a study has a page of its own"
        raise StoreError("a study cannot stand beside others", where=str(studies[0]), fix=fix)
    target = out or folders[0] / ("report.html" if len(folders) == 1 else "report-side-by-side.html")
    refuse_others_file(target, force, is_page)
    if studies:
        page = build_study(folders[0], title=title)
    else:
        page = build([run for folder in folders for run in _runs_of(folder)], title=title, max_samples=max_samples)
    write_text(target, page)
    return target


def _runs_of(folder: Path) -> list[Path]:
    """The folders of a sweep's runs, which lie inside its own, or the folder itself."""
    record = folder / SWEEP_FILE
    if not record.is_file():
        return [folder]
    runs = [folder / Path(run["out"]).name for run in read_json(record)["runs"]]
    if not runs:
        raise StoreError("this sweep has no finished run", where=str(folder), fix="run the sweep again: it goes on")
    return runs
