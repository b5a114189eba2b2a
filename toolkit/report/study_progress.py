"""How far a study is: its trials' states, the step that runs, and what the trials have logged so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import StoreError
from toolkit.files import read_json
from toolkit.progress import PROGRESS_FILE
from toolkit.report.reading import ResultRow, logged
from toolkit.runs.store import (
    FAILURE_FILE,
    MANIFEST_FILE,
    SCORES_FOLDER,
    TRIALS_FILE,
    RunFolder,
    read_record,
)

TRIALS_FOLDER = "trials"
# What a reader follows while an arm trains: key of the log -> title.
CURVES = {
    "ppo": {"objective/score": "score in training", "objective/kl": "KL to SFT, nats per response"},
    "dpo": {"rewards/accuracies": "accuracy of the implicit reward", "loss": "loss"},
}


@dataclass(frozen=True)
class TrialProgress:
    """A trial. ``share`` is how much of its current stage is done, and ``note`` says what it does or why it failed.

    ``state`` is waiting, training, begun, failed, trained, or measured.
    """

    name: str
    arm: str
    setting: str
    seed: int
    stage: str
    state: str
    share: float | None
    note: str

    @property
    def label(self) -> str:
        return f"{self.setting}, seed {self.seed}" if self.arm != self.setting else f"seed {self.seed}"


@dataclass(frozen=True)
class StudyProgress:
    """A study that has begun. ``steps`` are the progress of the study's own step and of those inside it."""

    name: str
    started: float
    busy: bool
    trials: list[TrialProgress]
    steps: list[ResultRow]

    def count(self, *states: str) -> int:
        return sum(trial.state in states for trial in self.trials)

    @property
    def seeds(self) -> list[int]:
        return sorted({trial.seed for trial in self.trials})

    @property
    def n_trained(self) -> int:
        return self.count("trained", "measured")


def is_begun(folder: Path) -> bool:
    """Whether a study has begun in the folder; its ``study.json`` comes at the end."""
    return (folder / TRIALS_FILE).is_file()


def study_progress(folder: Path) -> StudyProgress:
    """How far the study in a folder is. Raises StoreError where there is none, or its files are damaged."""
    path = folder / TRIALS_FILE
    if not path.is_file():
        raise StoreError("there is no study", where=str(folder), fix="start one: duel study RECIPE --out DIR")
    planned = read_json(path)
    if not isinstance(planned.get("trials"), list) or not isinstance(planned.get("started"), int | float):
        raise StoreError("this file is damaged: it lists no trials", where=str(path), fix="run the study again")
    busy = RunFolder(folder).busy()
    trials = [_trial(folder / TRIALS_FOLDER / row["name"], row) for row in planned["trials"]]
    steps = [_step(folder, planned["started"])] if busy else []
    steps += [
        _step(folder / TRIALS_FOLDER / trial.name, planned["started"]) for trial in trials if trial.state == "training"
    ]
    return StudyProgress(planned["recipe"], planned["started"], busy, trials, [step for step in steps if step])


def _trial(folder: Path, row: Mapping[str, Any]) -> TrialProgress:
    state, share, note = _state(folder, row)
    facts = {name: row[name] for name in ("name", "arm", "setting", "seed", "stage")}
    return TrialProgress(**facts, state=state, share=share, note=note)


def _state(folder: Path, row: Mapping[str, Any]) -> tuple[str, float | None, str]:
    manifest = read_json(folder / MANIFEST_FILE) if (folder / MANIFEST_FILE).is_file() else {}
    keys = manifest.get("keys", {})
    record = read_record(folder / row["stage"])
    if record is not None and record["key"] == keys.get(row["stage"]):
        return _measured(folder, row["n_checkpoints"])
    if RunFolder(folder).busy():
        step = _step(folder, manifest.get("started", 0.0))
        share = step["done"] / step["total"] if step and step["total"] else None
        return "training", share, f"{step['stage']}".replace("_", " ") if step else ""
    failure = read_json(folder / FAILURE_FILE) if (folder / FAILURE_FILE).is_file() else {}
    if failure and (not keys or failure["key"] in keys.values()):
        return "failed", None, str(failure["reason"])
    done = [stage.replace("_", " ") for stage in manifest.get("stages", {})]
    return ("begun", None, f"{done[-1]} is there" if done else "") if manifest else ("waiting", None, "")


def _measured(folder: Path, n_checkpoints: int) -> tuple[str, float | None, str]:
    """The state of a trained trial, by its files of samples: PART-CHECKPOINT-KEY."""
    names = [path.name.split("-") for path in (folder / SCORES_FOLDER).glob("*.samples.parquet")]
    counts = {split: len({checkpoint for name, checkpoint, *_ in names if name == split}) for split in ("dev", "test")}
    if counts["dev"] < n_checkpoints:
        return "trained", None, f"dev {counts['dev']} of {n_checkpoints}" if counts["dev"] else ""
    return "measured", None, "dev and test" if counts["test"] else "dev"


def _step(folder: Path, started: float) -> ResultRow:
    """How far the step is that a folder's process works on; empty where that is of an earlier call."""
    path = folder / PROGRESS_FILE
    now = read_json(path) if path.is_file() else {}
    if now.get("time", 0.0) < started:
        return {}
    left_s = now["left_s"]
    return {**now, "left_s": max(0.0, left_s - (time.time() - now["time"])) if left_s is not None else None}


def history(folder: Path, trial: TrialProgress) -> Sequence[ResultRow]:
    """What the trial's last stage has logged so far. A stage that was taken from another trial has its record alone."""
    of_trial = folder / TRIALS_FOLDER / trial.name
    if trial.state in ("trained", "measured"):
        record = read_record(of_trial / trial.stage)
        return record["metrics"].get("history", []) if record is not None else []
    return logged(of_trial, trial.stage) if trial.state != "waiting" else []
