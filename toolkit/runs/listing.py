"""``duel runs`` and ``duel diff``: what run folders say, without looking at their models or samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import StoreError, nearest
from toolkit.files import flat, read_json
from toolkit.runs.store import MANIFEST_FILE, RESULTS_FILE, RunFolder, read_document

DEPTH = 3  # runs, and the runs of a sweep in its folder
ESTIMATES = ("gold_reward", "explicit_reward", "implicit_reward", "length_tokens", "eos_rate")


def list_runs(root: Path) -> list[dict[str, Any]]:
    """A row for each run below ``root``, the latest first. Raises StoreError where the folder is not there.

    ``status`` is running, done, partial, failed or interrupted; a run that was killed counts as interrupted.
    """
    if not root.is_dir():
        raise StoreError("there is no such folder", where=str(root), fix="name the folder that holds your runs")
    found = {path for depth in range(DEPTH) for path in root.glob("*/" * depth + "manifest.json")}
    manifests = {path.parent: read_json(path) for path in found}
    # Other programs have manifests too.
    ours = [folder for folder, manifest in manifests.items() if {"keys", "stages", "started"} <= set(manifest)]
    rows = [_row(folder, root, read_document(folder / MANIFEST_FILE)) for folder in ours]
    return sorted(rows, key=lambda row: -row["started"])


def _row(folder: Path, root: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    verdict: Mapping[str, Any] = {}
    if "evaluate" in manifest["stages"] and (folder / RESULTS_FILE).is_file():
        verdict = read_document(folder / RESULTS_FILE)["verdict"]
    waiting = [stage for stage in manifest["keys"] if stage not in manifest["stages"]]
    return {
        "run": str(folder.relative_to(root)) if folder != root else str(folder),
        "recipe": manifest["name"],
        "seed": manifest["seed"],
        "status": status(folder, manifest),
        "stage": waiting[0] if waiting else None,
        "stages_done": len(manifest["stages"]),
        "stages": len(manifest["keys"]),
        "started": manifest["started"],
        "wall_s": round(sum(stage["wall_s"] for stage in manifest["stages"].values()), 3),
        "winner": verdict.get("winner"),
        "judge": verdict.get("judge"),
        "win_rate": verdict.get("win_rate"),
        "ci_low": verdict.get("ci_low"),
        "ci_high": verdict.get("ci_high"),
    }


def status(folder: Path, manifest: Mapping[str, Any]) -> str:
    """The manifest's status, unless a process says otherwise: a killed one could not write that it ended."""
    if RunFolder(folder).busy():
        return "running"
    return "interrupted" if manifest["status"] == "running" else str(manifest["status"])


def diff_runs(first: Path, second: Path) -> dict[str, Any]:
    """What differs between two finished runs: ``settings``, ``versions``, ``stages`` and ``results``.

    ``settings`` and ``versions`` map names to the two values, None where a run has none. ``stages`` maps each stage to
    whether both have the same result of it. ``results`` has rows {name, first, second} with an estimate on each side;
    their intervals are each run's own, over its own held-out prompts.
    """
    manifests = [_manifest(folder) for folder in (first, second)]
    settings = [flat(manifest["recipe"]) for manifest in manifests]
    keys = [manifest["keys"] for manifest in manifests]
    return {
        "runs": [str(first), str(second)],
        "settings": _differences(*settings),
        "versions": _differences(*(manifest["versions"] for manifest in manifests)),
        "stages": {stage: keys[0][stage] == keys[1].get(stage) for stage in keys[0]},
        "results": _results(*(_finished(folder) for folder in (first, second))),
    }


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        beside = [found.parent.name for found in folder.parent.glob("*/manifest.json")]
        raise StoreError("there is no run", where=str(folder), fix=nearest(folder.name, beside))
    return read_document(path)


def _finished(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS_FILE
    return read_document(path) if path.is_file() else {"win_rates": [], "policies": [], "cost": {"arms": {}}}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*first, *second])
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def _results(*runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every number that at least one of the two runs has, in the order of the first."""
    sides: list[dict[str, dict[str, Any]]] = []
    for results in runs:
        found: dict[str, dict[str, Any]] = {}
        for row in results["win_rates"]:
            name = f"{row['policy']} over {row['baseline']}, judge {row['judge']}"
            found[name] = _estimate("rate", row["win_rate"], row)
        for row in results["policies"]:
            for key in ESTIMATES:
                unit = "rate" if key == "eos_rate" else "number"
                found[f"{row['policy']}: {key}"] = _estimate(unit, row[key]["value"], row[key])
            found[f"{row['policy']}: kl_nats"] = {"unit": "number", "value": row["kl_nats"]} | _interval(row, "kl_ci_")
        for arm, cost in results["cost"]["arms"].items():
            found[f"{arm}: wall_s"] = _estimate("number", cost["wall_s"], {})
        sides.append({name: entry for name, entry in found.items() if entry["value"] is not None})
    names = [name for name in dict.fromkeys([*sides[0], *sides[1]]) if "@" not in name]
    return [{"name": name, "first": sides[0].get(name), "second": sides[1].get(name)} for name in names]


def _estimate(unit: str, value: float | None, source: Mapping[str, Any]) -> dict[str, Any]:
    return {"unit": unit, "value": value} | _interval(source, "ci_")


def _interval(source: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {"ci_low": source.get(f"{prefix}low"), "ci_high": source.get(f"{prefix}high")}
