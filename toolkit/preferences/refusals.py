"""What is wrong with preference data, in words: rows, labels, and columns that no format has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from toolkit.errors import DataError
from toolkit.preferences.cells import RecordError, is_missing, parsed_number
from toolkit.preferences.columns import KNOWN_COLUMNS, Columns, is_known_column
from toolkit.preferences.formats import FORMATS, unnamed_prompts
from toolkit.preferences.loading import SourceRecords
from toolkit.preferences.rows import Prompt

MIN_LABELS = 8  # fewer that are all 0 or 1 may well be ties, and wins of the first response
FIRST_COLUMNS = 20  # that an error lists
MOST_LABELS = 7  # different values of a column that could be a label
LONGEST_LABEL = 20  # characters of one


def prompt_texts(prompt: Prompt) -> list[str]:
    """A prompt as text, or the contents of its messages."""
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def check_unicode(loaded: SourceRecords, number: int, texts: Iterable[str], column: str) -> None:
    """Raises DataError for a text with half of a surrogate pair."""
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                what = f"half of a Unicode surrogate pair (U+{ord(text[error.start]):04X}), which no tokenizer takes"
                raise row_error(loaded, number, what, column=column) from error


def row_error(loaded: SourceRecords, number: int, what: str, *, column: str = "", fix: str = "") -> DataError:
    """The error of a wrong record, with its place."""
    where = loaded.place(number) + (f", column {column!r}" if column else "")
    return DataError(what, where=where, fix=fix)


def refused(loaded: SourceRecords, number: int, error: RecordError) -> DataError:
    """The error of a record that cannot be read, with its place."""
    return row_error(loaded, number, error.what, column=error.column, fix=error.fix)


def check_label_base(loaded: SourceRecords, labels: Sequence[str], *, mappable: bool) -> None:
    """Refuse ``MIN_LABELS`` labels or more that are all 0, or all 0 or 1.

    Read as 1 = first and 0 = tie they would lose every second win, or all of them. ``mappable``: another column of the
    format can hold them.
    """
    if not labels:
        return
    values: list[object] = []
    for _, record in loaded.records:
        for column in labels:
            of_record = record.get(column)
            values += of_record if isinstance(of_record, list) else [of_record]
    numbers = [_label_number(value) for value in values if not is_missing(value)]
    if len(numbers) >= MIN_LABELS and 0.0 in numbers and set(numbers) <= {0.0, 1.0}:
        column = labels[0]
        fix = "write 1 where the first response is preferred, 2 where the second is, 0 or null where neither is"
        if mappable:
            fix = (
                f"if 0 = first and 1 = second, map it: columns: {{choice: {column}}}; if 1 = the first is better and "
                f"0 = the second, columns: {{probability: {column}}}; otherwise {fix}"
            )
        said = "0 or 1" if 1.0 in numbers else "0"
        what = f"every label in {column!r} is {said}, but 1 = first, 2 = second, 0 = tie is expected"
        raise DataError(what, where=loaded.name, fix=fix)


def _label_number(value: object) -> float:
    """A label as a number, whatever its type; -1 for a word."""
    number = float(value) if isinstance(value, bool) else parsed_number(value)
    return -1.0 if number is None else number


def no_usable_row(loaded: SourceRecords, counts: Mapping[str, Any]) -> DataError:
    reasons = {
        "n_unparsable": "without a shared prompt",
        "n_empty": "empty",
        "n_identical": "with identical responses",
        "n_single": "without another response to their prompt",
    }
    why = ", ".join(f"{counts[name]} {text}" for name, text in reasons.items() if counts[name])
    fix = "check which columns hold the prompt and the responses; `columns` maps their names"
    return DataError(f"no usable row of {len(loaded.records)}: {why}", where=loaded.name, fix=fix)


def unknown_format(name: str, columns: Columns) -> DataError:
    """The error of columns that no format has: what the data is instead, or which of its columns could hold what."""
    if unnamed := unnamed_prompts(columns):
        name_it = f"columns: {{prompt: {unnamed[0]}}} (--column prompt={unnamed[0]})"
        fix = f"{in_words(unnamed)} could be the prompt: {name_it}. If both texts begin with it, remove that column"
        return DataError("no column is known to hold the prompt of 'chosen' and 'rejected'", where=name, fix=fix)
    known = "".join(f"\n           {label}: {text}" for label, text in FORMATS.items())
    fix = _other_data(columns) or _misspelled(columns) or _candidates(columns)
    return DataError(
        f"not a known format of preference data: its columns are {in_words(columns.names)}",
        where=name,
        fix=f"{fix} Known formats:{known}",
    )


def _other_data(columns: Columns) -> str:
    """What to do with data that is no preference data, and is known by its columns."""
    if columns.has("generator_1", "generator_2", "preference"):
        return "recorded judgements without their texts are for `duel winrate`."
    if holds_steps(columns):
        return "it labels the steps of solutions: name it as `reward_model.steps`, with `reward_model.kind: process`."
    response = columns.first(("completion", "response"))
    if response and columns.has("label") and columns.prompts:
        return (
            f"it labels single responses ({response!r} is good or bad), and a preference needs two responses to a "
            "prompt: `duel filter --calibrate` reads it."
        )
    return ""


def holds_steps(columns: Columns) -> bool:
    """Whether the data labels the steps of a solution: PRM800K (both forms), TRL's stepwise data, Math-Shepherd."""
    if columns.has("next_response", "rating"):
        return True
    if any(isinstance(cell, Mapping) and "steps" in cell for cell in columns.cells("label")):
        return True
    if columns.holds_texts("completions") and columns.holds_list("labels"):
        return True
    return columns.has("input", "label", "task") and any("ки" in str(cell) for cell in columns.cells("input"))


def _misspelled(columns: Columns) -> str:
    """Columns that are spelled almost as known ones."""
    hints = []
    for column in columns.names[:FIRST_COLUMNS]:
        close = difflib.get_close_matches(column, KNOWN_COLUMNS, n=1, cutoff=0.9)
        if not close or is_known_column(column) or close[0] in columns.names:
            continue
        # response_j is no misspelled response_b, nor "answer" one of "answers": such names mean something else
        if close[0][:-1] != column[:-1] and close[0] not in (f"{column}s", column[:-1]):
            hints.append(f"{column!r}: did you mean {close[0]!r}?")
    return " ".join(hints)


def _candidates(columns: Columns) -> str:
    """How to map columns, and which could hold texts or labels."""
    texts, labels = [], []
    for column in columns.names:
        cells = columns.cells(column)
        values = {cell for cell in cells if isinstance(cell, str | int | float)}
        is_scalar = bool(values) and not any(isinstance(cell, list | Mapping) for cell in cells)
        repeats = len(values) <= MOST_LABELS and len(values) < len(cells)
        if is_scalar and repeats and max(len(str(value)) for value in values) <= LONGEST_LABEL:
            labels.append(column)
        elif columns.holds(column, str) or columns.holds_objects(column):
            texts.append(column)
    fix = (
        "map its columns with `columns` (--column), as in columns: {prompt: NAME, response_a: NAME, response_b: NAME, "
    )
    fix += "label: NAME}."
    if texts:
        fix += f" The prompt and the responses could be {in_words(texts)}."
    if labels:
        fix += f" The label could be {in_words(labels)}: label for 1, 2 and 0 = tie, choice for 0 and 1 = the second, "
        fix += "probability for 1 and 0 = the second, preference_strength for -3 to 3."
    return fix


def in_words(columns: Sequence[str]) -> str:
    """The names of columns, the first of them where there are many."""
    more = f" and {len(columns) - FIRST_COLUMNS:,} more" if len(columns) > FIRST_COLUMNS else ""
    return ", ".join(map(repr, columns[:FIRST_COLUMNS])) + more
