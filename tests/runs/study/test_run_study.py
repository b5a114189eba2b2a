"""``duel study RECIPE``: its folder, its splits, its budget, and going on after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.finished_study import SMALL_STUDY
from support.running import ROOT, command, duel, environment

from toolkit.evals.study.study import study
from toolkit.evals.study.table import read_study
from toolkit.preferences.tables import from_parquet
from toolkit.storage.integrity import read_sealed

pytestmark = pytest.mark.e2e
TIMES = {"wall_s", "wall_s_low", "wall_s_high", "provenance", "started", "finished"}


def document(folder: Path) -> dict[str, Any]:
    return read_sealed(folder / "study.json")


def table(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "table.parquet").to_pylist()
    return rows


def timeless(value: Any) -> Any:
    """Without what the clock decides."""
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_the_document_is_what_its_table_says(small_study: Path) -> None:
    written = document(small_study)
    keys = ["schema_version", "recipe", "splits", "trials", "chosen", "verdict", "effort", "controls"]
    assert [key for key in written if key in keys] == keys
    again = study(read_study(small_study / "table.parquet"))
    assert [row["arm"] for row in written["controls"]] == ["online_dpo", "sft"] and written["gap"] == again["gap"]
    for key in ("trials", "chosen", "effort", "controls"):
        assert written[key] == again[key]
    assert {k: v for k, v in written["verdict"].items()} == again["verdict"]
    assert (written["verdict"]["n_seeds"], len(written["trials"])) == (2, 4)
    assert (small_study / "report.html").stat().st_size > 100_000


def test_a_prompt_is_in_one_split_and_no_trial_trains_on_dev_or_test(small_study: Path) -> None:
    splits: dict[str, set[str]] = {"dev": set(), "test": set()}
    for row in table(small_study):
        splits[row["split"]].add(row["prompt_id"])
    trained = [
        {row.prompt_id for row in from_parquet(folder / "data" / "train.parquet")}
        for folder in (small_study / "trials").iterdir()
    ]
    assert all(prompts == trained[0] for prompts in trained)
    assert not splits["dev"] & splits["test"] and not (splits["dev"] | splits["test"]) & trained[0]
    counts = document(small_study)["splits"]
    assert [counts[name]["n_prompts"] for name in ("train", "dev", "test")] == [
        len(prompts) for prompts in (trained[0], splits["dev"], splits["test"])
    ]


def test_budgets_are_equal_within_five_percent(small_study: Path) -> None:
    spent: dict[str, list[float]] = {"rm_ppo": [], "dpo": []}
    for trial in document(small_study)["trials"]:
        spent[trial["arm"]].append(trial["checkpoints"][-1]["train_tokens"])
    ppo, dpo = (np.mean(spent[arm]) for arm in ("rm_ppo", "dpo"))
    assert abs(ppo - dpo) < 0.05 * 3000, spent
    assert not [text for text in document(small_study)["warnings"] if "budgets differ" in text]


def test_stages_are_shared_and_seeds_are_not(small_study: Path) -> None:
    keys: dict[str, set[str]] = {}
    for record in (small_study / "trials").glob("*/*/stage.json"):
        keys.setdefault(record.parent.name, set()).add(json.loads(record.read_text())["key"])
    assert {stage: len(of_stage) for stage, of_stage in keys.items()} == {
        "data": 1,
        "sft": 2,
        "reward_model": 2,
        "ppo": 4,
        "dpo": 6,  # two settings and the control, with each seed
    }


def test_a_trial_records_the_command_of_its_study(small_study: Path) -> None:
    commands = [read_sealed(path)["command"] for path in small_study.glob("trials/*/manifest.json")]
    assert len(commands) > 6 and all(words[1:3] == ["study", "study-tiny"] for words in commands)


def test_what_is_there_is_not_computed_again(small_study: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(small_study, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/scores/*")}
    done = duel("study", "study-tiny", "--out", str(out), *SMALL_STUDY, "--json")
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("trials/*/scores/*")}
    assert "to run, for" not in done.stderr
    assert timeless(json.loads(done.stdout)) == timeless(document(small_study))


@pytest.mark.slow
@pytest.mark.fault
def test_a_study_that_was_killed_goes_on_to_the_same_numbers(small_study: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    words = command("study", "study-tiny", "--out", str(out), *SMALL_STUDY)
    for moment in ("trials/rm_ppo-1-seed1/.work/ppo-*/trainer", "trials/dpo-2-seed0/scores/*"):
        with subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not list(out.glob(moment)):
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    assert not (out / "study.json").exists()
    duel("study", "study-tiny", "--out", str(out), *SMALL_STUDY)
    uninterrupted, killed = (
        [{name: value for name, value in row.items() if name != "wall_s"} for row in table(folder)]
        for folder in (small_study, out)
    )
    assert killed == uninterrupted
    same = {"best", "matched_kl", "n_seeds", "n_prompts"}
    verdicts = [{name: document(folder)["verdict"][name] for name in same} for folder in (small_study, out)]
    assert verdicts[0] == verdicts[1]


@pytest.mark.fault
def test_a_trial_that_diverges_counts_as_the_worst_of_its_setting(small_study: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(small_study, out)
    spaces = [f"--set=study.{arm}={{learning_rate: [{wrong}, 0.0003]}}" for arm, wrong in (("dpo", 1e30), ("ppo", 1e2))]
    spaces.append("--set=study.controls=[]")
    done = duel("study", "study-tiny", "--out", str(out), *SMALL_STUDY, *spaces, "--seeds=1")
    assert "training diverged" in done.stderr
    written = document(out)
    [noise] = [trial for trial in written["trials"] if trial["setting"] == "learning_rate=100.0"]  # finite weights
    assert noise["n_diverged"] == 1 and written["chosen"]["rm_ppo"]["setting"] == "learning_rate=0.0003"
    assert any("nats in each token" in text and "counts as the worst policy" in text for text in written["warnings"])
    [bad] = [trial for trial in written["trials"] if trial["setting"] == "learning_rate=1.0e+30"]
    assert bad["n_diverged"] == 1 and not bad["chosen"]
    assert written["chosen"]["dpo"]["setting"] == "learning_rate=0.0003"
    assert any("diverged" in text and "it counts as the worst policy" in text for text in written["warnings"])
    both = "--set=study.dpo={learning_rate: [1.0e+30, 2.0e+30]}"
    done = duel("study", "study-tiny", "--out", str(out), *SMALL_STUDY, both, "--seeds=1", check=2)
    assert "every trial of DPO failed" in done.stderr


@pytest.mark.fault
def test_bad_input_is_told_in_words(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "study"), *SMALL_STUDY]
    done = duel("study", "study-tiny", *out, "--set=data.eval_prompts=2", "--set=study.dev_fraction=0.01", check=2)
    assert "leave no dev prompt" in done.stderr and "study.dev_fraction" in done.stderr
    done = duel("study", "smoke", "--seeds", "2", check=2)
    assert "the recipe smoke has no section `study`" in done.stderr
    done = duel("study", check=2)
    assert "RECIPE" in done.stderr and "--table" in done.stderr
    done = duel("study", "study-tiny", "--table", "x.parquet", check=2)
    done = duel("study", "--table", "x.parquet", "--seeds", "3", check=2)
    assert "--seeds is for a RECIPE" in done.stderr


@pytest.mark.fault
def test_a_judge_that_fails_is_said_and_asked_again(
    small_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    shutil.copytree(small_study, out)
    (tmp_path / "moody.py").write_text(
        "import os\n"
        "def length(prompts, completions, **_):\n"
        "    mood = os.environ['MOOD']\n"
        "    return [None if mood == 'none' or (mood == 'some' and len(p) % 5 == 0) else float(len(c))\n"
        "            for p, c in zip(prompts, completions)]\n"
    )
    judge = ["--set=evaluate.judges=[gold, python:moody:length]", "--json"]
    words = ("study", "study-tiny", "--out", str(out), *SMALL_STUDY, *judge)
    monkeypatch.syspath_prepend(str(tmp_path))
    none = duel(*words, env={"MOOD": "none"}, check=2)
    assert "the judge python:moody:length gave no answer on any of" in none.stderr
    some = json.loads(duel(*words, env={"MOOD": "some"}).stdout)
    [said] = [text for text in some["warnings"] if "python:moody:length failed on" in text]
    n_prompts, row = some["splits"]["test"]["n_prompts"], some["verdict"]["judges"][1]
    assert "asked again" in said and 0 < some["verdict"]["n_prompts"] <= n_prompts
    # A judge that is no better than a coin drops no prompt of the judge that decides.
    assert (some["verdict"]["n_prompts"] == n_prompts) == (row["not_deciding"] is not None)
    every = json.loads(duel(*words, env={"MOOD": "fine"}).stdout)
    assert every["verdict"]["n_prompts"] == every["splits"]["test"]["n_prompts"]
    assert not [text for text in every["warnings"] if "failed on" in text]
    assert [row["judge"] for row in every["verdict"]["judges"]] == ["gold", "python:moody:length"]
