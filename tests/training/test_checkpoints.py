"""Checkpoints that are not whole are noticed, and training goes on from the one before, or starts again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.damage import DAMAGES, cut, emptied, files_of, flipped
from support.small_trainers import assert_equal, build, losses, settings_of, trained

from toolkit.progress import Reporter
from toolkit.training.callbacks import StageProgress
from toolkit.training.checkpoints import FILES_FILE, last_checkpoint
from toolkit.training.trainer import train_to_end

pytestmark = [pytest.mark.fault, pytest.mark.invariant]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_ref: Any, make_trees: Any) -> Path:
    """A stage's folder whose training ended at step 4 of 6: it has the checkpoints 3 and 4."""
    out = tmp_path_factory.mktemp("stopped")
    build("dpo-lora", out, tiny_ref, make_trees, settings_of(), stop_at=4)[0].train()
    assert {path.name for path in (out / "trainer").iterdir()} == {"checkpoint-3", "checkpoint-4"}
    return out


def copy_of(stopped: Path, out: Path) -> tuple[Path, Path]:
    shutil.copytree(stopped / "trainer", out / "trainer")
    return out / "trainer" / "checkpoint-3", out / "trainer" / "checkpoint-4"


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_file_is_noticed(damage: Any, stopped: Path, tmp_path: Path) -> None:
    names = [path.relative_to(stopped / "trainer/checkpoint-4") for path in files_of(stopped / "trainer/checkpoint-4")]
    assert {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", FILES_FILE} <= set(map(str, names))
    for k, name in enumerate(names):
        before, newest = copy_of(stopped, tmp_path / str(k))
        damage(newest / name)
        said: list[str] = []
        assert last_checkpoint(tmp_path / str(k), said.append) == str(before), name
        [line] = said
        assert "checkpoint-4 cannot be used" in line and "training goes on from checkpoint-3" in line
        assert name.name in line or (name.name == FILES_FILE)
        assert before.is_dir() and not newest.exists()


def test_without_a_whole_one_training_starts_again(stopped: Path, tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    before, newest = copy_of(stopped, tmp_path)
    emptied(newest / "trainer_state.json")
    (before / FILES_FILE).unlink()  # as after a kill in the middle of writing it
    said: list[str] = []
    assert last_checkpoint(tmp_path, said.append) is None
    assert len(said) == 2 and all(line.endswith("training starts again") for line in said)
    assert "it was not written to its end" in said[1]


@pytest.mark.parametrize(("damage", "both"), [(flipped, False), (cut, True)])
def test_the_end_is_that_of_an_uninterrupted_training(
    damage: Any, both: bool, stopped: Path, tmp_path: Path, tiny_ref: Any, make_trees: Any
) -> None:
    whole, model = build("dpo-lora", tmp_path / "whole", tiny_ref, make_trees, settings_of())
    whole.train()
    expected = trained(model)
    before, newest = copy_of(stopped, tmp_path)
    damage(newest / "optimizer.pt")
    if both:
        damage(before / "adapter_model.safetensors")
    lines: list[str] = []
    reporter = Reporter(quiet=True)
    reporter.line = lines.append  # type: ignore[method-assign, assignment]
    resumed, model = build("dpo-lora", tmp_path, tiny_ref, make_trees, settings_of())
    progress = StageProgress(reporter, "dpo", 6)
    resumed.add_callback(progress)
    train_to_end(resumed, progress, tmp_path)
    assert lines[0].startswith("dpo: checkpoint-4 cannot be used, optimizer.pt is damaged")
    assert ("dpo: resumed at step 3 of 6" in lines) is not both
    assert_equal(trained(model), expected, tolerance=0)
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("kind", ["dpo-lora", "rm-lora"])
def test_the_log_is_that_of_an_uninterrupted_training(
    kind: str, tmp_path: Path, tiny_ref: Any, make_trees: Any
) -> None:
    """The checkpoint lies between two entries: what was gathered before it belongs to the next one."""
    logs = []
    for name, stop_at in (("whole", None), ("part", 4), ("part", None)):
        trainer, _ = build(kind, tmp_path / name, tiny_ref, make_trees, settings_of(logging_steps=5), stop_at=stop_at)
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path / name))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    whole, stopped, resumed = logs
    assert resumed == whole and len(whole) == 1 and whole[0]["step"] == 5 and not stopped
    assert {"loss", "tokens", "rewards/accuracies"} <= whole[0].keys()
