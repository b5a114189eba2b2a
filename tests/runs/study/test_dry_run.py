"""``duel study RECIPE --dry-run``: what would run, what is shared or there already, and about how long it takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from support.finished_study import SMALL_STUDY, SMALL_STUDY_SETS
from support.running import duel

from toolkit.files import read_json, write_json
from toolkit.runs.calibration import Speed
from toolkit.runs.plan import plan_stages
from toolkit.runs.store import RunFolder
from toolkit.runs.study import estimate
from toolkit.runs.study.dry_run import describe, render
from toolkit.runs.study.trials import StudyPlan

pytestmark = pytest.mark.e2e


def plan(out: Path, *sets: str) -> StudyPlan:
    return StudyPlan("study-tiny", (*SMALL_STUDY_SETS, *sets), out)


def totals(described: dict[str, Any]) -> dict[str, int]:
    return {name: sum(row[name] for row in described["stages"]) for name in ("runs", "distinct", "there", "to_run")}


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_nothing_is_left_of_a_finished_study(small_study: Path) -> None:
    before = files(small_study)
    described = json.loads(
        duel("study", "study-tiny", "--out", str(small_study), *SMALL_STUDY, "--dry-run", "--json").stdout
    )
    # data and SFT of 8 trials, 2 controls and 2 SFT policies; the reward model labels for the controls
    assert totals(described) == {"runs": 12 + 12 + 6 + 4 + 6, "distinct": 1 + 2 + 2 + 4 + 6, "there": 15, "to_run": 0}
    assert {trial["state"] for trial in described["trials"]} == {"done"} and len(described["trials"]) == 12
    written = read_json(small_study / "study.json")
    assert {name: row["n_prompts"] for name, row in described["splits"].items()} == {
        name: row["n_prompts"] for name, row in written["splits"].items()
    }
    assert described["judges"] == ["gold"] and described["time"]["parts"] == [] and described["time"]["seconds"] == 0
    text = render(described)
    assert "study: 40 stage runs, 15 of them distinct, 15 are there" in text and "nothing is left to run" in text
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert files(small_study) == before


def test_everything_is_to_run_in_a_new_folder(tmp_path: Path) -> None:
    out = tmp_path / "new"
    described = describe(plan(out, "study.controls=[rloo, online_dpo]"))
    assert not out.exists()
    # the controls have PPO and DPO of their own, and online DPO a reward model, which the seed has
    assert totals(described) == {"runs": 14 + 14 + 8 + 6 + 6, "distinct": 1 + 2 + 2 + 6 + 6, "there": 0, "to_run": 17}
    assert {trial["state"] for trial in described["trials"]} == {"waiting"}
    # 2 checkpoints of 12 trials, and an SFT policy for each seed
    assert described["measuring"] == {split: {"policies": 26, "there": 0} for split in ("dev", "test")}
    left = described["time"]
    assert {part["part"]: part["runs"] for part in left["parts"]} == {
        **{"data": 1, "sft": 2, "reward_model": 2, "ppo": 6, "dpo": 6},
        **{"measuring": 52},
    }
    assert {part["from"] for part in left["parts"]} == {"as timed now"}
    assert left["seconds"] == pytest.approx(sum(part["seconds"] for part in left["parts"]), abs=0.3)
    assert left["seconds"] > 1 and "with one worker" in render(described)


def test_a_part_that_is_missing_takes_the_time_of_those_that_are_there(small_study: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(small_study, out)
    shutil.rmtree(out / "trials" / "dpo-1-seed0" / "dpo")
    shutil.rmtree(out / "trials" / "dpo-2-seed1")
    described = describe(plan(out))
    states = {(t["arm"], t["seed"], t["setting"]): t["state"] for t in described["trials"]}
    assert sorted(states.values()) == ["done"] * 10 + ["partial", "waiting"]
    assert totals(described)["to_run"] == 2  # data and SFT of the folder that is gone are there in others
    recorded = [read_json(path)["wall_s"] for path in out.glob("trials/dpo-*/dpo/stage.json")]
    [training, measuring] = described["time"]["parts"]
    assert training == {
        **{"part": "dpo", "runs": 2, "from": "as recorded here"},
        "seconds": pytest.approx(2 * fmean(recorded), abs=0.1),
    }
    assert measuring["runs"] > 4 and measuring["from"] == "as recorded here"


def test_a_setting_of_the_evaluation_is_measured_anew(small_study: Path) -> None:
    described = describe(plan(small_study, "evaluate.temperature=0.7"))
    assert totals(described)["to_run"] == 0
    assert described["measuring"] == {split: {"policies": 22, "there": 0} for split in ("dev", "test")}
    assert [part["part"] for part in described["time"]["parts"]] == ["measuring"]


def test_a_trial_that_diverged_is_not_run_again_and_one_that_died_is(small_study: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(small_study, out)
    trials = {trial.name: trial for trial in plan(out).trials()}
    for name, kind in (("dpo-1-seed0", "diverged"), ("dpo-1-seed1", "died")):
        trial = trials[name]
        [dpo] = (s for s in plan_stages(trial.loaded, RunFolder(trial.folder)) if s.spec.name == "dpo")
        shutil.rmtree(trial.folder / "dpo")
        write_json(trial.folder / "failed.json", {"kind": kind, "reason": "the loss is not finite", "key": dpo.key})
    described = describe(plan(out))
    of_arm = {
        t["seed"]: (t["state"], t["reason"])
        for t in described["trials"]
        if (t["arm"], t["setting"]) == ("dpo", trials["dpo-1-seed0"].setting)
    }
    assert of_arm == {0: ("failed", "the loss is not finite"), 1: ("partial", None)}
    [row] = (row for row in described["stages"] if row["stage"] == "dpo")
    assert (row["there"], row["failed"], row["to_run"]) == (4, 1, 1)
    assert "cannot run since training diverged" in render(described) and "seed 0: the loss is not finite" in render(
        described
    )


def test_a_budget_is_counted_in_response_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second for each token in training, and nothing else."""
    monkeypatch.setattr(estimate, "calibrate", lambda *_: Speed(load_s=0.0, train_s=1.0, score_s=0.0, sample_s=0.0))
    study = plan(tmp_path, "ppo.num_ppo_epochs=3", "study.controls=[]")
    parts = {part["part"]: part for part in describe(study)["time"]["parts"]}
    assert parts["dpo"]["seconds"] == 4 * 3000
    reward_model = parts["reward_model"]["seconds"] / 2
    assert 0 < reward_model < 3000
    assert parts["ppo"]["seconds"] == 4 * 2 * (3000 - reward_model)  # policy and critic
    assert parts["measuring"]["seconds"] == 0

    monkeypatch.setattr(estimate, "calibrate", lambda *_: Speed(load_s=0.0, train_s=0.0, score_s=0.0, sample_s=1.0))
    parts = {part["part"]: part for part in describe(study)["time"]["parts"]}
    assert parts["ppo"]["seconds"] == pytest.approx(4 * (3000 - reward_model) / 3, abs=0.1)
    assert parts["dpo"]["seconds"] == 0 and parts["measuring"]["seconds"] > 0


def test_a_budget_of_seconds_is_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "calibrate", lambda *_: Speed(load_s=1.0, train_s=0.0, score_s=0.0, sample_s=0.0))
    described = describe(plan(tmp_path, "study.budget={seconds: 50}", "study.controls=[]"))
    parts = {part["part"]: part for part in described["time"]["parts"]}
    assert parts["dpo"]["seconds"] == 4 * 51 and parts["dpo"]["from"] == "by the budget"
    assert parts["ppo"]["seconds"] == 4 * 50  # a second of it was the reward model's
    assert "budget of a trial: 50 seconds" in render(described)


def test_a_judge_of_its_own_model_is_named_and_not_counted(tmp_path: Path) -> None:
    described = describe(plan(tmp_path, "evaluate.judges=[gold, 'openai:gpt@http://localhost:1/v1']"))
    assert described["time"]["without"] == ["the judge openai:gpt@http://localhost:1/v1"]
    assert "without the time of the judge openai:" in render(described)
