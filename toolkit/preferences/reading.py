"""Preference data of any source and format -> ``list[PreferenceRow]``, with a report of what was read.

A source is a shipped name, a file, a folder of ``datasets``, or a hub id. Rows of the same prompt are merged. What is
left out is counted. Wrong input is a :class:`DataError` that names file, row and column.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, nearest
from toolkit.files import write_row_groups
from toolkit.preferences import formats, splits
from toolkit.preferences.cells import RecordError, is_missing, name_cell, parsed_number
from toolkit.preferences.formats import Format
from toolkit.preferences.loading import PARQUET_KEY, SourceRecords, load, parquet_records
from toolkit.preferences.parsing import ASSISTANT_TURN, Datum, NoSharedPromptError, parse_transcript
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, Record, canonical_prompt, row_to_dict
from toolkit.preferences.unseen import unseen_parts
from toolkit.storage.integrity import refuse_changed

MIN_LABELS = 8  # fewer that are all 0 or 1 may be wins of the first response and ties
FIRST_COLUMNS = 20  # that an error lists
FIRST_ROWS = 5  # row numbers that a report lists for what was left out


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
    empty_rows: tuple[int, ...] = ()
    unparsable_rows: tuple[int, ...] = ()
    identical_rows: tuple[int, ...] = ()
    ignored_columns: tuple[str, ...] = ()
    unseen: dict[str, int] = field(default_factory=dict)  # what rows hold and no model sees -> how many rows do

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def warnings(self) -> list[str]:
        """:func:`data_warnings` of this report."""
        return data_warnings(self.to_dict())


_WARNINGS = {
    "n_empty": "rows left out: a prompt or response is empty",
    "n_unparsable": "rows left out: their responses share no prompt",
    "n_identical": "comparisons left out: both responses are the same text",
    "n_duplicates": "rows are equal to an earlier one",
    "n_contradictions": "pairs are judged both ways by the same annotator (or without one)",
    "n_unlabelled": "judgements are missing",
    "n_multi_turn": "rows have later turns inside a response",
    "n_booleans": "rows hold a boolean in the place of a text, read as 'True' or 'False'",
    "n_prompt_repeated": "rows repeat the prompt at the start of every response, so it will be there twice",
}


def data_warnings(report: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that a user should know before training on data with such a report.

    >>> data_warnings({"n_empty": 2, "empty_rows": [3, 8], "n_ties": 5})
    ['2 rows left out: a prompt or response is empty (first: 3, 8)']
    """
    sentences = []
    for name, text in _WARNINGS.items():
        if report.get(name):
            rows = report.get(f"{name.removeprefix('n_')}_rows", ())
            first = f" (first: {', '.join(map(str, rows))})" if rows else ""
            sentences.append(f"{report[name]:,} {text}{first}")
    for name, n in (report.get("unseen") or {}).items():
        sentences.append(f"{n:,} rows hold {name}, which no model here sees: only text is read")
    return sentences


@dataclass(frozen=True)
class PreferenceData:
    """Rows, a report of what was read, and a hash of the content."""

    rows: list[PreferenceRow]
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
            transcripts as messages when every one of them can be parsed, and leaves other data as it is.
        annotators: use only the comparisons of these annotators. Prompts without any stay in the data.

    Raises:
        DataError: no such source; a format that is not known; a wrong record (with its row and column); text prompts
            and conversations in one data set; fewer than two responses; no usable row.
    """
    loaded, recognised = recognised_source(source, split=split, config=config, revision=revision, columns=columns)
    data, unparsable = _parse(loaded, recognised)
    data, not_conversations = as_conversation(loaded, recognised, data, conversational)
    _check_one_kind(loaded, data)
    if annotators is not None:
        data = _only_annotators(loaded, data, annotators)
    rows, counts = _merge(loaded, data)
    counts |= _unparsable_counts([*unparsable, *not_conversations])
    if not rows:
        raise _no_usable_row(loaded, counts)
    report = DataReport(
        source=loaded.name,
        format=recognised.name,
        conversational=isinstance(rows[0].prompt, list),
        n_rows_read=len(loaded.records),
        n_prompts=len(rows),
        n_responses=sum(len(row.responses) for row in rows),
        n_annotators=len({c.annotator for row in rows for c in row.comparisons if c.annotator}),
        n_booleans=sum(any(isinstance(r.get(c), bool) for c in recognised.columns) for _, r in loaded.records),
        n_groups=len({row.group for row in rows if row.group}),
        ignored_columns=tuple(n for n in column_names(loaded) if n not in {*recognised.columns, formats.GROUP}),
        unseen=_unseen(loaded, recognised),
        **counts,
    )
    return PreferenceData(rows, report, loaded.fingerprint or _rows_hash(rows))


def _unseen(loaded: SourceRecords, recognised: Format) -> dict[str, int]:
    """What rows hold and no model here sees, with the number of rows that do."""
    counts: Counter[str] = Counter()
    for _, record in loaded.records:
        counts.update(set(unseen_parts(record, recognised.columns)))
    return dict(sorted(counts.items()))


def recognised_source(
    source: str, *, split: str, config: str | None, revision: str | None, columns: Mapping[str, str] | None
) -> tuple[SourceRecords, Format]:
    """The records of a source with ``columns`` renamed, and the format that reads them.

    Raises DataError for no such source, an empty one, a format that is not known, and labels that no format has.
    """
    loaded = load(source, split=split, config=config, revision=revision)
    if not loaded.records:
        raise DataError("the data set is empty", where=loaded.name)
    if columns:
        loaded = _renamed(loaded, columns)
    names = column_names(loaded)
    recognised = formats.recognise(names, [record for _, record in loaded.records[:100]])
    if recognised is None:
        raise _unknown_format(loaded.name, names)
    _check_label_base(loaded, recognised)
    return loaded, recognised


def column_names(loaded: SourceRecords) -> tuple[str, ...]:
    """The columns of the first records, in order of appearance."""
    return tuple(dict.fromkeys(str(name) for _, record in loaded.records[:100] for name in record))


# ---------------------------------------------------------------------------------------------------- single records
def _parse(loaded: SourceRecords, recognised: Format) -> tuple[list[tuple[int, Datum]], list[int]]:
    """Each record as ``(number, datum)``, and the numbers of the records whose responses share no prompt."""
    data: list[tuple[int, Datum]] = []
    unparsable: list[int] = []
    single: list[tuple[int, int]] = []
    for number, record in loaded.records:
        try:
            datum = parse_record(recognised, record)
        except NoSharedPromptError:
            unparsable.append(number)
            continue
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        if len(datum.responses) < 2:
            single.append((number, len(datum.responses)))
        data.append((number, datum))
    if single:
        number, n = single[0]
        if len(single) == len(loaded.records):
            raise DataError(f"every row has {n} response(s): a preference needs K >= 2 responses", where=loaded.name)
        raise row_error(loaded, number, f"{n} response(s) for a prompt: a preference needs K >= 2 responses")
    return data, unparsable


def parse_record(recognised: Format, record: Record) -> Datum:
    """What one record says. Raises RecordError for a wrong one, NoSharedPromptError where no prompt is shared."""
    return replace(recognised.parse(record), group=_group(record))


def _group(record: Record) -> str:
    """The group that a record names, as text. Raises RecordError for a list or an object."""
    if isinstance(record.get(formats.GROUP), float):
        raise RecordError(f"{formats.GROUP!r} is a number, expected a text or a whole number", column=formats.GROUP)
    return name_cell(record, formats.GROUP)


def as_conversation(
    loaded: SourceRecords, recognised: Format, data: list[tuple[int, Datum]], conversational: bool | None
) -> tuple[list[tuple[int, Datum]], list[int]]:
    """Text prompts as messages where the user wants that, or where all are transcripts that can be parsed.

    Also returns the numbers of the transcripts that cannot be parsed.
    """
    if conversational is False:
        number = next((number for number, datum in data if isinstance(datum.prompt, list)), None)
        if number is not None:
            fix = "leave conversational unset: this data needs a chat template"
            raise row_error(loaded, number, "conversational=False, but the prompt is chat messages", fix=fix)
        return data, []
    transcripts = recognised.name.endswith("transcripts")
    if not transcripts and not conversational:
        return data, []
    converted: list[tuple[int, Datum]] = []
    unparsable: list[int] = []
    for number, datum in data:
        if isinstance(datum.prompt, list):
            converted.append((number, datum))
        elif (messages := parse_transcript(datum.prompt)) is not None:
            responses = [response.strip() for response in datum.responses]
            converted.append((number, replace(datum, prompt=messages, responses=responses)))
        elif not transcripts:
            prompt: Prompt = [{"role": "user", "content": datum.prompt}]
            converted.append((number, replace(datum, prompt=prompt)))
        elif conversational is None:
            return data, []
        else:
            unparsable.append(number)
    return converted, unparsable


def _only_annotators(
    loaded: SourceRecords, data: list[tuple[int, Datum]], names: Sequence[str]
) -> list[tuple[int, Datum]]:
    known = {c.annotator for _, datum in data for c in datum.comparisons if c.annotator}
    for name in names:
        if name not in known:
            fix = nearest(name, known) or "this data names no annotators"
            raise DataError(f"no comparison by annotator {name!r}", where=loaded.name, fix=fix)
    wanted = frozenset(names)
    return [
        (number, replace(datum, comparisons=[c for c in datum.comparisons if c.annotator in wanted]))
        for number, datum in data
    ]


# ---------------------------------------------------------------------------------------------------- merging
@dataclass
class _PromptEntry:
    """One prompt while its rows are collected."""

    prompt: Prompt
    source_row: int
    group: str = ""
    position: dict[str, int] = field(default_factory=dict)  # of each response
    comparisons: list[Comparison] = field(default_factory=list)
    comparison_rows: list[int] = field(default_factory=list)
    gold: dict[str, float] = field(default_factory=dict)

    def add(self, number: int, datum: Datum) -> int:
        """Add the responses and comparisons of a record. Returns how many judgements compare a text with itself."""
        at = [self.position.setdefault(text, len(self.position)) for text in datum.responses]
        identical = []
        for c in datum.comparisons:
            if at[c.winner] == at[c.loser]:
                identical.append(c)
            else:
                self.comparisons.append(Comparison(at[c.winner], at[c.loser], c.weight, c.annotator, c.margin))
                self.comparison_rows.append(number)
        return len(splits.labelled_pairs(identical))

    def row(self, key: str) -> PreferenceRow:
        gold = [self.gold[text] for text in self.position] if len(self.gold) == len(self.position) else None
        prompt_id = hashlib.sha256(key.encode()).hexdigest()[:16]  # as rows.prompt_id, whose JSON the key is
        return PreferenceRow(
            prompt_id, self.prompt, list(self.position), self.comparisons, gold, self.source_row, self.group
        )


def _merge(loaded: SourceRecords, data: Iterable[tuple[int, Datum]]) -> tuple[list[PreferenceRow], dict[str, Any]]:
    """Rows, one for each prompt in order of first appearance, and counts of :class:`DataReport`."""
    entries: dict[str, _PromptEntry] = {}
    seen: set[object] = set()
    empty: list[int] = []
    identical: list[int] = []
    n = dict.fromkeys(("n_duplicates", "n_unlabelled", "n_multi_turn", "n_prompt_repeated"), 0)
    for number, datum in data:
        prompt, responses = datum.prompt, datum.responses
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
        check_unicode(loaded, number, prompt_texts(prompt), "prompt")
        check_unicode(loaded, number, responses, "responses")
        if not last.strip() or not all(map(str.strip, responses)):
            empty.append(number)
            continue
        key = canonical_prompt(prompt)
        entry = entries.setdefault(key, _PromptEntry(prompt, number, datum.group))
        if datum.group != entry.group:
            what = f"group {datum.group!r} here and {entry.group!r} earlier for the same prompt"
            raise row_error(loaded, number, what, column=formats.GROUP)
        whole = (key, tuple(responses), tuple(datum.comparisons))
        n["n_duplicates"] += whole in seen
        seen.add(whole)
        n["n_unlabelled"] += datum.n_unlabelled
        n["n_multi_turn"] += any("\n\nHuman:" in text or ASSISTANT_TURN in text for text in responses)
        n["n_prompt_repeated"] += all(text.startswith(last) for text in responses)
        identical += [number] * entry.add(number, datum)
        for text, gold in zip(responses, datum.gold or (), strict=False):
            if entry.gold.setdefault(text, gold) != gold:
                what = f"gold is {gold} here and {entry.gold[text]} earlier for the same prompt and response"
                raise row_error(loaded, number, what, column="gold")
    usable = {key: entry for key, entry in entries.items() if len(entry.position) > 1}
    pairs = [(splits.labelled_pairs(entry.comparisons), entry.comparison_rows) for entry in usable.values()]
    counts: dict[str, Any] = {
        **n,
        "n_comparisons": sum(len(labelled) for labelled, _ in pairs),
        "n_ties": sum(pair.p == 0.5 for labelled, _ in pairs for pair in labelled),
        "n_contradictions": sum(splits.contradictions(labelled, rows) for labelled, rows in pairs),
        "n_unjudged": sum(not labelled for labelled, _ in pairs),
        "n_empty": len(empty),
        "empty_rows": tuple(empty[:FIRST_ROWS]),
        "n_identical": len(identical),
        "identical_rows": tuple(dict.fromkeys(identical))[:FIRST_ROWS],
    }
    return [entry.row(key) for key, entry in usable.items()], counts


def _unparsable_counts(numbers: Sequence[int]) -> dict[str, Any]:
    return {"n_unparsable": len(numbers), "unparsable_rows": tuple(sorted(numbers)[:FIRST_ROWS])}


def _rows_hash(rows: Iterable[PreferenceRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row_to_dict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- checks
def _check_one_kind(loaded: SourceRecords, data: Iterable[tuple[int, Datum]]) -> None:
    first: dict[bool, int] = {}
    for number, datum in data:
        first.setdefault(isinstance(datum.prompt, list), number)
        if len(first) == 2:
            what = f"{loaded.unit} {first[True]} holds chat messages, {loaded.unit} {first[False]} holds plain text"
            fix = "conversational: true turns plain prompts into messages"
            raise DataError(f"conversational and plain prompts in one data set: {what}", where=loaded.name, fix=fix)


def _check_label_base(loaded: SourceRecords, recognised: Format) -> None:
    """Refuse labels that are all 0 or 1: read as 1 = first and 0 = tie they would lose every second win."""
    if not recognised.labels:
        return
    values: list[object] = []
    for _, record in loaded.records:
        for column in recognised.labels:
            of_record = record.get(column)
            values += of_record if isinstance(of_record, list) else [of_record]
    numbers = [_label_number(value) for value in values if not is_missing(value)]
    if len(numbers) >= MIN_LABELS and set(numbers) == {0.0, 1.0}:
        column = recognised.labels[0]
        fix = "write 1 where the first response is preferred, 2 where the second is, 0 or null where neither is"
        if recognised.name == "labelled pair":
            fix = f"if 0 = first and 1 = second, map it: columns: {{choice: {column}}}; otherwise {fix}"
        what = f"every label in {column!r} is 0 or 1, but 1 = first, 2 = second, 0 = tie is expected"
        raise DataError(what, where=loaded.name, fix=fix)


def _label_number(value: object) -> float:
    """A label as a number, whatever its type; -1 for a word."""
    number = float(value) if isinstance(value, bool) else parsed_number(value)
    return -1.0 if number is None else number


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


def _no_usable_row(loaded: SourceRecords, counts: Mapping[str, Any]) -> DataError:
    reasons = {
        "n_unparsable": "without a shared prompt",
        "n_empty": "empty",
        "n_identical": "with identical responses",
    }
    why = ", ".join(f"{counts[name]} {text}" for name, text in reasons.items() if counts[name])
    fix = "check which columns hold the prompt and the responses; `columns` maps their names"
    return DataError(f"no usable row of {len(loaded.records)}: {why}", where=loaded.name, fix=fix)


def _unknown_format(name: str, columns: Sequence[str]) -> DataError:
    hints = []
    for column in columns[:FIRST_COLUMNS]:
        close = difflib.get_close_matches(column, formats.KNOWN_COLUMNS, n=1, cutoff=0.9)
        if close and not formats.is_known_column(column) and close[0] not in columns:
            hints.append(f"{column!r}: did you mean {close[0]!r}?")
    known = "".join(f"\n           {label}: {text}" for label, text in formats.FORMATS.items())
    fix = " ".join(hints) or "name your columns as one of the formats does, or map them with `columns`."
    if {"generator_1", "generator_2", "preference"} <= set(columns):
        fix = "recorded judgements without their texts are for `duel winrate`."
    return DataError(
        f"not a known format of preference data: its columns are {in_words(columns)}",
        where=name,
        fix=f"{fix} Known formats:{known}",
    )


def in_words(columns: Sequence[str]) -> str:
    """The names of columns, the first of them where there are many."""
    more = f" and {len(columns) - FIRST_COLUMNS:,} more" if len(columns) > FIRST_COLUMNS else ""
    return ", ".join(map(repr, columns[:FIRST_COLUMNS])) + more


def _renamed(loaded: SourceRecords, columns: Mapping[str, str]) -> SourceRecords:
    """The records with ``columns`` (a format's column -> the data's column) applied."""
    present = {str(name) for _, record in loaded.records[:100] for name in record}
    for wanted, name in columns.items():
        if not formats.is_known_column(wanted):
            fix = nearest(wanted, formats.KNOWN_COLUMNS)
            raise DataError(f"columns.{wanted}: no format has a column {wanted!r}", where=loaded.name, fix=fix)
        if name not in present:
            raise DataError(f"columns.{wanted}: no column {name!r}", where=loaded.name, fix=nearest(name, present))
    mapped = set(columns.values())
    renamed: list[tuple[int, Record]] = []
    for number, record in loaded.records:
        rest = {key: value for key, value in record.items() if key not in mapped and key not in columns}
        renamed.append((number, {wanted: record[name] for wanted, name in columns.items() if name in record} | rest))
    return replace(loaded, records=renamed)


# ---------------------------------------------------------------------------------------------------- Parquet
def to_parquet(rows: Sequence[PreferenceRow], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write rows, the prompt as JSON text; :func:`from_parquet` gives back equal rows.

    ``metadata`` is kept beside the columns.
    """
    import pyarrow as pa

    comparison = pa.struct(
        [
            ("winner", pa.int32()),
            ("loser", pa.int32()),
            ("weight", pa.float64()),
            ("annotator", pa.string()),
            ("margin", pa.float64()),
        ]
    )
    schema = pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("responses", pa.list_(pa.string())),
            ("comparisons", pa.list_(comparison)),
            ("gold", pa.list_(pa.float64())),
            ("source_row", pa.int64()),
            ("group", pa.string()),
        ],
        metadata={PARQUET_KEY: b"1"} | {key.encode(): value.encode() for key, value in (metadata or {}).items()},
    )
    records = [{**asdict(row), "prompt": json.dumps(row.prompt)} for row in rows]
    write_row_groups([records], schema, Path(path))


def from_parquet(path: str | Path) -> list[PreferenceRow]:
    """Rows that :func:`to_parquet` wrote.

    Raises :class:`DataError` for another or a damaged file, StoreError for one that was changed in its run.
    """
    name = str(path)
    refuse_changed(Path(path))
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror or error}", where=name) from error
    rows = []
    for record in parquet_records(raw, name):
        if not {"prompt_id", "prompt", "responses", "comparisons", "gold", "source_row"} <= record.keys():
            fix = "read other Parquet files with read_preferences"
            raise DataError("not a Parquet file of preference rows", where=name, fix=fix)
        comparisons = [Comparison(**comparison) for comparison in record["comparisons"]]
        rows.append(PreferenceRow(**{**record, "comparisons": comparisons}))
    return rows
