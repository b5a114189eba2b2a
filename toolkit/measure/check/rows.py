"""The rows that are checked. A record that a run would refuse is a finding, or is named, and the others are read."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from toolkit.errors import DataError, nearest
from toolkit.evals.words import counted
from toolkit.measure.check.findings import Collector, excerpt
from toolkit.measure.check.stored import CheckedRow, CheckedRows, texts_of
from toolkit.preferences.cells import RecordError, messages_from
from toolkit.preferences.columns import PAIRS, PROMPTS, SIDES, Format
from toolkit.preferences.layout_parsing import joined
from toolkit.preferences.loading import SourceRecords
from toolkit.preferences.parsing import ASSISTANT_TURN, Datum, NoSharedPromptError
from toolkit.preferences.reading import as_conversation, parse_record, recognised_source
from toolkit.preferences.refusals import refused
from toolkit.preferences.rows import Record
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
class ReadRows:
    """The rows of a source that can be checked, and sentences on those that a run leaves out."""

    unit: str
    n_rows: int
    rows: CheckedRows
    notes: list[str]


def read_rows(source: str, options: SourceOptions, limit: int | None, collector: Collector | None) -> ReadRows:
    """The first ``limit`` rows of a source, in its order. Findings about the records go to the collector.

    Raises DataError where the source cannot be read, where none of its rows can be, and for an annotator who is asked
    for and compared nothing.
    """
    loaded, recognised = recognised_source(
        source,
        split=options.split,
        config=options.config,
        revision=options.revision,
        columns=options.columns or None,
        text_only=options.conversational is False,
    )
    collector = collector or Collector(loaded.unit)
    collector.unit = loaded.unit
    reader = _RowReader(loaded, recognised, options, limit, collector)
    try:
        reader.read()
    except _NoConversationError:
        reader = _RowReader(loaded, recognised, options, limit, collector, transcripts_stay=True)
        reader.read()
    _report_two_kinds(reader.messages, [*reader.texts, *reader.records.bare_texts], collector)
    if not reader.rows and reader.records.first_refused is not None and collector.kinds <= {"unreadable"}:
        number, error = reader.records.first_refused
        raise DataError(
            f"no row can be read: {error.what}",
            where=loaded.place(number) + (f", column {error.column!r}" if error.column else ""),
            fix=error.fix,
        )
    if not reader.rows and not collector.kinds:
        raise DataError(
            "no row has a prompt and two responses",
            where=loaded.name,
            fix="check which columns hold the prompt and the responses; --column maps their names",
        )
    reader.check_annotators()
    n_rows = len(loaded.records) if limit is None else min(limit, len(loaded.records))
    return ReadRows(loaded.unit, n_rows, reader.rows, reader.notes())


class _NoConversationError(Exception):
    """A transcript cannot be read as messages, which makes all of them text."""


class _RowReader:
    """Reads the rows of a source, which it keeps on disk, and notes what is odd about them.

    Transcripts become messages where all of them can be read so; with ``transcripts_stay`` they are text.
    """

    def __init__(
        self,
        loaded: SourceRecords,
        recognised: Format,
        options: SourceOptions,
        limit: int | None,
        collector: Collector,
        *,
        transcripts_stay: bool = False,
    ) -> None:
        self.loaded, self.recognised, self.options, self.limit = loaded, recognised, options, limit
        self.transcripts_stay = transcripts_stay
        self.records = _RecordReader(recognised, collector)
        self.rows = CheckedRows()
        # The numbers of rows.
        self.messages, self.texts = array("q"), array("q")
        self.blank, self.unparsable, self.unlabelled = array("q"), array("q"), array("q")
        self.single: Sequence[int] = ()
        self.later_turns, self.repeat_prompt = array("q"), array("q")
        self.annotators = set[str]()

    def read(self) -> None:
        """Raises _NoConversationError for a transcript that stays text, unless they all do."""
        for number, datum in self._data():
            (self.messages if isinstance(datum.prompt, list) else self.texts).append(number)
            if datum.n_unlabelled:
                self.unlabelled.append(number)
            self.annotators |= {c.annotator for c in datum.comparisons if c.annotator}
            row = _checked_row(len(self.rows), number, datum, self.options.annotators)
            if not row.last_turn.strip() or not all(map(str.strip, row.responses)):
                self.blank.append(number)
                continue
            self.rows.add(row, datum.group)
            if any("\n\nHuman:" in text or ASSISTANT_TURN in text for text in row.responses):
                self.later_turns.append(number)
            if all(text.startswith(row.last_turn) for text in row.responses):
                self.repeat_prompt.append(number)

    def check_annotators(self) -> None:
        """Raises DataError for an annotator whose comparisons are wanted and who has none."""
        for name in self.options.annotators or ():
            if name not in self.annotators:
                among = f" in the first {self.limit} rows" if self.limit is not None else ""
                fix = nearest(name, self.annotators) or "these rows name no annotators"
                raise DataError(f"no comparison by annotator {name!r}{among}", where=self.loaded.name, fix=fix)

    def _data(self) -> Iterator[tuple[int, Datum]]:
        records = islice(self.loaded.records, self.limit)
        data: Iterator[tuple[int, Datum]] = (
            (number, datum) for number, record in records if (datum := self.records.read(number, record)) is not None
        )
        if self.recognised.one_response:
            data, self.single, empty = joined(data, partial(refused, self.loaded))
            self.blank.extend(empty)
        if self.transcripts_stay:
            yield from data
            return
        for number, datum in data:
            try:
                as_read = as_conversation(self.recognised, datum, self.options.conversational)
            except NoSharedPromptError:
                self.unparsable.append(number)
                continue
            except RecordError as error:
                raise refused(self.loaded, number, error) from error
            if self._decides and isinstance(as_read.prompt, str):
                raise _NoConversationError
            yield number, as_read

    @property
    def _decides(self) -> bool:
        """Whether one transcript decides about the others."""
        return self.options.conversational is None and self.recognised.name.endswith("transcripts")

    def notes(self) -> list[str]:
        """Sentences on rows that a run leaves out, and on those that are read, and not as their author may think."""
        return [
            f"{counted(len(numbers), 'row')} {why} ({self.loaded.unit} {', '.join(map(str, numbers[:5]))})"
            for numbers, why in (
                (self.blank, "left out: a prompt or response is empty"),
                (
                    sorted([*self.records.without_prompt, *self.unparsable]),
                    "left out: its responses share no prompt",
                ),
                (self.single, "left out: no other row has a response to the same prompt"),
                (self.later_turns, "with later turns inside a response"),
                (self.repeat_prompt, "whose responses all begin with the prompt, which will be there twice"),
                (self.unlabelled, "with a missing judgement"),
            )
            if numbers
        ]


def _checked_row(place: int, number: int, datum: Datum, annotators: Sequence[str] | None) -> CheckedRow:
    prompt, responses = datum.prompt, datum.responses
    texts = texts_of(prompt, responses)
    if not all(map(str.isascii, texts)) and _SURROGATE.search("".join(texts)):
        prompt = _whole(prompt) if isinstance(prompt, str) else [m | {"content": _whole(m["content"])} for m in prompt]
        responses = list(map(_whole, responses))
    comparisons = [c for c in datum.comparisons if annotators is None or c.annotator in annotators]
    return CheckedRow(place, number, prompt, responses, comparisons, texts)


def _whole(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _report_two_kinds(messages: Sequence[int], texts: Sequence[int], collector: Collector) -> None:
    """Text among messages, or messages among text: the rows of the rarer kind."""
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
        self.first_refused: tuple[int, RecordError] | None = None  # of those that no other finding explains
        self.without_prompt = array("q")
        self.bare_texts = array("q")  # rows of text where the format has messages

    def read(self, number: int, record: Record) -> Datum | None:
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
            return None
        except RecordError as error:
            self._refuse(number, record, error, explained=bool(unseen) or answered is not None)
            return None
        if len(datum.responses) < 2 and not self.recognised.one_response:
            self._unreadable(number, RecordError(f"{len(datum.responses)} response(s) for a prompt"))
            return None
        if isinstance(datum.prompt, str) and (turn := _answered_transcript(datum.prompt)) is not None:
            self.collector.add("ends_with_assistant", number, f"the prompt ends with {excerpt(turn, end=True)}")
        return datum

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
            self._unreadable(number, error)

    def _unreadable(self, number: int, error: RecordError) -> None:
        self.first_refused = self.first_refused or (number, error)
        self.collector.refuse("unreadable", number, error.what)


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
