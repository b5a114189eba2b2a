"""Rows of a file one chunk after the other, in flat memory, and the responses that a row has.

A row is preference data in a known format, or one response: ``prompt``, ``response`` (or ``completion``) and, where its
quality is known, ``label``.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, nearest
from toolkit.files import file_hash, fingerprint, parse_json
from toolkit.preferences import formats
from toolkit.preferences.cells import RecordError, excerpt, parsed_number
from toolkit.preferences.columns import GROUP, SIDES, Columns, Format
from toolkit.preferences.csv_cells import CSV, message_columns, read_messages
from toolkit.preferences.loading import (
    PARQUET_KEY,
    ROWS_AT_ONCE,
    FileRecords,
    SourceRecords,
    csv_records,
    load,
    local_path,
    shipped_path,
)
from toolkit.preferences.parsing import Datum, NoSharedPromptError, is_empty
from toolkit.preferences.reading import are_messages, as_conversation, check_mapping, parse_record, with_columns
from toolkit.preferences.refusals import check_label_base, in_words, prompt_texts, unknown_format
from toolkit.preferences.rows import Record, canonical_prompt
from toolkit.preferences.single_rows import RESPONSES, response_rows
from toolkit.storage.integrity import refuse_changed

LABEL = "label"
_WORDS = {"true": True, "false": False, "good": True, "bad": False, "chosen": True, "rejected": False}
_FLAGS = {1.0: True, 0.0: False}
SAMPLE = 100
# The column with the scores of all responses of a row of preference data.
RESPONSE_SCORES = "response_scores"


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file: the number of the first, the records, and of Parquet the table that they are."""

    first: int
    records: list[Record]
    table: Any = None


@dataclass(frozen=True)
class RowFile:
    """Rows read by chunks: those of a ``.jsonl``, ``.csv`` (each also ``.gz``) or ``.parquet`` file, in flat memory.

    ``loaded`` has the rows of a source that has to be read whole: a JSON document, or a data set of the hub. Rows count
    from 1; blank lines do not.
    """

    path: Path
    loaded: SourceRecords | None = None

    @property
    def is_parquet(self) -> bool:
        return self.loaded is None and self.path.name.lower().endswith(".parquet")

    @property
    def is_csv(self) -> bool:
        return self.loaded is None and self.path.name.lower().endswith(CSV)

    def identity(self) -> str:
        """Changes with the rows."""
        if self.loaded is None:
            return file_hash(self.path)
        return self.loaded.fingerprint or fingerprint([repr(record) for _, record in self.loaded.records])

    def n_rows(self) -> int:
        if self.loaded is not None:
            return len(self.loaded.records)
        if self.is_parquet:
            return int(self._parquet().metadata.num_rows)
        return sum(1 for _ in (self._csv_records() if self.is_csv else self._lines()))

    def sample(self) -> list[Record]:
        """The first records. Raises DataError where there is none."""
        first = next(self.chunks(SAMPLE), None)
        if first is None:
            raise DataError("the data set is empty", where=str(self.path))
        return first.records

    def chunks(self, size: int) -> Iterator[Chunk]:
        """All rows, ``size`` at a time. Raises DataError for what cannot be read, with its row."""
        if self.is_parquet:
            return self._of_parquet(size)
        if self.loaded is not None:
            return _chunks((record for _, record in self.loaded.records), size)
        return _chunks(self._csv_records(), size) if self.is_csv else self._of_lines(size)

    def place(self, number: int, column: str = "") -> str:
        return f"{self.path}, row {number}" + (f", column {column!r}" if column else "")

    def _of_lines(self, size: int) -> Iterator[Chunk]:
        lines, first = self._lines(), 1
        while batch := list(islice(lines, size)):
            yield Chunk(first, [self._record(line, first + k) for k, line in enumerate(batch)])
            first += len(batch)

    def _csv_records(self) -> Iterator[Record]:
        is_packed = self.path.name.lower().endswith(".gz")
        try:
            with (gzip.open if is_packed else open)(self.path, "rt", encoding="utf-8-sig", newline="") as file:
                yield from (record for _, record in csv_records(file, str(self.path)))
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8 text", where=str(self.path), fix="save the file as UTF-8") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            fix = "the file is damaged or was cut off: copy or download it again"
            raise DataError(f"not a whole gzip file: {error}", where=str(self.path), fix=fix) from error

    def _lines(self) -> Iterator[bytes]:
        is_packed = self.path.name.lower().endswith(".gz")
        with gzip.open(self.path) if is_packed else self.path.open("rb") as file:
            try:
                yield from (line for line in file if line.strip())
            except (EOFError, OSError, zlib.error) as error:
                fix = "the file is damaged or was cut off: copy or download it again"
                raise DataError(f"not a whole gzip file: {error}", where=str(self.path), fix=fix) from error

    def _record(self, line: bytes, number: int) -> Record:
        try:
            record = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            fix = "each line must be one JSON object in UTF-8"
            raise DataError(f"invalid JSON: {error}", where=self.place(number), fix=fix) from error
        if not isinstance(record, dict):
            raise DataError(f"a JSON {type(record).__name__}, expected an object", where=self.place(number))
        return record

    def _parquet(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            fix = "the file is damaged or is not Parquet"
            what = f"cannot read the Parquet file: {str(error).splitlines()[0]}"
            raise DataError(what, where=str(self.path), fix=fix) from error

    def _of_parquet(self, size: int) -> Iterator[Chunk]:
        import pyarrow as pa

        file, first = self._parquet(), 1
        own = PARQUET_KEY in (file.schema_arrow.metadata or {})  # its prompts are JSON in a text
        try:
            for batch in file.iter_batches(batch_size=size):
                records = batch.to_pylist()
                if own:
                    records = [{**record, "prompt": parse_json(record["prompt"])} for record in records]
                yield Chunk(first, records, pa.Table.from_batches([batch]))
                first += len(records)
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
            what = f"cannot read the Parquet file: {str(error).splitlines()[0]}"
            raise DataError(what, where=self.place(first)) from error


def _chunks(records: Iterable[Record], size: int) -> Iterator[Chunk]:
    """Records, ``size`` at a time."""
    remaining, first = iter(records), 1
    while batch := list(islice(remaining, size)):
        yield Chunk(first, batch)
        first += len(batch)


def row_file(source: str, split: str = "train") -> RowFile:
    """The rows of a shipped data set, of a file, or of a split of a data set of the hub.

    JSON documents and data sets of the hub are read whole, the others by chunks. Raises DataError where there is no
    such source.
    """
    path = shipped_path(source) or local_path(source)
    if path.is_file() and path.name.lower().endswith((".jsonl", ".jsonl.gz", ".parquet", *CSV)):
        refuse_changed(path)
        return RowFile(path)
    return RowFile(path, load(source, split=split, config=None, revision=None))


# ---------------------------------------------------------------- the responses of a row


@dataclass(frozen=True)
class RowReader:
    """Reads the prompt and the responses of each row of one file; made by :func:`row_reader`.

    ``columns`` maps a format's columns to those of the file.
    """

    file: RowFile
    recognised: Format
    columns: Mapping[str, str]
    conversational: bool | None
    messages: frozenset[str] = frozenset()  # of the columns, those of texts that are JSON of chat messages

    @property
    def is_preference(self) -> bool:
        """Whether a row has responses that are compared with each other."""
        return not self.recognised.one_response

    def record(self, number: int, record: Record) -> Record:
        """A record with the format's names of columns, and with messages where their JSON is.

        Raises DataError for a text that is none in a column of such JSON.
        """
        try:
            return read_messages(with_columns(record, self.columns) if self.columns else record, self.messages)
        except RecordError as error:
            column = self.columns.get(error.column, error.column)
            raise DataError(error.what, where=self.file.place(number, column), fix=error.fix) from error

    def read(self, number: int, record: Record) -> Datum | None:
        """None for a row that cannot be scored: a blank prompt or response, or responses that share no prompt.

        Raises DataError for a wrong row, with its place.
        """
        datum = self.parsed(number, self.record(number, record))
        if datum is None or not datum.responses or is_empty(datum):
            return None
        for text in (*prompt_texts(datum.prompt), *datum.responses):
            if max(text, default="") >= "\ud800" and not _is_unicode(text):
                raise DataError(
                    "half of a Unicode surrogate pair, which no tokenizer takes", where=self.file.place(number)
                )
        return datum

    def parsed(self, number: int, record: Record) -> Datum | None:
        """What a row of :meth:`records` says; None where its responses share no prompt. Raises DataError for a wrong
        one.
        """
        try:
            datum = parse_record(self.recognised, record)
            if self.conversational is False:  # texts stay as they are, and so do messages, which a run refuses then
                return datum
            return as_conversation(self.recognised, datum, self.conversational)
        except NoSharedPromptError:
            return None
        except RecordError as error:
            raise DataError(error.what, where=self.file.place(number, error.column), fix=error.fix) from error

    def records(self) -> Iterator[tuple[int, Record]]:
        """All rows of the file, each with its number."""
        for chunk in self.file.chunks(ROWS_AT_ONCE):
            yield from (
                (number, self.record(number, record)) for number, record in enumerate(chunk.records, chunk.first)
            )

    def label(self, number: int, record: Record) -> bool:
        """Whether the label of a row says good. Raises DataError where it says neither good nor bad."""
        value = self.record(number, record).get(LABEL)
        number_in_it = parsed_number(value)  # "1.0" of a CSV file too
        known = _WORDS.get(str(value).strip().lower()) if number_in_it is None else _FLAGS.get(number_in_it)
        if known is None:
            raise DataError(
                f"the label {excerpt(value)} is neither good nor bad",
                where=self.file.place(number, self.columns.get(LABEL, LABEL)),
                fix="1, true, good or chosen; 0, false, bad or rejected; leave rows without a label out",
            )
        return known


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def row_reader(file: RowFile, columns: Mapping[str, str], *, conversational: bool | None = None) -> RowReader:
    """The reader of a file by the columns of its first rows. ``columns`` maps a format's columns to those of the data.

    Rows are read as a run reads them (:func:`toolkit.preferences.reading.read_preferences`), ``conversational``
    included: transcripts become messages where all of the file can.

    Raises DataError where no column is known to hold the response or the prompt, with the columns that could; for a
    column in ``columns`` that no format has; and for labels that no format has.
    """
    check_mapping(columns, columns.values(), str(file.path))
    first = file.sample()
    there = {str(name) for record in first for name in record}
    mapped = {wanted: name for wanted, name in columns.items() if name in there}
    sample = [with_columns(record, mapped) for record in first]
    messages = message_columns(sample, str(file.path))
    sample = [read_messages(record, messages) for record in sample]
    found = Columns(tuple(dict.fromkeys(str(name) for record in sample for name in record)), sample)
    text_only = conversational is False
    recognised = formats.recognise(found.names, sample, text_only=text_only)
    if recognised is None or recognised.one_response:
        recognised = response_rows(found, text_only=text_only)
    if recognised is None:
        if found.has(*SIDES[0]):
            raise unknown_format(str(file.path), found)
        what = "prompt" if found.first(RESPONSES) else "response"
        raise no_column(file, what, columns)
    reader = RowReader(file, recognised, mapped, conversational, messages)
    if recognised.labels:
        loaded = SourceRecords(str(file.path), "row", FileRecords(reader.records))
        check_label_base(loaded, recognised.labels, mappable=recognised.name == "labelled pair")
    if conversational is None and recognised.name.endswith("transcripts"):
        said = (reader.parsed(number, record) for number, record in reader.records())
        return replace(reader, conversational=are_messages(datum for datum in said if datum is not None))
    return reader


def no_column(file: RowFile, what: str, columns: Mapping[str, str]) -> DataError:
    """The error of a file in which no column is known to hold ``what``; names the columns that could."""
    asked, sample = columns.get(what), file.sample()
    names = tuple(dict.fromkeys(str(name) for record in sample for name in record))
    fits = _could_be_label if what == LABEL else _could_be_text
    candidates = [name for name in names if all(fits(record.get(name)) for record in sample)]
    listed = f"could be: {', '.join(candidates)}" if candidates else f"its columns are {in_words(names)}"
    return DataError(
        f"there is no column {asked!r}" if asked else f"no column is known to hold the {what}",
        where=str(file.path),
        fix=f"name it with --column {what}=NAME; {listed}",
    )


def check_columns(columns: Mapping[str, str], readers: Sequence[RowReader], further: Collection[str]) -> None:
    """Raises DataError for an entry of ``columns`` that none of these readers uses, or only as ``further`` columns."""
    where = "--column"
    used = {GROUP, *further}.union(*(reader.recognised.columns for reader in readers))
    for wanted, name in columns.items():
        if not any(wanted in reader.columns for reader in readers):
            names = {str(column) for reader in readers for record in reader.file.sample() for column in record}
            raise DataError(
                f"no file has a column {name!r}", where=f"{where} {wanted}={name}", fix=nearest(name, names)
            )
        if wanted not in used:
            formats_ = " and ".join(dict.fromkeys(reader.recognised.name for reader in readers))
            fix = f"columns that are read: {', '.join(sorted(used))}"
            raise DataError(f"{formats_} has no column {wanted!r}", where=f"{where} {wanted}={name}", fix=fix)


def _could_be_text(value: object) -> bool:
    return isinstance(value, str | list)


def _could_be_label(value: object) -> bool:
    return str(value).strip().lower() in _WORDS or parsed_number(value) in _FLAGS


def group_of(datum: Datum) -> str:
    """What tells responses that are not independent: the data's group, or the prompt."""
    return datum.group or canonical_prompt(datum.prompt)


# ---------------------------------------------------------------- writing


def write_rows(chunk: Chunk, at: Sequence[int], columns: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Write these rows of a chunk with further columns, as JSON lines, or as Parquet where the chunk is a table."""
    if chunk.table is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = chunk.table.take(pa.array(at, pa.int64()))
        for name, values in columns.items():
            kind = pa.list_(pa.float64()) if name == RESPONSE_SCORES else pa.float64()
            table = table.append_column(name, pa.array([values[k] for k in at], kind))
        pq.write_table(table, path)
        return
    with path.open("w", encoding="utf-8") as out:
        for k in at:
            record = {**chunk.records[k], **{name: values[k] for name, values in columns.items()}}
            out.write(_json_line(record, chunk.first + k) + "\n")


def _json_line(record: Record, number: int) -> str:
    """A record as JSON. Dates and times become text. Raises DataError for bytes and what else JSON does not have."""
    try:
        line = json.dumps(record, ensure_ascii=False, default=_text_of)
    except TypeError as error:
        fix = "remove the column, or name a Parquet file with it"
        raise DataError(f"JSON lines cannot hold what the row has: {error}", where=f"row {number}", fix=fix) from error
    # half of a surrogate pair in a column that nobody reads is in the file as it came, escaped
    return line if line.isascii() or _is_unicode(line) else json.dumps(record, default=_text_of)


def _text_of(value: object) -> str:
    if isinstance(value, date | time | timedelta | Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def join_rows(parts: Sequence[Path], path: Path, name: str) -> None:
    """Join files of :func:`write_rows` into ``path``; ``name`` has the ending. Equal parts give equal bytes."""
    if name.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pq.read_schema(parts[0])) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part))
        return
    with path.open("wb") as raw:
        packed = name.lower().endswith(".gz")
        out = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if packed else raw
        for part in parts:
            with part.open("rb") as lines:
                while block := lines.read(1 << 20):
                    out.write(block)
        if packed:
            out.close()
