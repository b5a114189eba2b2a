"""What the pipeline does around the stages, which are made up here: what runs, what is recorded, what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.damage import DAMAGES
from support.running import environment

from toolkit.engine.facts import peak_memory
from toolkit.errors import DataError, RecipeError, StoreError
from toolkit.files import read_json, write_json, write_table
from toolkit.judging.records import Judgement, write_judgements
from toolkit.progress import METRICS_FILE, Reporter
from toolkit.recipe.arms import ArmDifference
from toolkit.recipe.files import load_recipe
from toolkit.runs import pipeline
from toolkit.runs.attempts import AttemptsClock
from toolkit.runs.dry_run import describe
from toolkit.runs.facts import PACKAGES, machine, versions
from toolkit.runs.pipeline import RunOptions, cost, run
from toolkit.runs.plan import STAGE_NAMES
from toolkit.runs.store import refuse_damaged
from toolkit.stages.contexts import CONTEXTS, from_json

MEASURED = (
    ArmDifference("learning_rate", "learning_rate", 0.001, 0.5, True),
    ArmDifference("tuning_trials", "the settings that were tried", 1, 1, False),
)
Stage = Callable[[Any, dict[str, Path], Path, Reporter], dict[str, Any]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for the stages: they write what the run folder needs. Name -> what each was called with."""
    calls: dict[str, Any] = {}

    def stage(name: str) -> Stage:
        def run_stage(context: Any, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
            calls[name] = SimpleNamespace(context=context, inputs=inputs, out=out, reporter=reporter)
            reporter.log(name, {"step": 1})
            (out / "trainer").mkdir(exist_ok=True)
            if name == "evaluate":
                for table in ("samples", "rewards", "judgements"):
                    write_table([{"a": 1}], out / f"{table}.parquet")
                facts = {"warnings": ["w"], "verdict": {}, "arm_differences": [d.as_dict() for d in MEASURED]}
                write_json(out / "evaluation.json", facts | {"judge_usage": ["usage"]})
            if name == "report":
                assert all(path.exists() for path in inputs.values())
                (out / "report.html").write_text("page")
            return {"tokens": 7, "mine": name}

        return run_stage

    for name in CONTEXTS:
        monkeypatch.setitem(sys.modules, f"toolkit.stages.{name}", SimpleNamespace(run=stage(name)))
    return calls


def go(folder: Path, *sets: str, **options: Any) -> dict[str, Any]:
    return run(load_recipe("smoke", sets), folder, Reporter(), RunOptions(**options))


def test_each_stage_gets_its_own_context_inputs_and_reporter(ran: dict[str, Any], tmp_path: Path) -> None:
    manifest = go(tmp_path, "report_to=[tensorboard]", command=["duel", "run"])
    assert list(ran) == list(manifest["stages"]) == list(STAGE_NAMES)
    for name, call in ran.items():
        assert type(call.context) is CONTEXTS[name]
        assert call.out == tmp_path / ".work" / f"{name}-{manifest['keys'][name]}"
        trackers = call.reporter.trackers
        assert (trackers.names, trackers.run_name, trackers.folder) == (("tensorboard",), "smoke", tmp_path)
    assert ran["ppo"].inputs == {name: tmp_path / name for name in ("data", "sft", "reward_model")}
    documents = ("results.json", "manifest.json", "recipe.resolved.yaml")
    assert ran["report"].inputs == {name: tmp_path / name for name in (*STAGE_NAMES[:-1], *documents)}
    logged = [json.loads(line)["stage"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert logged == list(STAGE_NAMES)


def test_what_is_recorded(ran: dict[str, Any], tmp_path: Path) -> None:
    go(tmp_path, "dpo.learning_rate=0.5", command=["duel", "run"])
    manifest = read_json(tmp_path / "manifest.json")
    assert (manifest["status"], manifest["command"], manifest["schema_version"]) == ("done", ["duel", "run"], 2)
    assert manifest["origins"]["dpo.learning_rate"] == "--set" and manifest["finished"] >= manifest["started"]
    record = read_json(tmp_path / "dpo" / "stage.json")
    assert (record["arm"], record["tokens"], record["metrics"]) == ("dpo", 7, {"mine": "dpo"})
    assert record["fields"]["dpo.learning_rate"] == 0.5 and record["peak_gib"] > 0
    assert "metrics" not in manifest["stages"]["dpo"] and not (tmp_path / "dpo" / "trainer").exists()
    results = read_json(tmp_path / "results.json")
    assert results["schema_version"] == 2 and results["recipe"]["dpo"]["learning_rate"] == 0.5
    assert results["warnings"][0] == "w" and "learning_rate: RM + PPO" in results["warnings"][1]
    assert results["arm_differences"] == manifest["arm_differences"] == [d.as_dict() for d in MEASURED]
    assert len(results["warnings"]) == 2  # what is equal is no warning
    assert results["cost"]["judges"] == ["usage"] and len(results["cost"]["stages"]) == 6
    assert (tmp_path / "report.html").read_text() == "page" and (tmp_path / "samples.parquet").is_file()


def test_nothing_is_computed_twice_and_nothing_is_lost(
    ran: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(tmp_path)
    ran.clear()
    capsys.readouterr()
    go(tmp_path)
    assert ran == {} and capsys.readouterr().err.count("cached") == 7
    go(tmp_path, "dpo.beta=0.9")
    assert list(ran) == ["dpo", "evaluate", "report"]
    lines = capsys.readouterr().err.splitlines()
    assert "[5/7 dpo] runs again, changed: dpo.beta" in lines
    assert "[6/7 evaluate] runs again, changed: input dpo" in lines
    ran.clear()
    go(tmp_path)
    assert ran == {} and capsys.readouterr().err.count("cached (an earlier result") == 3
    other = tmp_path.with_name("other")
    go(other, "ppo.kl_coef=0.9", reuse=[tmp_path])
    assert list(ran) == ["ppo", "evaluate", "report"]
    assert capsys.readouterr().err.count("taken from another run") == 4
    ran.clear()
    go(tmp_path, force=True, until="sft")
    assert list(ran) == ["data", "sft"]


def test_until_and_only(ran: dict[str, Any], tmp_path: Path) -> None:
    manifest = go(tmp_path, until="sft")
    assert manifest["status"] == "partial" and list(manifest["stages"]) == ["data", "sft"]
    assert list(go(tmp_path, only="dpo")["stages"]) == ["data", "sft", "dpo"]
    with pytest.raises(StoreError, match="needs reward_model"):
        go(tmp_path, only="ppo")


def test_one_stage_that_is_forced_takes_its_inputs_from_the_shelf(ran: dict[str, Any], tmp_path: Path) -> None:
    go(tmp_path)
    go(tmp_path, "dpo.beta=0.9")
    ran.clear()
    go(tmp_path, only="evaluate", force=True)
    assert list(ran) == ["evaluate"]


@pytest.mark.parametrize("options", [{"until": "reward_model"}, {"only": "reward_model"}, {"target": "sft"}])
def test_what_a_finished_run_has_stays_recorded(ran: dict[str, Any], tmp_path: Path, options: dict[str, Any]) -> None:
    """Also the stages behind those that were asked for; those of other settings do not."""
    whole = go(tmp_path)
    ran.clear()
    again = go(tmp_path, **options)
    assert ran == {} and again["status"] == "done" and again["stages"] == whole["stages"]
    assert again["files"] == whole["files"] and "results.json" in again["files"]
    assert read_json(tmp_path / "manifest.json")["status"] == "done"
    refuse_damaged(tmp_path)
    changed = go(tmp_path, "reward_model.learning_rate=0.5", until="reward_model")
    assert list(ran) == ["reward_model"] and changed["status"] == "partial"
    assert list(changed["stages"]) == ["data", "sft", "reward_model", "dpo"] and "results.json" not in changed["files"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(DataError("bad"), "failed"), (ValueError("ours"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_a_stage_that_fails(
    ran: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str
) -> None:
    go(tmp_path, until="data")
    fails = True

    def run_stage(context: Any, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
        (out / "half").write_text("a half")
        if fails:
            raise error
        return {"found": (out / "half").is_file()}

    monkeypatch.setitem(sys.modules, "toolkit.stages.sft", SimpleNamespace(run=run_stage))
    with pytest.raises(type(error)):
        go(tmp_path, until="sft")
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["status"] == status and list(manifest["stages"]) == ["data"]
    attempts = tmp_path / ".work" / f"sft-{manifest['keys']['sft']}" / "attempts.json"
    write_json(attempts, {"wall_s": read_json(attempts)["wall_s"] + 1000})
    fails = False
    stages = go(tmp_path, until="sft")["stages"]
    assert stages["sft"]["wall_s"] > 1000  # both attempts
    assert read_json(tmp_path / "sft" / "stage.json")["metrics"] == {"found": True}
    assert not (tmp_path / "sft" / "attempts.json").exists()


def test_a_launched_stage_gets_the_same_context(
    ran: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def launch(arguments: Any, module: str, own: Any) -> int:
        request = read_json(Path(own[0]))
        asked[request["stage"]] = request
        write_json(Path(own[0]).with_name("answer.json"), {"tokens": 3, "processes": 2})
        for rank in (0, 1):
            write_json(Path(own[0]).with_name(f"peak-{rank}.json"), {"peak_gib": 7.5 + rank})
        if request["stage"] == "evaluate":
            sys.modules["toolkit.stages.evaluate"].run(None, {}, Path(own[0]).parent, Reporter(quiet=True))
        return 0

    monkeypatch.setattr(pipeline, "accelerate_launch", launch)
    go(tmp_path / "one")
    alone = dict(ran)
    sets = ["report_to=[tensorboard]", "name=smoke"]
    manifest = go(tmp_path / "two", *sets, launch=["--num_processes", "2"])
    assert list(asked) == ["sft", "reward_model", "ppo", "dpo", "evaluate"]
    for name, request in asked.items():
        assert from_json(name, request["context"]) == alone[name].context
        assert request["inputs"] == {stage: str(tmp_path / "two" / stage) for stage in alone[name].inputs}
        assert request["trackers"] == {"names": ["tensorboard"], "run_name": "smoke"}
        assert not (tmp_path / "two" / name / "request.json").exists()
        assert request["processes"] == 2
    assert manifest["stages"]["dpo"]["tokens"] == 3 and manifest["processes"] == 2
    assert manifest["launch"] == ["--num_processes", "2"]
    # The memory of the processes, and not of the one that launched them; the stages that run here have their own.
    assert {name for name, stage in manifest["stages"].items() if stage["peak_gib"] == 8.5} == set(asked)
    assert not list((tmp_path / "two" / "dpo").glob("peak-*"))
    # One process has other results: nothing that two have trained stands for them.
    ran.clear()
    assert go(tmp_path / "two", *sets)["processes"] == 1
    assert list(ran) == ["sft", "reward_model", "ppo", "dpo", "evaluate", "report"]
    ran.clear()
    go(tmp_path / "two", *sets, launch=["--num_processes=2"])  # all of it lies on the shelf
    assert not ran and len(asked) == 5

    monkeypatch.setattr(pipeline, "accelerate_launch", lambda *_: 2)
    with pytest.raises(StoreError, match="exit code 2"):
        go(tmp_path / "three", until="sft", launch=["--cpu"])


def test_what_a_damaged_file_of_the_run_folder_costs(ran: dict[str, Any], tmp_path: Path) -> None:
    """Following the fix loses no more than the file: the manifest nothing, a stage's record that stage."""
    go(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="damaged") as caught:
        go(tmp_path)
    assert "away and run" in caught.value.fix and "remove" not in caught.value.fix
    (tmp_path / "manifest.json").rename(tmp_path / "moved.json")
    for damaged, runs_again in ((None, []), ("reward_model/stage.json", ["reward_model"])):
        if damaged:
            (tmp_path / damaged).write_text("{")
        ran.clear()
        manifest = go(tmp_path)
        assert list(ran) == runs_again and manifest["status"] == "done" and set(manifest["stages"]) == set(STAGE_NAMES)


def test_a_damaged_stage_runs_again_and_so_does_what_reads_it(
    ran: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(tmp_path)
    evaluation = (tmp_path / "evaluate" / "evaluation.json").read_text()
    (tmp_path / "evaluate" / "evaluation.json").write_text(evaluation.replace('"w"', '"x"'))
    ran.clear()
    with pytest.raises(StoreError, match=r"needs evaluate, which is damaged: evaluation\.json") as caught:
        go(tmp_path, only="report")
    assert "--until evaluate" in caught.value.fix
    go(tmp_path)
    assert list(ran) == ["evaluate"] and read_json(tmp_path / "results.json")["warnings"][0] == "w"
    assert "[6/7 evaluate] damaged, and computed again: evaluation.json is damaged" in capsys.readouterr().err
    (tmp_path / "evaluate" / "samples.parquet").unlink()
    ran.clear()
    go(tmp_path)
    assert list(ran) == ["evaluate"]


def test_a_stage_whose_record_is_gone_runs_again(
    ran: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest lists it, so the folder is the run's. Its files stay on the shelf: nobody can tell whose each is."""
    go(tmp_path)
    (tmp_path / "sft" / "mine.txt").write_text("notes")
    (tmp_path / "sft" / "stage.json").unlink()
    ran.clear()
    manifest = go(tmp_path)
    assert list(ran) == ["sft"] and manifest["status"] == "done"
    assert "sft/stage.json is missing" in capsys.readouterr().err
    assert (tmp_path / ".shelf" / "sft-damaged-1" / "mine.txt").read_text() == "notes"


def test_a_folder_of_somebody_else_is_refused_before_anything_runs(ran: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir(parents=True)
    with pytest.raises(StoreError, match="did not finish writing"):
        go(tmp_path)
    assert not ran
    go(tmp_path, until="dpo")
    assert "dpo" in ran


def test_what_lies_at_the_top_of_a_run_is_verified_before_it_is_published(ran: dict[str, Any], tmp_path: Path) -> None:
    go(tmp_path)
    refuse_damaged(tmp_path)
    for name in ("results.json", "samples.parquet", "recipe.resolved.yaml", "report/report.html", "sft/stage.json"):
        content = (tmp_path / name).read_bytes()
        for damage in DAMAGES:
            damage(tmp_path / name)
            with pytest.raises(StoreError, match="changed|damaged|missing") as caught:
                refuse_damaged(tmp_path)
            assert "run" in caught.value.fix and name.rpartition("/")[2] in str(caught.value)
            (tmp_path / name).write_bytes(content)
    refuse_damaged(tmp_path)


def test_a_tracker_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pip install 'rlhf-duel\[no_such_tracker\]'"):
        pipeline.check_trackers(["json", "no_such_tracker"])


def test_cost_by_arm() -> None:
    def stage(arm: str, wall_s: float, peak_gib: float) -> dict[str, Any]:
        return {"arm": arm, "wall_s": wall_s, "tokens": 10, "peak_gib": peak_gib, "key": "k"}

    stages = {
        "sft": stage("shared", 1.0, 0.5),
        "reward_model": stage("rm_ppo", 2.0, 0.7) | {"response_tokens_trained": 300},
        "ppo": stage("rm_ppo", 4.0, 0.6) | {"response_tokens_trained": 40},
        "report": stage("shared", 100.0, 9.0),  # no part of what an arm costs
    }
    found = cost(stages)
    assert [row["stage"] for row in found["stages"]] == ["sft", "reward_model", "ppo"]
    assert found["arms"] == {
        "shared": {"wall_s": 1.0, "tokens": 10, "peak_gib": 0.5, "response_tokens_trained": None},
        "rm_ppo": {"wall_s": 6.0, "tokens": 20, "peak_gib": 0.7, "response_tokens_trained": 340},
        "dpo": {"wall_s": 0, "tokens": 0, "peak_gib": 0.0, "response_tokens_trained": None},
    }
    assert "same reward model" not in found["sentence"]
    online = stage("dpo", 3.0, 0.5) | {"fields": {"input reward_model": "k"}}
    assert "DPO 3 s beside the same reward model, which" in cost(stages | {"dpo": online})["sentence"]
    del stages["reward_model"]["response_tokens_trained"]  # as a stage of an earlier duel
    assert cost(stages)["arms"]["rm_ppo"]["response_tokens_trained"] is None


def test_facts() -> None:
    found = versions()
    assert list(found) == ["python", *PACKAGES] and found["torch"][0].isdigit()
    assert machine()["cpus"] >= 1
    with peak_memory() as peak:
        block = bytearray(b"x" * (64 << 20))
    assert peak.gib > 0.0625 and len(block) == 64 << 20


@pytest.mark.parametrize("name", ["gold", "all judges"])
def test_a_clash_of_judges_names_is_found_before_anything_runs(ran: dict[str, Any], tmp_path: Path, name: str) -> None:
    votes = tmp_path / "votes.parquet"
    judges = f"evaluate.judges=[gold, file:{votes}]"
    for expected in (DataError, RecipeError):  # no such file, and then one with that name
        with pytest.raises(expected) as raised:
            go(tmp_path / "run", judges)
        with pytest.raises(expected):
            describe(load_recipe("smoke", [judges]), tmp_path / "run")
        write_judgements([Judgement("p0", "rm_ppo", "dpo", name, 1.0)], votes)
    assert "would be mixed" in str(raised.value) and ran == {}
    go(tmp_path / "run", judges, until="dpo")  # what does not judge asks for no votes
    assert list(ran) == ["data", "sft", "reward_model", "ppo", "dpo"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from toolkit.runs.attempts import AttemptsClock
with AttemptsClock(Path(sys.argv[1])):
    time.sleep(1.6)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_time_of_killed_attempts_counts(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(file)], env=environment(), check=False)
    clock = AttemptsClock(file)
    assert 2.0 <= clock.earlier_s < 5.0 and clock.seconds() >= clock.earlier_s
    file.write_text("{")
    assert AttemptsClock(file).earlier_s == 0.0
