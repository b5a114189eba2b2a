"""The command line as a user meets it: real processes, real files, the tiny model."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.running import ROOT, SMALL, command, duel, duel_process, environment

from toolkit.cli.next_steps import next_study
from toolkit.engine.engine import Engine
from toolkit.judging.records import read_judgements, write_judgements
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.inspect import torch_dtype
from toolkit.models.load import load_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.recipe.files import load_recipe
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.e2e

TOP = {
    "schema_version",
    "recipe",
    "verdict",
    "policies",
    "win_rates",
    "implicit_vs_explicit",
    "frontier",
    "overoptimization",
    "hacking",
    "rm_quality",
    "judge_tests",
    "best_of_n",
    "reward_outputs",
    "process",
    "rounds",
    "cost",
    "warnings",
    "arm_differences",
}


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "cost"}


@pytest.fixture(scope="module")
def run_folder(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, which these tests go on with."""
    return shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def another_seed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run with another seed in a process of its own, and what it wrote to stdout."""
    out = tmp_path_factory.mktemp("seeds") / "other"
    return out, duel_process("run", "smoke", "--out", str(out), *SMALL, "--set=seed=1", "--json").stdout


def test_help_is_fast_and_lists_the_contract() -> None:
    started = time.monotonic()
    text = duel_process("--help").stdout
    assert time.monotonic() - started < 5  # the target is 0.3 s on an idle machine; scripts/bench measures it
    contract = "run rewards score compare judge winrate label simulate sweep report recipes validate schema env "
    contract += "runs diff watch push completion"
    for name in contract.split():
        assert f"\n  {name} " in text
    loaded = duel_process("--help", env={"PYTHONPROFILEIMPORTTIME": "1"}).stderr
    assert " click\n" in loaded
    assert not any(f" {heavy}\n" in loaded for heavy in ("torch", "transformers", "pydantic", "numpy"))


def test_the_run_folder_holds_what_the_contract_says(run_folder: Path) -> None:
    for name in ("manifest.json", "recipe.resolved.yaml", "metrics.jsonl", "results.json", "report.html"):
        assert (run_folder / name).is_file(), name
    results = json.loads((run_folder / "results.json").read_text())
    assert results.keys() == TOP
    assert results["cost"]["judges"] == []  # no language model was asked
    judging = json.loads((run_folder / "evaluate" / "judging.json").read_text())
    assert {row["judge"] for row in judging["bradley_terry"]} == {row["judge"] for row in results["win_rates"]}
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert list(manifest["stages"]) == ["data", "sft", "reward_model", "ppo", "dpo", "evaluate", "report"]
    assert all(stage["peak_gib"] > 0 and stage["wall_s"] > 0 for stage in manifest["stages"].values())
    assert len(json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[0])) > 2

    names = [row["policy"] for row in results["policies"]]
    whole = sorted(n for n in names if "@" not in n)
    assert whole == ["base", "best_of_2_implicit", "best_of_2_rm", "dpo", "rm_ppo", "sft"]
    assert any(n.startswith("rm_ppo@") for n in names) and any(n.startswith("dpo@") for n in names)
    keys = (
        "policy baseline judge win tie loss win_rate standard_error ci_low ci_high p_value n_prompts n_judged n_failed"
    )
    keys += " lc_win_rate lc_ci_low lc_ci_high position_consistency"
    for row in results["win_rates"]:
        assert set(keys.split()) <= row.keys()
        assert row["judge"] == "gold" and row["n_prompts"] == 12
        assert row["win"] + row["tie"] + row["loss"] == pytest.approx(1)
    pairs = {(row["policy"], row["baseline"]) for row in results["win_rates"]}
    assert {("rm_ppo", "sft"), ("dpo", "sft"), ("rm_ppo", "dpo")} <= pairs
    assert results["verdict"]["winner"] in ("rm_ppo", "dpo", "undecided")


def test_samples_and_rewards_are_consistent(run_folder: Path) -> None:
    samples = pq.read_table(run_folder / "samples.parquet").to_pylist()
    cut = {row["prompt_id"] for row in samples if row["policy"] in ("rm_ppo", "dpo") and row["truncated"]}
    ended = json.loads((run_folder / "results.json").read_text())["verdict"]["both_ended"]
    assert [row["n_judged"] for row in ended] == ([12 - len(cut)] if len(cut) < 12 else [])
    by_policy: dict[str, set[str]] = {}
    for row in samples:
        by_policy.setdefault(row["policy"], set()).add(row["prompt_id"])
    assert len({frozenset(prompts) for prompts in by_policy.values()}) == 1, "every policy answers the same prompts"
    sft = [row["kl_nats"] for row in samples if row["policy"] == "sft"]
    assert max(abs(value) for value in sft) < 1e-3, "SFT has no KL to itself"
    rewards = pq.read_table(run_folder / "rewards.parquet").to_pylist()
    beta = json.loads((run_folder / "results.json").read_text())["recipe"]["dpo"]["beta"]
    for row in rewards:
        expected = beta * (row["policy_logp"] - row["reference_logp"])
        assert row["implicit_reward"] == pytest.approx(expected, abs=1e-6)


def test_a_second_run_is_all_cached_and_a_changed_field_reruns_what_follows(run_folder: Path) -> None:
    before = json.loads((run_folder / "manifest.json").read_text())
    again = duel("run", "smoke", "--out", str(run_folder), *SMALL)
    assert again.stderr.count("cached") == 7
    changed = duel("run", "smoke", "--out", str(run_folder), *SMALL, "--set=dpo.beta=0.3")
    lines = changed.stderr
    for stage in ("data", "sft", "reward_model", "ppo"):
        assert f"{stage}] cached" in lines
    assert "dpo] runs again, changed: dpo.beta" in lines
    assert "evaluate] runs again" in lines and "report] runs again" in lines
    assert json.loads((run_folder / "results.json").read_text())["recipe"]["dpo"]["beta"] == 0.3
    # What was finished before is on the shelf: going back computes nothing.
    back = duel("run", "smoke", "--out", str(run_folder), *SMALL)
    assert "runs again" not in back.stderr
    after = json.loads((run_folder / "manifest.json").read_text())
    assert {name: stage["key"] for name, stage in after["stages"].items()} == {
        name: stage["key"] for name, stage in before["stages"].items()
    }


def test_a_run_up_to_the_evaluation_prints_its_results(run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    shutil.rmtree(run / "report")
    sentence = json.loads((run / "results.json").read_text())["verdict"]["sentence"].split()[:6]
    for option in ("--until", "--only"):
        words = ("run", "smoke", "--out", str(run), *SMALL, option, "evaluate")
        text = duel(*words).stdout
        assert " ".join(sentence) in " ".join(text.split()) and "report: " not in text and "duel study" in text
        document = json.loads(duel(*words, "--json").stdout)
        assert document["status"] == "partial" and document["verdict"]["sentence"].split()[:6] == sentence
    assert duel("run", "smoke", "--out", str(run), *SMALL, "--until", "dpo").stdout == ""


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Until the run in another process has written a file of that name."""
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.fault
def test_killed_in_training_it_continues_to_the_same_result(run_folder: Path, tmp_path: Path) -> None:
    """That of a run with the same seed that ran through."""
    out = tmp_path / "killed"
    arguments = ["run", "smoke", "--out", str(out), *SMALL]
    process = subprocess.Popen(command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(process, out / ".work", "ppo-*/trainer/checkpoint-*/trainer_state.json")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "ppo").exists(), "a stage that was killed is not taken for whole"
    assert not (out / "results.json").exists()
    rerun = duel(*arguments)
    assert "sft] cached" in rerun.stderr
    killed = json.loads((out / "results.json").read_text())
    assert without_times(killed) == without_times(json.loads((run_folder / "results.json").read_text()))


def test_json_of_a_whole_run_is_one_document_and_nothing_else(another_seed: tuple[Path, str]) -> None:
    document = json.loads(another_seed[1])
    assert document["status"] == "done" and document["verdict"]["sentence"]
    assert document["next"].endswith(": duel study study")


def test_a_run_ends_with_the_way_to_a_study(run_folder: Path, tmp_path: Path) -> None:
    """The command of the last line names a recipe that there is: the shipped study, or one's own with its section."""
    run, mine = shutil.copytree(run_folder, tmp_path / "run"), tmp_path / "my recipe.yaml"
    mine.write_text((ROOT / "recipes" / "smoke.yaml").read_text() + "study: {seeds: 2}\n")
    for recipe, named in (("smoke", "study"), (str(mine), str(mine))):
        lines = duel("run", recipe, "--out", str(run), *SMALL, cwd=tmp_path).stdout.splitlines()
        given = [word for text in SMALL for word in text.split("=", 1)] if recipe == named else []
        assert shlex.split(lines[-1]) == ["duel", "study", named, *given]
        assert "One run is one seed of one setting" in "\n".join(lines[-3:-1])
        assert load_recipe(named).recipe.study is not None
        assert not any("duel sweep" in line for line in lines)  # nothing else is the next thing to do
    stopped = duel("run", "smoke", "--out", str(tmp_path / "part"), *SMALL, "--until", "data")
    assert "duel study" not in stopped.stdout


def test_the_study_that_is_named_is_of_the_runs_data_lengths_and_judges(tmp_path: Path) -> None:
    data = tmp_path / "my pairs.jsonl"
    rows = [{"question": f"What is {k}?", "chosen": "A number.", "rejected": "No."} for k in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = [f"data.source={data}", "data.columns={prompt: question}", "data.max_prompt_tokens=300", "model.name=tiny"]
    judges = ["evaluate.judges=[gold, 'python:my_judge:short']", "evaluate.max_new_tokens=200"]
    _, command = next_study("own.yaml", load_recipe("quickstart", [*own, *judges]).recipe, judged=True)
    words = shlex.split(command)
    assert words[:3] == ["duel", "study", "study"]
    study, run = (
        load_recipe(name, sets).recipe for name, sets in (("study", words[4::2]), ("quickstart", own + judges))
    )
    assert (study.data.source, study.data.columns) == (str(data), {"prompt": "question"})
    assert (study.data.max_prompt_tokens, study.evaluate.max_new_tokens) == (300, 200)
    assert study.model.name == "tiny" and study.evaluate.judges == run.evaluate.judges
    assert study.data.max_response_tokens == 64 and study.data.train_prompts == 400  # the study's own
    undecided = next_study("own.yaml", load_recipe("quickstart", own).recipe, judged=False)[1]
    assert undecided.endswith("--set 'evaluate.judges=[JUDGE]'")
    votes = load_recipe("quickstart", [*own, "evaluate.judges=['file:votes.parquet']"]).recipe  # of other texts
    assert next_study("own.yaml", votes, judged=True)[1].endswith("--set 'evaluate.judges=[JUDGE]'")


def test_another_seed_gives_another_result(run_folder: Path, another_seed: tuple[Path, str]) -> None:
    """That one seed gives one result, a run that was killed shows."""
    first, other = (json.loads((folder / "results.json").read_text()) for folder in (run_folder, another_seed[0]))
    assert other["win_rates"] != first["win_rates"]


def test_dry_run_says_what_is_cached_and_marks_the_response(run_folder: Path) -> None:
    text = duel("run", "smoke", "--out", str(run_folder), *SMALL, "--dry-run").stdout
    assert text.count("cached") == 7 and "memory: about" in text and "][" in text
    plan = json.loads(duel("run", "smoke", "--out", "/nonexistent/x", *SMALL, "--dry-run", "--json").stdout)
    assert plan["data"]["train"]["n_prompts"] == 24
    assert next(s for s in plan["stages"] if s["stage"] == "ppo")["steps"] == 2 * 2 * 2


def test_only_and_until(tmp_path: Path) -> None:
    out = tmp_path / "parts"
    missing = duel("run", "smoke", "--out", str(out), *SMALL, "--only", "dpo", check=2)
    assert "dpo" in missing.stderr and "--until sft" in missing.stderr
    duel("run", "smoke", "--out", str(out), *SMALL, "--until", "sft")
    assert (out / "sft" / "model" / "config.json").is_file() and not (out / "dpo").exists()
    duel("run", "smoke", "--out", str(out), *SMALL, "--only", "dpo")
    assert (out / "dpo" / "model").is_dir() and not (out / "ppo").exists()


def test_what_a_run_says_of_judgements_from_a_file(small_run: Path, tmp_path: Path) -> None:
    """The run's own reward model does not become independent in a file, and what does not match is counted."""
    run, votes = shutil.copytree(small_run, tmp_path / "run"), tmp_path / "votes.parquet"
    pair = ("--policy", "rm_ppo", "--baseline", "dpo")
    own = run / "reward_model" / "model"
    duel("judge", str(run), *pair, "--judge", f"rm:{own}", "--out", str(votes))
    recorded = read_judgements([votes])
    other = [replace(row, judge="me", policy_hash="0" * 16) for row in recorded[:3]]
    untied = [replace(row, judge="you", policy_hash="", baseline_hash="") for row in recorded[:4]]
    write_judgements([*recorded, *other, *untied], votes)
    duel("run", "smoke", "--out", str(run), *SMALL, f"--set=evaluate.judges=[file:{votes}]", "--json")
    results = json.loads((run / "results.json").read_text())
    warnings = "\n".join(results["warnings"])
    assert f"{votes}: of 19 judgements 3 are of other responses" in warnings
    assert f"{votes}: of 19 judgements 4 do not record which responses they are of" in warnings
    assert f"judge rm:{own} is a model of this run, reward_model/model: it does not decide" in warnings
    assert set(results["verdict"]["judges"]) <= {"you"} and results["verdict"]["winner"] == "undecided"
    assert "4 do not record which responses" in (run / "report.html").read_text()


def test_a_held_out_reward_model_judges_both_arms(
    small_run: Path, another_seed: tuple[Path, str], tmp_path: Path
) -> None:
    """A reward model from elsewhere counts as independent, and PPO's own does not."""
    other, run = another_seed[0], shutil.copytree(small_run, tmp_path / "run")
    # Beside its run's data it would be known to have seen some of these prompts (tests/judging/test_independence.py).
    held_out = shutil.copytree(other / "reward_model" / "model", tmp_path / "elsewhere")
    own = run / "reward_model" / "model"
    judges = json.dumps([f"rm:{held_out}", f"rm:{own}"])
    duel("run", "smoke", "--out", str(run), *SMALL, f"--set=evaluate.judges={judges}")

    results = json.loads((run / "results.json").read_text())
    names = {row["judge"] for row in results["win_rates"]}
    assert names == {f"rm:{held_out}", "rm"}  # its own model is recognised behind its path
    assert "no independent judge" not in results["verdict"]["sentence"]

    # Its judgements are its scores of the samples, computed here by the reference path of one row for each.
    ref = resolve(str(held_out))
    model = load_reward_model(ref, ModelSection(name="tiny", dtype="float32", lora=None))
    tokenizer = load_tokenizer(ref)
    scorer = Engine(model, int(tokenizer.pad_token_id), dtype=torch_dtype("float32"))
    samples = {}
    for row in pq.read_table(run / "samples.parquet").to_pylist():
        if row["kind"] != "best_of_n" and row["sample_index"] == 0:
            tree = Tree(text_encoder(tokenizer, row["prompt"]).prompt(row["prompt"]), [list(row["response_ids"])])
            samples[row["prompt_id"], row["policy"]] = scorer.scores([tree])[0][0]
    checked = 0
    for row in pq.read_table(run / "judgements.parquet").to_pylist():
        pair = (row["prompt_id"], row["policy"]), (row["prompt_id"], row["baseline"])
        if row["judge"] == f"rm:{held_out}" and all(key in samples for key in pair):
            ours, theirs = (samples[key] for key in pair)
            if abs(ours - theirs) > 1e-4:
                assert row["preference"] == float(ours > theirs)
                checked += 1
    assert checked >= 20


def test_trls_own_trainers_train_both_models(tmp_path: Path) -> None:
    out = tmp_path / "trl"
    sets = ["--set=dpo.trainer=trl", "--set=dpo.loss_type=apo_zero", "--set=reward_model.trainer=trl"]
    for stage in ("dpo", "reward_model"):
        sets += [f"--set={stage}.per_device_train_batch_size=64", f"--set={stage}.logging_steps=1"]
    duel("run", "smoke", "--out", str(out), *SMALL, *sets, "--until", "reward_model")
    duel("run", "smoke", "--out", str(out), *SMALL, *sets, "--only", "dpo")
    for stage, logged in (("reward_model", "margin"), ("dpo", "logps/chosen")):
        record = json.loads((out / stage / "stage.json").read_text())
        assert any(logged in entry for entry in record["metrics"]["history"])
    assert json.loads((out / "dpo" / "model" / "duel.json").read_text())["loss_type"] == "apo_zero"
    rewards = ["rewards", "--policy", str(out / "dpo" / "model"), "--reference", str(out / "sft" / "model")]
    rewards += ["--rm", str(out / "reward_model" / "model"), "--data", "reviews", "--limit", "4"]
    summary = json.loads(duel(*rewards, "--out", str(tmp_path / "r.parquet"), "--json").stdout)
    assert summary["n_prompts"] == 4 and summary["implicit_vs_explicit"]["agreement"]["value"] is not None
    wrong = duel("validate", "smoke", "--set=dpo.loss_type=apo_zero", check=2)
    assert "trainer: trl" in wrong.stderr


def test_sweep_shares_equal_stages(small_run: Path, tmp_path: Path) -> None:
    """Its first run is there, as that of a sweep which was interrupted."""
    out = tmp_path / "sweep"
    shutil.copytree(small_run, out / "dpo.beta=0.1")
    done = duel("sweep", "smoke", "--grid", "dpo.beta=0.1,0.5", "--out", str(out), *SMALL, "--json")
    rows = json.loads(done.stdout)["runs"]
    assert [row["settings"] for row in rows] == [{"dpo.beta": "0.1"}, {"dpo.beta": "0.5"}]
    assert done.stderr.count("] cached") == 6  # the report names where each setting comes from
    assert done.stderr.count("taken from another run") == 4  # data, sft, reward_model, ppo of the second point
    again = duel("sweep", "smoke", "--grid", "dpo.beta=0.1,0.5", "--out", str(out), *SMALL).stdout
    assert again.endswith(f"\nNext: duel report {out}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "smok"], "'smoke'"),
        (["run", "smoke", "--set", "dpo.betta=1"], "beta"),
        (["run", "smoke", "--set", "data.source=missing.jsonl"], "missing.jsonl"),
        (["run", "smoke", "--set", "model=tinny"], "'tiny'"),
        (["run", "smoke", "--only", "dop"], "'dpo'"),
        (["rnu"], "'run'"),
        (["run", "smoke", "--set", "ppo.max_steps=4"], "ppo.total_episodes"),
        (["run", "smoke", "--set", "ppo.missing_eos_penalty=1"], "ppo.missing_eos_penalty"),
        (["winrate", "nothing.json"], "nothing.json"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "tiny", "--data", "reviews", "--judge", "gold", "--out", "x"], "two policies"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = duel(*arguments, cwd=tmp_path, check=2)
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_exit_codes_of_the_process(tmp_path: Path) -> None:
    wrong = duel_process("run", "smok", cwd=tmp_path, check=2)
    assert "'smoke'" in wrong.stderr and "Traceback" not in wrong.stderr and wrong.stdout == ""
    assert "Traceback" in duel_process("--debug", "run", "smok", cwd=tmp_path, check=2).stderr


def test_conversations_without_a_chat_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(ROOT / "toolkit" / "assets" / "tiny", model)
    (model / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(model).chat_template is None
    rows = [
        {"chosen": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}],
         "rejected": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "no"}]}
        for i in range(20)
    ]  # fmt: skip
    data = tmp_path / "chat.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    done = duel(
        "run", "smoke", "--set", f"data.source={data}", "--set", f"model={model}", "--out", str(tmp_path / "r"), check=2
    )
    assert "chat template" in done.stderr


@pytest.mark.fault
def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    out = tmp_path / "full"
    # A limit on the size of files is what a test can set; the write fails in the same place as on a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        done = duel("run", "smoke", "--out", str(out), *SMALL, check=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in done.stderr and "disk" in done.stderr
    assert not (out / "sft").exists()
    duel("run", "smoke", "--out", str(out), *SMALL, "--until", "sft")
    assert (out / "sft" / "model").is_dir()


@pytest.mark.skipif(not os.environ.get("DUEL_REAL_DATA"), reason="DUEL_REAL_DATA names no folder of real data")
def test_hh_harmless_on_real_human_pairs(tmp_path: Path) -> None:
    source = Path(os.environ["DUEL_REAL_DATA"]) / "hh_harmless" / "pairs.jsonl.gz"
    limits = [
        "data.train_prompts=24",
        "data.eval_prompts=12",
        "data.max_prompt_tokens=128",
        "data.max_response_tokens=12",
    ]
    limits += ["ppo.total_episodes=32", "ppo.per_device_train_batch_size=16", "ppo.samples_per_prompt=4"]
    limits += ["evaluate.best_of_n=2", "evaluate.bootstrap=200", f"data.source={source}", "model=tiny"]
    out = tmp_path / "hh"
    duel("run", "hh-harmless", "--out", str(out), *[f"--set={limit}" for limit in limits])
    results = json.loads((out / "results.json").read_text())
    held_out = results["implicit_vs_explicit"]["held_out"]
    for name in ("accuracy_explicit", "accuracy_implicit"):
        assert held_out[name]["n"] > 0
        assert 0 <= held_out[name]["ci_low"] <= held_out[name]["value"] <= held_out[name]["ci_high"] <= 1
    # Nobody neutral judged: the verdict must not be bought from a training signal.
    assert results["verdict"]["winner"] == "undecided" and "no independent judge" in results["verdict"]["sentence"]
    report = json.loads((out / "data" / "report.json").read_text())
    assert report["n_rows_read"] == 1500 and report["conversational"] is True
