"""Writing the page of a run, of runs side by side, or of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import StoreError
from toolkit.files import refuse_others_file, write_text
from toolkit.report.page import build
from toolkit.report.render import is_page
from toolkit.report.study_page import build_study, is_study


def write_page(folders: Sequence[Path], out: Path | None, title: str | None, max_samples: int, force: bool) -> Path:
    """Writes the page to ``out``, by default into the first folder, and returns its path.

    Raises StoreError for a study beside others, and where ``out`` is somebody else's file, unless ``force``.
    """
    studies = [path for path in folders if is_study(path)]
    if studies and len(folders) > 1:
        fix = "give it alone: a study has a page of its own"
        raise StoreError("a study cannot stand beside others", where=str(studies[0]), fix=fix)
    target = out or folders[0] / ("report.html" if len(folders) == 1 else "report-side-by-side.html")
    if out is not None:
        refuse_others_file(out, force, is_page)
    page = build_study(folders[0], title=title) if studies else build(folders, title=title, max_samples=max_samples)
    write_text(target, page)
    return target
