"""How a record of any known format becomes a prompt with responses and comparisons.

:func:`recognise` looks at the columns of the data and returns the :class:`Shape` that reads its records. Files and the
hub are read by :mod:`toolkit.preferences.loading`, rows of one prompt merged by :mod:`toolkit.preferences.reading`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

from toolkit.preferences.rows import Comparison, Prompt, Record, soft_comparisons


@dataclass(frozen=True)
class Datum:
    """What one record says, before rows of the same prompt are merged. ``n_unlabelled`` judgements are missing."""

    prompt: Prompt
    responses: list[str]
    comparisons: list[Comparison]
    gold: list[float] | None = None
    n_unlabelled: int = 0


@dataclass(frozen=True)
class Shape:
    """A recognised format: its name, the columns it reads, and the function that reads one record."""

    name: str
    columns: frozenset[str]
    parse: Callable[[Record], Datum]


class RowProblem(Exception):
    """A record that is wrong input; the reader adds the file and the row and raises :class:`DataError`."""

    def __init__(self, what: str, *, column: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.column, self.fix = what, column, fix


class Unparsable(Exception):
    """A record without a prompt that its responses share: left out and counted."""


FORMATS = {
    "native": "prompt, responses, comparisons [{winner, loser, weight?, annotator?, margin?}], gold?",
    "chosen/rejected": "prompt?, chosen, rejected (text, messages, or Human:/Assistant: transcripts), margin?",
    "ranked": "prompt, responses, ranks (1 = best, equal = tie) or ranking (indices, best first)",
    "scored": "prompt, responses, scores; or instruction, completions [{response, overall_score}]",
    "labelled pair": "prompt, response_a/_b or response_1/_2 or output_1/_2 or conversation_a/_b, and label, "
    "preference, winner, choice, probability or annotator1..n",
    "labelled list": "prompt, responses or numbered responses, and labels or preference: one label for each of the "
    "pairs 1v2 1v3 ... 2v3 ...",
    "summaries": "info {post}, summaries [{text}, {text}], choice",
}
PROMPTS = ("prompt", "instruction", "question", "input", "query")
PAIRS = (
    ("response_a", "response_b"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_0", "response_1"),
    ("output_1", "output_2"),
    ("output_a", "output_b"),
    ("conversation_a", "conversation_b"),
)
PROBABILITIES = ("probability", "label_probability")
LABELS = ("label", "preference", "winner")
CHOICES = ("choice", "better_response_id")
KNOWN_COLUMNS = frozenset(
    (*PROMPTS, *(name for pair in PAIRS for name in pair), *PROBABILITIES, *LABELS, *CHOICES, "chosen", "rejected")
    + ("responses", "comparisons", "gold", "ranks", "ranking", "scores", "labels", "completions", "info", "summaries")
    + ("annotator", "worker")
)
_NUMBERED = re.compile(r"(prediction|response|output|completion|answer)[ _]?([1-9]\d?)")
_ANNOTATOR = re.compile(r"annotator_?\d+")
_TURN = re.compile(r"\n\n(Human|Assistant|System):")
_ASSISTANT = "\n\nAssistant:"
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_FIRST = ("a", "1", "first", "model_a", "response_a", "response_1", "output_1")
_SECOND = ("b", "2", "second", "model_b", "response_b", "response_2", "output_2")
_TIED = ("0", "tie", "tie (bothbad)", "tie(bothbad)", "both bad", "draw", "equal")
_P_FIRST = dict.fromkeys(_FIRST, 1.0) | dict.fromkeys(_SECOND, 0.0) | dict.fromkeys(_TIED, 0.5)


def is_known_column(name: str) -> bool:
    """Whether some format reads a column of this name."""
    return name in KNOWN_COLUMNS or bool(_NUMBERED.fullmatch(name) or _ANNOTATOR.fullmatch(name))


# ---------------------------------------------------------------------------------------------------- reading values
def _kind(value: object) -> str:
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _get(record: Record, column: str) -> Any:
    if column not in record:
        close = difflib.get_close_matches(column, map(str, record), n=1)
        fix = f"it has {close[0]!r}: did you mean {column!r}?" if close else f"it has {', '.join(map(str, record))}"
        raise RowProblem(f"no column {column!r}", column=column, fix=fix)
    return record[column]


def _text(record: Record, column: str) -> str:
    return _as_text(_get(record, column), column, column)


def _as_text(value: object, name: str, column: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""  # a missing text is an empty one: the row is left out and counted
    if isinstance(value, bool):
        return str(value)  # the answer "True" after a trip through a table reader that guesses types (PandaLM has six)
    raise RowProblem(f"{name!r} is {_kind(value)} ({str(value)[:40]}), expected text", column=column)


def _list(record: Record, column: str) -> list[Any]:
    value = _get(record, column)
    if not isinstance(value, list):
        raise RowProblem(f"{column!r} is {_kind(value)} ({str(value)[:40]}), expected a list", column=column)
    return value


def _texts(record: Record, column: str) -> list[str]:
    return [_as_text(item, f"{column}[{k}]", column) for k, item in enumerate(_list(record, column), start=1)]


def _numbers(record: Record, column: str, n: int) -> list[float | None]:
    items = _list(record, column)
    if len(items) != n:
        raise RowProblem(f"{n} responses but {len(items)} values in {column!r}", column=column)
    return [None if item is None else _number(item, column) for item in items]


def _number(value: object, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowProblem(f"{column!r} holds {value!r}, expected a finite number", column=column)
    return float(value)


def messages_from(value: Sequence[Any], column: str) -> list[dict[str, str]]:
    """Chat messages as ``[{"role", "content"}...]``; takes ``from``/``value`` and text parts too."""
    messages = []
    for k, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            fix = "a prompt is text, or a list of {role, content} messages"
            raise RowProblem(f"{column}[{k}] is {_kind(message)}, expected a message", column=column, fix=fix)
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            fix = f"it has {', '.join(map(str, message))}"
            raise RowProblem(f"{column}[{k}] needs a role and a text content", column=column, fix=fix)
        messages.append({"role": _ROLES.get(role.lower(), role.lower()), "content": content})
    return messages


def _prompt(record: Record, columns: Sequence[str]) -> Prompt:
    """The prompt in the first of ``columns``; a non-empty second one (Alpaca's ``input``) follows a blank line."""
    value = _get(record, columns[0])
    if isinstance(value, list):
        messages = messages_from(value, columns[0])
        if messages and messages[-1]["role"] == "assistant":
            fix = "the last turn before the responses must be the user's"
            raise RowProblem("the prompt ends with an assistant message", column=columns[0], fix=fix)
        return messages
    parts = [_text(record, columns[0]), *(_text(record, column) for column in columns[1:] if column in record)]
    return "\n\n".join(part for part in parts if part)


def _index(value: object, n: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
        fix = f"an index from 0 to {n - 1}"
        raise RowProblem(f"{name} is {value!r}, not one of the {n} responses", column="comparisons", fix=fix)
    return value


def _label(value: object, column: str) -> float | None:
    """P(first response preferred) of a label: 1, 2, 0 = tie, anything between 1 and 2, or a name. None: no label.

    AlpacaEval's ``preference`` is 1 + P(second preferred), with 0 for a tie, so it needs no case of its own.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    known = _P_FIRST.get(value.strip().lower()) if isinstance(value, str) else None
    if known is not None:
        return known
    number = _as_number(value)
    if number == 0:
        return 0.5
    if number is None or not 1 <= number <= 2:
        fix = "1 = first, 2 = second, 0 = tie, a number from 1 to 2, A/B/tie, or model_a/model_b/tie"
        raise RowProblem(f"label {value!r} is not one of those known", column=column, fix=fix)
    return 2.0 - number


def _as_number(value: object) -> float | None:
    """The number of a cell (text in CSV), or None where it is not one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _probability(value: object, column: str) -> float | None:
    """P(first response preferred), given as such."""
    if value is None or value == "":
        return None
    number = _as_number(value)
    if number is None or not 0 <= number <= 1:
        raise RowProblem(f"probability {value!r} is not between 0 and 1", column=column)
    return number


def _choice(value: object, column: str) -> float | None:
    """P(first response preferred) of the 0-based index of the preferred response."""
    if value is None or value == "":
        return None
    number = _as_number(value)
    if number not in (0, 1):
        fix = "choice counts from 0; use label for 1, 2 and 0 = tie"
        raise RowProblem(f"choice {value!r} is neither 0 nor 1", column=column, fix=fix)
    return 1.0 - number


# ---------------------------------------------------------------------------------------------------- the formats
def _native(record: Record) -> Datum:
    prompt, responses = _prompt(record, ["prompt"]), _texts(record, "responses")
    comparisons = []
    for k, item in enumerate(_list(record, "comparisons"), start=1):
        where = f"comparisons[{k}]"
        if not isinstance(item, Mapping):
            raise RowProblem(f"{where} is {_kind(item)}, expected an object", column="comparisons")
        winner, loser = (_index(item.get(end), len(responses), f"{where}: {end}") for end in ("winner", "loser"))
        if winner == loser:
            raise RowProblem(f"{where} compares response {winner} with itself", column="comparisons")
        weight, annotator = item.get("weight"), item.get("annotator")
        weight = 1.0 if weight is None else _number(weight, "comparisons")
        if weight <= 0:
            raise RowProblem(f"{where}: weight {weight} is not positive", column="comparisons")
        name = "" if annotator is None else str(annotator)
        comparisons.append(Comparison(winner, loser, weight, name, _margin(item, "comparisons")))
    if record.get("gold") is None:
        return Datum(prompt, responses, comparisons)
    gold = _numbers(record, "gold", len(responses))
    if None in gold:
        raise RowProblem("'gold' has a null: give a number for every response, or none at all", column="gold")
    return Datum(prompt, responses, comparisons, [g for g in gold if g is not None])


def _by_value(prompt: Prompt, responses: list[str], values: Sequence[float | None], annotator: str) -> Datum:
    """All C(K,2) comparisons of responses by a value, higher is better, equal is a tie."""
    comparisons: list[Comparison] = []
    n_unlabelled = 0
    for i, j in combinations(range(len(responses)), 2):
        left, right = values[i], values[j]
        if left is None or right is None:
            n_unlabelled += 1
        else:
            comparisons += soft_comparisons(i, j, 1.0 if left > right else 0.5 if left == right else 0.0, annotator)
    return Datum(prompt, responses, comparisons, n_unlabelled=n_unlabelled)


def _scored(record: Record, *, prompts: Sequence[str], column: str) -> Datum:
    responses = _texts(record, "responses")
    if column == "ranking":
        ranking = _list(record, column)
        if sorted(map(str, ranking)) != sorted(map(str, range(len(responses)))):
            fix = f"each of 0..{len(responses) - 1} once, the best response's index first"
            raise RowProblem(f"ranking {ranking} is not an order of {len(responses)} responses", column=column, fix=fix)
        values: list[float | None] = [-float(ranking.index(k)) for k in range(len(responses))]
    else:
        sign = -1.0 if column == "ranks" else 1.0
        values = [None if v is None else sign * v for v in _numbers(record, column, len(responses))]
    return _by_value(_prompt(record, prompts), responses, values, _annotator(record))


def _completions(record: Record, *, prompts: Sequence[str]) -> Datum:
    """openbmb/UltraFeedback. One of the two scores for all completions of a row: their scales differ."""
    items = _list(record, "completions")
    if not all(isinstance(item, Mapping) for item in items):
        raise RowProblem("'completions' must hold objects with a response and a score", column="completions")
    responses = [_text(item, "response") for item in items]
    values: list[float | None] = [None] * len(items)
    for score in ("overall_score", "fine-grained_score"):
        found = [_as_number(item.get(score)) for item in items]
        if None not in found:
            values = found
            break
    return _by_value(_prompt(record, prompts), responses, values, "")


def _annotator(record: Record) -> str:
    value = record.get("annotator")
    return "" if value is None else str(value)


def _margin(record: Record, column: str = "margin") -> float:
    value = record.get("margin")
    margin = 0.0 if value is None else _number(value, column)
    if margin < 0:
        raise RowProblem(f"margin {margin} is negative", column=column, fix="swap the two responses, or leave it out")
    return margin


def _pair(record: Record, *, prompts: Sequence[str], pair: tuple[str, str], labels: Sequence[str]) -> Datum:
    prompt, responses = _prompt_and_two(record, prompts, pair)
    comparisons: list[Comparison] = []
    n_unlabelled = 0
    for column in labels:
        value = _get(record, column)
        if column in PROBABILITIES:
            p = _probability(value, column)
        else:
            p = _choice(value, column) if column in CHOICES else _label(value, column)
        if p is None:
            n_unlabelled += 1
        else:
            comparisons += soft_comparisons(0, 1, p, column if _ANNOTATOR.fullmatch(column) else _annotator(record))
    return Datum(prompt, responses, comparisons, n_unlabelled=n_unlabelled)


def _labelled_list(record: Record, *, prompts: Sequence[str], responses: Sequence[str], column: str) -> Datum:
    texts = _texts(record, "responses") if responses == ("responses",) else [_text(record, name) for name in responses]
    labels, pairs = _list(record, column), list(combinations(range(len(texts)), 2))
    if len(labels) != len(pairs):
        fix = "one label for each of 1v2, 1v3, ... 2v3, ..."
        what = f"{len(texts)} responses have {len(pairs)} pairs, but {column!r} has {len(labels)} labels"
        raise RowProblem(what, column=column, fix=fix)
    ps = [_label(label, column) for label in labels]
    found = [c for (i, j), p in zip(pairs, ps, strict=True) if p is not None
             for c in soft_comparisons(i, j, p, _annotator(record))]  # fmt: skip
    return Datum(_prompt(record, prompts), texts, found, n_unlabelled=ps.count(None))


def _chosen_rejected(record: Record, *, prompts: Sequence[str]) -> Datum:
    prompt, responses = _prompt_and_two(record, prompts, ("chosen", "rejected"))
    return Datum(prompt, responses, [Comparison(0, 1, 1.0, _annotator(record), _margin(record))])


def _prompt_and_two(record: Record, prompts: Sequence[str], pair: tuple[str, str]) -> tuple[Prompt, list[str]]:
    """The prompt and two responses, which may be texts or messages that repeat the prompt (TRL, UltraFeedback)."""
    if prompts and not any(isinstance(record.get(column), list) for column in pair):
        return _prompt(record, prompts), [_text(record, column) for column in pair]
    first, second = (messages_from(_list(record, column), column) for column in pair)
    prompt = _prompt(record, prompts) if prompts else ""
    if isinstance(prompt, list) and first[: len(prompt)] == prompt == second[: len(prompt)]:
        n = len(prompt)
    else:
        n = 0  # the messages' common start, cut back so that it ends before an assistant's turn
        while n < min(len(first), len(second)) - 1 and first[n] == second[n]:
            n += 1
        while n and first[n - 1]["role"] == "assistant":
            n -= 1
        if n and isinstance(prompt, list):
            raise RowProblem(f"{pair[0]!r} and {pair[1]!r} do not start with the prompt's messages", column=pair[0])
        prompt = first[:n] or (prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])
    rests = (first[n:], second[n:])
    if any(len(rest) != 1 or rest[0]["role"] != "assistant" for rest in rests) or not (n or prompts):
        raise Unparsable("the two conversations must share all but one last assistant message")
    return prompt, [rest[0]["content"] for rest in rests]


def common_prefix_length(a: str, b: str) -> int:
    """Characters that two texts share at their start, by bisection over slices (fast on long texts)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _transcripts(record: Record) -> Datum:
    """HH: the prompt ends with the last "Assistant:" that both transcripts share (it stays plain text here)."""
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    start = chosen.rfind(_ASSISTANT, 0, common_prefix_length(chosen, rejected))
    if start < 0:
        raise Unparsable("the two transcripts share no turn that ends in 'Assistant:'")
    cut = start + len(_ASSISTANT)
    return Datum(
        chosen[:cut], [chosen[cut:], rejected[cut:]], [Comparison(0, 1, 1.0, _annotator(record), _margin(record))]
    )


def _implicit_prompt(record: Record) -> Datum:
    """Texts without a prompt column: their common start, cut back to a word boundary, with something left of both."""
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    cut = common_prefix_length(chosen, rejected)
    if not (chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace()):
        cut = max((m.start() for m in re.finditer(r"\s", chosen[:cut])), default=0)
    cut = len(chosen[:cut].rstrip())
    while cut and not (chosen[cut:].strip() and rejected[cut:].strip()):  # one text is the start of the other
        cut = max((m.start() for m in re.finditer(r"\s", chosen[:cut].rstrip())), default=0)
        cut = len(chosen[:cut].rstrip())
    if not cut:
        raise Unparsable("the two texts share no first word")
    return Datum(
        chosen[:cut], [chosen[cut:], rejected[cut:]], [Comparison(0, 1, 1.0, _annotator(record), _margin(record))]
    )


def parse_transcript(text: str) -> list[dict[str, str]] | None:
    """Messages of a "Human:/Assistant:" transcript that ends in an open "Assistant:"; None where it is not one.

    Two turns in a row of one speaker (HH has some) become one message: chat templates want them to alternate.
    """
    parts = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text)
    turns = list(zip(parts[1::2], parts[2::2], strict=True))
    if parts[0].strip() or len(turns) < 2 or turns[0][0] == "Assistant" or turns[-1] != ("Assistant", ""):
        return None
    messages: list[dict[str, str]] = []
    for speaker, content in turns[:-1]:
        role = {"Human": "user", "Assistant": "assistant", "System": "system"}[speaker]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content.strip()
        else:
            messages.append({"role": role, "content": content.strip()})
    return messages if messages[-1]["role"] == "user" else None


def _summaries(record: Record) -> Datum:
    """openai/summarize_from_feedback, its prompt as in the paper's code (arXiv 2009.01325): ends in "TL;DR:"."""
    info, items = _get(record, "info"), _list(record, "summaries")
    if not isinstance(info, Mapping) or not all(isinstance(item, Mapping) for item in items):
        raise RowProblem("'info' and each of 'summaries' must be objects", column="info")
    if info.get("post"):
        head = f"SUBREDDIT: r/{info['subreddit']}\n\n" if info.get("subreddit") else ""
        title = f"TITLE: {info['title']}\n\n" if info.get("title") else ""
        prompt = f"{head}{title}POST: {_text(info, 'post')}\n\nTL;DR:"
    else:
        prompt = f"Article:\n\n{article}\n\nTL;DR:" if (article := _text(info, "article")) else ""
    texts = [_text(item, "text") for item in items]
    texts = [text if not text or text[0].isspace() else " " + text for text in texts]  # it continues "TL;DR:"
    if len(texts) > 2:
        raise RowProblem(f"{len(texts)} summaries, but 'choice' is between two", column="summaries")
    p = _choice(_get(record, "choice"), "choice")
    worker = record.get("worker")
    return Datum(
        prompt,
        texts,
        [] if p is None or len(texts) != 2 else soft_comparisons(0, 1, p, "" if worker is None else str(worker)),
        n_unlabelled=int(p is None),
    )


# ---------------------------------------------------------------------------------------------------- recognition
@dataclass(frozen=True)
class Columns:
    """The columns of the data, and some records to look into."""

    names: tuple[str, ...]
    sample: Sequence[Record] = field(default=())

    def has(self, *names: str) -> bool:
        return all(name in self.names for name in names)

    def first(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if name in self.names), None)

    def holds_list(self, column: str | None) -> bool:
        return column is not None and any(isinstance(record.get(column), list) for record in self.sample)


def recognise(names: Iterable[str], sample: Sequence[Record]) -> Shape | None:
    """The :class:`Shape` that reads data with these columns, or None. ``sample``: the first records (100 will do)."""
    columns = Columns(tuple(names), sample)
    prompts = _prompt_columns(columns)
    extra = frozenset(["annotator"] if columns.has("annotator") else [])
    if columns.has("prompt", "responses", "comparisons"):
        used = ["prompt", "responses", "comparisons", *(n for n in ("gold", "source_row") if columns.has(n))]
        return Shape("native", frozenset(used), _native)
    if columns.has("chosen", "rejected"):
        return _recognise_chosen(columns, prompts, extra)
    if columns.has("info", "summaries", "choice"):
        return Shape("summaries", frozenset(["info", "summaries", "choice", "worker"]), _summaries)
    if not prompts and not columns.has("conversation_a", "conversation_b"):
        return None
    if columns.has("completions") and columns.holds_list("completions"):
        return Shape("scored completions", frozenset([*prompts, "completions"]), partial(_completions, prompts=prompts))
    listed = columns.first(c for c in ("labels", *LABELS) if columns.holds_list(c))
    if columns.has("responses"):
        column = columns.first(("ranks", "ranking", "scores"))
        if column:
            name = "scored" if column == "scores" else "ranked"
            return Shape(
                name, extra | {*prompts, "responses", column}, partial(_scored, prompts=prompts, column=column)
            )
        if listed:
            parse = partial(_labelled_list, prompts=prompts, responses=("responses",), column=listed)
            return Shape("labelled list", extra | {*prompts, "responses", listed}, parse)
    numbered = _numbered_columns(columns)
    if numbered and listed:
        parse = partial(_labelled_list, prompts=prompts, responses=numbered, column=listed)
        return Shape("labelled list", extra | {*prompts, *numbered, listed}, parse)
    pair = next((pair for pair in PAIRS if columns.has(*pair)), None)
    labels = tuple(sorted(name for name in columns.names if _ANNOTATOR.fullmatch(name)))
    if not labels and (one := columns.first((*PROBABILITIES, *LABELS, *CHOICES))):
        labels = (one,)
    if pair is None or not labels:
        return None
    parse = partial(_pair, prompts=prompts, pair=pair, labels=labels)
    return Shape("labelled pair", extra | {*prompts, *pair, *labels}, parse)


def _recognise_chosen(columns: Columns, prompts: Sequence[str], extra: frozenset[str]) -> Shape:
    used = extra | {"chosen", "rejected", *prompts, *(["margin"] if columns.has("margin") else [])}
    if prompts or columns.holds_list("chosen"):
        return Shape("chosen/rejected", used, partial(_chosen_rejected, prompts=prompts))
    for record in columns.sample:
        texts = [record.get(name) for name in ("chosen", "rejected")]
        if all(isinstance(text, str) and _ASSISTANT in text and "Human:" in text for text in texts):
            return Shape("chosen/rejected transcripts", used, _transcripts)
    return Shape("chosen/rejected, implicit prompt", used, _implicit_prompt)


def _prompt_columns(columns: Columns) -> tuple[str, ...]:
    name = columns.first(PROMPTS)
    if name is None:
        return ()
    return ("instruction", "input") if name == "instruction" and columns.has("input") else (name,)


def _numbered_columns(columns: Columns) -> tuple[str, ...]:
    """Columns such as "prediction 1".."prediction 4", in order, of one stem; () where there are fewer than two."""
    stems: dict[str, dict[int, str]] = {}
    for name in columns.names:
        if match := _NUMBERED.fullmatch(name):
            stems.setdefault(match[1], {})[int(match[2])] = name
    for found in stems.values():
        if len(found) >= 2 and sorted(found) == list(range(1, len(found) + 1)):
            return tuple(found[k] for k in sorted(found))
    return ()
