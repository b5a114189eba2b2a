"""The figures of a process reward model as a table: of a run's report, and of its card on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.report.numbers import number, percent
from toolkit.report.sheets import Sheet, estimate_cells, interval_heading
from toolkit.report.tables import EstimateRow, EstimateTable

# Words, the path of the figure in a reward's part, its name among the differences, and whether it is a share of one.
FIGURES: list[tuple[str, tuple[str, ...], str, bool]] = [
    ("accuracy on steps", ("steps", "accuracy"), "accuracy", True),
    ("calling every step what most are", ("steps", "majority"), "", True),
    ("accuracy beyond that", ("steps", "over_majority"), "", True),
    ("F1 of the wrong steps", ("steps", "f1_wrong"), "", False),
    ("F1, mean of right and wrong steps", ("steps", "f1_macro"), "f1_macro", False),
    ("area under the ROC curve, steps", ("steps", "auc"), "auc", False),
    ("the same within prompts", ("steps", "auc_within_prompts"), "auc_within_prompts", False),
    ("first wrong step found, or none", ("first_error", "accuracy"), "first_error", True),
    ("calling every step right", ("first_error", "all_right"), "", True),
    ("solutions without a wrong step: area, by min", ("solutions", "min", "auc"), "", False),
    ("the same by product", ("solutions", "product", "auc"), "", False),
    ("the same by last", ("solutions", "last", "auc"), "", False),
]
COLUMNS = {
    "explicit": "process reward model",
    "implicit": "implicit, running sum",
    "implicit_own": "implicit, the step's own",
    "explicit_over_implicit": "model − running sum",
    "explicit_over_implicit_own": "model − step's own",
}


def figure(results: Mapping[str, Any], column: str, path: tuple[str, ...], name: str) -> Mapping[str, Any] | None:
    """One figure of a column of the table; None where the column lacks it."""
    part: Any = results[column]
    for key in (name,) if "_over_" in column else path:
        part = part.get(key) if part else None
    return part or None


def process_table(results: Mapping[str, Any]) -> EstimateTable | None:
    """The table of a run's results; None where the run trained no process reward model."""
    process = results.get("process")
    if not process:
        return None
    columns = [column for column in COLUMNS if process[column]]
    rows = [
        EstimateRow(words, is_share, cells)
        for words, path, name, is_share in FIGURES
        if any(cells := [figure(process, column, path, name) for column in columns])
    ]
    steps = process["explicit"]
    n_prompts = rows[0].cells[0]["n"] if rows and rows[0].cells[0] else 0
    return EstimateTable(
        [COLUMNS[column] for column in columns], rows, [(n_prompts, steps["n_steps"])], process["thresholds"]
    )


def process_sheets(results: Mapping[str, Any], confidence: float) -> list[Sheet]:
    """The same as text, with an interval beside each value: the rewards, and their differences."""
    bounds = interval_heading(confidence)
    rewards = [column for column in COLUMNS if results[column] and "_over_" not in column]
    differences = [column for column in COLUMNS if results[column] and "_over_" in column]
    sheets = []
    for title, columns in (("Labelled steps", rewards), ("Differences on the same steps", differences)):
        sheet = Sheet(title, ["", *(text for column in columns for text in (COLUMNS[column], bounds))])
        for words, path, name, is_share in FIGURES:
            form = percent if is_share else number
            cells = [estimate_cells(figure(results, column, path, name), form) for column in columns]
            if any(value != "-" for value, _ in cells):
                sheet.add_row(words, *(text for cell in cells for text in cell))
        sheets += [sheet] if sheet.rows else []
    return sheets
