"""Files that are whole or absent: atomic writes, fingerprints, tables."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO, Any

from toolkit.errors import DuelError, StoreError, first_line

PACKAGE = Path(__file__).parent
# In these folders a result depends on the modules that it reaches. In the others it depends on every file.
FOLDERS_OF_SEPARATE_MODULES = ("stages", "runs", "measure")
ROW_GROUP_BYTES = 1 << 25  # of a table that waits in memory to be written
ROWS_AT_ONCE = 4096  # of a table that are read
BUFFER_BYTES = 1 << 20  # of a column of a table that are read
# A file that was written less long ago is hashed each time.
SETTLED_NS = 1_000_000_000
# Files of commands that were killed and run again now: they may have been written whole just before.
UNFINISHED = set[Path]()
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository on the hub, OWNER/NAME."""
    return _HUB_ID.fullmatch(name) is not None


# ---------------------------------------------------------------- fingerprints


def fingerprint(value: object) -> str:
    """16 hex digits over the canonical JSON of ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """16 hex digits over the bytes of a file."""
    return file_hash(path)[:16]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes. A process computes it once for a file that stays as it is."""
    facts = path.stat()
    if time.time_ns() - max(facts.st_ctime_ns, facts.st_mtime_ns) < SETTLED_NS:
        return _hash(path)  # a second write within the clock's resolution would look like the first
    return _remembered_hash(path.resolve(), facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@lru_cache(maxsize=100_000)
def _remembered_hash(path: Path, inode: int, size: int, written_ns: int, changed_ns: int) -> str:
    return _hash(path)


def folder_fingerprint(folder: Path, names: list[str]) -> str:
    """16 hex digits over the files of a folder that match one of the globs in ``names``."""
    files = sorted({path for name in names for path in folder.glob(name) if path.is_file()})
    return fingerprint({path.relative_to(folder).as_posix(): file_fingerprint(path) for path in files})


@cache
def code_fingerprint(module: str) -> str:
    """16 hex digits over the code that the results of a module ("toolkit.stages.dpo") depend on.

    A process computes it once: it goes on with the code that it has imported, also where a file is edited meanwhile.
    """
    return package_code_fingerprint(module, PACKAGE)


def package_code_fingerprint(module: str, package: Path) -> str:
    """16 hex digits over the code in the folder ``package`` that the results of its module depend on.

    Its imports are followed from module to module, also those inside functions. Every file of a folder that they reach
    counts, word lists and templates too; in ``FOLDERS_OF_SEPARATE_MODULES`` the modules that they reach.
    """
    files = set[Path]()
    for name in reached_modules([module], package):
        path = _module_file(name, package)
        folder = package / path.relative_to(package).parts[0]
        separate = folder == path or folder.name in FOLDERS_OF_SEPARATE_MODULES
        files |= {path} if separate else set(folder.rglob("*"))
    code = sorted(path for path in files if path.is_file() and path.suffix != ".pyc")
    return fingerprint({path.relative_to(package).as_posix(): file_fingerprint(path) for path in code})


def reached_modules(
    modules: Iterable[str], package: Path = PACKAGE, follows: Callable[[str], bool] = lambda _: True
) -> set[str]:
    """The modules of ``package`` that these import, and those that they import, and so on; only what ``follows``."""
    reached, waiting = set[str](), list(modules)
    while waiting:
        name = waiting.pop()
        if name not in reached and follows(name):
            reached.add(name)
            waiting += imported_modules(name, package)
    return reached


def module_fingerprint(name: str) -> str | None:
    """16 hex digits over the source of a user's module. None where there is no such module.

    Of a package it is all of its modules; of a module alone, those beside it that it imports count as well. Nothing is
    imported to find out.
    """
    source = _source_of(name)
    if source is None:
        return None
    if (top := _source_of(name.partition(".")[0])) is not None and top.name == "__init__.py":
        return folder_fingerprint(top.parent, ["**/*.py"])
    files, waiting = set[Path](), [source]
    while waiting:
        file = waiting.pop()
        if file not in files and file.suffix == ".py":
            files.add(file)
            beside = (_source_of(imported, file.parent) for imported in _imports(file))
            waiting += [source for source in beside if source is not None]
    return fingerprint({path.name: file_fingerprint(path) for path in sorted(files | {source})})


def _source_of(name: str, folder: Path | None = None) -> Path | None:
    """The file of a module, in ``folder`` or on the path of imports; its parents are not imported."""
    path: Sequence[str] | None = None if folder is None else [str(folder)]
    spec = None
    for part in name.split("."):
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin else None


def _imports(file: Path) -> set[str]:
    """The modules that a file imports by their names; none where it is no Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


@cache
def imported_modules(module: str, package: Path = PACKAGE) -> tuple[str, ...]:
    """The modules of ``package`` that one of them imports, also inside functions."""
    tree = ast.parse(_module_file(module, package).read_text(encoding="utf-8"))
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = (name for name in names if name.startswith(f"{package.name}."))
    return tuple(sorted(name for name in inside if _module_file(name, package).is_file()))


def _module_file(module: str, package: Path) -> Path:
    return package.parent / f"{module.replace('.', '/')}.py"


# ---------------------------------------------------------------- locks

ASKED_S = 0.1  # by then one that only asks has long let go


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock file, alone or with others who share it. Raises BlockingIOError where another process holds it.

    The system lets go of it when the process ends, however it ends. One that only asks (:func:`is_locked`) has it for
    an instant, which is waited for.
    """
    patience = time.monotonic() + ASKED_S
    while True:
        with path.open("a") as handle:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise
                time.sleep(ASKED_S / 20)
                continue
            if _is_at(handle, path):
                yield
                return


def _is_at(handle: IO[str], path: Path) -> bool:
    """Whether an open file is still the one of its path: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file alone. It is tried for an instant, shared with others who ask."""
    try:
        with path.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


# ---------------------------------------------------------------- whole or absent


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives the path of a partial file to write, and moves it to ``path`` at the end.

    After an error, ``path`` is what it was before, and nothing partial is left. Both may be folders, if ``path`` does
    not exist yet.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    remove(partial)  # of a process that was killed
    try:
        yield partial
        os.replace(partial, path)
    finally:
        remove(partial)


def remove_partials(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of :func:`atomic_write`. The caller knows that nobody writes there now."""
    for path in list(folder.glob(pattern)):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file to write, which is there whole or not at all, also where the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also where the machine stops."""
    with written_whole(path) as out:
        out.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all. NaN and infinity are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for any text that is none or cannot be read.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    import pydantic_core

    try:
        # Gives the values of Python's reader in a fifth of its time. What it refuses, that reader takes or explains.
        return pydantic_core.from_json(text, cache_strings="keys")
    except (ValueError, TypeError):  # the latter for half of a surrogate pair
        pass
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:  # Python refuses to make an integer of thousands of digits
        raise ValueError("it holds a number of thousands of digits") from error


def read_json(path: Path, *, fix: str = "remove it and run again") -> dict[str, Any]:
    """Read a JSON object that this project wrote. Raises StoreError, with this ``fix``, where it is damaged."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"this file is damaged: {error}", where=str(path), fix=fix) from error
    if not isinstance(document, dict):
        raise StoreError("this file is damaged: it holds no JSON object", where=str(path), fix=fix)
    return document


def write_table(rows: Sequence[Mapping[str, Any]], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write rows as a Parquet file, whole or not at all. ``metadata`` is kept beside its columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    write_columns(((name, [row.get(name) for row in rows]) for name in names), path, metadata)


def write_columns(
    columns: Iterable[tuple[str, Sequence[Any]]], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """:func:`write_table` of columns by their names, of which one at a time is in memory as Python's values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(values) for name, values in columns})
    with atomic_write(path) as partial:
        pq.write_table(table.replace_schema_metadata(dict(metadata or {}) or None), partial, write_page_checksum=True)


def write_row_groups(groups: Iterable[Sequence[Mapping[str, Any]]], schema: Any, path: Path) -> None:
    """Write a Parquet file of this pyarrow schema whole or not at all, each of ``groups`` as it comes as a row group.

    Columns that the schema does not name are left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_write(path) as partial, pq.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema))


def write_tables(tables: Iterable[Any], schema: Any, path: Path, row_group: int) -> None:
    """Write pyarrow tables of this schema one behind the other as a Parquet file, whole or not at all.

    A row group is written once it has ``row_group`` rows or ROW_GROUP_BYTES, so that no more than that waits in memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(waiting: list[Any]) -> None:
        # One chunk for each column: the file's bytes then do not depend on how the rows came.
        writer.write_table(pa.concat_tables(waiting).combine_chunks())

    with atomic_write(path) as partial, pq.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
        waiting = [schema.empty_table()]
        for table in tables:
            waiting.append(table)
            if sum(map(len, waiting)) >= row_group or sum(part.nbytes for part in waiting) >= ROW_GROUP_BYTES:
                write(waiting)
                waiting = []
        if waiting:
            write(waiting)


def read_table(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    error: type[DuelError] = StoreError,
    fix: str = "remove it and run again",
) -> list[dict[str, Any]]:
    """Rows of a Parquet file, all columns or those that are named. Raises ``error`` where it does not have them."""
    return list(table_rows(path, columns, error=error, fix=fix))


def table_rows(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    error: type[DuelError] = StoreError,
    fix: str = "remove it and run again",
) -> Iterator[dict[str, Any]]:
    """The rows of :func:`read_table`, of which ``ROWS_AT_ONCE`` are in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise error("this table is missing", where=str(path), fix=fix)
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, page_checksum_verification=True) as file:
            there = file.schema_arrow.names
            if missing := [name for name in columns or () if name not in there]:
                what = f"it has no column {missing[0]!r}"
                raise error(f"this table cannot be read: {what}", where=str(path), fix=fix)
            names = None if columns is None else list(columns)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=names):
                yield from (batch if names is None else batch.select(names)).to_pylist()
    except (OSError, KeyError, pa.ArrowException) as damage:
        raise error(f"this table cannot be read: {first_line(damage)}", where=str(path), fix=fix) from damage


def table_columns(path: Path, *, error: type[DuelError] = StoreError, fix: str = "remove it and run again") -> set[str]:
    """The names of a Parquet file's columns. Raises ``error`` where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as damage:
        raise error(f"this table cannot be read: {first_line(damage)}", where=str(path), fix=fix) from damage


def table_metadata(path: Path, *, error: type[DuelError] = StoreError) -> dict[str, str]:
    """The metadata of a Parquet file, as :func:`write_table` took it. Raises ``error`` where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pairs = (pq.read_schema(path).metadata or {}).items()
    except (OSError, pa.ArrowException) as damage:
        raise error(f"this table cannot be read: {first_line(damage)}", where=str(path)) from damage
    return {key.decode(): value.decode() for key, value in pairs if not key.startswith(b"ARROW:")}


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that the target is whole or unchanged."""
    with atomic_write(target) as partial:
        shutil.copyfile(source, partial)


def refuse_below_file(path: Path) -> None:
    """Raises StoreError where a file is in the place of a folder that is to hold ``path``."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise StoreError("this is a file, and not a folder", where=str(above), fix="choose another place")


def refuse_place(path: Path) -> None:
    """Raises StoreError where no file can be written: a folder is in its place, or a file in that of its folder."""
    if path.is_dir():
        raise StoreError("this is a folder, and not a file to write", where=str(path), fix="name a file in it")
    refuse_below_file(path)


def refuse_others_file(path: Path, force: bool | None, ours: Callable[[Path], bool]) -> None:
    """Raises StoreError where a file exists that is not ``ours``, and ``--force`` was not given.

    ``force`` is None for a command without that option.
    """
    refuse_place(path)
    if path.exists() and not force and not (path.is_file() and ours(path)):
        raise StoreError(
            "this file is there, and duel did not write it",
            where=str(path),
            fix="choose another --out" + (", or give --force" if force is False and path.is_file() else ""),
        )


def refuse_existing(path: Path, force: bool) -> None:
    """Raises StoreError where a file exists and ``--force`` was not given, and where none can be written."""
    refuse_place(path)
    if path.exists() and not force and path not in UNFINISHED:
        raise StoreError("the file exists", where=str(path), fix="choose another --out, or give --force")


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        dotted = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            out.update(flat(item, dotted + "."))
        else:
            out[dotted] = item
    return out
