"""Rows that compare nothing: of a prompt alone, of a prompt and one response, or of a prompt and a list of them.

Their prompt is made up as that of preference data is: ``input`` follows ``instruction``, and a system text and earlier
turns in columns of their own stand before it, so that a row has the prompt that a run on the same columns has.
"""

from __future__ import annotations

from functools import partial

from toolkit.preferences import layouts
from toolkit.preferences.cells import RecordError, cell, messages_from, prompt_cell, text_cell, texts_cell
from toolkit.preferences.columns import Columns, Format
from toolkit.preferences.parsing import Datum
from toolkit.preferences.rows import Record

# The columns that hold the response of a row; the first that is there counts.
RESPONSES = ("response", "output", "completion", "answer")


def prompt_rows(columns: Columns, *, text_only: bool = False) -> Format | None:
    """The format of rows with a prompt, whose data have no responses. None where no column holds a prompt.

    ``text_only`` leaves system texts and earlier turns unread.
    """
    prompts = prompt_columns(columns)
    if not prompts:
        return None
    found = Format("prompts", frozenset(prompts), partial(_datum, prompts=prompts, response=None))
    return found if text_only else layouts.in_context(found, columns)


def response_rows(columns: Columns, *, text_only: bool = False) -> Format | None:
    """The format of rows with a prompt and one response, which is a text or one message of the assistant.

    None where no column holds the one or the other. ``text_only`` as :func:`prompt_rows` has it.
    """
    prompts, response = prompt_columns(columns), columns.first(RESPONSES)
    if not prompts or response is None:
        return None
    parse = partial(_datum, prompts=prompts, response=response)
    found = Format("single responses", frozenset([*prompts, response]), parse, one_response=True)
    return found if text_only else layouts.in_context(found, columns)


def list_rows(columns: Columns) -> Format | None:
    """The format of rows with a prompt and a list ``responses`` that nothing compares. None for other columns."""
    prompts = prompt_columns(columns)
    if not prompts or not columns.has("responses"):
        return None
    parse = partial(_listed, prompts=prompts)
    return layouts.in_context(Format("unlabelled responses", frozenset([*prompts, "responses"]), parse), columns)


def prompt_columns(columns: Columns) -> tuple[str, ...]:
    """The columns that make up the prompt of such rows; () where there is none."""
    return columns.prompts or tuple(columns.present("messages"))


def _datum(record: Record, *, prompts: tuple[str, ...], response: str | None) -> Datum:
    return Datum(prompt_cell(record, prompts), [] if response is None else [response_cell(record, response)], [])


def _listed(record: Record, *, prompts: tuple[str, ...]) -> Datum:
    return Datum(prompt_cell(record, prompts), texts_cell(record, "responses"), [])


def response_cell(record: Record, column: str) -> str:
    """A response: a text, or one message of the assistant. Raises RecordError for anything else."""
    value = cell(record, column)
    if not isinstance(value, list):
        return text_cell(record, column)
    messages = messages_from(value, column)
    if [message["role"] for message in messages] != ["assistant"]:
        raise RecordError(f"{column!r} is not one message of the assistant", column=column)
    return messages[0]["content"]
