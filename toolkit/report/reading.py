"""What a run folder holds, as the report needs it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.errors import StoreError
from toolkit.files import read_json, read_table
from toolkit.preferences.samples import SAMPLES_FILE, Sample, read_samples
from toolkit.progress import COMPLETIONS_FILE, METRICS_FILE, PROGRESS_FILE, TRAINER_FOLDER
from toolkit.recipe.rounds import kind_of
from toolkit.runs.store import (
    MANIFEST_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    STAGE_FILE,
    TRIALS_FILE,
    RunFolder,
    read_document,
    refuse_damaged,
)

ResultRow = dict[str, Any]
"""A row of a table in ``results.json``, of one of the run's Parquet tables, or of a log."""
TRAINED_STAGES = ("sft", "reward_model", "ppo", "dpo", "rft")
# Token ids and log-probabilities are most of samples.parquet and are not shown.
SAMPLE_COLUMNS = [
    *("prompt_id", "policy", "arm", "kind", "sample_index", "prompt", "response", "n_tokens", "truncated"),
    *("explicit_reward", "implicit_reward", "gold_reward"),
]
REWARD_COLUMNS = ["prompt_id", "response_index", "n_tokens", "explicit_reward", "implicit_reward", "gold_reward"]
EVALUATE_AGAIN = "remove it and run the evaluation again: --only evaluate"
JUDGEMENT_COLUMNS = ["prompt_id", "policy", "baseline", "judge", "preference"]


@dataclass(frozen=True)
class RunFiles:
    """The files that a report is made of. ``stages`` maps the stages that are there to their folders.

    ``tables`` is the folder of the evaluation's tables. Of the other files only ``results`` must be there.
    """

    results: Path
    manifest: Path
    recipe: Path
    tables: Path
    stages: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path) -> RunFiles:
        """The files of a run folder."""
        return cls(
            results=folder / RESULTS_FILE,
            manifest=folder / MANIFEST_FILE,
            recipe=folder / RECIPE_FILE,
            tables=folder,
            stages={
                name: folder / name
                for name in ("data", *TRAINED_STAGES, *(path.name for path in folder.glob("*@*")), "evaluate")
            },
        )


@dataclass(frozen=True)
class Run:
    """A finished evaluation and what is known of the run around it.

    ``manifest``, ``data_report``, ``recipe_text``, ``histories`` (of training) and ``judgements`` are empty where the
    folder lacks them. ``name`` tells the runs of one report apart. ``progress`` has the stages of a run that is
    watched; before its evaluation ``results`` holds only the recipe and empty lists. ``completions`` are the last ones
    that PPO logged.
    """

    folder_name: str
    name: str
    results: dict[str, Any]
    manifest: dict[str, Any]
    data_report: dict[str, Any]
    recipe_text: str
    histories: dict[str, list[ResultRow]]
    samples: list[Sample]
    rewards: list[ResultRow]
    judgements: list[ResultRow]
    progress: list[ResultRow] = field(default_factory=list)
    completions: list[ResultRow] = field(default_factory=list)

    @property
    def recipe(self) -> dict[str, Any]:
        return dict(self.results.get("recipe") or {})

    @property
    def page_settings(self) -> dict[str, Any]:
        """The ``report`` section of the newest recipe, which changes no result and may be newer than the evaluation."""
        return dict((self.manifest.get("recipe") or self.recipe).get("report") or {})

    @property
    def confidence(self) -> float:
        """The coverage of every interval of this run; 0.95 where the recipe is not recorded."""
        return float(self.recipe.get("evaluate", {}).get("confidence", 0.95))

    @property
    def has_gold(self) -> bool:
        return any(row["gold_reward"]["value"] is not None for row in self.results["policies"])


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises StoreError where it holds no finished evaluation, or a damaged one."""
    if not (folder / RESULTS_FILE).is_file():
        if (folder / TRIALS_FILE).is_file():
            raise StoreError(
                "the study has no verdict yet",
                where=str(folder),
                fix="go on with it: duel study RECIPE --out DIR; `duel watch` shows how far it is",
            )
        raise StoreError(
            "there is no finished evaluation to report on",
            where=str(folder),
            fix="run the recipe up to its evaluation first: duel run RECIPE --out DIR",
        )
    return read_files(RunFiles.of(folder), folder.resolve().name)


def read_files(files: RunFiles, folder_name: str) -> Run:
    """Read the files of a run; ``folder_name`` names a run that neither its manifest nor its recipe name.

    Raises StoreError where one of them is damaged.
    """
    results = read_document(files.results)
    manifest = read_document(files.manifest) if files.manifest.is_file() else {}
    data_report = _json(files.stages["data"] / "report.json")
    trained = [stage for stage in manifest.get("keys") or TRAINED_STAGES if kind_of(stage) in TRAINED_STAGES]
    histories = {stage: _record(files.stages[stage]).get("history", []) for stage in trained if stage in files.stages}
    judgements = files.tables / "judgements.parquet"
    return Run(
        folder_name=folder_name,
        name=str(manifest.get("name") or (results.get("recipe") or {}).get("name") or folder_name),
        results=results,
        manifest=manifest,
        data_report=data_report or _json(files.stages["evaluate"] / "data_report.json"),
        recipe_text=_text(files.recipe),
        histories={stage: history for stage, history in histories.items() if history},
        samples=read_samples(files.tables / SAMPLES_FILE, SAMPLE_COLUMNS, error=StoreError, fix=EVALUATE_AGAIN),
        rewards=read_table(files.tables / "rewards.parquet", REWARD_COLUMNS, fix=EVALUATE_AGAIN),
        judgements=read_table(judgements, JUDGEMENT_COLUMNS, fix=EVALUATE_AGAIN) if judgements.is_file() else [],
        completions=last_completions(files.stages["ppo"] / COMPLETIONS_FILE),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, with names that differ: the recipe's, else the folder's, else numbered.

    Raises StoreError where one of them is damaged.
    """
    if not folders:
        raise StoreError("no run folder was given", fix="name at least one")
    for folder in folders:
        refuse_damaged(folder)
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        names = [run.folder_name for run in runs]
        if len(set(names)) < len(names):
            names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
        runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    return runs


def read_live(folder: Path) -> Run:
    """What a run that may still go on has recorded so far. Raises StoreError where there is no run.

    Results of an earlier recipe in the same folder are left out until the evaluation of this one is there.
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise StoreError("there is no run", where=str(folder), fix="start one: duel run RECIPE --out DIR")
    manifest = read_document(folder / MANIFEST_FILE)
    keys, finished = manifest["keys"], manifest["stages"]
    store = RunFolder(folder)
    working = [stage for stage in keys if stage not in finished and store.work_dir(stage, keys[stage]).is_dir()]
    progress = _progress(folder, manifest, working[0] if working else None, store.busy())
    if "evaluate" in finished and (folder / RESULTS_FILE).is_file():
        run = read_run(folder)
        run.progress.extend(progress)
        return run
    trained = [stage for stage in keys if kind_of(stage) in TRAINED_STAGES]
    histories = {stage: _record(folder / stage).get("history", []) for stage in trained if stage in finished}
    histories |= {stage: logged(folder, stage) for stage in trained if stage in working}
    recipe_path = folder / RECIPE_FILE
    return Run(
        folder_name=folder.resolve().name,
        name=str(manifest["name"]),
        results={"policies": [], "win_rates": [], "warnings": [], "recipe": manifest["recipe"]},
        manifest=manifest,
        data_report=_json(folder / "data" / "report.json") if "data" in finished else {},
        recipe_text=_text(recipe_path),
        histories={stage: history for stage, history in histories.items() if history},
        samples=[],
        rewards=[],
        judgements=[],
        progress=progress,
        completions=last_completions(
            store.work_dir("ppo", keys["ppo"]) / TRAINER_FOLDER / COMPLETIONS_FILE
            if "ppo" in working
            else folder / "ppo" / COMPLETIONS_FILE
        ),
    )


def _progress(folder: Path, manifest: Mapping[str, Any], current: str | None, busy: bool) -> list[ResultRow]:
    """Each stage with its state (done, running, interrupted or waiting), and how far a running one is."""
    now = _json(folder / PROGRESS_FILE) if current and busy else {}
    out = []
    for stage in manifest["keys"]:
        row: ResultRow = {"stage": stage, "state": "waiting"}
        if stage in manifest["stages"]:
            row |= {key: manifest["stages"][stage][key] for key in ("arm", "wall_s", "tokens", "peak_gib")}
            row["state"] = "done"
        elif stage == current:
            row["state"] = "running" if busy else "interrupted"
            if now.get("stage") == stage and now["time"] >= manifest["started"]:
                row |= {key: now[key] for key in ("label", "done", "total", "left_s", "note")}
                if row["left_s"] is not None:
                    row["left_s"] = max(0.0, row["left_s"] - (time.time() - now["time"]))
        out.append(row)
    return out


def logged(folder: Path, stage: str) -> list[ResultRow]:
    """What an unfinished stage has logged. A resumed stage repeats steps; the later entry of a step counts."""
    path = folder / METRICS_FILE
    rows: list[ResultRow] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line that is being written
            continue
        if entry["stage"] == stage and "step" in entry:
            while rows and rows[-1]["step"] >= entry["step"]:
                rows.pop()
            rows.append(entry)
    return rows


def last_completions(file: Path) -> list[ResultRow]:
    """The records of the last step in a file of completions, which is written whole; none where there is no file."""
    if not file.is_file():
        return []
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["step"] == records[-1]["step"]]


def _record(stage_folder: Path) -> dict[str, Any]:
    return dict(_json(stage_folder / STAGE_FILE).get("metrics", {}))


def outdated(run: Run) -> list[str]:
    """Sections of the recipe that were changed after this evaluation, whose numbers belong to the earlier ones."""
    then, now = run.results.get("recipe") or {}, run.manifest.get("recipe") or {}
    if not then or not now:
        return []
    sections = [name for name in now if name not in ("report", "report_to", "name")]
    return [name for name in sections if then.get(name) != now.get(name)]


def _text(path: Path) -> str:
    """The text of a file; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise StoreError("this file is damaged: it is no UTF-8 text", where=str(path), fix="run it again") from error


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}
