"""The layout of a run folder: finished stages, stages that go on, the shelf of earlier results, and the lock."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import BusyError, StoreError
from toolkit.files import fingerprint, flat, is_locked, locked, remove, remove_partials
from toolkit.progress import TRAINER_FOLDER
from toolkit.storage import integrity
from toolkit.storage.integrity import differences, in_words, is_list, listed, read_sealed, write_sealed
from toolkit.storage.locks import held

# 2: the evaluate stage writes evaluation.json, which was called results.json as the run's own file is.
SCHEMA_VERSION = 2
# Files outside the stages' folders are the same in these versions, and so are the stages' tables and models.
READABLE_VERSIONS = (1, SCHEMA_VERSION)
WORKERS_LOCK = ".workers"  # shared by the processes of a stage
# So long may launched processes take to notice that their command was killed.
WORKERS_END_S = 5.0
STAGE_FILE, MANIFEST_FILE = integrity.STAGE_FILE, integrity.MANIFEST_FILE
RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
# The evaluation's tables, which lie at the top of the run folder as well.
JUDGEMENTS_FILE = "judgements.parquet"
TABLES = ("samples.parquet", "rewards.parquet", JUDGEMENTS_FILE)
RECIPE_FILE = "recipe.resolved.yaml"
# Of a study: what its table says, its trials as they are planned, the table, and why a trial has no policy.
STUDY_FILE = "study.json"
TRIALS_FILE = "trials.json"
TABLE_FILE = "table.parquet"
FAILURE_FILE = "failed.json"
# Of a stage that goes on: checkpoints of its trainer, and the time of its attempts.
ATTEMPTS_FILE = "attempts.json"
TO_RESUME = (TRAINER_FOLDER, ATTEMPTS_FILE)
SWEEP_FILE = "sweep.json"  # its settings, and the folder and the verdict of each run
SCORES_FOLDER = "scores"
# Fields of the two documents of a run that readers take for granted, with their types; and those that hold objects.
FORMS: dict[str, dict[str, Any]] = {
    MANIFEST_FILE: {
        "name": str,
        "recipe": dict,
        "keys": dict,
        "stages": dict,
        "started": int | float,
        "versions": dict,
    },
    RESULTS_FILE: {"policies": list, "win_rates": list, "verdict": dict},
}
OF_OBJECTS = ("stages", "policies", "win_rates")


def read_document(path: Path) -> dict[str, Any]:
    """``manifest.json`` or ``results.json`` of a run.

    Raises StoreError where the file is damaged, or of a version that this code does not know.
    """
    fix = "move it away and run the recipe again: it is written anew, and finished stages stay as they are"
    document = read_sealed(path, fix=fix)
    version = document.get("schema_version")
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise StoreError(
            f"this run folder has the layout {version}, and this duel reads the layouts {known}",
            where=str(path),
            fix="read it with the duel that wrote it, or run its recipe again in another folder",
        )
    _check_form(document, path, fix)
    return document


def _check_form(document: Mapping[str, Any], path: Path, fix: str) -> None:
    """Raises StoreError where a field that readers take for granted is missing, or of another type."""
    for name, kind in FORMS.get(path.name, {}).items():
        value = document.get(name)
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        objects = name not in OF_OBJECTS or all(isinstance(item, dict) for item in items)
        if not isinstance(value, kind) or isinstance(value, bool) or not objects:
            what = f"this file is damaged: {name!r} is {'missing' if value is None else 'of another form'}"
            raise StoreError(what, where=str(path), fix=fix)


def refuse_damaged(run: Path) -> None:
    """Before something is published from a run: raises StoreError where its files are not as it wrote them.

    Policies from along the training may be removed, to save space. A folder without a manifest was put
    together by hand.
    """
    if not (run / MANIFEST_FILE).is_file():
        return
    manifest = read_document(run / MANIFEST_FILE)
    if not is_list(manifest.get("files")):  # of an earlier version
        return
    problems = differences(run, manifest["files"])
    for stage in manifest["stages"]:
        record = read_record(run / stage)
        if record is None:
            problems.append(f"{stage}/{STAGE_FILE} is missing")
        elif is_list(record.get("files")):
            files = {name: entry for name, entry in record["files"].items() if not _removed(run / stage, name)}
            problems += [f"{stage}/{problem}" for problem in differences(run / stage, files)]
    if problems:
        raise StoreError(
            f"the run was changed after it was written: {in_words(problems)}",
            where=str(run),
            fix=f"run its recipe again (duel run RECIPE --out {run}), which computes what is damaged anew",
        )


def _removed(stage: Path, name: str) -> bool:
    return name.startswith("checkpoints/") and not (stage / name).is_file()


def refuse_study(folder: Path, fix: str) -> None:
    """Raises StoreError for the folder of a study, where a command takes that of a run."""
    if any((folder / name).is_file() for name in (STUDY_FILE, TRIALS_FILE)):
        raise StoreError("this is a study, and not one run", where=str(folder), fix=fix)


@dataclass(frozen=True)
class StageState:
    """What is on disk for a stage. ``changed`` names the fields that differ from what ran last, ``damage`` says what is
    wrong with the files of a finished one. ``digest`` is the hash over the files of a cached or shelved result.
    """

    stage: str
    key: str
    status: str  # "cached" | "shelved" | "partial" | "missing" | "stale" | "damaged"
    changed: tuple[str, ...] = ()
    damage: str = ""
    digest: str | None = field(default=None, compare=False)


def is_manifest(path: Path) -> bool:
    """Whether a file has the form of a run's manifest."""
    try:
        return path.is_file() and bool(read_document(path))
    except (StoreError, OSError):
        return False


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
        fix = "wait for it, or choose another folder with --out"
        with held(self.root / ".lock", "is working on this run", self.root, fix=fix):
            self._await_workers(fix)
            remove_partials(self.root, ".*.partial")
            yield

    def _await_workers(self, fix: str) -> None:
        """Wait a moment for the launched processes of a run that was killed, which end by themselves."""
        deadline = time.monotonic() + WORKERS_END_S
        while True:
            try:
                with locked(self.root / WORKERS_LOCK):
                    return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    what = "another process is working on this run: a killed command launched it"
                    raise BusyError(what, where=str(self.root), fix=fix) from error
            time.sleep(0.1)

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

    def state(
        self, stage: str, key: str, fields: Mapping[str, Any], digests: Mapping[str, str] | None = None
    ) -> StageState:
        """Whether this stage with this key is there, and whole. ``fields`` are what the key is made of.

        ``digests`` are those of the stages that it reads: one that was computed from other files than theirs is stale.
        """
        digests = digests or {}
        changed: tuple[str, ...] = ()
        try:
            record = self.record(stage)
        except StoreError as error:
            return StageState(stage, key, "damaged", damage=f"{STAGE_FILE}: {error.what}")
        if record is not None and _is(record, key):
            changed = _changed_inputs(record, digests)
            if damage := _damage(self.stage_dir(stage), record):
                return StageState(stage, key, "damaged", damage=damage)
            if not changed:
                return StageState(stage, key, "cached", digest=_digest(record))
        elif record is not None:
            old, new = flat(record["fields"]), flat(fields)
            changed = tuple(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))
        if (shelved := _held(self.shelf_dir(stage, key), key, digests)) is not None:
            return StageState(stage, key, "shelved", changed, digest=_digest(shelved))
        if self.work_dir(stage, key).is_dir():
            return StageState(stage, key, "partial", changed)
        return StageState(stage, key, "stale" if record is not None else "missing", changed)

    def digests(self, stages: Sequence[str]) -> dict[str, str]:
        """Stage -> a hash over its files, of those finished stages that have a list of them."""
        digests = {}
        for stage in stages:
            try:
                digest = _digest(self.record(stage) or {})
            except StoreError:
                continue  # it is damaged, and runs again first
            if digest is not None:
                digests[stage] = digest
        return digests

    def refuse_foreign(self, stage: str) -> None:
        """Raises StoreError where something lies in the stage's place that is no finished stage."""
        folder = self.stage_dir(stage)
        if folder.exists() and not (folder / STAGE_FILE).is_file():
            raise StoreError(
                f"{stage!r} holds something that this project did not finish writing",
                where=str(folder),
                fix="move it away, or choose another folder with --out",
            )

    def set_aside_recordless(self, stage: str) -> str:
        """Put a stage on the shelf that the manifest lists, and whose record is gone. Returns where it went, or ""."""
        folder, manifest = self.stage_dir(stage), self.root / MANIFEST_FILE
        if not folder.is_dir() or (folder / STAGE_FILE).is_file() or not is_manifest(manifest):
            return ""
        if stage not in read_document(manifest)["stages"]:
            return ""
        self.set_aside(stage)
        return f"{stage}/{STAGE_FILE} is missing: its files are in {self.root / '.shelf'}, and the stage runs again"

    def set_aside(self, stage: str) -> list[tuple[Path, str]]:
        """Put a damaged stage on the shelf. Returns the user's own files in it, with their names in the stage."""
        folder, number = self.stage_dir(stage), 1
        while (target := self.root / ".shelf" / f"{stage}-damaged-{number}").exists():
            number += 1
        target.parent.mkdir(exist_ok=True)
        os.rename(folder, target)
        try:
            record = read_record(target) or {}
        except StoreError:
            record = {}
        files = record.get("files")
        others = listed(target, [*files, STAGE_FILE]) if is_list(files) else {}
        return [(target / name, name) for name in others]

    def shelve(self, stage: str) -> None:
        """Put the finished stage on the shelf, so that its result is not lost.

        Raises StoreError for a folder in its place that is no finished stage.
        """
        self.refuse_foreign(stage)
        record = self.record(stage)
        if record is None:
            return
        target = self.shelf_dir(stage, record["key"])
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        os.rename(self.stage_dir(stage), target)

    def unshelve(self, stage: str, key: str) -> None:
        """Take an earlier result from the shelf, and put the present one there.

        The present one may have the same key, and have read other inputs.
        """
        work = self.work_dir(stage, key)
        shutil.rmtree(work, ignore_errors=True)
        os.rename(self.shelf_dir(stage, key), work)
        self._put(stage, work)

    def adopt(self, stage: str, key: str, others: list[Path], inputs: Sequence[str] = ()) -> bool:
        """Take an equal finished stage from another run folder, by hard links where the disk allows."""
        digests = self.digests(inputs)
        for other in others:
            for folder in (other / stage, other / ".shelf" / f"{stage}-{key}"):
                if _held(folder, key, digests) is not None:
                    work = self.work_dir(stage, key)
                    shutil.rmtree(work, ignore_errors=True)
                    shutil.copytree(folder, work, ignore=_to_resume_of(folder), copy_function=_link_or_copy)
                    self._put(stage, work)
                    return True
        return False

    def finish(self, stage: str, key: str, record: Mapping[str, Any], inputs: Sequence[str] = ()) -> None:
        """Make the work folder the finished stage, with its record and the list of its files, by one rename.

        What the stage resumes from goes once that is done: a kill before it loses nothing.
        """
        work = self.work_dir(stage, key)
        remove_partials(work, "**/.*.partial")
        record = {"schema_version": SCHEMA_VERSION, "stage": stage, "key": key, **record}
        files = {"inputs": self.digests(inputs), "files": listed(work, [STAGE_FILE, *TO_RESUME])}
        write_sealed(work / STAGE_FILE, record | files)
        self._put(stage, work)

    def take_finished(self, stage: str, key: str, inputs: Sequence[str] = ()) -> bool:
        """Put a work folder in its place that was finished when a kill came. Returns whether there was one."""
        work = self.work_dir(stage, key)
        if _held(work, key, self.digests(inputs)) is None:
            return False
        self._put(stage, work)
        return True

    def _put(self, stage: str, work: Path) -> None:
        """Move a folder to the place of the finished stage, and what is there to the shelf."""
        self.refuse_foreign(stage)
        try:
            record = self.record(stage)
            whole = record is None or not _damage(self.stage_dir(stage), record)
        except StoreError:
            whole = False
        others: list[tuple[Path, str]] = []
        if whole:
            self.shelve(stage)
        else:
            others = self.set_aside(stage)
        os.rename(work, self.stage_dir(stage))
        self.remove_to_resume(stage)
        for path, name in others:
            place = self.stage_dir(stage) / name
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                os.rename(path, place)

    def remove_to_resume(self, stage: str) -> None:
        """Remove what the stage would have resumed from: a kill can leave it in a finished one."""
        for name in TO_RESUME:
            remove(self.stage_dir(stage) / name)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the finished stage in a folder, or None. Raises StoreError where it is damaged."""
    path = folder / STAGE_FILE
    fix = f"move {folder} away and run again: only this stage is computed anew"
    return read_sealed(path, fix=fix) if path.is_file() else None


def _is(record: Mapping[str, Any], key: str) -> bool:
    """Whether a record is that of the stage with this key, in today's layout."""
    return (record.get("schema_version"), record.get("key")) == (SCHEMA_VERSION, key)


def _damage(folder: Path, record: Mapping[str, Any]) -> str:
    """What is wrong with the files of a finished stage, in words. Earlier records have no list of files."""
    files = record.get("files")
    return in_words(differences(folder, files)) if is_list(files) else ""


def _changed_inputs(record: Mapping[str, Any], digests: Mapping[str, str]) -> tuple[str, ...]:
    """The inputs that were computed again, to other files, after this stage had read them."""
    read = record.get("inputs", {})
    return tuple(f"input {name}" for name, digest in digests.items() if read.get(name, digest) != digest)


def _digest(record: Mapping[str, Any]) -> str | None:
    """A hash over the files of a finished stage; None where its record does not list them."""
    files = record.get("files")
    return fingerprint(files) if is_list(files) else None


def _held(folder: Path, key: str, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """The record of a folder that is the finished stage with this key, whole, and computed from inputs with these
    digests; None for any other folder."""
    try:
        record = read_record(folder)
    except StoreError:
        return None
    if record is None or not _is(record, key) or _changed_inputs(record, digests) or _damage(folder, record):
        return None
    return record


def _to_resume_of(stage: Path) -> Callable[[str, list[str]], Collection[str]]:
    """For ``copytree``: what another run may be removing from a stage that it has just finished."""
    return lambda folder, _: TO_RESUME if Path(folder) == stage else ()


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target
