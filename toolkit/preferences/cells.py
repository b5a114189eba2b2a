"""Cells of a record: texts, lists, messages, numbers and labels. An error names the column and what it should hold."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.preferences.rows import Prompt, Record
from toolkit.preferences.unseen import TEXT_PARTS

_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_FIRST = ("a", "1", "first", "model_a", "model_1", "response_a", "response_1", "output_1")
_SECOND = ("b", "2", "second", "model_b", "model_2", "response_b", "response_2", "output_2")
_TIED = ("0", "tie", "tie (bothbad)", "tie(bothbad)", "both bad", "both_bad", "bothbad", "draw", "equal")
_NO_SCORE = ("", "n/a", "na", "nan", "none", "null")
_P_FIRST = dict.fromkeys(_FIRST, 1.0) | dict.fromkeys(_SECOND, 0.0) | dict.fromkeys(_TIED, 0.5)


class RecordError(Exception):
    """A record that is wrong input. The reader adds the file and the row, and raises :class:`DataError`."""

    def __init__(self, what: str, *, column: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.column, self.fix = what, column, fix


def type_name(value: object) -> str:
    """The JSON type of a value, in words."""
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def excerpt(value: object) -> str:
    """The beginning of a value as Python writes it, for an error."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def cell(record: Record, column: str) -> Any:
    if column not in record:
        close = difflib.get_close_matches(column, map(str, record), n=1)
        names = ", ".join(list(map(str, record))[:20])
        fix = f"it has {close[0]!r}: did you mean {column!r}?" if close else f"it has {names}"
        raise RecordError(f"no column {column!r}", column=column, fix=fix)
    return record[column]


# ---------------------------------------------------------------------------------------------------- texts
def text_cell(record: Record, column: str) -> str:
    value = record.get(column)
    if isinstance(value, str):
        return value
    return _as_text(cell(record, column), column, column)


def _as_text(value: object, name: str, column: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""  # a missing text is an empty one: the row is left out and counted
    if isinstance(value, bool):
        return str(value)  # the answer "True" after a table reader guessed its type (PandaLM has six of these)
    what = f"{name!r} is {type_name(value)} ({str(value)[:40]}), expected text"
    raise RecordError(what, column=column, fix="text in quotes, or another column by data.columns")


def list_cell(record: Record, column: str) -> list[Any]:
    value = cell(record, column)
    if not isinstance(value, list):
        what = f"{column!r} is {type_name(value)} ({str(value)[:40]}), expected a list"
        raise RecordError(what, column=column, fix="a list, or another column by data.columns")
    return value


def texts_cell(record: Record, column: str) -> list[str]:
    return [_as_text(item, f"{column}[{k}]", column) for k, item in enumerate(list_cell(record, column), start=1)]


def messages_from(value: Sequence[Any], column: str) -> list[dict[str, str]]:
    """Chat messages as ``[{"role", "content"}...]``. ``from``/``value`` and a content of parts are read too.

    Of parts the texts are read; :func:`toolkit.preferences.unseen.unseen_parts` names the others.
    """
    messages = []
    for k, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            fix = "a prompt is text, or a list of {role, content} messages"
            raise RecordError(f"{column}[{k}] is {type_name(message)}, expected a message", column=column, fix=fix)
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list):
            content = "".join(_part_text(part, f"{column}[{k}]", column) for part in content)
        elif content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(role, str) or not isinstance(content, str):
            fix = f"it has {', '.join(list(map(str, message))[:20])}"
            raise RecordError(f"{column}[{k}] needs a role and a text content", column=column, fix=fix)
        if not role.isascii():
            raise RecordError(f"{column}[{k}] has the role {role!a}", column=column, fix="user, assistant or system")
        messages.append({"role": _ROLES.get(role.lower(), role.lower()), "content": content})
    return messages


def _part_text(part: object, name: str, column: str) -> str:
    """The text of a part of a message's content; "" for an image or another part that is no text."""
    if not isinstance(part, Mapping):
        raise RecordError(f"{name} has {type_name(part)} in its content, expected a part with a type", column=column)
    if part.get("type", "text") not in TEXT_PARTS:
        return ""
    text = part.get("text")
    if not isinstance(text, str):
        raise RecordError(f"{name} has a part of text whose 'text' is {type_name(text)}", column=column)
    return text


def json_texts(value: object) -> list[str] | None:
    """A list of texts, or JSON of one in a text; null is an empty text. None for anything else.

    >>> json_texts('["Hi", null]'), json_texts("Hi")
    (['Hi', ''], None)
    """
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value or not all(item is None or isinstance(item, str) for item in value):
        return None
    return [item or "" for item in value]


def prompt_cell(record: Record, columns: Sequence[str]) -> Prompt:
    """The prompt in the first of ``columns``. The text of a second one (Alpaca's ``input``) follows a blank line.

    Of an object (WebGPT's question) the ``full_text`` is read.
    """
    value = cell(record, columns[0])
    if isinstance(value, str) and len(columns) == 1:  # as below, in a fraction of the time
        return value
    if isinstance(value, Mapping) and "full_text" in value:
        return text_cell(value, "full_text")
    if isinstance(value, list):
        messages = messages_from(value, columns[0])
        if messages and messages[-1]["role"] == "assistant":
            fix = "the last turn before the responses must be the user's"
            raise RecordError("the prompt ends with an assistant message", column=columns[0], fix=fix)
        return messages
    parts = [text_cell(record, columns[0]), *(text_cell(record, column) for column in columns[1:] if column in record)]
    return "\n\n".join(part for part in parts if part)


def name_cell(record: Record, column: str) -> str:
    """A name such as an annotator's or a group's, or "" where there is none."""
    value = record.get(column)
    if value is None:
        return ""
    if isinstance(value, list | Mapping):
        raise RecordError(f"{column!r} is {type_name(value)} ({excerpt(value)}), expected a name", column=column)
    name = str(value)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{column!r} holds half of a Unicode surrogate pair: {name!a}", column=column) from error
    return name


def odd_one(groups: Sequence[str]) -> int | None:
    """The place of the first of a prompt's groups that is not the first one. None where all are equal.

    >>> odd_one(["a", "a", "b"]), odd_one(["", ""])
    (2, None)
    """
    return next((k for k, group in enumerate(groups) if group != groups[0]), None)


def two_groups(here: str, earlier: str) -> RecordError:
    """The error of a prompt in two groups, which cannot both be held out as a whole."""
    what = f"group {here!r} here and {earlier!r} earlier for the same prompt"
    return RecordError(what, column="group", fix="the same group in all rows of a prompt")


# ---------------------------------------------------------------------------------------------------- numbers
def read_number(value: object, column: str) -> float:
    number = None if isinstance(value, str) else parsed_number(value)
    if number is None:
        what = f"{column!r} holds {excerpt(value)}, expected a finite number"
        raise RecordError(what, column=column, fix="correct it, or leave the row out")
    return number


def numbers_cell(record: Record, column: str, n: int) -> list[float | None]:
    """One number for each of ``n`` responses. None where it is null."""
    items = list_cell(record, column)
    if len(items) != n:
        what = f"{n} responses but {len(items)} values in {column!r}"
        raise RecordError(what, column=column, fix="one value for each response")
    return [None if item is None else read_number(item, column) for item in items]


def read_index(value: object, n: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
        fix = f"an index from 0 to {n - 1}"
        raise RecordError(f"{name} is {excerpt(value)}, not one of the {n} responses", column="comparisons", fix=fix)
    return value


def margin_cell(record: Record, column: str = "margin") -> float:
    """The ``margin`` of a record, 0 where there is none. Errors name ``column``."""
    margin = signed_margin(record, column)
    if margin < 0:
        raise RecordError(f"margin {margin} is negative", column=column, fix="swap the two responses, or leave it out")
    return margin


def signed_margin(record: Record, column: str = "margin") -> float:
    """The ``margin`` of a record, which may be negative; 0 where there is none. Errors name ``column``."""
    value = record.get("margin")
    if isinstance(value, str):  # a cell of a CSV file
        value = None if not value.strip() else value if (number := parsed_number(value)) is None else number
    return 0.0 if value is None else read_number(value, column)


def parsed_number(value: object) -> float | None:
    """The finite number in a cell, which is text in CSV. None where there is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # an integer can be larger than every float
        return None
    return number if math.isfinite(number) else None


def score_of(value: object, column: str) -> float | None:
    """The score in a cell, which is text in CSV; of a boolean 0 or 1. None for a missing one."""
    if is_missing(value) or (isinstance(value, str) and value.strip().lower() in _NO_SCORE):
        return None
    number = float(value) if isinstance(value, bool) else parsed_number(value)
    if number is None:
        what = f"{column!r} holds {excerpt(value)}, expected a finite number"
        raise RecordError(what, column=column, fix="a number alone (4, not 4/5), or an empty cell where there is none")
    return number


# ---------------------------------------------------------------------------------------------------- labels
def is_missing(value: object) -> bool:
    """Whether a cell holds no label: null, an empty cell, or the NaN of a table."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def read_label(value: object, column: str) -> float | None:
    """P(first response preferred) of a label: 1, 2, 0 = tie, a number between 1 and 2, or a name. None: no label.

    AlpacaEval's ``preference`` is 1 + P(second preferred), with 0 for a tie, so it needs no case of its own.
    """
    if is_missing(value):
        return None
    named = _P_FIRST.get(value.strip().lower()) if isinstance(value, str) else None
    if named is not None:
        return named
    parsed = parsed_number(value)
    if parsed == 0:
        return 0.5
    if parsed is None or not 1 <= parsed <= 2:
        fix = "1 = first, 2 = second, 0 = tie, a number from 1 to 2, A/B/tie, or model_a/model_b/tie"
        if parsed is not None and -3 <= parsed <= 3:
            fix += "; map a strength from -3 (the first is much better) to 3 as preference_strength"
        raise RecordError(f"label {excerpt(value)} is not one of those known", column=column, fix=fix)
    return 2.0 - parsed


def read_probability(value: object, column: str) -> float | None:
    """P(first response preferred) of a cell that holds this probability. None: no label."""
    if value is None or value == "":
        return None
    parsed = parsed_number(value)
    if parsed is None or not 0 <= parsed <= 1:
        fix = "the probability that the first response is better, from 0 to 1; divide percentages by 100"
        raise RecordError(f"probability {excerpt(value)} is not between 0 and 1", column=column, fix=fix)
    return parsed


def read_signed(value: object, column: str) -> float | None:
    """P(first response preferred) of HelpSteer's strength from -3 (the first is much better) to 3. None: no label."""
    if is_missing(value):
        return None
    parsed = parsed_number(value)
    if parsed is None or abs(parsed) > 3:
        fix = "a number from -3 (the first response is much better) to 3 (the second is)"
        raise RecordError(f"{column} {excerpt(value)} is no strength of a preference", column=column, fix=fix)
    return 0.5 if parsed == 0 else float(parsed < 0)


def read_flag(value: object, column: str) -> bool:
    """Whether a cell of one-hot columns says yes: 1 or true. An empty cell says no."""
    word = "0" if is_missing(value) else str(value).strip().lower()
    flag = {"true": 1.0, "false": 0.0}.get(word, parsed_number(word))
    if flag not in (0, 1):
        fix = "1 or true in one of the columns of the winner, 0 or false in the others"
        raise RecordError(f"{column!r} holds {excerpt(value)}, expected 1 or 0", column=column, fix=fix)
    return flag == 1


def read_choice(value: object, column: str) -> float | None:
    """P(first response preferred) of the 0-based index of the preferred response. None: no label."""
    if value is None or value == "":
        return None
    parsed = parsed_number(value)
    if parsed not in (0, 1):
        fix = "choice counts from 0; use label for 1, 2 and 0 = tie"
        raise RecordError(f"choice {excerpt(value)} is neither 0 nor 1", column=column, fix=fix)
    return 1.0 - parsed
