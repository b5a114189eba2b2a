"""Files as they were written: their sizes and hashes, documents that carry their own hash, and what differs.

A checkpoint, a finished stage and a run each keep a list of their files. Every file is hashed before it is used, also
after a rerun: that takes little beside loading a model, and neither a kept time nor a kept size hides an edit. A
process hashes a file once, unless somebody touches it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from toolkit.errors import StoreError
from toolkit.files import file_hash, fingerprint, read_json, write_json

STAGE_FILE = "stage.json"
MANIFEST_FILE = "manifest.json"
SEAL = "sealed"
# A file of a model lies this deep in a run folder at most: RUN/ppo/checkpoints/step-8/model/FILE.
DEPTH = 5
MOST_NAMED = 3
FileList = dict[str, dict[str, Any]]
"""Path below a folder -> ``{"size": bytes, "sha256": hex}``."""


def listed(folder: Path, leave_out: Collection[str] = ()) -> FileList:
    """All files below a folder as they are now, without the files and outermost folders in ``leave_out``."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: described(path)
        for name, path in names.items()
        if name not in leave_out and name.partition("/")[0] not in leave_out
    }


def described(path: Path) -> dict[str, Any]:
    """The entry of a file in a list."""
    return {"size": path.stat().st_size, "sha256": file_hash(path)}


def differences(folder: Path, files: Mapping[str, Mapping[str, Any]], below: str = "") -> list[str]:
    """What is wrong with the files of a list, in words. ``below`` names a file or a folder: the others do not count.

    Files that are not in the list are somebody else's.
    """
    problems = []
    for name, entry in files.items():
        if below and name != below and not name.startswith(f"{below}/"):
            continue
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != entry["size"]:
            problems.append(f"{name} is damaged ({size} bytes instead of {entry['size']})")
        elif file_hash(path) != entry["sha256"]:
            problems.append(f"{name} is damaged")
    return problems


def in_words(problems: list[str]) -> str:
    """The first problems of a list, and how many there are further.

    >>> in_words(["a is missing", "b is missing", "c is missing", "d is missing"])
    'a is missing; b is missing; c is missing; and 1 more'
    """
    more = [f"and {len(problems) - MOST_NAMED} more"] if len(problems) > MOST_NAMED else []
    return "; ".join([*problems[:MOST_NAMED], *more])


def is_list(files: object) -> TypeGuard[FileList]:
    """Whether a value of a JSON document is a list of files."""
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values()
    )


# ---------------------------------------------------------------- documents with their own hash


def write_sealed(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document with a hash of its other values."""
    values = {name: value for name, value in document.items() if name != SEAL}
    write_json(path, values | {SEAL: _seal(values)})


def _seal(values: Mapping[str, Any]) -> str:
    return fingerprint(json.loads(json.dumps(values)))  # as a reader gets it: tuples are lists, keys are texts


def read_sealed(path: Path, *, fix: str = "remove it and run again") -> dict[str, Any]:
    """Read a JSON document. One without a hash was written by an earlier version, or by hand.

    Raises StoreError, with this ``fix``, where it is damaged.
    """
    document = read_json(path, fix=fix)
    seal = document.pop(SEAL, None)
    if seal is not None and seal != _seal(document):
        what = "this file is damaged: it was changed after it was written"
        raise StoreError(what, where=str(path), fix=fix)
    return document


# ---------------------------------------------------------------- before a command uses what a run wrote


def refuse_changed(path: Path) -> None:
    """Raises StoreError where a file, or one below a folder, is not what the run wrote that it lies in.

    A path outside every run folder, and one that no list names, passes.
    """
    path = path.expanduser().resolve()
    for folder in [path, *path.parents][:DEPTH]:
        below = path.relative_to(folder).as_posix() if path != folder else ""
        if (folder / STAGE_FILE).is_file() and (run := _run_of(folder.parent)) is not None:
            record = folder / STAGE_FILE
        elif (folder / MANIFEST_FILE).is_file() and _run_of(folder) is not None and "/" not in below:
            record, run = folder / MANIFEST_FILE, folder
        else:
            continue
        fix = f"run its recipe again (duel run RECIPE --out {run}), which computes what is damaged anew"
        files = read_sealed(record, fix=fix).get("files")
        if is_list(files) and (problems := differences(folder, files, below)):
            raise StoreError(f"this was changed after it was written: {in_words(problems)}", where=str(folder), fix=fix)
        return


def _run_of(folder: Path) -> Path | None:
    """The run folder whose stages lie in a folder; None where that is another program's."""
    run = folder.parent if folder.name == ".shelf" else folder
    return run if (run / ".work").is_dir() else None
