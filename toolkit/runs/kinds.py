"""What duel wrote into a folder: a run, a study, a sweep, a comparison or a card. None takes the place of another."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from toolkit.errors import StoreError
from toolkit.files import read_json, refuse_others_file
from toolkit.progress import METRICS_FILE
from toolkit.runs.store import (
    JUDGEMENTS_FILE,
    MANIFEST_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    STAGE_FILE,
    STUDY_FILE,
    SWEEP_FILE,
    TABLE_FILE,
    TABLES,
    TRIALS_FILE,
    is_manifest,
)

Kind = Literal["run", "study", "study of a table", "sweep", "comparison", "card"]
CARD_FILE = "card.json"
# What a run and a study write at the top of their folders.
RUN_FILES = (MANIFEST_FILE, RESULTS_FILE, RECIPE_FILE, REPORT_FILE, METRICS_FILE, *TABLES)
STUDY_FILES = (STUDY_FILE, TRIALS_FILE, TABLE_FILE, RECIPE_FILE, REPORT_FILE, METRICS_FILE)
# A policy's samples of a comparison, by the fingerprint of all that they depend on.
SAMPLES_OF_COMPARISON = f"samples-{'[0-9a-f]' * 16}.parquet"


def kind_of(folder: Path) -> Kind | None:
    """What duel wrote into a folder; None where it wrote nothing that another command would replace.

    Files of the same names that are not duel's do not count: documents are told by their fields.
    """
    if _has(folder / TRIALS_FILE, "recipe", "started", "trials") or _damaged(folder / TRIALS_FILE, "trials/*/*"):
        return "study"
    if _has(folder / STUDY_FILE, "verdict", "trials"):
        return "study of a table"
    if is_manifest(folder / MANIFEST_FILE) or any(folder.glob(f"*/{STAGE_FILE}")):
        return "run"
    if _has(folder / SWEEP_FILE, "recipe", "runs") or _damaged(folder / SWEEP_FILE, "*/*"):
        return "sweep"
    if _has(folder / CARD_FILE, "schema_version", "inputs"):
        return "card"
    if any(folder.glob(SAMPLES_OF_COMPARISON)) or _has(folder / RESULTS_FILE, "win_rates", "judge_usage"):
        return "comparison"
    damaged = (folder / MANIFEST_FILE).is_file() and (folder / ".work").is_dir()
    return "run" if damaged else None


def _has(path: Path, *fields: str) -> bool:
    """Whether a file is a JSON object with these fields."""
    try:
        return path.is_file() and set(fields) <= read_json(path).keys()
    except (StoreError, OSError):
        return False


def _damaged(path: Path, stages: str) -> bool:
    """Whether a file is there, in a folder that has stages where this pattern says: duel wrote the file."""
    return path.is_file() and any(path.parent.glob(f"{stages}/{STAGE_FILE}"))


def refuse_others_folder(folder: Path, kind: Kind, files: Collection[str], force: bool | None = None) -> None:
    """Raises StoreError where a command that writes a folder of this kind would replace what is not its own.

    That is a folder of another kind, and, where none has begun, one of ``files`` that is there, unless ``force`` (None
    for a command without that option). A command that was stopped goes on. So does a run that an earlier duel let lie
    in the folder of a study.
    """
    there = kind_of(folder)
    if there == kind or (kind == "run" and is_manifest(folder / MANIFEST_FILE)):
        return
    if there is not None:
        named = folder if folder.name not in ("", "..") else folder.resolve()
        other = named.with_name(f"{named.name}-{kind.split()[0]}")
        raise StoreError(
            f"this folder holds a {there}: a {kind} needs a folder of its own",
            where=str(folder),
            fix=f"name another folder: --out {shlex.quote(str(other))}",
        )
    stopped_early = (folder / ".work").is_dir()  # runs and studies write their recipe first of all
    for name in files:
        if not (stopped_early and name == RECIPE_FILE):
            refuse_others_file(folder / name, force=force, ours=lambda _: False)


def refuse_table_of_folder(table: Path, force: bool) -> None:
    """Raises StoreError for the judgements that a run or a comparison keeps, where another command would write them."""
    if table.name == JUDGEMENTS_FILE and not force and (kind := kind_of(table.parent)) in ("run", "comparison"):
        fix = "choose another --out, or give --force"
        raise StoreError(f"these are the judgements of a {kind}", where=str(table), fix=fix)
