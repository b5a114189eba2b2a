"""``duel runs`` and ``duel diff``: what the manifests and results of runs, and the documents of studies, say."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import StoreError, nearest
from toolkit.files import flat, read_json
from toolkit.report.study_page import is_study, read_study_document
from toolkit.report.study_progress import TRIALS_FOLDER, is_begun, study_progress
from toolkit.runs.store import (
    MANIFEST_FILE,
    RESULTS_FILE,
    STUDY_FILE,
    TRIALS_FILE,
    RunFolder,
    read_document,
    refuse_damaged,
    refuse_study,
)
from toolkit.storage.integrity import refuse_changed

# How deep runs are looked for: a sweep has its runs in a folder of its own.
DEPTH = 3
# Columns of a policy's row in the results that are shown, each with an interval.
ESTIMATES = ("gold_reward", "explicit_reward", "implicit_reward", "length_tokens", "eos_rate")
_log = logging.getLogger(__name__)


def list_runs(root: Path) -> list[dict[str, Any]]:
    """A row for each run and each study below ``root``, the latest first. Raises StoreError where there is no folder.

    A study counts its trials as ``stages``, and the time of their stages as ``wall_s``; they have rows of their own
    where ``root`` is the study's folder.

    ``status`` is running, done, partial, failed or interrupted; a run that was killed counts as interrupted. A run in a
    layout that is not known, or with files that cannot be read, has no row, and a warning in the log names it.
    """
    if not root.is_dir():
        raise StoreError("there is no such folder", where=str(root), fix="name the folder that holds your runs")
    rows = []
    studies = _folders(root, TRIALS_FILE, STUDY_FILE)
    runs = [folder for folder in _folders(root, MANIFEST_FILE) if not _is_trial_of(studies - {root}, folder)]
    for folder in sorted({*runs, *studies}):
        try:
            row = _study_row(folder, root) if folder in studies else _run_row(folder, root)
        except StoreError as error:
            _log.warning("%s: %s", folder, error.what)
        except OSError as error:
            _log.warning("%s: it cannot be read: %s", folder, error.strerror)
        else:
            rows += [row] if row is not None else []
    return sorted(rows, key=lambda row: -row["started"])


def _folders(root: Path, *files: str) -> set[Path]:
    """The folders below ``root`` that have one of these files."""
    return {path.parent for depth in range(DEPTH) for name in files for path in root.glob("*/" * depth + name)}


def _is_trial_of(studies: Collection[Path], folder: Path) -> bool:
    return folder.parent.name == TRIALS_FOLDER and folder.parent.parent in studies


def _run_row(folder: Path, root: Path) -> dict[str, Any] | None:
    """The row of a run; None where the manifest is another program's."""
    path = folder / MANIFEST_FILE
    manifest = read_json(path)
    if not (isinstance(manifest, dict) and {"keys", "stages", "started"} <= manifest.keys()):
        return None
    return _row(folder, root, read_document(path))


def _name(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder != root else str(folder)


def _row(folder: Path, root: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    verdict: Mapping[str, Any] = {}
    if "evaluate" in manifest["stages"] and (folder / RESULTS_FILE).is_file():
        refuse_changed(folder / RESULTS_FILE)
        verdict = read_document(folder / RESULTS_FILE)["verdict"]
    # A rate by a judge that may not decide is no result. A run of an earlier duel does not list its judges.
    rate = verdict if verdict.get("judges", True) else {}
    waiting = [stage for stage in manifest["keys"] if stage not in manifest["stages"]]
    return {
        "run": _name(folder, root),
        "kind": "run",
        "recipe": manifest["name"],
        "seed": manifest["seed"],
        "status": status(folder, manifest),
        "stage": waiting[0] if waiting else None,
        "stages_done": len(manifest["stages"]),
        "stages": len(manifest["keys"]),
        "started": manifest["started"],
        "wall_s": round(sum(stage["wall_s"] for stage in manifest["stages"].values()), 3),
        "winner": verdict.get("winner"),
        **{name: rate.get(name) for name in ("judge", "win_rate", "ci_low", "ci_high")},
    }


def _study_row(folder: Path, root: Path) -> dict[str, Any]:
    """The row of a study, with the columns of a run's. ``win_rate`` is that of best against best on test prompts."""
    document = read_study_document(folder) if is_study(folder) else {}
    progress = study_progress(folder) if is_begun(folder) else None
    verdict, written = document.get("verdict", {}), document.get("provenance", {})
    if progress is not None:
        started = progress.started
    else:  # its table was recorded, or the document alone is here
        started = written.get("started", (folder / STUDY_FILE).stat().st_mtime)
    finished = written.get("finished", started)
    done = bool(document) and finished >= started and not (progress is not None and progress.busy)
    n_recorded = sum(len(trial["checkpoints"][0]["seeds"]) for trial in document.get("trials", []))
    state = "done" if done else "running" if progress is not None and progress.busy else "interrupted"
    best = verdict.get("best", {})
    return {
        "run": _name(folder, root),
        "kind": "study",
        "recipe": progress.name if progress is not None else (document["recipe"] or {}).get("name"),
        "seed": None,
        "status": state,
        "stage": None,
        "stages_done": progress.n_trained if progress is not None else n_recorded,
        "stages": len(progress.trials) if progress is not None else n_recorded,
        "started": started,
        "wall_s": _trained_s(folder) if progress is not None else round(finished - written.get("started", finished), 3),
        "winner": verdict.get("winner") if done else None,
        "judge": None,
        **{name: best.get(name) if done else None for name in ("win_rate", "ci_low", "ci_high")},
    }


def _trained_s(folder: Path) -> float:
    """The seconds of all stages of a study's trials, over all calls; one that several trials share counts once."""
    seconds = dict[tuple[Any, ...], float]()
    for path in (folder / TRIALS_FOLDER).glob(f"*/{MANIFEST_FILE}"):
        for stage, record in read_json(path).get("stages", {}).items():
            if "wall_s" in record:
                seconds[stage, record.get("key"), record.get("started")] = record["wall_s"]
    return round(sum(seconds.values()), 3)


def status(folder: Path, manifest: Mapping[str, Any]) -> str:
    """The manifest's status, unless the lock says otherwise: a killed process could not write that it ended."""
    if RunFolder(folder).busy():
        return "running"
    return "interrupted" if manifest["status"] == "running" else str(manifest["status"])


def diff_runs(first: Path, second: Path) -> dict[str, Any]:
    """What differs between two runs: ``settings``, ``versions``, ``stages`` and ``results``.

    ``settings`` (with ``processes``, the number that trained) and ``versions`` map names to the two values, None where
    a run has none. ``stages`` is what :func:`compare_outputs` says of each stage of either run. ``results`` has rows
    {name, first, second} with an estimate on each side, whose interval is over the held-out prompts of its own run.
    Raises StoreError where there is no run.
    """
    manifests = [read_manifest(folder) for folder in (first, second)]
    settings = [flat(manifest["recipe"]) | {"processes": manifest.get("processes")} for manifest in manifests]
    return {
        "runs": [str(first), str(second)],
        "settings": differences(*settings),
        "versions": differences(*(manifest["versions"] for manifest in manifests)),
        "stages": compare_outputs(*(manifest["stages"] for manifest in manifests)),
        "results": estimates_of(*(_read_results(folder) for folder in (first, second))),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises StoreError where there is none, or a study."""
    path = folder / MANIFEST_FILE
    refuse_study(folder, f"compare two of its trials: they are below {folder / TRIALS_FOLDER}")
    if not path.is_file():
        runs = [manifest.parent.name for manifest in folder.parent.glob(f"*/{MANIFEST_FILE}")]
        raise StoreError("there is no run", where=str(folder), fix=nearest(folder.name, runs))
    refuse_damaged(folder)
    return read_document(path)


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS_FILE
    return read_document(path) if path.is_file() else {"win_rates": [], "policies": [], "cost": {"arms": {}}}


def compare_outputs(
    first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Stage -> ``equal``, ``files_that_differ`` and ``missing_in``, by the hashes of weights and tables of two runs.

    ``equal`` is None for a stage of which a side has no hashes. ``missing_in`` is ``first`` or ``second`` where only
    the other has the stage. A stage without weights and tables, as the report, is left out where both have it.
    """
    compared = {}
    for stage in dict.fromkeys([*first, *second]):
        then, now = (side.get(stage, {}).get("outputs") for side in (first, second))
        if then == {} == now:
            continue
        names = sorted(differences(then, now)) if then and now else []
        lacks = "first" if stage not in first else "second" if stage not in second else None
        equal = not names if then and now else None
        compared[stage] = {"equal": equal, "files_that_differ": names, "missing_in": lacks}
    return compared


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Name -> the two values, where they differ; None where a side has none."""
    names = dict.fromkeys([*first, *second])
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def estimates_of(*runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every number that at least one of the two runs has, in the order of the first; none of checkpoints."""
    sides: list[dict[str, dict[str, Any]]] = []
    for results in runs:
        estimates: dict[str, dict[str, Any]] = {}
        for row in results["win_rates"]:
            if "@" in row["policy"] or "@" in row["baseline"]:  # a checkpoint; the name of a judge may have one, too
                continue
            name = f"{row['policy']} over {row['baseline']}, judge {row['judge']}"
            estimates[name] = _estimate("rate", row["win_rate"], row)
        for row in results["policies"]:
            if "@" in row["policy"]:
                continue
            for key in ESTIMATES:
                unit = "rate" if key == "eos_rate" else "number"
                estimates[f"{row['policy']}: {key}"] = _estimate(unit, row[key]["value"], row[key])
            estimates[f"{row['policy']}: kl_nats"] = {"unit": "number", "value": row["kl_nats"]} | _interval(
                row, "kl_ci_"
            )
        for arm, cost in (results.get("cost") or {}).get("arms", {}).items():
            estimates[f"{arm}: wall_s"] = _estimate("number", cost["wall_s"], {})
        sides.append({name: entry for name, entry in estimates.items() if entry["value"] is not None})
    names = dict.fromkeys([*sides[0], *sides[1]])
    return [{"name": name, "first": sides[0].get(name), "second": sides[1].get(name)} for name in names]


def _estimate(unit: str, value: float | None, row: Mapping[str, Any]) -> dict[str, Any]:
    return {"unit": unit, "value": value} | _interval(row, "ci_")


def _interval(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {"ci_low": row.get(f"{prefix}low"), "ci_high": row.get(f"{prefix}high")}
