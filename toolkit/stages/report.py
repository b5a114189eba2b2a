"""The HTML page of the run, from what the stages before it left on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.files import write_text
from toolkit.progress import Reporter
from toolkit.report.page import LARGEST, page_of
from toolkit.report.reading import RunFiles, read_files
from toolkit.runs.store import MANIFEST_FILE, RECIPE_FILE, RESULTS_FILE
from toolkit.stages.contexts import ReportContext


def run(context: ReportContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``report.html``. Raises StoreError where a file of the run is damaged.

    ``inputs`` are the folders of all stages before this one, and the run's manifest, results and resolved recipe.
    """
    files = RunFiles(
        results=inputs[RESULTS_FILE],
        manifest=inputs[MANIFEST_FILE],
        recipe=inputs[RECIPE_FILE],
        tables=inputs["evaluate"],
        stages=inputs,
    )
    page = page_of([read_files(files, context.name)], context.report.title, context.report.max_samples)
    write_text(out / "report.html", page)
    size = len(page.encode())
    if size > LARGEST:
        reporter.line(f"the report is {size / 1e6:.1f} MB, even with the samples of a single prompt")
    return {"tokens": 0}
