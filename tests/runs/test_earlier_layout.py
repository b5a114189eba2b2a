"""A run folder from before: ``layout_1`` was written by ``duel run smoke`` in the first layout, without its models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.running import SMALL, duel

from toolkit.errors import StoreError
from toolkit.evals.verdict import ARMS
from toolkit.files import read_json, write_json
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.samples import by_policy, read_samples
from toolkit.recipe.files import load_recipe
from toolkit.report import reading
from toolkit.report.page import build, build_live
from toolkit.runs.dry_run import describe, render
from toolkit.runs.listing import diff_runs, list_runs
from toolkit.runs.push import push_run
from toolkit.runs.store import READABLE_VERSIONS, RunFolder, read_document

EARLIER = Path(__file__).parent / "layout_1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(EARLIER, tmp_path / "runs" / "before")


def test_the_layout_of_a_folder_is_recognised(folder: Path, tmp_path: Path) -> None:
    assert RunFolder(folder).earlier_version() == 1
    assert RunFolder(tmp_path / "new").earlier_version() is None


def test_the_dry_run_says_and_refuses_what_the_run_does(folder: Path) -> None:
    recipe = load_recipe("smoke", ["data.train_prompts=20", "data.eval_prompts=5"])
    assert "an earlier duel wrote this run folder (layout 1)" in render(describe(recipe, folder))
    assert "earlier duel" not in render(describe(recipe, folder.with_name("new")))
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | {"schema_version": 99})
    with pytest.raises(StoreError, match="has the layout 99"):
        describe(recipe, folder)


@pytest.mark.e2e
def test_a_run_says_so_and_shelves_the_earlier_results(folder: Path) -> None:
    before = {name: read_json(folder / name / "stage.json")["key"] for name in ("data", "sft", "ppo", "evaluate")}
    done = duel("run", "smoke", "--out", str(folder), *SMALL, "--until", "sft")
    assert "an earlier duel wrote this run folder" in done.stderr and ".shelf" in done.stderr
    assert "cached" not in done.stderr and "data] runs again" in done.stderr
    manifest = read_document(folder / "manifest.json")
    assert manifest["schema_version"] == 2 and list(manifest["stages"]) == ["data", "sft"]
    for name in ("data", "sft"):
        assert read_json(folder / ".shelf" / f"{name}-{before[name]}" / "stage.json")["schema_version"] == 1
        assert read_json(folder / name / "stage.json")["schema_version"] == 2
    for name in ("ppo", "evaluate"):  # they wait for their turn
        assert read_json(folder / name / "stage.json")["key"] == before[name]
    again = duel("run", "smoke", "--out", str(folder), *SMALL, "--until", "sft")
    assert "earlier duel" not in again.stderr and again.stderr.count("cached") == 2


def test_a_stage_of_the_earlier_layout_is_never_taken_for_todays(folder: Path, tmp_path: Path) -> None:
    record = read_json(folder / "evaluate" / "stage.json")
    run = RunFolder(folder)
    assert run.state("evaluate", record["key"], record["fields"]).status == "stale"
    run.shelve("evaluate")
    assert run.state("evaluate", record["key"], record["fields"]).status == "missing"
    assert not RunFolder(tmp_path / "other").adopt("evaluate", record["key"], [folder])


def test_a_report_shows_the_earlier_run(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    run = reading.read_run(folder)
    assert run.results["verdict"] == results["verdict"] and run.name == "smoke"
    assert run.data_report["train"]["n_prompts"] == 12
    assert list(run.histories) == ["ppo"]  # the other stages were shorter than logging_steps
    for html in (build([folder], title=None, max_samples=4), build_live(folder, version="v", max_samples=4)):
        assert results["verdict"]["sentence"].split(":")[0] in html


def test_runs_and_diff_read_the_earlier_run(folder: Path) -> None:
    (row,) = list_runs(folder.parent)
    assert (row["run"], row["status"], row["stages_done"], row["judge"]) == ("before", "done", 7, "gold")
    other = shutil.copytree(folder, folder.with_name("other"))
    manifest = read_json(other / "manifest.json")
    manifest["recipe"]["dpo"]["beta"] = 0.7
    write_json(other / "manifest.json", manifest)
    found = diff_runs(folder, other)
    assert found["settings"] == {"dpo.beta": [0.1, 0.7]} and len(found["results"]) > 10


@pytest.mark.e2e
def test_commands_on_the_earlier_runs_data_and_samples(folder: Path, reward_folder: Path, tmp_path: Path) -> None:
    duel("push", str(folder), "--only", "preferences", "--to", str(tmp_path / "hub"))
    assert (tmp_path / "hub" / "preferences" / "pairs" / "train.parquet").is_file()
    asked = ["--judge", "gold", "--out", str(tmp_path / "j.parquet"), "--json"]
    judged = duel("judge", str(folder), "--policy", "rm_ppo", "--baseline", "dpo", *asked)
    rate = json.loads(judged.stdout)["win_rates"][0]["win_rate"]
    samples = by_policy(read_samples(folder))
    ppo, dpo = (gold_rewards([s.prompt for s in samples[arm]], [s.response for s in samples[arm]]) for arm in ARMS)
    assert rate == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in zip(ppo, dpo, strict=True)) / len(ppo))
    rewards = ["rewards", "--policy", "tiny", "--reference", "none", "--data", str(folder / "data" / "eval.parquet")]
    rewards += ["--rm", str(reward_folder), "--samples", str(folder / "samples.parquet"), "--json"]
    found = json.loads(duel(*rewards, "--out", str(tmp_path / "r.parquet")).stdout)
    assert found["implicit_vs_explicit"]["samples"].keys() == {
        "PPO",
        "sft and base",
    }  # one sample of DPO for a prompt is no pair
    label = ["label", "--data", str(folder), "--judge", "llm:tiny", "--principles", "hhh", "--limit", "1", "--json"]
    labelled = json.loads(duel(*label, "--out", str(tmp_path / "labels.jsonl.gz")).stdout)
    assert labelled["n_prompts"] == 1 and labelled["n_comparisons"] > 0


@pytest.mark.parametrize("version", [3, None, "2"])
def test_a_layout_that_is_not_known_is_refused(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, version: object
) -> None:
    for name in ("manifest.json", "results.json"):
        write_json(folder / name, read_json(folder / name) | {"schema_version": version})
    acts = [
        lambda: RunFolder(folder).earlier_version(),
        lambda: reading.read_run(folder),
        lambda: reading.read_live(folder),
        lambda: diff_runs(folder, folder),
        lambda: push_run(folder, None, to=tmp_path / "hub", artifacts=("preferences",), public=False, reporter=None),
    ]
    for act in acts:
        with pytest.raises(StoreError, match=f"layout {version}, and this duel reads the layouts 1 and 2"):
            act()
    assert READABLE_VERSIONS == (1, 2)
    assert list_runs(folder.parent) == [] and f"before: this run folder has the layout {version}" in caplog.text
