"""The layout of a run folder: finished stages, stages that go on, the shelf of earlier results, and the lock."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import BusyError, StoreError
from toolkit.files import flat, is_locked, locked, read_json, write_json

# 2: the evaluate stage writes evaluation.json, which was called results.json as the run's own file is.
SCHEMA_VERSION = 2
# Files outside the stages' folders are the same in these versions, and so are the stages' tables and models.
READABLE_VERSIONS = (1, SCHEMA_VERSION)
WORKERS_LOCK = ".workers"  # shared by the processes of a stage
STAGE_FILE = "stage.json"
MANIFEST_FILE = "manifest.json"
RESULTS_FILE = "results.json"
RECIPE_FILE = "recipe.resolved.yaml"
# Of a study: what its table says, its trials as they are planned, and in a trial's folder why it has no policy.
STUDY_FILE = "study.json"
TRIALS_FILE = "trials.json"
FAILURE_FILE = "failed.json"
SCORES_FOLDER = "scores"


def read_document(path: Path) -> dict[str, Any]:
    """``manifest.json`` or ``results.json`` of a run.

    Raises StoreError where the file is damaged, or of a version that this code does not know.
    """
    fix = "move it away and run the recipe again: it is written anew, and finished stages stay as they are"
    document = dict(read_json(path, fix=fix))
    version = document.get("schema_version")
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise StoreError(
            f"this run folder has the layout {version}, and this duel reads the layouts {known}",
            where=str(path),
            fix="read it with the duel that wrote it, or run its recipe again in another folder",
        )
    return document


def refuse_study(folder: Path, fix: str) -> None:
    """Raises StoreError for the folder of a study, where a command takes that of a run."""
    if any((folder / name).is_file() for name in (STUDY_FILE, TRIALS_FILE)):
        raise StoreError("this is a study, and not one run", where=str(folder), fix=fix)


@dataclass(frozen=True)
class StageState:
    """What is on disk for a stage. ``changed`` names the fields that differ from what ran last."""

    stage: str
    key: str
    status: str  # "cached" | "shelved" | "partial" | "missing" | "stale"
    changed: tuple[str, ...] = ()


class RunFolder:
    """One run's folder on disk.

    ``STAGE/`` is a finished stage with its record ``stage.json``, ``.work/STAGE-KEY`` one that goes on, and
    ``.shelf/STAGE-KEY`` an earlier result with other settings.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        """Make the folder. Raises StoreError where that is not possible."""
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
        """Hold the run folder: two processes never write the same one. Raises BusyError where another holds it, or
        where processes live on that a run had launched which was killed.
        """
        self.create()
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.root / ".lock"))
                with locked(self.root / WORKERS_LOCK):
                    pass
            except BlockingIOError as error:
                raise BusyError(
                    "another process is working on this run",
                    where=str(self.root),
                    fix="wait for it, or choose another folder with --out",
                ) from error
            yield

    @contextmanager
    def as_worker(self) -> Iterator[None]:
        """Of a launched process: while it works here, no other run may begin."""
        with locked(self.root / WORKERS_LOCK, shared=True):
            yield

    def earlier_version(self) -> int | None:
        """The version of a run that an earlier duel began here; None for today's, and where there is no run.

        Raises StoreError for a version that this code does not know.
        """
        path = self.root / MANIFEST_FILE
        version = read_document(path)["schema_version"] if path.is_file() else SCHEMA_VERSION
        return None if version == SCHEMA_VERSION else int(version)

    def busy(self) -> bool:
        """Whether a process holds the run folder now."""
        return is_locked(self.root / ".lock")

    def stage_dir(self, stage: str) -> Path:
        return self.root / stage

    def work_dir(self, stage: str, key: str) -> Path:
        return self.root / ".work" / f"{stage}-{key}"

    def shelf_dir(self, stage: str, key: str) -> Path:
        return self.root / ".shelf" / f"{stage}-{key}"

    def record(self, stage: str) -> dict[str, Any] | None:
        """The finished stage's record, or None."""
        return read_record(self.stage_dir(stage))

    def state(self, stage: str, key: str, fields: Mapping[str, Any]) -> StageState:
        """Whether this stage with this key is there. ``fields`` are what the key is made of."""
        record = self.record(stage)
        if _holds(self.stage_dir(stage), key):
            return StageState(stage, key, "cached")
        changed: tuple[str, ...] = ()
        if record is not None:
            old, new = flat(record["fields"]), flat(fields)
            changed = tuple(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))
        if _holds(self.shelf_dir(stage, key), key):
            return StageState(stage, key, "shelved", changed)
        if self.work_dir(stage, key).is_dir():
            return StageState(stage, key, "partial", changed)
        return StageState(stage, key, "stale" if record is not None else "missing", changed)

    def shelve(self, stage: str) -> None:
        """Put the finished stage on the shelf, so that its result is not lost.

        Raises StoreError for a folder in its place that is no finished stage.
        """
        record = self.record(stage)
        if record is None:
            # Something else put a folder without a record there.
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
        """Take an earlier result from the shelf, and put the present one there."""
        self.shelve(stage)
        os.rename(self.shelf_dir(stage, key), self.stage_dir(stage))

    def adopt(self, stage: str, key: str, others: list[Path]) -> bool:
        """Take an equal finished stage from another run folder, by hard links where the disk allows."""
        for other in others:
            for folder in (other / stage, other / ".shelf" / f"{stage}-{key}"):
                if _holds(folder, key):
                    work = self.work_dir(stage, key)
                    shutil.rmtree(work, ignore_errors=True)
                    shutil.copytree(folder, work, copy_function=_link_or_copy)
                    self.shelve(stage)
                    os.rename(work, self.stage_dir(stage))
                    return True
        return False

    def finish(self, stage: str, key: str, record: Mapping[str, Any]) -> None:
        """Make the work folder the finished stage, with its record, by one rename."""
        work = self.work_dir(stage, key)
        write_json(work / STAGE_FILE, {"schema_version": SCHEMA_VERSION, "stage": stage, "key": key, **record})
        self.shelve(stage)
        os.rename(work, self.stage_dir(stage))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the finished stage in a folder, or None. Raises StoreError where it is damaged."""
    path = folder / STAGE_FILE
    fix = f"move {folder} away and run again: only this stage is computed anew"
    return dict(read_json(path, fix=fix)) if path.is_file() else None


def _holds(folder: Path, key: str) -> bool:
    """Whether a folder is the finished stage with this key, in today's layout."""
    record = read_record(folder)
    return record is not None and (record.get("schema_version"), record["key"]) == (SCHEMA_VERSION, key)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target
