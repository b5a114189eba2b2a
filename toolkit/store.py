"""Run folders: fingerprints, what is already there, and writes that are whole or absent.

A stage's *key* is a hash over everything that its result depends on. A finished stage is the folder
``RUN/<stage>`` with a ``stage.json`` in it, moved there in one rename; until then its work lives in
``RUN/.work/<stage>-<key>``, where an interrupted stage finds its checkpoints again. A finished stage
whose key no longer fits is moved to ``RUN/.shelf/<stage>-<key>`` rather than deleted, and comes back
when the recipe asks for it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import StoreError

SCHEMA_VERSION = 1
STAGE_FILE = "stage.json"
# The modules that a log-probability or a score comes out of: part of the key of whatever keeps one.
FORWARD_CODE = ("tree_batch.py", "scoring.py", "attention.py", "models.py", "adapters.py", "norms.py")


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
    return fingerprint({path.name: file_fingerprint(path) for path in files})


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


@dataclass(frozen=True)
class StageState:
    """What is on disk for a stage. ``changed`` names the fields that differ from what ran last."""

    stage: str
    key: str
    status: str  # "cached" | "shelved" | "partial" | "missing" | "stale"
    changed: tuple[str, ...] = ()


class RunFolder:
    """One run's folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        try:
            (self.root / ".work").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the run folder cannot be made: {error.strerror}",
                where=str(self.root),
                fix="choose another folder with --out",
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Two processes never write one run folder. Raises StoreError when it is taken."""
        self.create()
        with (self.root / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreError(
                    "another process is working on this run",
                    where=str(self.root),
                    fix="wait for it, or choose another folder with --out",
                ) from error
            yield

    def busy(self) -> bool:
        """Whether a process works on this run now. Its lock is tried for an instant, shared with other askers."""
        try:
            with (self.root / ".lock").open() as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def stage_dir(self, stage: str) -> Path:
        return self.root / stage

    def work_dir(self, stage: str, key: str) -> Path:
        return self.root / ".work" / f"{stage}-{key}"

    def shelf_dir(self, stage: str, key: str) -> Path:
        return self.root / ".shelf" / f"{stage}-{key}"

    def record(self, stage: str) -> dict[str, Any] | None:
        """The finished stage's record, or None."""
        path = self.stage_dir(stage) / STAGE_FILE
        return read_json(path) if path.is_file() else None

    def state(self, stage: str, key: str, fields: Mapping[str, Any]) -> StageState:
        """Is this stage, with exactly these fields, already there?"""
        record = self.record(stage)
        if record is not None and record["key"] == key:
            return StageState(stage, key, "cached")
        changed: tuple[str, ...] = ()
        if record is not None:
            old, new = flat(record["fields"]), flat(fields)
            changed = tuple(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))
        if (self.shelf_dir(stage, key) / STAGE_FILE).is_file():
            return StageState(stage, key, "shelved", changed)
        if self.work_dir(stage, key).is_dir():
            return StageState(stage, key, "partial", changed)
        return StageState(stage, key, "stale" if record is not None else "missing", changed)

    def shelve(self, stage: str) -> None:
        """Put the finished stage aside; nothing finished is lost."""
        record = self.record(stage)
        if record is None:
            # A folder without a record was put there by something else: never take it for ours.
            if self.stage_dir(stage).exists():
                raise StoreError(
                    f"{stage!r} holds something that this project did not finish writing",
                    where=str(self.stage_dir(stage)),
                    fix="move it away, or choose another folder with --out",
                )
            return
        target = self.shelf_dir(stage, record["key"])
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        os.rename(self.stage_dir(stage), target)

    def unshelve(self, stage: str, key: str) -> None:
        self.shelve(stage)
        os.rename(self.shelf_dir(stage, key), self.stage_dir(stage))

    def adopt(self, stage: str, key: str, others: list[Path]) -> bool:
        """Take an equal finished stage from another run folder, by hard links where the disk allows."""
        for other in others:
            for folder in (other / stage, other / ".shelf" / f"{stage}-{key}"):
                path = folder / STAGE_FILE
                if path.is_file() and read_json(path)["key"] == key:
                    work = self.work_dir(stage, key)
                    shutil.rmtree(work, ignore_errors=True)
                    shutil.copytree(folder, work, copy_function=_link_or_copy)
                    self.shelve(stage)
                    os.rename(work, self.stage_dir(stage))
                    return True
        return False

    def finish(self, stage: str, key: str, record: Mapping[str, Any]) -> None:
        """Turn the work folder into the finished stage in one rename."""
        work = self.work_dir(stage, key)
        write_json(work / STAGE_FILE, {"schema_version": SCHEMA_VERSION, "stage": stage, "key": key, **record})
        self.shelve(stage)
        os.rename(work, self.stage_dir(stage))


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target
