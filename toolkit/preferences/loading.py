"""Records as they are in a source: a shipped name, a file, a folder of ``datasets``, or a hub id."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast, overload

from pydantic_core import from_json

from toolkit.errors import DataError, nearest
from toolkit.files import file_hash, is_hub_id, parse_json, read_json
from toolkit.preferences.cells import RecordError
from toolkit.preferences.csv_cells import FIRST_ROWS, message_columns, read_messages, with_json
from toolkit.preferences.rows import Record
from toolkit.storage.integrity import refuse_changed

HELD_BYTES = 1 << 25  # of a file whose records stay in memory once they were read; those of a larger one are read again
ROWS_AT_ONCE = 1024  # of a large Parquet file that are in memory
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
PARQUET_KEY = b"duel.preference_rows"


@dataclass(frozen=True)
class SourceRecords:
    """Records as they are in the source, each with its 1-based number (``unit``: "row" or "line")."""

    name: str
    unit: str
    records: Sequence[tuple[int, Record]]
    fingerprint: str | None = None

    def place(self, number: int) -> str:
        """Where a record is, as an error names it."""
        return f"{self.name}, {self.unit} {number}"


def place_in(source: str, number: int) -> str:
    """Where a record of a source is, as an error names it."""
    lines = source.lower().endswith((".jsonl", ".jsonl.gz")) or source in shipped_names()
    return f"{source}, {'line' if lines else 'row'} {number}"


def shipped_names() -> dict[str, str]:
    """Names of the data sets inside this package, each with the name of its file."""
    assets = resources.files("toolkit.preferences") / "assets"
    files = sorted(item.name for item in assets.iterdir()) if assets.is_dir() else []
    return {name.removesuffix(".jsonl.gz"): name for name in files if name.endswith(".jsonl.gz")}


def shipped_path(name: str) -> Path | None:
    """The file of a shipped data set. None where no data set has that name."""
    file = shipped_names().get(name)
    return Path(str(resources.files("toolkit.preferences") / "assets" / file)) if file else None


def load(source: str, *, split: str, config: str | None, revision: str | None, checked: bool = True) -> SourceRecords:
    """The records of a source, with messages in the place of texts that are JSON of them. ``checked``: as
    :func:`read_file` has it.
    """
    return messages_read(_load(source, split=split, config=config, revision=revision, checked=checked))


def messages_read(loaded: SourceRecords) -> SourceRecords:
    """The records with messages in the known columns of which every text, in the first rows, is JSON of messages.

    Raises DataError for such columns as Python writes them, and for a later text that is no such JSON.
    """
    columns = message_columns([record for _, record in loaded.records[:FIRST_ROWS]], loaded.name)
    if not columns:
        return loaded

    def read() -> Iterator[tuple[int, Record]]:
        for number, record in loaded.records:
            try:
                yield number, read_messages(record, columns)
            except RecordError as error:
                where = f"{loaded.place(number)}, column {error.column!r}"
                raise DataError(error.what, where=where, fix=error.fix) from error

    in_file = isinstance(loaded.records, FileRecords)
    return replace(loaded, records=FileRecords(read) if in_file else list(read()))


def _load(source: str, *, split: str, config: str | None, revision: str | None, checked: bool) -> SourceRecords:
    shipped = shipped_names()
    if source in shipped:
        with resources.as_file(resources.files("toolkit.preferences") / "assets" / shipped[source]) as path:
            return replace(read_file(path, checked=checked), name=source)
    path = local_path(source)
    if path.is_file():
        return read_file(path, checked=checked)
    if path.is_dir():
        return _read_hub(source, config=config, split=split, revision=None, folder=path)
    looks_like_file = source.lower().endswith(SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_file or path.suffix.lower() in (".gz", ".tsv", ".txt", ".arrow", ".zip"):
        folder = path.parent
        if not folder.is_dir():
            raise DataError(f"no such file: {source}", where=source, fix=f"the folder {folder} does not exist either")
        fix = nearest(path.name, (item.name for item in folder.iterdir()))
        raise DataError(f"no such file: {source}", where=str(folder.resolve()), fix=fix)
    if is_hub_id(source):
        return _read_hub(source, config=config, split=split, revision=revision, folder=None)
    fix = f"{nearest(source, shipped)} A file ends in one of {', '.join(SUFFIXES)}; a hub id is OWNER/NAME".strip()
    raise DataError(f"no data set is called {source!r}", where="data.source", fix=fix)


def local_path(source: str) -> Path:
    """A source as a path. Raises DataError for a text that the system takes for none."""
    path = Path(source).expanduser()
    try:
        path.stat()
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) or error.errno == errno.ENAMETOOLONG:
            shortened = source if len(source) <= 60 else f"{source[:60]}..."
            raise DataError(
                f"{shortened!r} cannot be the name of a file: {error}"[:300], where="data source"
            ) from error
    return path


def read_file(path: Path, *, checked: bool = True) -> SourceRecords:
    """The records of a file with one of ``SUFFIXES``.

    Raises DataError where it cannot be read, with the line or row that is wrong. Without ``checked``, a wrong line or
    row of a large file raises it only where the records come to it: the file is then read once less.
    """
    name = str(path)
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), None)
    if suffix is None:
        fix = f"known endings: {', '.join(SUFFIXES)}"
        raise DataError(f"{path.name} has an ending that is not known", where=name, fix=fix)
    refuse_changed(path)
    is_document = suffix in (".json", ".json.gz")  # which is read whole
    try:
        is_large = path.stat().st_size > HELD_BYTES
        fingerprint = file_hash(path)
        raw = path.read_bytes() if is_document else b""
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror or error}", where=name) from error
    if not is_document:
        records = _records_of(path, suffix)
        unit = "line" if suffix.startswith(".jsonl") else "row"
        if is_large and checked:
            records.check()
        return SourceRecords(name, unit, records if is_large else list(records), fingerprint)
    if suffix.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            fix = "the file is damaged or was cut off: copy or download it again"
            raise DataError(f"not a whole gzip file: {error}", where=name, fix=fix) from error
    return _json_document(raw, name, fingerprint)


def _records_of(path: Path, suffix: str) -> FileRecords:
    """The records of a file that need not be read whole."""
    if suffix.endswith(".gz"):
        _check_whole(path)
    if suffix == ".parquet":
        return FileRecords(partial(parquet_rows, path))
    if suffix.startswith(".csv"):
        _check_utf8(path)
        return FileRecords(partial(_csv_rows_of, path))
    return FileRecords(partial(_lines_of, path))


def decoded(raw: bytes, name: str, first_line: int = 1) -> str:
    """Text in UTF-8; its mark may stand before line 1. Raises DataError, with the line, where it is not."""
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + first_line
        fix = "save the file as UTF-8"
        raise DataError(
            f"not UTF-8 text (byte {raw[error.start]:#04x})", where=f"{name}, line {line}", fix=fix
        ) from error


def _check_whole(path: Path) -> None:
    """Raises DataError for a packed file that is damaged, before anything in it is taken for text."""
    try:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        fix = "the file is damaged or was cut off: copy or download it again"
        raise DataError(f"not a whole gzip file: {error}", where=str(path), fix=fix) from error


def _check_utf8(path: Path) -> None:
    """Raises DataError, with the line, for a file that is not text in UTF-8."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            decoded(line, str(path), first_line=number)


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


class FileRecords(Sequence[tuple[int, Record]]):
    """The records of a file, read anew each time that they are asked for.

    Their number is known once all of them were read. Raises DataError where one cannot be read.
    """

    def __init__(self, read: Callable[[], Iterator[tuple[int, Record]]]) -> None:
        self._read = read
        self._n: int | None = None

    def check(self) -> None:
        """Read all records. Raises DataError for the first one that cannot be read."""
        deque(self, maxlen=0)

    def __len__(self) -> int:
        if self._n is None:
            self.check()
        assert self._n is not None
        return self._n

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None

    @overload
    def __getitem__(self, at: int) -> tuple[int, Record]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[tuple[int, Record]]: ...
    def __getitem__(self, at: int | slice) -> tuple[int, Record] | Sequence[tuple[int, Record]]:
        if isinstance(at, slice):
            if at.start is at.step is None and at.stop is not None and at.stop >= 0:  # the first ones
                return list(islice(self, at.stop))
            start, stop, step = at.indices(len(self))
            return list(islice(self, start, stop, step))
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return next(islice(self, at % len(self), None))

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        n = 0
        for n, item in enumerate(self._read(), start=1):  # noqa: B007 - the last one is their number
            yield item
        self._n = n


def _lines_of(path: Path) -> Iterator[tuple[int, Record]]:
    """The objects of a file of JSON lines. Blank lines are none."""
    name = str(path)
    try:
        with _opened(path) as file:
            # at "\n" only, as files are read in bytes: texts may hold U+2028 and other ends of lines
            for number, line in enumerate(file, start=1):
                try:
                    record = from_json(line, cache_strings="keys")
                except ValueError:  # it may be blank, begin the file with a mark, or be wrong
                    text = decoded(line.removesuffix(b"\n"), name, first_line=number)
                    record = _json_record(text, name, number) if text.strip() else None
                    if record is None:
                        continue
                if not isinstance(record, dict):
                    raise _no_object(record, name, number)
                yield number, record
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror or error}", where=name) from error


def _csv_rows_of(path: Path) -> Iterator[tuple[int, Record]]:
    """The rows of a CSV file that :func:`_check_utf8` has passed."""
    try:
        with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
            yield from csv_records(lines, str(path))
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror or error}", where=str(path)) from error


def parquet_rows(path: Path) -> Iterator[tuple[int, Record]]:
    """The rows of a Parquet file, ``ROWS_AT_ONCE`` of them in memory. Preference rows get their prompts back.

    Raises DataError for a file that is not there or is damaged, a column name that stands twice, and values that Python
    cannot hold.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror or error}", where=str(path)) from error
    try:
        with raw, pq.ParquetFile(raw) as file:
            refuse_repeated(file.schema_arrow.names, f"{path}, schema")
            is_own = PARQUET_KEY in (file.schema_arrow.metadata or {})
            rows = (record for batch in file.iter_batches(ROWS_AT_ONCE) for record in batch.to_pylist())
            for number, record in enumerate(rows, start=1):
                yield number, _with_prompt(record, number, str(path)) if is_own else record
    except (pa.ArrowException, OSError) as error:
        fix = "the file is damaged or is not Parquet"
        raise _no_parquet(error, path, fix) from error
    except (ValueError, OverflowError) as error:  # dates behind the year 9999, text that is not UTF-8
        raise _no_parquet(error, path, "a column holds what Python cannot read: write it as text") from error


def _no_parquet(error: Exception, path: Path, fix: str) -> DataError:
    return DataError(f"cannot read the Parquet file: {str(error).splitlines()[0]}", where=str(path), fix=fix)


def refuse_repeated(columns: Iterable[str], where: str) -> None:
    """Raises DataError for a column that stands twice: one of the two would be lost."""
    if repeated := [column for column, times in Counter(columns).items() if times > 1]:
        raise DataError(f"there are two columns {repeated[0]!r}", where=where, fix="rename one of them")


def _json_record(line: str, name: str, number: int) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        fix = "each line must be one JSON object; a list of objects belongs into a .json file"
        raise DataError(f"invalid JSON: {error}", where=f"{name}, line {number}", fix=fix) from error
    if not isinstance(record, dict):
        raise _no_object(record, name, number)
    return record


def _no_object(value: Any, name: str, number: int) -> DataError:
    return DataError(f"a JSON {type(value).__name__}, expected an object", where=f"{name}, line {number}")


def _json_lines(raw: bytes, name: str) -> Iterator[tuple[int, Record]]:
    # split at "\n" only: str.splitlines also splits at U+2028 and other characters that JSON text may hold
    for number, line in enumerate(decoded(raw, name).split("\n"), start=1):
        if line.strip():
            yield number, _json_record(line, name, number)


def _json_document(raw: bytes, name: str, fingerprint: str) -> SourceRecords:
    text = decoded(raw, name)
    if not text.strip():
        return SourceRecords(name, "row", [], fingerprint)
    try:
        document = parse_json(text)
    except json.JSONDecodeError as error:
        # many tools write JSON lines into a .json file
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return SourceRecords(name, "line", list(_json_lines(raw, name)), fingerprint)
        raise DataError(f"invalid JSON: {error.msg}", where=f"{name}, line {error.lineno}") from error
    except ValueError as error:
        raise DataError(f"invalid JSON: {error}", where=name) from error
    if isinstance(document, dict):
        lists = [value for name, value in document.items() if isinstance(value, list) and name == "judgements"]
        lists = lists or [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else document
    if not isinstance(document, list):
        fix = "the file must hold a list of objects, one for each row"
        raise DataError(f"a JSON {type(document).__name__} at the top, expected a list", where=name, fix=fix)
    for number, record in enumerate(document, start=1):
        if not isinstance(record, dict):
            what = f"a JSON {type(record).__name__}, expected an object"
            raise DataError(what, where=f"{name}, row {number}")
    return SourceRecords(name, "row", list(enumerate(document, start=1)), fingerprint)


def csv_records(lines: Iterable[str], name: str) -> Iterator[tuple[int, Record]]:
    """Rows of a CSV file with a header, as they are read (:func:`toolkit.preferences.csv_cells.with_json`)."""
    return with_json(_csv_texts(lines, name), name)


def _csv_texts(lines: Iterable[str], name: str) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than some conversations
    reader = csv.DictReader(lines, strict=True)
    try:
        refuse_repeated(reader.fieldnames or (), f"{name}, line 1")
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                n_cells = sum(value is not None for key, value in row.items() if key) + len(row.get(None) or ())
                what = f"{n_cells} cells, but the header has {len(reader.fieldnames or ())}"
                raise DataError(what, where=f"{name}, row {number} (line {reader.line_num})")
            yield number, row
    except csv.Error as error:
        raise DataError(f"invalid CSV: {error}", where=f"{name}, line {reader.reader.line_num}") from error


def _with_prompt(record: Record, number: int, name: str) -> Record:
    """A row that :func:`toolkit.preferences.tables.to_parquet` wrote; its prompt is JSON in a text."""
    try:
        return {**record, "prompt": parse_json(record["prompt"])}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError("this file of preference rows is damaged", where=f"{name}, row {number}") from error


def _read_hub(
    source: str, *, config: str | None, split: str, revision: str | None, folder: Path | None
) -> SourceRecords:
    """Records of a folder or hub data set. Errors of ``datasets`` become :class:`DataError`."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # the first base of HfHubHTTPError is the error of the HTTP client that this version of the hub library uses
    errors: tuple[type[Exception], ...] = (
        DatasetsError,
        HfHubHTTPError.__bases__[0],
        OSError,
        ValueError,
        RuntimeError,
    )
    where = ", ".join(f"{label} {value!r}" for label, value in (("config", config), ("split", split)) if value)
    where = f"{source} ({where}{f', revision {revision!r}' if revision else ''})"
    try:
        if folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            _check_saved(folder)
            data = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise DataError(f"no split {split!r}", where=source, fix=nearest(split, data))
                data = data[split]
        else:
            data = _load_dataset(str(folder or source), config=config, split=split, revision=revision)
        records = [record for table in data.with_format("arrow").iter(1000) for record in table.to_pylist()]
    except errors as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot load the data set: {lines[0][:500]}", where=where, fix=_hub_fix(error)) from error
    rows = enumerate(records, start=1)
    is_csv = data.info.builder_name == "csv"  # which has no lists
    return SourceRecords(source, "row", list(with_json(rows, source) if is_csv else rows))


def _check_saved(folder: Path) -> None:
    """Raises DataError where what ``save_to_disk`` writes beside the tables is of another form."""
    for file, key, of_files in (("dataset_dict.json", "splits", False), ("state.json", "_data_files", True)):
        for path in (folder / file, *folder.glob(f"*/{file}")):
            listed = read_json(path, fix="save the data set again").get(key) if path.is_file() else []
            items = listed if isinstance(listed, list) else [None]
            if of_files:
                items = [item.get("filename") if isinstance(item, dict) else None for item in items]
            if not all(isinstance(item, str) for item in items):
                raise DataError(f"a saved data set lists its {key} in this file", where=str(path))


def _load_dataset(source: str, *, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, name=config, split=split, revision=revision)
    except ValueError as error:
        if config is None or not str(error).startswith("BuilderConfig"):
            raise
        try:
            return datasets.load_dataset(source, data_dir=config, split=split, revision=revision)
        except (datasets.exceptions.DatasetsError, OSError) as second:
            raise error from second  # its message lists the configurations that exist


def _hub_fix(error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    text = str(error)
    if "scripts are no longer supported" in text:
        return "set data.revision to refs/convert/parquet, the hub's own conversion, or download a file"
    if "Unknown split" in text or "BuilderConfig" in text:
        return "set data.split (or data.eval_split) and data.config to names that the message lists"
    if isinstance(error, DatasetNotFoundError):
        return "check the name OWNER/NAME on the hub; private and gated data need `hf auth login`"
    if not isinstance(error, ValueError | RuntimeError | DatasetsError):
        return "the hub cannot be reached: check the network and HF_HUB_OFFLINE, or give a local file"
    return "check name, config, split and revision, or give a local file"
