"""."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import StoreError
from toolkit.files import flat, read_json, write_json

SCHEMA_VERSION = 1
STAGE_FILE = "stage.json"


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
