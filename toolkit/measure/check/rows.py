"""The rows that are checked. A record that a run would refuse is a finding, or is named, and the others are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from toolkit.errors import DataError
from toolkit.evals.words import counted
from toolkit.measure.check.findings import Collector, excerpt
from toolkit.preferences.cells import RecordError, messages_from
from toolkit.preferences.columns import PAIRS, PROMPTS, SIDES, Format
from toolkit.preferences.layout_parsing import joined
from toolkit.preferences.loading import SourceRecords
from toolkit.preferences.parsing import ASSISTANT_TURN, Datum, NoSharedPromptError
from toolkit.preferences.reading import as_conversation, parse_record, recognised_source
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, Record, canonical_prompt
from toolkit.preferences.splits import Pair, pairs
from toolkit.preferences.unseen import unseen_parts

TWO_RESPONSES = (*SIDES, *PAIRS)
_LAST_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read, as ``data`` of a recipe has it."""

    split: str = "train"
    config: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    conversational: bool | None = None
    annotators: Sequence[str] | None = None


@dataclass(frozen=True)
class CheckedRow:
    """One row of the source. ``texts`` are its prompt's and its responses', as they are in the source.

    In ``prompt`` and ``responses`` halves of surrogate pairs are replaced, because no tokenizer takes them.
    """

    number: int
    prompt: Prompt
    responses: list[str]
    comparisons: list[Comparison]
    group: str
    texts: list[str]

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)

    @property
    def last_turn(self) -> str:
        """The text that the responses answer."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"] if self.prompt else ""

    @cached_property
    def key(self) -> str:
        """Identifies the prompt."""
        return canonical_prompt(self.prompt)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every compared pair of responses once, all its comparisons aggregated."""
        return pairs(PreferenceRow("", "", [], self.comparisons))


@dataclass(frozen=True)
class CheckedRows:
    """The rows of a source that can be checked, and sentences on those that a run leaves out."""

    unit: str
    n_rows: int
    rows: list[CheckedRow]
    notes: list[str]


def read_rows(source: str, options: SourceOptions, limit: int | None, collector: Collector | None) -> CheckedRows:
    """The first ``limit`` rows of a source, in its order. Findings about the records go to the collector.

    Raises DataError where the source cannot be read, and where none of its rows can be.
    """
    loaded, recognised = recognised_source(
        source,
        split=options.split,
        config=options.config,
        revision=options.revision,
        columns=options.columns or None,
        text_only=options.conversational is False,
    )
    loaded = SourceRecords(loaded.name, loaded.unit, loaded.records[:limit], loaded.fingerprint)
    collector = collector or Collector(loaded.unit)
    collector.unit = loaded.unit
    reader = _RecordReader(recognised, collector)
    data = [(number, datum) for number, record in loaded.records for datum in reader.read(number, record)]
    if recognised.one_response:
        data = joined(data)[0]
    data, not_conversations = as_conversation(loaded, recognised, data, options.conversational)
    _report_two_kinds(data, reader.bare_texts, collector)
    rows = [_checked_row(number, datum, options.annotators) for number, datum in data]
    blank = [row.number for row in rows if _is_blank(row)]
    rows = [row for row in rows if not _is_blank(row)]
    if not rows and reader.refused and not collector.rows:
        number, error = next(iter(reader.refused.items()))
        raise DataError(
            f"no row can be read: {error.what}",
            where=f"{loaded.name}, {loaded.unit} {number}" + (f", column {error.column!r}" if error.column else ""),
            fix=error.fix,
        )
    if not rows and not collector.rows:
        raise DataError(
            "no row has a prompt and two responses",
            where=loaded.name,
            fix="check which columns hold the prompt and the responses; --column maps their names",
        )
    for number, error in reader.refused.items():
        collector.refuse("unreadable", number, error.what)
    notes = _notes(loaded, reader, blank, not_conversations)
    notes += _odd_rows(loaded.unit, rows, [number for number, datum in data if datum.n_unlabelled])
    return CheckedRows(loaded.unit, len(loaded.records), rows, notes)


def _is_blank(row: CheckedRow) -> bool:
    return not row.last_turn.strip() or not all(map(str.strip, row.responses))


def _checked_row(number: int, datum: Datum, annotators: Sequence[str] | None) -> CheckedRow:
    prompt_texts = [datum.prompt] if isinstance(datum.prompt, str) else [m["content"] for m in datum.prompt]
    texts = [*prompt_texts, *datum.responses]
    prompt, responses = datum.prompt, datum.responses
    if not all(map(str.isascii, texts)) and _SURROGATE.search("".join(texts)):
        prompt = _whole(prompt) if isinstance(prompt, str) else [m | {"content": _whole(m["content"])} for m in prompt]
        responses = list(map(_whole, responses))
    comparisons = [c for c in datum.comparisons if annotators is None or c.annotator in annotators]
    return CheckedRow(number, prompt, responses, comparisons, datum.group, texts)


def _whole(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _notes(loaded: SourceRecords, reader: _RecordReader, blank: list[int], unparsable: list[int]) -> list[str]:
    notes = []
    for numbers, why in (
        (blank, "a prompt or response is empty"),
        (sorted([*reader.without_prompt, *unparsable]), "its responses share no prompt"),
    ):
        if numbers:
            first = ", ".join(map(str, numbers[:5]))
            notes.append(f"{counted(len(numbers), 'row')} left out: {why} ({loaded.unit} {first})")
    return notes


def _odd_rows(unit: str, rows: Sequence[CheckedRow], unlabelled: list[int]) -> list[str]:
    """Sentences on rows that are read, and not as their author may think."""
    later = [row.number for row in rows if any("\n\nHuman:" in t or ASSISTANT_TURN in t for t in row.responses)]
    repeated = [row.number for row in rows if all(text.startswith(row.last_turn) for text in row.responses)]
    reasons = {
        "with later turns inside a response": later,
        "whose responses all begin with the prompt, which will be there twice": repeated,
        "with a missing judgement": unlabelled,
    }
    return [
        f"{counted(len(numbers), 'row')} {why} ({unit} {', '.join(map(str, numbers[:5]))})"
        for why, numbers in reasons.items()
        if numbers
    ]


def _report_two_kinds(data: Sequence[tuple[int, Datum]], bare_texts: Sequence[int], collector: Collector) -> None:
    """Text among messages, or messages among text: the rows of the rarer kind."""
    messages = [number for number, datum in data if isinstance(datum.prompt, list)]
    texts = [number for number, datum in data if isinstance(datum.prompt, str)] + list(bare_texts)
    if messages and texts:
        rarer, word, other = (
            (messages, "messages", "text") if len(messages) < len(texts) else (texts, "text", "messages")
        )
        for number in rarer:
            collector.refuse("text_and_messages", number, f"{word}, and most rows are {other}")


# ---------------------------------------------------------------------------------------------------- single records
class _RecordReader:
    """Reads records one by one, and goes on behind a wrong one."""

    def __init__(self, recognised: Format, collector: Collector) -> None:
        self.recognised, self.collector = recognised, collector
        self.refused: dict[int, RecordError] = {}
        self.without_prompt: list[int] = []
        self.bare_texts: list[int] = []  # rows of text where the format has messages

    def read(self, number: int, record: Record) -> Iterator[Datum]:
        """What a record says, if it can be read; else what is wrong with it is noted."""
        unseen = list(dict.fromkeys(unseen_parts(record, self.recognised.columns)))
        if unseen:
            self.collector.add("unseen_parts", number, ", ".join(unseen))
        answered = prompt_with_answer(record)
        if answered is not None:
            column, last = answered
            self.collector.refuse("ends_with_assistant", number, f"the prompt ends with {last}")
            record = {**record, column: _before_answer(record[column])}
        try:
            datum = parse_record(self.recognised, record)
        except NoSharedPromptError:
            if answered is None:
                self.without_prompt.append(number)
            return
        except RecordError as error:
            self._refuse(number, record, error, explained=bool(unseen) or answered is not None)
            return
        if len(datum.responses) < 2 and not self.recognised.one_response:
            self.refused[number] = RecordError(f"{len(datum.responses)} response(s) for a prompt")
            return
        if isinstance(datum.prompt, str) and (turn := _answered_transcript(datum.prompt)) is not None:
            self.collector.add("ends_with_assistant", number, f"the prompt ends with {excerpt(turn, end=True)}")
        yield datum

    def _refuse(self, number: int, record: Record, error: RecordError, *, explained: bool) -> None:
        """Note a row that cannot be read, unless another finding explains it."""
        self.collector.refused.add(number)
        present = [
            [record.get(name) for name in pair] for pair in TWO_RESPONSES if all(record.get(name) for name in pair)
        ]
        for first, second in present:
            if isinstance(first, list) != isinstance(second, list):
                self.collector.add("text_and_messages", number, "one response is text and the other is messages")
                return
            if isinstance(first, str) and "expected a list" in error.what:
                self.bare_texts.append(number)
                return
        if not explained:
            self.refused[number] = error


def prompt_with_answer(record: Record) -> tuple[str, str] | None:
    """The column of a prompt of messages that ends with the assistant's, and that message in words; else None."""
    for column in PROMPTS:
        value = record.get(column)
        if isinstance(value, list) and value:
            last = _as_messages(value[-1:], column)
            return (column, excerpt(last[0]["content"])) if last and last[0]["role"] == "assistant" else None
    for first, second in TWO_RESPONSES:
        one, two = record.get(first), record.get(second)
        if isinstance(one, list) and isinstance(two, list) and len(one) > 2 and one[:-1] == two[:-1]:
            last = _as_messages(one[-2:-1], first)
            if last and last[0]["role"] == "assistant":
                return first, excerpt(last[0]["content"])
    return None


def _as_messages(value: Sequence[Any], column: str) -> list[dict[str, str]]:
    """The messages, or none where they are no messages: the parser says so."""
    try:
        return messages_from(value, column)
    except RecordError:
        return []


def _before_answer(messages: Sequence[Any]) -> list[Any]:
    """The messages up to the last one that is not the assistant's."""
    end = len(messages)
    while end and any(m["role"] == "assistant" for m in _as_messages(messages[end - 1 : end], "")):
        end -= 1
    return list(messages[:end])


def _answered_transcript(prompt: str) -> str | None:
    """The last turn of a Human:/Assistant: transcript, where it is the assistant's and not empty."""
    if ASSISTANT_TURN not in prompt or "Human:" not in prompt:
        return None
    last = list(_LAST_TURN.finditer(prompt))[-1:]
    if not last or last[0][1] != "Assistant" or not prompt[last[0].end() :].strip():
        return None
    return prompt[last[0].start() :].strip()
