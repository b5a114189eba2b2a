"""The HTML page of the run, from what the stages before it left on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.files import write_text
from toolkit.progress import Reporter
from toolkit.recipe.schema import ReportSection
from toolkit.report.page import build

LARGE_BYTES = 6_000_000


def run(settings: Any, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``report.html``. Raises StoreError where the run folder holds no finished evaluation."""
    section: ReportSection = settings.report
    page = build([inputs["evaluate"].parent], title=section.title, max_samples=section.max_samples)
    write_text(out / "report.html", page)
    size = len(page.encode())
    if size > LARGE_BYTES:
        reporter.line(f"the report is {size / 1e6:.1f} MB: lower report.max_samples for a smaller one")
    return {"tokens": 0}
