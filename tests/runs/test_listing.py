"""``duel runs`` and ``duel diff``: status, verdict and differences, from manifests alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.begun_study import write_begun_study
from support.run_folder import write_run
from support.running import duel
from support.study_documents import CASES

from toolkit.cli.tables import diff_tables, runs_table
from toolkit.errors import StoreError
from toolkit.files import write_json
from toolkit.runs.listing import diff_runs, list_runs
from toolkit.runs.store import RunFolder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root") / "runs"
    for name, seed, status, started in (("first", 0, "done", 1.0e9), ("sweep/second", 1, "running", 2.0e9)):
        folder = write_run(root / name, seed=seed, sets=("dpo.beta=0.2",) if seed else ())
        manifest = json.loads((folder / "manifest.json").read_text())
        write_json(folder / "manifest.json", manifest | {"status": status, "started": started})
    return root


def test_the_latest_run_comes_first_with_status_and_verdict(root: Path) -> None:
    rows = list_runs(root)
    assert [(row["run"], row["status"], row["seed"]) for row in rows] == [
        ("sweep/second", "interrupted", 1),  # it says that it runs, and no process holds it
        ("first", "done", 0),
    ]
    verdict = json.loads((root / "first" / "results.json").read_text())["verdict"]
    assert {key: rows[1][key] for key in ("winner", "judge", "win_rate", "ci_low", "ci_high")} == {
        key: verdict[key] for key in ("winner", "judge", "win_rate", "ci_low", "ci_high")
    }
    assert rows[1]["wall_s"] == 339.5
    text = runs_table(rows)
    assert f"{verdict['win_rate']:.1%}" in text and "5m 39s" in text and text.index("second") < text.index("first")


def test_a_run_in_another_process_is_running(root: Path) -> None:
    folder = RunFolder(root / "first")
    assert not folder.busy()
    code = "import sys; from pathlib import Path; from toolkit.runs.store import RunFolder"
    code += "\nwith RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(root / "first")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout is not None and held.stdout.readline() == "held\n"
        assert folder.busy() and list_runs(root)[1]["status"] == "running"
        held.communicate("")
    assert not folder.busy()
    with folder.lock():  # having asked does not hold it
        pass


def test_verdicts_of_earlier_settings_are_not_shown(root: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "again")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"].pop("evaluate")
    write_json(folder / "manifest.json", manifest | {"status": "partial"})
    (row,) = list_runs(tmp_path)
    assert (row["winner"], row["win_rate"], row["stage"]) == (None, None, "evaluate")
    assert "partial, evaluate" in runs_table([row])


def test_diff(root: Path, tmp_path: Path) -> None:
    found = diff_runs(root / "first", root / "sweep" / "second")
    assert found["settings"] == {"seed": [0, 1], "dpo.beta": [0.1, 0.2]}
    assert found["versions"] == {} and {entry["equal"] for entry in found["stages"].values()} == {None}
    manifest = json.loads((root / "first" / "manifest.json").read_text())
    for name, processes in (("one", 1), ("two", 2)):
        write_json(tmp_path / name / "manifest.json", manifest | {"processes": processes})
    assert diff_runs(*(tmp_path / name for name in ("one", "two")))["settings"] == {"processes": [1, 2]}
    results = json.loads((root / "sweep" / "second" / "results.json").read_text())
    rows = {row["name"]: row for row in found["results"]}
    rate = next(
        r for r in results["win_rates"] if (r["policy"], r["baseline"], r["judge"]) == ("rm_ppo", "dpo", "gold")
    )
    second = rows["rm_ppo over dpo, judge gold"]["second"]
    assert (second["value"], second["ci_low"]) == (rate["win_rate"], rate["ci_low"])
    policy = next(r for r in results["policies"] if r["policy"] == "dpo")
    assert rows["dpo: kl_nats"]["second"]["value"] == policy["kl_nats"]
    assert not any("@" in name for name in rows)
    text = diff_tables(found)
    assert "dpo.beta" in text and f"{rate['win_rate']:.1%} ({rate['ci_low']:.1%} to {rate['ci_high']:.1%})" in text


def test_stages_are_compared_by_their_results_and_a_judge_may_have_an_address(root: Path, tmp_path: Path) -> None:
    """Equal settings on two machines can give other weights."""
    judge = "openai:m@http://localhost:1/v1"
    for name in ("one", "two"):
        folder = write_run(tmp_path / name, judge_names=(judge, "rm"))
        manifest = json.loads((folder / "manifest.json").read_text())
        for stage, record in manifest["stages"].items():
            record["outputs"] = {"model.safetensors": "same" if stage == "sft" else name}
        del manifest["stages"]["dpo" if name == "two" else "ppo"]
        write_json(folder / "manifest.json", manifest)
    found = diff_runs(tmp_path / "one", tmp_path / "two")
    assert [stage for stage, entry in found["stages"].items() if entry["equal"]] == ["sft"]
    assert found["stages"]["data"]["files_that_differ"] == ["model.safetensors"]
    assert (found["stages"]["dpo"]["missing_in"], found["stages"]["ppo"]["missing_in"]) == ("second", "first")
    text = diff_tables(found)
    assert "stages with the same result: sft\n" in text
    assert f"stages that {tmp_path / 'two'} does not have: dpo\n" in text
    names = [row["name"] for row in found["results"]]
    assert f"rm_ppo over dpo, judge {judge}" in names and not any(name.startswith("rm_ppo@") for name in names)


def test_a_rate_by_a_training_signal_alone_is_no_result(tmp_path: Path) -> None:
    write_run(tmp_path / "signals", gold=False)
    (row,) = list_runs(tmp_path)
    assert row["winner"] == "undecided" and {row[name] for name in ("judge", "win_rate", "ci_low")} == {None}


def test_where_there_is_no_run(root: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="did you mean 'first'"):
        diff_runs(root / "firts", root / "first")
    with pytest.raises(StoreError, match="no such folder"):
        list_runs(tmp_path / "nowhere")
    write_json(tmp_path / "app" / "manifest.json", {"name": "a web page", "icons": []})
    write_json(tmp_path / "list" / "manifest.json", ["keys", "stages", "started"])
    assert list_runs(tmp_path) == []


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_listed(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(root, tmp_path / "runs")
    for name, text in {"torn": '{"keys": [', "bytes": "\xff\xfe", "newer": '{"schema_version": 99}'}.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "manifest.json").write_text(text, encoding="latin-1")
    manifest = json.loads((root / "first" / "manifest.json").read_text())
    write_json(tmp_path / "runs" / "newer" / "manifest.json", manifest | {"schema_version": 99})
    (tmp_path / "runs" / "folder" / "manifest.json").mkdir(parents=True)
    shutil.copytree(root / "first", tmp_path / "runs" / "results")
    (tmp_path / "runs" / "results" / "results.json").write_text("{")
    assert [row["run"] for row in list_runs(tmp_path / "runs")] == ["sweep/second", "first"]
    for name in ("torn", "bytes", "newer", "folder", "results"):
        assert f"{tmp_path / 'runs' / name}: " in caplog.text, name


def test_a_study_is_listed_as_one_and_its_trials_inside_it_alone(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    folder = write_begun_study(root / "study")
    write_run(root / "run")
    for trial in ("rm_ppo-1-seed0", "dpo-1-seed0"):
        shutil.copytree(root / "run", folder / "trials" / trial, dirs_exist_ok=True)
    rows = {row["run"]: row for row in list_runs(root)}
    assert rows.keys() == {"study", "run"} and (rows["run"]["kind"], rows["study"]["kind"]) == ("run", "study")
    row = rows["study"]
    assert (row["status"], row["stages_done"], row["stages"], row["winner"]) == ("interrupted", 3, 10, None)
    assert "3/10 trials" in runs_table(list_runs(root))
    assert {row["run"] for row in list_runs(folder)} == {str(folder), "trials/rm_ppo-1-seed0", "trials/dpo-1-seed0"}
    assert len(list_runs(folder / "trials")) == 2
    with RunFolder(folder).lock():
        assert {row["run"]: row["status"] for row in list_runs(root)}["study"] == "running"

    document = CASES["better"]()
    started = json.loads((folder / "trials.json").read_text())["started"]
    write_json(folder / "study.json", document | {"provenance": {"started": started, "finished": started + 60}})
    [row] = (row for row in list_runs(root) if row["kind"] == "study")
    best = document["verdict"]["best"]
    assert (row["status"], row["winner"]) == ("done", document["verdict"]["winner"])
    assert row["wall_s"] == 339.5  # of the run that both trials took their stages from, and not of the last call
    assert (row["win_rate"], row["ci_low"], row["ci_high"]) == (best["win_rate"], best["ci_low"], best["ci_high"])
    assert f"{best['win_rate']:.1%}  {best['ci_low']:.1%} to {best['ci_high']:.1%}" in runs_table([row])
    # another call began, and was interrupted: what is written is of the earlier one
    trials = json.loads((folder / "trials.json").read_text())
    write_json(folder / "trials.json", trials | {"started": started + 100})
    [row] = (row for row in list_runs(root) if row["kind"] == "study")
    assert (row["status"], row["winner"], row["win_rate"]) == ("interrupted", None, None)


def test_a_recorded_study_is_done(tmp_path: Path) -> None:
    write_json(tmp_path / "recorded" / "study.json", CASES["one seed"]())
    [row] = list_runs(tmp_path)
    assert (row["kind"], row["status"], row["stages_done"], row["recipe"]) == ("study", "done", row["stages"], None)
    assert row["stages"] > 0 and row["win_rate"] is not None and row["ci_low"] is None
    assert "recorded" in runs_table([row])
    # the document of a study that was run, without its folder's other files
    written = {"recipe": {"name": "mine"}, "provenance": {"started": 1000.0, "finished": 1060.0}}
    write_json(tmp_path / "recorded" / "study.json", CASES["one seed"]() | written)
    [row] = list_runs(tmp_path)
    assert (row["status"], row["recipe"], row["started"], row["wall_s"]) == ("done", "mine", 1000.0, 60.0)


def test_commands_on_a_run_refuse_a_study_in_words(tmp_path: Path) -> None:
    folder = write_begun_study(tmp_path / "study")
    for words in (["diff", str(folder), str(folder)], ["push", str(folder), "--to", str(tmp_path / "out")]):
        done = duel(*words, check=2)
        assert "this is a study, and not one run" in done.stderr and "trials" in done.stderr
    done = duel("report", str(folder), check=2)
    assert "the study has no verdict yet" in done.stderr and "duel watch" in done.stderr
