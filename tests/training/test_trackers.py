"""``report_to``: the training stages' numbers reach the trackers that are installed, and no result changes."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.running import SMALL, duel, duel_process
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from toolkit.progress import Reporter
from toolkit.training.callbacks import StageProgress, log_table

pytestmark = pytest.mark.e2e

FEW = [*SMALL, "--set=sft.logging_steps=1", "--set=reward_model.logging_steps=1"]


def logged(out: Path) -> dict[str, list[dict[str, float]]]:
    """Our own log, by stage."""
    entries: dict[str, list[dict[str, float]]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entries.setdefault(entry["stage"], []).append(entry)
    return entries


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@needs("tensorboard")
def test_tensorboard_has_every_number_of_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    duel("run", "smoke", "--out", str(out), *FEW, "--until", "reward_model", "--set=report_to=[tensorboard]")
    entries = logged(out)
    assert {"sft", "reward_model"} <= set(entries)
    for stage in ("sft", "reward_model"):
        events = EventAccumulator(str(out / "tensorboard" / stage))
        events.Reload()
        losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert losses == [(entry["step"], pytest.approx(entry["loss"])) for entry in entries[stage]]
    assert "train/rewards/accuracies" in events.Tags()["scalars"]
    again = duel("run", "smoke", "--out", str(out), *FEW, "--until", "reward_model").stderr
    assert again.count("cached") == 3  # who listens is no part of a stage's key


@needs("wandb")
def test_wandb_gets_a_run_for_each_stage(tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    more = ["--until", "reward_model", "--set=report_to=[wandb]"]
    duel_process("run", "smoke", "--out", str(out), *FEW, *more, env=environment)
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert sum(b"smoke-sft" in file.read_bytes() for file in files) == 1
    assert sum(b"smoke-reward_model" in file.read_bytes() for file in files) == 1


@needs("trackio")
def test_trackio_gets_a_run_for_each_stage(tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    more = ["--until", "reward_model", "--set=report_to=[trackio]"]
    duel_process("run", "smoke", "--out", str(out), *FEW, *more, env=environment)
    (database,) = (tmp_path / "trackio").glob("duel*.db")
    with sqlite3.connect(database) as connection:
        names = {name for (name,) in connection.execute("SELECT DISTINCT run_name FROM metrics")}
    assert names == {"smoke-sft", "smoke-reward_model"}


def test_a_tracker_that_is_not_there_or_not_known(tmp_path: Path) -> None:
    unknown = duel("run", "smoke", "--out", str(tmp_path / "a"), "--set=report_to=[wandv]", check=2).stderr
    assert "wandb" in unknown
    if importlib.util.find_spec("trackio") is None:
        missing = duel("run", "smoke", "--out", str(tmp_path / "b"), "--set=report_to=[trackio]", check=2).stderr
        assert "pip install 'rlhf-duel[trackio]'" in missing and not (tmp_path / "b").exists()


class Tables:
    """Stands in for wandb and trackio: keeps the tables that it gets."""

    def __init__(self) -> None:
        self.logged: list[tuple[Any, ...]] = []

    def Table(self, **content: Any) -> dict[str, Any]:  # noqa: N802
        return content

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))


def test_a_table_reaches_every_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, trackio, written = Tables(), Tables(), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    rows = [{"prompt": "a | b\nc", "score": 0.123456}, {"prompt": "d", "score": 2.0}]
    tensorboard = TensorBoardCallback.__new__(TensorBoardCallback)
    tensorboard.tb_writer = SimpleNamespace(add_text=lambda *text: written.append(text))
    others = [WandbCallback.__new__(WandbCallback), TrackioCallback.__new__(TrackioCallback), TrainerCallback()]
    stage = StageProgress(Reporter(quiet=True), "ppo", 8)
    stage.trackers = [tensorboard]
    log_table([*others, stage], "completions", rows, 4)
    cells = [["a | b\nc", 0.123456], ["d", 2.0]]
    assert wandb.logged == [
        ({"completions": {"columns": ["prompt", "score"], "data": cells}, "train/global_step": 4}, None)
    ]
    [(values, step)] = trackio.logged
    assert step == 4 and values["completions"]["dataframe"].to_numpy().tolist() == cells
    lines = ["| prompt | score |", "| --- | --- |", "| a \\| b<br>c | 0.1235 |", "| d | 2 |"]
    assert written == [("completions", "\n".join(lines), 4)]
