"""Column layouts of published data sets and of other trainers that are no plain format.

Each function looks at the columns, and returns the :class:`Format` that reads them or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from toolkit.preferences import layout_parsing
from toolkit.preferences.cells import json_texts
from toolkit.preferences.columns import (
    ANSWERS,
    CONVERSATIONS,
    LABELS,
    ONE_HOT,
    REJECTED,
    ROW_SCORES,
    SYSTEMS,
    Columns,
    Format,
)
from toolkit.preferences.parsing import parse_transcript

PAIR_STATUS = {"tie", "swapped", "unchanged"}
TURNS = ("prompt", "response_a", "response_b")


def json_turns(columns: Columns) -> Format | None:
    """Chatbot Arena's 55k: the prompts of all turns, and both models' answers, each as a list of texts."""
    label = columns.first(LABELS)
    verdict = ONE_HOT if columns.has(*ONE_HOT[:2]) else (label,) if label else None
    if verdict is None or not columns.has(*TURNS):
        return None
    cells = [cell for name in TURNS for cell in columns.cells(name)]
    if not cells or not all(json_texts(cell) is not None for cell in cells):
        return None
    parse = partial(layout_parsing.json_turns, verdict=verdict)
    return Format("labelled pair", frozenset([*TURNS, *verdict]), parse, verdict if label in verdict else ())


def conversation_before(columns: Columns, sides: tuple[str, str]) -> tuple[str, ...]:
    """LLaMA-Factory, axolotl: the column with the messages before both responses; () where these are conversations."""
    column = columns.first(name for name in CONVERSATIONS if columns.holds_objects(name))
    if column is None:
        return ()
    for cell in columns.cells(sides[0]):
        first = cell[0] if isinstance(cell, list) and cell else cell
        if isinstance(cell, list) and (not isinstance(first, Mapping) or _role(first) in ("user", "human", "system")):
            return ()
    for cell in columns.cells(column):
        if isinstance(cell, list) and cell and _role(cell[-1]) in ("assistant", "gpt"):
            return ()
    return (column,)


def _role(message: object) -> str:
    return str(message.get("role", message.get("from"))).lower() if isinstance(message, Mapping) else ""


def messages_and_rejected(columns: Columns) -> Format | None:
    """ms-swift: a conversation that ends with the chosen response, and the rejected one."""
    rejected = columns.first(REJECTED)
    if rejected is None or not columns.holds_objects("messages"):
        return None
    used = frozenset(["messages", rejected])
    return Format("chosen/rejected", used, partial(layout_parsing.messages_and_rejected, rejected=rejected))


def valued_answers(columns: Columns) -> Format | None:
    """Nectar, stack-exchange: a list of objects, each with a response and its rank or score."""
    prompts = columns.prompts
    column = columns.first(name for name in ANSWERS if columns.holds_objects(name))
    if not prompts or column is None:
        return None
    first = next(item for cell in columns.cells(column) if isinstance(cell, list) for item in cell)
    text = next((name for name in layout_parsing.ANSWER_TEXTS if name in first), None)
    value = next((name for name in layout_parsing.ANSWER_VALUES if name in first), None)
    if text is None or value is None:
        return None
    parse = partial(layout_parsing.valued_answers, prompts=prompts, column=column, text=text, value=value)
    texts = [cell for cell in columns.cells(prompts[0]) if isinstance(cell, str)]
    transcripts = bool(texts) and all(parse_transcript(cell) is not None for cell in texts)
    name = "ranked" if value == "rank" else "scored"
    return Format(f"{name} transcripts" if transcripts else name, frozenset([*prompts, column]), parse)


def scored_rows(columns: Columns) -> Format | None:
    """HelpSteer2: one response in each row, with a score. Some prompt has to be there twice."""
    prompts, score = columns.prompts, columns.first(ROW_SCORES)
    if not prompts or score is None or not columns.has("response"):
        return None
    cells = [str(cell) for cell in columns.cells(prompts[0])]
    if len(set(cells)) == len(cells):
        return None
    used = frozenset([*prompts, "response", score])
    parse = partial(layout_parsing.scored_row, prompts=prompts, score=score)
    return Format("scored responses", used, parse, one_response=True)


def in_context(recognised: Format, columns: Columns) -> Format:
    """The format with the system text and the earlier turns of further columns before the prompt, where there are any.

    orca and truthy DPO pairs have a column ``system``, LLaMA-Factory's and ms-swift's data ``system`` and ``history``.
    """
    unread = [name for name in (*SYSTEMS, "history") if name in columns.names and name not in recognised.columns]
    system = next((name for name in unread if name in SYSTEMS and any(map(_says, columns.cells(name)))), None)
    history = "history" if "history" in unread and columns.holds_list("history") else None
    if system is None and history is None:
        return recognised
    used = recognised.columns | {name for name in (system, history) if name}
    parse = partial(layout_parsing.in_context, recognised=recognised, system=system, history=history)
    return replace(recognised, columns=used, parse=parse)


def with_ties(recognised: Format, columns: Columns) -> Format:
    """The format with the ties of distilabel's orca pairs: there, ``status`` says that two ratings were equal.

    Chosen and rejected of such a row are in no order.
    """
    texts = {cell for cell in columns.cells("status") if isinstance(cell, str)}
    if recognised.name != "chosen/rejected" or not texts or not texts <= PAIR_STATUS:
        return recognised
    parse = partial(layout_parsing.with_ties, recognised=recognised)
    return replace(recognised, columns=recognised.columns | {"status"}, parse=parse)


def with_margin(recognised: Format, columns: Columns) -> Format:
    """The format with the margins of a column of their own, where each record compares two responses."""
    if recognised.name not in ("labelled pair", "scored pair", "summaries") or not columns.has("margin"):
        return recognised
    parse = partial(layout_parsing.with_margin, recognised=recognised)
    return replace(recognised, columns=recognised.columns | {"margin"}, parse=parse)


def _says(cell: object) -> bool:
    return isinstance(cell, str) and bool(cell.strip())
