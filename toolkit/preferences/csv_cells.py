"""Cells of a CSV file that hold JSON: which columns do, and what their cells say.

A cell is text, and text may begin with a bracket. A column holds lists where all of its first cells are JSON of what a
format has in that column.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from toolkit.errors import DataError
from toolkit.files import parse_json
from toolkit.preferences.cells import RecordError, excerpt
from toolkit.preferences.columns import LABELS, PROMPTS, is_known_column
from toolkit.preferences.rows import Record

CSV = (".csv", ".csv.gz")
FIRST_ROWS = 100  # those that tell what a column holds
# In these a list or an object is JSON, whatever the other cells are.
ALWAYS = frozenset(["responses", "comparisons", "gold", "ranks", "ranking", "scores", "labels", "completions", "steps"])
_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"')  # so they are JSON in every column
_FIX = "write JSON lines or Parquet instead, or json.dumps of each list (pandas writes lists as Python does)"


@dataclass(frozen=True)
class _Form:
    """What the cells of a column are JSON of, and how the same looks as Python writes it (None: it is text then)."""

    fits: Callable[[object], bool]
    python: re.Pattern[str] | None = None


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(fits, value))


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return ("role" in value and ("content" in value or "tool_calls" in value)) or {"from", "value"} <= value.keys()


def _are_turns(value: object) -> bool:
    """Pairs of a question and an answer; a first turn has none before it."""
    return value == [] or _is_list_of(_is_list_of(_is_text))(value)


def _written(start: str, end: str) -> re.Pattern[str]:
    return re.compile(rf"\s*{start}.*{end}\s*", re.DOTALL)


MESSAGES = _Form(_is_list_of(_is_message), _written(r"\[\s*\{\s*'", r"\]"))
MESSAGE = _Form(_is_message, _written(r"\{\s*'", r"\}"))
TEXTS = _Form(_is_list_of(_is_text), _written(r"""\[\s*['"]""", r"\]"))
OBJECTS = _Form(_is_list_of(_is_object), MESSAGES.python)
# The columns that hold lists or objects, beside ``ALWAYS``; several are lists together, or texts.
FORMS: tuple[tuple[tuple[str, ...], _Form], ...] = (
    (("chosen", "rejected"), TEXTS),
    (("chosen", "rejected"), MESSAGE),
    (("answers",), OBJECTS),
    (("summaries",), OBJECTS),
    (("info",), _Form(_is_object, _written(r"\{\s*'", r"\}"))),
    (("history",), _Form(_are_turns, _written(r"""\[\s*\[\s*['"]""", r"\]"))),
    *(((name,), _Form(_is_list_of(lambda value: not isinstance(value, list | Mapping)))) for name in LABELS),
    *(((name,), _Form(lambda value: isinstance(value, Mapping) and "full_text" in value)) for name in PROMPTS),
)


def with_json(rows: Iterable[tuple[int, Record]], name: str) -> Iterator[tuple[int, Record]]:
    """The rows of a CSV file, with lists and objects in the place of cells that hold JSON of them.

    Raises DataError for a cell that should be JSON and is not, and for lists as Python writes them.
    """
    remaining = iter(rows)
    first = list(islice(remaining, FIRST_ROWS))
    columns = _json_columns(first, name)
    for number, record in chain(first, remaining):
        yield number, {column: _read(column, value, columns, name, number) for column, value in record.items()}


def message_columns(records: Sequence[Record], name: str) -> frozenset[str]:
    """The known columns of texts that are all JSON of messages, by the first records of data that has lists of its own.

    Raises DataError for a column of messages as Python writes them.
    """
    rows = list(enumerate(records[:FIRST_ROWS], start=1))
    names = dict.fromkeys(str(column) for _, record in rows for column in record)
    return frozenset(n for n in names if is_known_column(n) and _all_fit(rows, (n,), MESSAGES, name))


def read_messages(record: Record, columns: frozenset[str]) -> Record:
    """The record with messages in the place of their JSON. Raises RecordError for a text that is none."""
    if not columns:
        return record
    return {name: _messages(value, name) if name in columns else value for name, value in record.items()}


def _messages(value: object, column: str) -> object:
    if not isinstance(value, str) or not value.strip():
        return value
    messages = _json(value)
    if not MESSAGES.fits(messages):
        fix = "JSON of chat messages in every row of the column, or in none"
        raise RecordError(f"{column!r} holds {excerpt(value)}, expected JSON of messages", column=column, fix=fix)
    return messages


def _read(column: str, value: Any, columns: frozenset[str], name: str, number: int) -> Any:
    if not isinstance(value, str):
        return value
    start = value.lstrip()[:1]
    known = column in columns or (column in ALWAYS and start in ("[", "{"))
    is_json = bool(start) and (known or _MESSAGES.match(value) is not None)
    if not is_json:
        return None if column == "gold" and not value else value
    try:
        return parse_json(value)
    except ValueError as error:
        where = f"{name}, row {number}, column {column!r}"
        raise DataError(f"invalid JSON: {error}", where=where, fix=_FIX) from error


def _json_columns(rows: Sequence[tuple[int, Record]], name: str) -> frozenset[str]:
    """The columns, among those that may hold text, of which every cell is JSON of a form that a format has there."""
    known = {str(column) for column in (rows[0][1] if rows else ()) if is_known_column(str(column))}
    found = set[str]()
    for columns, form in (*FORMS, *(((column,), MESSAGES) for column in sorted(known))):
        if known.issuperset(columns) and _all_fit(rows, columns, form, name):
            found.update(columns)
    return frozenset(found)


def _all_fit(rows: Sequence[tuple[int, Record]], columns: Sequence[str], form: _Form, name: str) -> bool:
    """Whether the columns have cells, and all of them are JSON of this form. Raises DataError for Python's form."""
    filled, wrong = set[str](), ""
    for number, record in rows:
        for column in columns:
            cell = record.get(column)
            if not isinstance(cell, str) or not cell.strip():
                continue
            filled.add(column)
            value = _json(cell)
            if form.fits(value):
                continue
            if value is not None or not _is_python(cell, form):
                return False
            wrong = wrong or f"{name}, row {number}, column {column!r}"
    if wrong and filled.issuperset(columns):
        raise DataError("lists as Python writes them, expected JSON", where=wrong, fix=_FIX)
    return filled.issuperset(columns)


def _is_python(cell: str, form: _Form) -> bool:
    """Whether a cell has this form as Python writes it, and is not a text that begins and ends like it."""
    if form.python is None or form.python.fullmatch(cell) is None:
        return False
    try:
        return form.fits(ast.literal_eval(cell.strip()))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def _json(cell: str) -> object:
    """What a cell says as JSON; None where it is none."""
    if cell.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return parse_json(cell)
    except ValueError:
        return None
