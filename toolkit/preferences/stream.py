"""Rows of a file one chunk after the other, in flat memory, and the responses that a row has.

A row is preference data in a known format, or one response: ``prompt``, ``response`` (or ``completion``) and, where its
quality is known, ``label``.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.files import file_hash, fingerprint, parse_json
from toolkit.preferences import formats
from toolkit.preferences.cells import RecordError, cell, excerpt, messages_from, name_cell, prompt_cell, text_cell
from toolkit.preferences.columns import GROUP, Format
from toolkit.preferences.csv_cells import CSV
from toolkit.preferences.loading import PARQUET_KEY, SourceRecords, csv_records, load, local_path, shipped_path
from toolkit.preferences.parsing import Datum, NoSharedPromptError, parse_transcript
from toolkit.preferences.prompts import COLUMNS as PROMPTS
from toolkit.preferences.reading import parse_record
from toolkit.preferences.refusals import in_words
from toolkit.preferences.rows import Prompt, Record, canonical_prompt
from toolkit.storage.integrity import refuse_changed

RESPONSES = ("response", "completion", "output", "answer")
LABEL = "label"
_WORDS = {"true": True, "false": False, "1": True, "0": False, "good": True, "bad": False}
_WORDS |= {"chosen": True, "rejected": False}
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
        return self.loaded.fingerprint or fingerprint([record for _, record in self.loaded.records])

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

    ``transcripts`` reads "Human: ... Assistant:" prompts as messages.
    """

    file: RowFile
    parse: Callable[[Record], Datum]
    transcripts: bool
    is_preference: bool

    def read(self, number: int, record: Record) -> Datum | None:
        """None for a row that cannot be scored: a blank prompt or response, or responses that share no prompt.

        Raises DataError for a wrong row, with its place.
        """
        try:
            datum = self.parse(record)
        except NoSharedPromptError:
            return None
        except RecordError as error:
            raise DataError(error.what, where=self.file.place(number, error.column), fix=error.fix) from error
        prompt: Prompt | None = datum.prompt
        if self.transcripts and isinstance(datum.prompt, str):
            prompt = parse_transcript(datum.prompt)
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt or []]
        if not texts or not texts[-1].strip() or not all(text.strip() for text in datum.responses):
            return None
        if not datum.responses:
            return None
        for text in (*texts, *datum.responses):
            if max(text) >= "\ud800" and not _is_unicode(text):
                raise DataError(
                    "half of a Unicode surrogate pair, which no tokenizer takes", where=self.file.place(number)
                )
        assert prompt is not None
        return datum._replace(prompt=prompt)

    def label(self, number: int, record: Record, column: str) -> bool:
        """Raises DataError for a label that is neither good nor bad."""
        value = record.get(column)
        known = _WORDS.get(str(int(value) if isinstance(value, float) and value in (0, 1) else value).strip().lower())
        if known is None:
            raise DataError(
                f"the label {excerpt(value)} is neither good nor bad",
                where=self.file.place(number, column),
                fix="1, true, good or chosen; 0, false, bad or rejected; leave rows without a label out",
            )
        return known


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def row_reader(file: RowFile, columns: Mapping[str, str], *, text_only: bool) -> RowReader:
    """The reader of a file by the columns of its first rows. ``columns`` maps prompt and response to other names.

    Transcripts are read as messages where all of the first rows can be; ``text_only`` leaves them as text.

    Raises DataError where no column is known to hold the response or the prompt, with the columns that could.
    """
    sample = file.sample()
    names = tuple(dict.fromkeys(str(name) for record in sample for name in record))
    recognised = None if "response" in columns else formats.recognise(names, sample, text_only=text_only)
    if recognised is not None and not recognised.one_response:
        parse, is_preference = _parser_of(recognised), True
    else:
        response = column_of(file, sample, names, "response", RESPONSES, columns)
        prompt = column_of(file, sample, names, "prompt", PROMPTS, columns)
        parse, is_preference = _single(prompt, response), False
    reader = RowReader(file, parse, False, is_preference)
    if text_only:
        return reader
    data = [datum for k, record in enumerate(sample, 1) if (datum := reader.read(k, record)) is not None]
    texts = [datum.prompt for datum in data if isinstance(datum.prompt, str)]
    transcripts = bool(texts) and all(parse_transcript(text) is not None for text in texts)
    return replace(reader, transcripts=transcripts)


def _parser_of(recognised: Format) -> Callable[[Record], Datum]:
    return lambda record: parse_record(recognised, record)


def _single(prompt: str, response: str) -> Callable[[Record], Datum]:
    """Reads a row with one response, which is a text or one message of the assistant."""

    def parse(record: Record) -> Datum:
        value = cell(record, response)
        if isinstance(value, list):
            messages = messages_from(value, response)
            if [message["role"] for message in messages] != ["assistant"]:
                raise RecordError(f"{response!r} is not one message of the assistant", column=response)
            text = messages[0]["content"]
        else:
            text = text_cell(record, response)
        return Datum(prompt_cell(record, [prompt]), [text], [], group=name_cell(record, GROUP))

    return parse


def column_of(
    file: RowFile,
    sample: Sequence[Record],
    names: Sequence[str],
    what: str,
    known: Iterable[str],
    columns: Mapping[str, str],
) -> str:
    """The column that holds ``what``: the one that ``columns`` names, or the first of ``known`` that is there."""
    asked = columns.get(what)
    if asked in names and asked is not None:
        return asked
    name = next((name for name in known if name in names), None)
    if name is not None and asked is None:
        return name
    fits = _could_be_label if what == LABEL else _could_be_text
    candidates = [name for name in names if all(fits(record.get(name)) for record in sample)]
    listed = f"could be: {', '.join(candidates)}" if candidates else f"its columns are {in_words(names)}"
    raise DataError(
        f"there is no column {asked!r}" if asked else f"no column is known to hold the {what}",
        where=str(file.path),
        fix=f"name it with --column {what}=NAME; {listed}",
    )


def _could_be_text(value: object) -> bool:
    return isinstance(value, str | list)


def _could_be_label(value: object) -> bool:
    return str(value).strip().lower() in {*_WORDS, "0.0", "1.0"}


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
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


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
