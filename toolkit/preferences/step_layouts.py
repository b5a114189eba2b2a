"""Published layouts of labelled steps, record by record: PRM800K's table and its original records, and Math-Shepherd's.

PRM800K: Lightman et al. 2023 (arXiv 2305.20050). Math-Shepherd: Wang et al. 2023 (arXiv 2312.08935).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from toolkit.preferences.cells import RecordError, cell, excerpt, prompt_cell, text_cell, type_name
from toolkit.preferences.rows import Prompt, Record

RATINGS = {1: True, 0: True, -1: False}  # the neutral rating counts as right: nothing wrong was seen in the step
MARK = "ки"  # behind each step of Math-Shepherd's input; its label has + or - in the same places
AS_PUBLISHED = "an original record of PRM800K has question.problem, and label.steps with their completions"
FIRST_STEP = re.compile(r"step 1:", re.IGNORECASE)


class UnclearRecordError(Exception):
    """A record that is right and does not say what is needed: it is left out and counted."""


class Candidate(NamedTuple):
    """A step that was rated, behind those before it: the last of ``steps``. None is no rating."""

    prompt: Prompt
    steps: list[str]
    rating: int | None


def step_texts(record: Record, column: str) -> list[str]:
    """The texts in a column of steps."""
    value, fix = cell(record, column), "a list of texts, one for each step"
    if not isinstance(value, list):
        raise RecordError(f"{column!r} is {type_name(value)}, expected a list", column=column, fix=fix)
    for number, item in enumerate(value, start=1):
        if not isinstance(item, str):
            what = f"step {number} is {type_name(item)} ({excerpt(item)}), expected text"
            raise RecordError(what, column=column, fix=fix)
    return value


# ---------------------------------------------------------------------------------------------------- PRM800K
def table_candidates(record: Record) -> list[Candidate]:
    """The one candidate of a row of the table."""
    prompt = prompt_cell(record, ("instruction",))
    before = step_texts(record, "responses")
    rating = _rating(cell(record, "rating"), "rating")
    return [Candidate(prompt, [*before, text_cell(record, "next_response")], rating)]


def nested_candidates(record: Record) -> list[Candidate]:
    """The candidates of an original record, in its order, and the steps that its labeler wrote.

    Each stands behind the chosen steps before it. Raises UnclearRecordError where a step that others follow has none.
    """
    prompt = prompt_cell(_mapping(cell(record, "question"), "question", "question"), ("problem",))
    before: list[str] | None = []
    candidates = []
    for number, value in enumerate(_list(_mapping(cell(record, "label"), "label", "label"), "steps"), start=1):
        step = _mapping(value, f"step {number}", "label")
        if before is None:
            raise UnclearRecordError
        offered = [_mapping(item, f"a candidate of step {number}", "label") for item in _list(step, "completions")]
        texts = [text_cell(item, "text") for item in offered]
        candidates += [
            Candidate(prompt, [*before, text], _rating(item.get("rating"), "label"))
            for item, text in zip(offered, texts, strict=True)
        ]
        chosen, written = step.get("chosen_completion"), step.get("human_completion")
        if chosen is not None:
            if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < len(texts):
                fix = f"the number of one of its {len(texts)} candidates, from 0, or null"
                what = f"'chosen_completion' of step {number} is {excerpt(chosen)}"
                raise RecordError(what, column="label", fix=fix)
            before = [*before, texts[chosen]]
        elif written is not None:
            human = {"text": written} if isinstance(written, str) else _mapping(written, "human_completion", "label")
            before = [*before, text_cell(human, "text")]
            candidates.append(Candidate(prompt, before, _rating(human.get("rating"), "label")))
        else:
            before = None
    return candidates


def _mapping(value: Any, name: str, column: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecordError(f"{name} is {type_name(value)}, expected an object", column=column, fix=AS_PUBLISHED)
    return value


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    """A list in a label; null is an empty one."""
    value = record.get(key)
    if value is not None and not isinstance(value, list):
        raise RecordError(f"{key!r} is {type_name(value)}, expected a list", column="label", fix=AS_PUBLISHED)
    return value or []


def _rating(value: object, column: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in RATINGS:
        fix = "1 (right), 0 (neutral), -1 (wrong), or null for a candidate that was skipped"
        raise RecordError(f"the rating is {excerpt(value)}", column=column, fix=fix)
    return int(value)


# ---------------------------------------------------------------------------------------------------- Math-Shepherd
def marked_steps(record: Record) -> tuple[str, list[str], list[bool | None]]:
    """Prompt, steps and labels of Math-Shepherd's ``input`` and ``label``. Text behind the last mark has no label.

    The prompt ends before ``Step 1:``, or behind its only question mark. Raises UnclearRecordError where neither is
    before the first mark.

    >>> marked_steps({"input": "3+1? Step 1: 4 ки\\nStep 2: 5 ки", "label": "3+1? Step 1: 4 +\\nStep 2: 5 -"})
    ('3+1?', ['Step 1: 4', 'Step 2: 5'], [True, False])
    """
    text, label = (text_cell(record, name) for name in ("input", "label"))
    one_character = text.replace(MARK, "\0")  # as long as + and -, so that places in both texts are the same
    places = [match.start() for match in re.finditer("\0", one_character)]
    if not places:
        raise RecordError(f"no step ends with the mark {MARK!r}", column="input", fix=f"{MARK!r} behind each step")
    labels: list[bool | None] = []
    for number, place in enumerate(places, start=1):
        sign = label[place : place + 1]
        if sign not in ("+", "-"):
            what = f"mark {number} of 'input' has {excerpt(sign)} in its place in 'label'"
            raise RecordError(what, column="label", fix="the text of 'input', with + or - for each mark")
        labels.append(sign == "+")
    pieces = [one_character[start + 1 : end] for start, end in pairwise([-1, *places, len(one_character)])]
    prompt, first = _prompt_and_first_step(pieces)
    steps = [first, *pieces[1:-1]]
    if pieces[-1].strip():
        steps, labels = [*steps, pieces[-1]], [*labels, None]
    return prompt.strip(), [step.strip() for step in steps], labels


def _prompt_and_first_step(pieces: list[str]) -> tuple[str, str]:
    head = pieces[0]
    if (heading := FIRST_STEP.search(head)) is not None:
        return head[: heading.start()], head[heading.start() :]
    # A mark inside the prompt, with the heading of the first step behind it, is a mistake in the data.
    if head.count("?") != 1 or any(FIRST_STEP.search(piece) for piece in pieces[1:]):
        raise UnclearRecordError
    prompt, _, first = head.partition("?")
    if not first.strip():
        raise UnclearRecordError
    return f"{prompt}?", first
