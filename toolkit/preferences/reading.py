"""Preference data of any source and format -> ``list[PreferenceRow]``, with a report of what was read.

A source is a shipped name, a file, a folder of ``datasets``, or a hub id. Rows of the same prompt are merged. What is
left out is counted. Wrong input is a :class:`DataError` that names file, row and column.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from toolkit.errors import DataError, DuelError, nearest
from toolkit.preferences import formats
from toolkit.preferences.cells import RecordError, name_cell, parsed_number
from toolkit.preferences.columns import GROUP, KNOWN_COLUMNS, Columns, Format, is_known_column
from toolkit.preferences.csv_cells import CSV, with_json
from toolkit.preferences.layout_parsing import joined
from toolkit.preferences.loading import FileRecords, SourceRecords, load, messages_read
from toolkit.preferences.merging import FIRST_ROWS, merge
from toolkit.preferences.parsing import Datum, NoSharedPromptError, parse_transcript
from toolkit.preferences.refusals import check_label_base, in_words, no_usable_row, refused, row_error, unknown_format
from toolkit.preferences.rows import PreferenceRow, Record, row_to_dict
from toolkit.preferences.stored import StoredRows
from toolkit.preferences.unseen import UNSEEN_COLUMNS, unseen_parts

# The scores of the chosen and the rejected response: UltraFeedback's, Tulu's and argilla's names.
SIDE_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)
_SCORES_OF_CHOSEN = frozenset(chosen for chosen, _ in SIDE_SCORES)
SAMPLE = 100  # records that are looked at to recognise the format


@dataclass(frozen=True)
class DataReport:
    """Counts of what was read. Rows are those of the source; prompts and responses are counted after merging."""

    source: str
    format: str
    conversational: bool
    n_rows_read: int
    n_prompts: int
    n_responses: int
    n_comparisons: int  # judgements: a tie or a soft label counts once
    n_ties: int
    n_annotators: int  # distinct names
    n_empty: int  # rows left out because a prompt or response is blank
    n_unparsable: int  # rows left out because their responses share no prompt
    n_identical: int  # comparisons left out because both responses are the same text: they tie by construction
    n_duplicates: int  # rows equal to an earlier one; they stay, since two annotators may agree
    n_contradictions: int  # pairs with opposite preferences by one annotator, or in two rows that name none; they stay
    n_unlabelled: int  # judgements that are missing (null)
    n_unjudged: int  # prompts without any comparison; they stay
    n_multi_turn: int  # transcripts that differ before their last turn: later turns are in the response; they stay
    n_groups: int  # distinct names of groups, each of which is held out as a whole
    n_prompt_repeated: int  # rows whose responses all begin with the text of the prompt; they stay
    n_booleans: int  # rows where a text is a JSON boolean, read as "True" or "False"
    n_single: int = 0  # rows of one response left out, because no other row has their prompt
    n_equal_scores: int = 0  # rows whose chosen and rejected response have the same score; they stay
    empty_rows: tuple[int, ...] = ()
    unparsable_rows: tuple[int, ...] = ()
    identical_rows: tuple[int, ...] = ()
    single_rows: tuple[int, ...] = ()
    ignored_columns: tuple[str, ...] = ()
    unseen: dict[str, int] = field(default_factory=dict)  # what rows hold and no model sees -> how many rows do

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def warnings(self) -> list[str]:
        """:func:`data_warnings` of this report."""
        return data_warnings(self.to_dict())

    def left_out(self) -> str:
        """What was left out, in one line; "" where nothing was."""
        report = {name: value for name, value in self.to_dict().items() if name in _LEFT_OUT or name.endswith("_rows")}
        return "; ".join(data_warnings(report))

    @property
    def n_rows_left_out(self) -> int:
        """Rows of which nothing is read."""
        return self.n_empty + self.n_unparsable + self.n_single


# What is said of one, and of several: "row|rows".
_WARNINGS = {
    "n_empty": "row|rows left out: a prompt or response is empty",
    "n_unparsable": "row|rows left out: the responses share no prompt",
    "n_single": "row|rows left out: no other row has a response to the same prompt",
    "n_equal_scores": "row|rows with one score for the chosen and the rejected response, read as wins",
    "n_identical": "comparison|comparisons left out: both responses are the same text",
    "n_duplicates": "row|rows equal to an earlier one",
    "n_contradictions": "pair|pairs judged both ways by the same annotator (or without one)",
    "n_unlabelled": "judgement|judgements missing",
    "n_multi_turn": "row|rows with later turns inside a response",
    "n_booleans": "row|rows with a boolean in the place of a text, read as 'True' or 'False'",
    "n_prompt_repeated": "row|rows with the prompt at the start of every response, so it will be there twice",
}
_LEFT_OUT = frozenset(name for name, text in _WARNINGS.items() if "left out" in text)


def data_warnings(report: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that a user should know before training on data with such a report.

    >>> data_warnings({"n_empty": 2, "empty_rows": [3, 8], "n_ties": 5})
    ['2 rows left out: a prompt or response is empty (first: 3, 8)']
    >>> data_warnings({"n_identical": 1})
    ['1 comparison left out: both responses are the same text']
    >>> data_warnings({"ignored_columns": ("id", "source")})
    ["columns that are not read: 'id', 'source'"]
    """
    sentences = []
    for name, text in _WARNINGS.items():
        if report.get(name):
            rows = report.get(f"{name.removeprefix('n_')}_rows", ())
            first = f" (first: {', '.join(map(str, rows))})" if rows else ""
            sentences.append(f"{_number_of(report[name], text)}{first}")
    for name, n in (report.get("unseen") or {}).items():
        sentences.append(_number_of(n, f"row|rows with {name}, which no model here sees: only text is read"))
    unseen = {*(report.get("unseen") or {})}
    if unread := [name for name in report.get("ignored_columns", ()) if f"column {name!r}" not in unseen]:
        sentences.append(f"columns that are not read: {in_words(unread)}")
    return sentences


def _number_of(n: int, text: str) -> str:
    one, _, rest = text.partition("|")
    return f"{n:,} {one} {rest.partition(' ')[2]}" if n == 1 else f"{n:,} {rest}"


@dataclass(frozen=True)
class PreferenceData:
    """Rows, which wait on disk, a report of what was read, and a hash of the content."""

    rows: StoredRows
    report: DataReport
    fingerprint: str


def read_preferences(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    conversational: bool | None = None,
    annotators: Sequence[str] | None = None,
) -> PreferenceData:
    """Read preference data in any known format (:data:`toolkit.preferences.formats.FORMATS`).

    Args:
        source: a shipped name, a file (:data:`toolkit.preferences.loading.SUFFIXES`), a folder that ``datasets`` reads,
            or a hub id.
        split, config, revision: of hub data and folders; files have none. A ``config`` that the data set does not
            know is taken as its ``data_dir`` (Anthropic/hh-rlhf has "harmless-base").
        columns: the name of a format's column -> the name of that column in the data.
        conversational: True reads transcripts and text prompts as chat messages, False leaves them as text. None reads
            transcripts as messages when every one of them can be parsed, and leaves other data as it is. The texts of
            a column ``system`` become messages too, unless it is False.
        annotators: use only the comparisons of these annotators. Prompts without any stay in the data.

    Raises:
        DataError: no such source; a format that is not known; a wrong record (with its row and column); text prompts
            and conversations in one data set; fewer than two responses; no usable row.
    """
    loaded = load(source, split=split, config=config, revision=revision, checked=False)
    try:
        return _read_records(loaded, columns, conversational, annotators)
    except DuelError:
        if isinstance(loaded.records, FileRecords):
            loaded.records.check()  # a line that cannot be read comes before all other errors
        raise


def _read_records(
    loaded: SourceRecords,
    columns: Mapping[str, str] | None,
    conversational: bool | None,
    annotators: Sequence[str] | None,
) -> PreferenceData:
    loaded, recognised = _recognised(loaded, columns, text_only=conversational is False)
    tally = _Tally()
    data = _conversations(loaded, recognised, conversational, tally)
    if annotators is not None:
        data = _only_annotators(loaded, data, annotators)
    merged = merge(loaded, _of_one_kind(loaded, data))
    rows, counts = merged.rows, merged.counts
    unparsable, single = sorted(tally.unparsable), tally.single
    counts["n_empty"] += len(tally.empty)
    counts["empty_rows"] = tuple(sorted([*tally.empty[:FIRST_ROWS], *counts["empty_rows"]])[:FIRST_ROWS])
    counts |= {"n_unparsable": len(unparsable), "unparsable_rows": tuple(unparsable[:FIRST_ROWS])}
    counts |= {"n_single": len(single), "single_rows": tuple(single[:FIRST_ROWS])}
    if not rows:
        raise no_usable_row(loaded, counts)
    report = DataReport(
        source=loaded.name,
        format=recognised.name,
        conversational=isinstance(rows[0].prompt, list),
        n_rows_read=len(loaded.records),
        n_prompts=len(rows),
        n_booleans=tally.n_booleans,
        n_equal_scores=tally.n_equal_scores,
        n_groups=rows.n_groups,
        ignored_columns=tuple(n for n in column_names(loaded) if n not in {*recognised.columns, GROUP}),
        unseen=dict(sorted(tally.unseen.items())),
        **counts,
    )
    return PreferenceData(rows, report, loaded.fingerprint or _rows_hash(rows))


@dataclass
class _Tally:
    """What is counted while records are parsed, and the numbers of those that are left out."""

    n_booleans: int = 0
    n_equal_scores: int = 0
    unseen: Counter[str] = field(default_factory=Counter)
    unparsable: list[int] = field(default_factory=list)
    single: Sequence[int] = ()
    empty: Sequence[int] = ()  # of one response, before records are joined

    def count(self, record: Record, recognised: Format) -> None:
        kinds = set(map(type, record.values()))
        if bool in kinds:
            self.n_booleans += bool in map(type, map(record.get, recognised.columns))
        if not _SCORES_OF_CHOSEN.isdisjoint(record):
            self.n_equal_scores += _equal_scores(record)
        if list in kinds or not UNSEEN_COLUMNS.isdisjoint(record):
            self.unseen.update(set(unseen_parts(record, recognised.columns)))


def _equal_scores(record: Record) -> bool:
    """Whether the chosen and the rejected response have the same score, in columns such as UltraFeedback's."""
    there = (pair for pair in SIDE_SCORES if pair[0] in record)
    scores = ([parsed_number(record.get(name)) for name in pair] for pair in there)
    return any(chosen is not None and chosen == rejected for chosen, rejected in scores)


def recognised_source(
    source: str,
    *,
    split: str,
    config: str | None,
    revision: str | None,
    columns: Mapping[str, str] | None,
    text_only: bool = False,
) -> tuple[SourceRecords, Format]:
    """The records of a source with ``columns`` renamed, and the format that reads them.

    ``text_only`` leaves prompts as text, without the system texts and earlier turns of further columns.

    Raises DataError for no such source, an empty one, a format that is not known, and labels that no format has.
    """
    return _recognised(load(source, split=split, config=config, revision=revision), columns, text_only=text_only)


def _recognised(
    loaded: SourceRecords, columns: Mapping[str, str] | None, *, text_only: bool
) -> tuple[SourceRecords, Format]:
    if not loaded.records:
        raise DataError("the data set is empty", where=loaded.name)
    if columns:
        loaded = _renamed(loaded, columns)
    names = column_names(loaded)
    sample = [record for _, record in loaded.records[:SAMPLE]]
    recognised = formats.recognise(names, sample, text_only=text_only)
    if recognised is None:
        raise unknown_format(loaded.name, Columns(names, sample))
    check_label_base(loaded, recognised.labels, mappable=recognised.name == "labelled pair")
    return loaded, recognised


def column_names(loaded: SourceRecords) -> tuple[str, ...]:
    """The columns of the first records, in order of appearance."""
    return tuple(dict.fromkeys(str(name) for _, record in loaded.records[:SAMPLE] for name in record))


# ---------------------------------------------------------------------------------------------------- single records
def _parse(loaded: SourceRecords, recognised: Format, tally: _Tally) -> Iterator[tuple[int, Datum]]:
    """Each record as ``(number, datum)``; records of one response are joined by their prompts.

    The tally gets the numbers of the records whose responses share no prompt, and among those of one response of the
    blank ones, and of those that have no other response to be compared with. Raises DataError for a wrong record.
    """
    if recognised.one_response:
        data = _parsed(loaded, recognised, tally)
        together, tally.single, tally.empty = joined(data, partial(refused, loaded))
        yield from together
        return
    n_single, first_single = 0, (0, 0)
    for number, datum in _parsed(loaded, recognised, tally):
        if len(datum.responses) < 2:
            first_single = first_single if n_single else (number, len(datum.responses))
            n_single += 1
        yield number, datum
    if n_single:
        number, n = first_single
        if n_single == len(loaded.records):
            what, fix = (
                f"every row has {n} response(s): a preference needs K >= 2 responses",
                "add responses to compare",
            )
            raise DataError(what, where=loaded.name, fix=fix)
        what = f"{n} response(s) for a prompt: a preference needs K >= 2 responses"
        raise row_error(loaded, number, what, fix="leave the row out, or add responses")


def _parsed(loaded: SourceRecords, recognised: Format, tally: _Tally) -> Iterator[tuple[int, Datum]]:
    for number, record in loaded.records:
        tally.count(record, recognised)
        try:
            datum = parse_record(recognised, record)
        except NoSharedPromptError:
            tally.unparsable.append(number)
        except RecordError as error:
            raise refused(loaded, number, error) from error
        else:
            yield number, datum


def _conversations(
    loaded: SourceRecords, recognised: Format, conversational: bool | None, tally: _Tally
) -> Iterator[tuple[int, Datum]]:
    """The data of all records, as :func:`as_conversation` has them, one after the other."""
    if conversational is None and recognised.name.endswith("transcripts"):
        conversational = are_messages(datum for _, datum in _parse(loaded, recognised, _Tally())) or None
    if conversational is None:  # they stay as they are
        yield from _parse(loaded, recognised, tally)
        return
    for number, datum in _parse(loaded, recognised, tally):
        try:
            yield number, as_conversation(recognised, datum, conversational)
        except NoSharedPromptError:
            tally.unparsable.append(number)
        except RecordError as error:
            raise refused(loaded, number, error) from error


def parse_record(recognised: Format, record: Record) -> Datum:
    """What one record says. Raises RecordError for a wrong one, NoSharedPromptError where no prompt is shared."""
    datum, group = recognised.parse(record), _group(record) if GROUP in record else ""
    return datum._replace(group=group) if group != datum.group else datum


def _group(record: Record) -> str:
    """The group that a record names, as text. Raises RecordError for a list or an object."""
    if isinstance(record.get(GROUP), float):
        raise RecordError(f"{GROUP!r} is a number, expected a text or a whole number", column=GROUP)
    return name_cell(record, GROUP)


def are_messages(transcripts: Iterable[Datum]) -> bool:
    """Whether all of these transcripts can be read as messages: one that cannot makes all of them text."""
    return all(isinstance(datum.prompt, list) or parse_transcript(datum.prompt) is not None for datum in transcripts)


def as_conversation(recognised: Format, datum: Datum, conversational: bool | None) -> Datum:
    """A text prompt as messages where the user wants that, and a transcript unless the user does not.

    A transcript that is no conversation stays text where ``conversational`` is None.

    Raises NoSharedPromptError for such a one where it is True, RecordError for messages where it is False.
    """
    prompt, transcripts = datum.prompt, recognised.name.endswith("transcripts")
    if isinstance(prompt, list):
        if conversational is False:
            fix = "leave conversational unset: this data needs a chat template"
            raise RecordError("conversational=False, but the prompt is chat messages", fix=fix)
        return datum
    if conversational is False or not (transcripts or conversational):
        return datum
    if (messages := parse_transcript(prompt)) is not None:
        return datum._replace(prompt=messages, responses=[response.strip() for response in datum.responses])
    if not transcripts:
        return datum._replace(prompt=[{"role": "user", "content": prompt}])
    if conversational:
        raise NoSharedPromptError("the transcript cannot be read as messages")
    return datum


def _only_annotators(
    loaded: SourceRecords, data: Iterable[tuple[int, Datum]], names: Sequence[str]
) -> Iterator[tuple[int, Datum]]:
    known = set[str]()
    wanted = frozenset(names)
    for number, datum in data:
        known |= {c.annotator for c in datum.comparisons if c.annotator}
        yield number, datum._replace(comparisons=[c for c in datum.comparisons if c.annotator in wanted])
    for name in names:
        if name not in known:
            fix = nearest(name, known) or "this data names no annotators"
            raise DataError(f"no comparison by annotator {name!r}", where=loaded.name, fix=fix)


def _rows_hash(rows: Iterable[PreferenceRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row_to_dict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- checks
def _of_one_kind(loaded: SourceRecords, data: Iterable[tuple[int, Datum]]) -> Iterator[tuple[int, Datum]]:
    """The data as they come. Raises DataError where text follows chat messages, or the other way round."""
    first: dict[bool, int] = {}
    for number, datum in data:
        first.setdefault(isinstance(datum.prompt, list), number)
        if len(first) == 2:
            what = f"{loaded.unit} {first[True]} holds chat messages, {loaded.unit} {first[False]} holds plain text"
            fix = "conversational: true turns plain prompts into messages"
            raise DataError(f"conversational and plain prompts in one data set: {what}", where=loaded.name, fix=fix)
        yield number, datum


def _renamed(loaded: SourceRecords, columns: Mapping[str, str]) -> SourceRecords:
    """The records with ``columns`` (a format's column -> the data's column) applied."""
    check_mapping(columns, column_names(loaded), loaded.name)

    def rename() -> Iterator[tuple[int, Record]]:
        return ((number, with_columns(record, columns)) for number, record in loaded.records)

    if loaded.name.lower().endswith(CSV):  # under their new names columns may hold lists
        return replace(loaded, records=FileRecords(lambda: with_json(rename(), loaded.name)))
    return messages_read(replace(loaded, records=FileRecords(rename)))


def check_mapping(columns: Mapping[str, str], present: Collection[str], where: str) -> None:
    """Raises DataError for a column that no format has, and for one that is not there."""
    for wanted, name in columns.items():
        if not is_known_column(wanted):
            fix = nearest(wanted, KNOWN_COLUMNS)
            raise DataError(f"columns.{wanted}: no format has a column {wanted!r}", where=where, fix=fix)
        if name not in present:
            raise DataError(f"columns.{wanted}: no column {name!r}", where=where, fix=nearest(name, present))


def with_columns(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with ``columns`` (a format's column -> the data's column) applied."""
    mapped = set(columns.values())
    rest = {key: value for key, value in record.items() if key not in mapped and key not in columns}
    return {wanted: record[name] for wanted, name in columns.items() if name in record} | rest
