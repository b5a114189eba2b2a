"""Preference data of any source and format -> ``list[PreferenceRow]``, with a report of what was found in it.

A source is a shipped name, a file, a folder of ``datasets``, or a hub id. Rows of the same prompt are merged;
what is left out is counted, never silent; wrong input is a :class:`DataError` that names file, row and column.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, nearest
from toolkit.preferences import formats, splits
from toolkit.preferences.formats import Datum
from toolkit.preferences.loading import PARQUET_KEY, Source, load, parquet_records
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, Record, canonical_prompt, row_to_dict

FIRST_ROWS = 5  # row numbers that a report lists for what was left out


@dataclass(frozen=True)
class DataReport:
    """Counts of what was read. Rows are those of the source, prompts and responses those after merging."""

    source: str
    format: str
    conversational: bool
    n_rows_read: int
    n_prompts: int
    n_responses: int
    n_comparisons: int  # judgements: a tie or a soft label counts once
    n_ties: int
    n_annotators: int  # distinct names
    n_empty: int  # rows left out: a prompt or response is blank
    n_unparsable: int  # rows left out: the responses share no prompt
    n_identical: int  # comparisons left out: both responses are the same text, so they tie by construction
    n_duplicates: int  # rows equal to an earlier one; kept, since two annotators may agree
    n_contradictions: int  # pairs with opposite preferences by one annotator, or in two rows that name none; kept
    n_unlabelled: int  # judgements that are missing (null)
    n_unjudged: int  # prompts without any comparison; kept
    n_multi_turn: int  # transcripts that part before their last turn: later turns are in the response's text; kept
    n_prompt_repeated: int  # rows whose responses all begin with the prompt's text; kept
    n_booleans: int  # rows where a text is a JSON boolean, read as "True" or "False"
    empty_rows: tuple[int, ...] = ()
    unparsable_rows: tuple[int, ...] = ()
    identical_rows: tuple[int, ...] = ()
    ignored_columns: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def warnings(self) -> list[str]:
        """One sentence for each thing that a user should know before training on the data."""
        rows = {"n_empty": self.empty_rows, "n_unparsable": self.unparsable_rows, "n_identical": self.identical_rows}
        sentences = {
            "n_empty": "rows left out: a prompt or response is empty",
            "n_unparsable": "rows left out: their responses share no prompt",
            "n_identical": "comparisons left out: both responses are the same text",
            "n_contradictions": "pairs are judged both ways by the same annotator (or without one)",
            "n_unlabelled": "judgements are missing",
            "n_multi_turn": "rows have later turns inside a response",
            "n_booleans": "rows hold a boolean in the place of a text, read as 'True' or 'False'",
            "n_prompt_repeated": "rows repeat the prompt at the start of every response, so it will be there twice",
        }
        found = [(name, int(getattr(self, name)), text) for name, text in sentences.items()]
        return [
            f"{n} {text}" + (f" (first: {', '.join(map(str, rows[name]))})" if name in rows else "")
            for name, n, text in found
            if n
        ]


@dataclass(frozen=True)
class PreferenceData:
    """Rows, what was found while reading them, and a hash of the content."""

    rows: list[PreferenceRow]
    report: DataReport
    fingerprint: str


@dataclass
class _Merged:
    """One prompt while its rows are collected."""

    prompt: Prompt
    source_row: int
    index: dict[str, int] = field(default_factory=dict)  # response -> its position
    comparisons: list[Comparison] = field(default_factory=list)
    comparison_rows: list[int] = field(default_factory=list)
    gold: dict[str, float] = field(default_factory=dict)


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
        source: a shipped name, a file (:data:`SUFFIXES`), a folder that ``datasets`` reads, or a hub id.
        split, config, revision: of hub data and folders; files have none. A ``config`` that the data set does not
            know is taken as its ``data_dir`` (Anthropic/hh-rlhf has "harmless-base").
        columns: our column name -> the data's column name.
        conversational: transcripts and plain prompts as chat messages (True) or as text (False); None parses
            transcripts into messages when every one of them can be, and leaves other data as it is.
        annotators: keep the comparisons of these annotators only; prompts stay, judged or not.

    Raises:
        DataError: no such source; a format that is not known; a wrong record (with its row and column); plain
            and conversational prompts in one data set; fewer than two responses; nothing left.
    """
    found = load(source, split=split, config=config, revision=revision)
    if not found.records:
        raise DataError("the data set is empty", where=found.name)
    if columns:
        found = _renamed(found, columns)
    sample = [record for _, record in found.records[:100]]
    names = tuple(dict.fromkeys(str(name) for record in sample for name in record))
    shape = formats.recognise(names, sample)
    if shape is None:
        raise _unknown_format(found.name, names)
    _check_label_base(found, shape)
    data, unparsable = _parse(found, shape)
    data, more_unparsable = _as_conversation(found, shape, data, conversational)
    _check_one_kind(found, data)
    if annotators is not None:
        data = _only_annotators(found, data, annotators)
    rows, counts = _merge(found, data)
    unparsable = sorted(unparsable + more_unparsable)
    if not rows:
        left_out = {"n_empty": "empty", "n_identical": "with identical responses"}
        why = [f"{len(unparsable)} without a shared prompt"] if unparsable else []
        why += [f"{counts[name]} {text}" for name, text in left_out.items() if counts[name]]
        fix = "see which columns hold the prompt and the responses; `columns` maps names"
        raise DataError(f"no usable row of {len(found.records)}: {', '.join(why)}", where=found.name, fix=fix)
    report = DataReport(
        source=found.name,
        format=shape.name,
        conversational=isinstance(rows[0].prompt, list),
        n_rows_read=len(found.records),
        n_prompts=len(rows),
        n_responses=sum(len(row.responses) for row in rows),
        n_annotators=len({c.annotator for row in rows for c in row.comparisons if c.annotator}),
        n_unparsable=len(unparsable),
        n_booleans=sum(any(isinstance(record.get(c), bool) for c in shape.columns) for _, record in found.records),
        unparsable_rows=tuple(unparsable[:FIRST_ROWS]),
        ignored_columns=tuple(name for name in names if name not in shape.columns),
        **counts,
    )
    return PreferenceData(rows, report, found.fingerprint or _rows_hash(rows))


# ---------------------------------------------------------------------------------------------------- from records on
def _parse(found: Source, shape: formats.Shape) -> tuple[list[tuple[int, Datum]], list[int]]:
    """``(data, numbers of unparsable rows)``."""
    data: list[tuple[int, Datum]] = []
    unparsable: list[int] = []
    single: list[tuple[int, int]] = []
    for number, record in found.records:
        try:
            datum = shape.parse(record)
        except formats.Unparsable:
            unparsable.append(number)
            continue
        except formats.RowProblem as problem:
            raise _row_error(found, number, problem.what, column=problem.column, fix=problem.fix) from problem
        if len(datum.responses) < 2:
            single.append((number, len(datum.responses)))
        data.append((number, datum))
    if single:
        number, n = single[0]
        if len(single) == len(found.records):
            raise DataError(f"every row has {n} response(s): a preference needs K >= 2 responses", where=found.name)
        raise _row_error(found, number, f"{n} response(s) for a prompt: a preference needs K >= 2 responses")
    return data, unparsable


def _as_conversation(
    found: Source, shape: formats.Shape, data: list[tuple[int, Datum]], conversational: bool | None
) -> tuple[list[tuple[int, Datum]], list[int]]:
    """Text prompts as messages where that is asked for, or is the default (transcripts that all parse)."""
    if conversational is False:
        number = next((number for number, datum in data if isinstance(datum.prompt, list)), None)
        if number is not None:
            fix = "leave conversational unset: this data needs a chat template"
            raise _row_error(found, number, "conversational=False, but the prompt is chat messages", fix=fix)
        return data, []
    transcripts = shape.name.endswith("transcripts")
    if not transcripts and not conversational:
        return data, []
    converted: list[tuple[int, Datum]] = []
    unparsable: list[int] = []
    for number, datum in data:
        if isinstance(datum.prompt, list):
            converted.append((number, datum))
        elif (messages := formats.parse_transcript(datum.prompt)) is not None:
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


def _check_one_kind(found: Source, data: Iterable[tuple[int, Datum]]) -> None:
    first: dict[bool, int] = {}
    for number, datum in data:
        first.setdefault(isinstance(datum.prompt, list), number)
        if len(first) == 2:
            what = f"{found.unit} {first[True]} holds chat messages, {found.unit} {first[False]} holds plain text"
            fix = "conversational: true turns plain prompts into messages"
            raise DataError(f"conversational and plain prompts in one data set: {what}", where=found.name, fix=fix)


def _check_label_base(found: Source, shape: formats.Shape) -> None:
    """Refuse labels that are 0 and 1 throughout: read as 1 = first and 0 = tie they would lose every second win."""
    column = next((name for name in formats.LABELS if name in shape.columns), None)
    if column is None or shape.name != "labelled pair":
        return
    values = [str(record.get(column)) for _, record in found.records]
    if len(values) >= 20 and set(values) == {"0", "1"}:
        fix = f"if 0 = first and 1 = second, map it: columns: {{choice: {column}}}"
        what = f"every label in {column!r} is 0 or 1, but 1 = first, 2 = second, 0 = tie is expected"
        raise DataError(what, where=found.name, fix=fix)


def _only_annotators(found: Source, data: list[tuple[int, Datum]], names: Sequence[str]) -> list[tuple[int, Datum]]:
    known = {c.annotator for _, datum in data for c in datum.comparisons if c.annotator}
    for name in names:
        if name not in known:
            fix = nearest(name, known) or "this data names no annotators"
            raise DataError(f"no comparison by annotator {name!r}", where=found.name, fix=fix)
    wanted = frozenset(names)
    return [
        (number, replace(datum, comparisons=[c for c in datum.comparisons if c.annotator in wanted]))
        for number, datum in data
    ]


def _merge(found: Source, data: Iterable[tuple[int, Datum]]) -> tuple[list[PreferenceRow], dict[str, Any]]:
    """Rows, one for each prompt in order of first appearance, and the counts of :class:`DataReport`."""
    merged: dict[str, _Merged] = {}
    seen: set[object] = set()
    empty: list[int] = []
    identical: list[int] = []
    n = dict.fromkeys(("n_duplicates", "n_unlabelled", "n_multi_turn", "n_prompt_repeated"), 0)
    for number, datum in data:
        prompt, responses = datum.prompt, datum.responses
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
        _check_unicode(found, number, [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt], "prompt")
        _check_unicode(found, number, responses, "responses")
        if not last.strip() or not all(map(str.strip, responses)):
            empty.append(number)
            continue
        key = canonical_prompt(prompt)
        entry = merged.setdefault(key, _Merged(prompt, number))
        whole = (key, tuple(responses), tuple(datum.comparisons))
        n["n_duplicates"] += whole in seen
        seen.add(whole)
        n["n_unlabelled"] += datum.n_unlabelled
        n["n_multi_turn"] += any("\n\nHuman:" in text or "\n\nAssistant:" in text for text in responses)
        n["n_prompt_repeated"] += all(text.startswith(last) for text in responses)
        at = [entry.index.setdefault(text, len(entry.index)) for text in responses]
        same = [c for c in datum.comparisons if at[c.winner] == at[c.loser]]
        if same:
            identical += [number] * len(splits.judgements(same))
        for c in datum.comparisons:
            if at[c.winner] != at[c.loser]:
                entry.comparisons.append(Comparison(at[c.winner], at[c.loser], c.weight, c.annotator, c.margin))
                entry.comparison_rows.append(number)
        for text, gold in zip(responses, datum.gold or (), strict=False):
            if entry.gold.setdefault(text, gold) != gold:
                what = f"gold is {gold} here and {entry.gold[text]} earlier for the same prompt and response"
                raise _row_error(found, number, what, column="gold")
    kept = [(key, entry) for key, entry in merged.items() if len(entry.index) > 1]
    judged = [(splits.judgements(entry.comparisons), entry) for _, entry in kept]
    counts: dict[str, Any] = {
        **n,
        "n_comparisons": sum(len(judgements) for judgements, _ in judged),
        "n_ties": sum(judgement.p == 0.5 for judgements, _ in judged for judgement in judgements),
        "n_contradictions": sum(splits.contradictions(judgements, e.comparison_rows) for judgements, e in judged),
        "n_unjudged": sum(not judgements for judgements, _ in judged),
        "n_empty": len(empty),
        "empty_rows": tuple(empty[:FIRST_ROWS]),
        "n_identical": len(identical),
        "identical_rows": tuple(dict.fromkeys(identical))[:FIRST_ROWS],
    }
    return [_finished(key, entry) for key, entry in kept], counts


def _finished(key: str, entry: _Merged) -> PreferenceRow:
    gold = [entry.gold[text] for text in entry.index] if len(entry.gold) == len(entry.index) else None
    ident = hashlib.sha256(key.encode()).hexdigest()[:16]  # as prompt_id, whose JSON the key is
    return PreferenceRow(ident, entry.prompt, list(entry.index), entry.comparisons, gold, entry.source_row)


def _check_unicode(found: Source, number: int, texts: Iterable[str], column: str) -> None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                what = f"half of a Unicode surrogate pair (U+{ord(text[error.start]):04X}), which no tokenizer takes"
                raise _row_error(found, number, what, column=column) from error


def _row_error(found: Source, number: int, what: str, *, column: str = "", fix: str = "") -> DataError:
    where = f"{found.name}, {found.unit} {number}" + (f", column {column!r}" if column else "")
    return DataError(what, where=where, fix=fix)


def _unknown_format(name: str, columns: Sequence[str]) -> DataError:
    hints = []
    for column in columns:
        close = difflib.get_close_matches(column, formats.KNOWN_COLUMNS, n=1, cutoff=0.9)
        if close and not formats.is_known_column(column) and close[0] not in columns:
            hints.append(f"{column!r}: did you mean {close[0]!r}?")
    known = "".join(f"\n           {label}: {text}" for label, text in formats.FORMATS.items())
    fix = " ".join(hints) or "name your columns as one of the formats does, or map them with `columns`."
    if {"generator_1", "generator_2", "preference"} <= set(columns):
        fix = "recorded judgements without their texts are for `duel winrate`."
    return DataError(
        f"not a known format of preference data: its columns are {', '.join(map(repr, columns))}",
        where=name,
        fix=f"{fix} Known formats:{known}",
    )


def _renamed(found: Source, columns: Mapping[str, str]) -> Source:
    """The source with ``columns`` (ours -> theirs) applied."""
    theirs = {str(name) for _, record in found.records[:100] for name in record}
    for ours, name in columns.items():
        if not formats.is_known_column(ours):
            fix = nearest(ours, formats.KNOWN_COLUMNS)
            raise DataError(f"columns.{ours}: no format has a column {ours!r}", where=found.name, fix=fix)
        if name not in theirs:
            raise DataError(f"columns.{ours}: no column {name!r}", where=found.name, fix=nearest(name, theirs))
    mapped = set(columns.values())
    renamed: list[tuple[int, Record]] = []
    for number, record in found.records:
        rest = {key: value for key, value in record.items() if key not in mapped and key not in columns}
        renamed.append((number, {ours: record[name] for ours, name in columns.items() if name in record} | rest))
    return replace(found, records=renamed)


def _rows_hash(rows: Iterable[PreferenceRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row_to_dict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- Parquet
def to_parquet(rows: Sequence[PreferenceRow], path: str | Path) -> None:
    """Write rows, the prompt as JSON text; :func:`from_parquet` gives back equal rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
        ],
        metadata={PARQUET_KEY: b"1"},
    )
    records = [{**asdict(row), "prompt": json.dumps(row.prompt)} for row in rows]
    pq.write_table(pa.Table.from_pylist(records, schema=schema), path)


def from_parquet(path: str | Path) -> list[PreferenceRow]:
    """Rows that :func:`to_parquet` wrote. Raises :class:`DataError` for another or a damaged file."""
    name = str(path)
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
