"""Files that are whole or absent: atomic writes, fingerprints, tables."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from toolkit.errors import DuelError, StoreError, first_line

PACKAGE = Path(__file__).parent
# Folders whose modules do not need each other: of these a module's own file counts, and not its neighbours.
APART = ("stages", "runs")


def fingerprint(value: object) -> str:
    """16 hex digits over the canonical JSON of ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """16 hex digits over the bytes of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def folder_fingerprint(folder: Path, names: list[str]) -> str:
    """16 hex digits over those of ``names`` (globs) that the folder holds."""
    files = sorted({path for name in names for path in folder.glob(name) if path.is_file()})
    return fingerprint({path.relative_to(folder).as_posix(): file_fingerprint(path) for path in files})


def code_fingerprint(module: str) -> str:
    """16 hex digits over the code that the results of a module of this package ("toolkit.stages.dpo") depend on.

    Its imports are followed from module to module, those inside functions too. Of each folder that they reach every
    file counts, word lists and templates as well; of the folders in ``APART`` the modules that are reached.
    """
    reached, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += imported_modules(name)
    files = set[Path]()
    for name in reached:
        path = PACKAGE.parent / f"{name.replace('.', '/')}.py"
        room = PACKAGE / path.relative_to(PACKAGE).parts[0]
        files |= {path} if room.name in APART or room == path else set(room.rglob("*"))
    kept = sorted(path for path in files if path.is_file() and path.suffix != ".pyc")
    return fingerprint({path.relative_to(PACKAGE).as_posix(): file_fingerprint(path) for path in kept})


@cache
def imported_modules(module: str) -> tuple[str, ...]:
    """The modules of this package that one of them imports, inside functions too."""
    tree = ast.parse((PACKAGE.parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = (name for name in names if name.startswith(f"{PACKAGE.name}."))
    return tuple(sorted(name for name in own if (PACKAGE.parent / f"{name.replace('.', '/')}.py").is_file()))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all; NaN and infinity are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON that this project wrote. Raises StoreError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"this file is damaged: {error}", where=str(path), fix="remove it and run again") from error


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as a Parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        names = dict.fromkeys(name for row in rows for name in row)  # pyarrow would look at the first row alone
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_row_groups(groups: Iterable[Sequence[Mapping[str, Any]]], schema: Any, path: Path) -> None:
    """Write a Parquet file of this pyarrow schema, a row group for each of ``groups`` as it comes, whole or not at all.

    Columns that the schema does not name are left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            for rows in groups:
                writer.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_table(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    error: type[DuelError] = StoreError,
    fix: str = "remove it and run again",
) -> list[dict[str, Any]]:
    """Rows of a Parquet file, all columns or those that are named. Raises ``error`` where it does not have them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise error("this table is missing", where=str(path), fix=fix)
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=None if columns is None else list(columns)).to_pylist()
    except (OSError, KeyError, pa.ArrowException) as damage:
        raise error(f"this table cannot be read: {first_line(damage)}", where=str(path), fix=fix) from damage
    return rows


def refuse_existing(path: Path, force: bool) -> None:
    """Raises StoreError where there is a file already and nobody said ``--force``."""
    if path.exists() and not force:
        raise StoreError("the file exists", where=str(path), fix="choose another --out, or give --force")


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that the target is whole or unchanged."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


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
