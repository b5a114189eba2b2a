"""The command line as a user meets it: real processes, real files, the tiny model."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.running import ROOT, SMALL, duel

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
    "cost",
    "warnings",
}


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "cost"}


@pytest.fixture(scope="module")
def run_folder(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, which these tests go on with."""
    return shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "small")


def test_help_is_fast_and_lists_the_contract() -> None:
    started = time.monotonic()
    text = duel("--help").stdout
    assert time.monotonic() - started < 5  # the target is 0.3 s on an idle machine; scripts/bench measures it
    contract = "run rewards score compare judge winrate label simulate sweep report recipes validate schema env "
    contract += "runs diff watch push completion"
    for command in contract.split():
        assert f"\n  {command} " in text
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "toolkit.cli", "--help"], capture_output=True, text=True, cwd=ROOT
    ).stderr
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
    assert [n for n in names if "@" not in n] == [
        "base",
        "sft",
        "rm_ppo",
        "dpo",
        "best_of_2_implicit",
        "best_of_2_rm",
    ] or {n for n in names if "@" not in n} == {"base", "sft", "rm_ppo", "dpo", "best_of_2_implicit", "best_of_2_rm"}
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


def test_one_seed_gives_one_result_and_another_seed_another(run_folder: Path, tmp_path: Path) -> None:
    duel("run", "smoke", "--out", str(tmp_path / "same"), *SMALL)
    first = json.loads((run_folder / "results.json").read_text())
    second = json.loads((tmp_path / "same" / "results.json").read_text())
    assert without_times(first) == without_times(second)
    duel("run", "smoke", "--out", str(tmp_path / "other"), *SMALL, "--set=seed=1")
    third = json.loads((tmp_path / "other" / "results.json").read_text())
    assert third["win_rates"] != first["win_rates"]


def test_killed_in_training_it_continues_to_the_same_result(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "toolkit.cli", "run", "smoke", "--out", str(out), *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    work = out / ".work"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(work.glob("ppo-*/trainer/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "ppo").exists(), "a stage that was killed is not taken for whole"
    assert not (out / "results.json").exists()
    rerun = duel("run", "smoke", "--out", str(out), *SMALL)
    assert "sft] cached" in rerun.stderr
    killed = json.loads((out / "results.json").read_text())
    assert without_times(killed) == without_times(json.loads((run_folder / "results.json").read_text()))


def test_interrupt_exits_130_and_says_how_to_continue(tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    command = [sys.executable, "-m", "toolkit.cli", "run", "smoke", "--out", str(out), *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list((out / ".work").glob("sft-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "again to continue" in stderr and "Traceback" not in stderr
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"


def test_json_is_one_document_and_nothing_else(run_folder: Path) -> None:
    printed = duel("run", "smoke", "--out", str(run_folder), *SMALL, "--json").stdout
    document = json.loads(printed)
    assert document["status"] == "done" and document["verdict"]["sentence"]


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


def test_rewards_and_score_on_a_run(run_folder: Path, tmp_path: Path) -> None:
    policy, reference, rm = (str(run_folder / name / "model") for name in ("dpo", "sft", "reward_model"))
    out = tmp_path / "rewards.parquet"
    limits = ["--limit", "12", "--json"]
    summary = json.loads(
        duel(
            "rewards", "--policy", policy, "--reference", reference, "--data", "reviews", "--rm", rm, "--per-token",
            "--with-ids", "--out", str(out), *limits,
        ).stdout
    )  # fmt: skip
    assert {"n_prompts", "n_responses", "accuracy", "accuracy_ci", "seconds", "responses_per_second"} <= summary.keys()
    assert summary["beta"] == 0.1 and summary["n_responses"] == 72
    for row in pq.read_table(out).to_pylist():
        assert row["implicit_reward"] == pytest.approx(0.1 * (row["policy_logp"] - row["reference_logp"]), abs=1e-6)
        assert sum(row["token_rewards"]) == pytest.approx(row["implicit_reward"], abs=1e-6)
        assert len(row["response_ids"]) == row["n_tokens"] == len(row["token_rewards"])
        assert row["running_rewards"] == pytest.approx([*accumulate(row["token_rewards"])], abs=1e-9)
    other = ["rewards", "--policy", policy, "--reference", "tiny", "--data", "reviews"]
    for launch in ([], ["--", "--num_processes", "1"]):  # the launcher itself would exit with 1
        wrong = duel(*other, "--out", str(tmp_path / "w.parquet"), *launch, check=2)
        assert "--any-reference" in wrong.stderr and not (tmp_path / "w.parquet").exists()
    scored = json.loads(
        duel("score", "--rm", rm, "--data", "reviews", "--out", str(tmp_path / "s.parquet"), *limits).stdout
    )
    assert scored["n_responses"] == 72
    by_rewards = {(r["prompt_id"], r["response_index"]): r["explicit_reward"] for r in pq.read_table(out).to_pylist()}
    for row in pq.read_table(tmp_path / "s.parquet").to_pylist():
        assert row["explicit_reward"] == pytest.approx(by_rewards[row["prompt_id"], row["response_index"]], abs=1e-4)


def test_rewards_on_what_the_policies_wrote(run_folder: Path, tmp_path: Path) -> None:
    """The same figures as the run's own evaluation, which scored the samples when it drew them."""
    policy, reference, rm = (str(run_folder / name / "model") for name in ("dpo", "sft", "reward_model"))
    out = tmp_path / "rewards.parquet"
    given = ["--policy", policy, "--reference", reference, "--rm", rm, "--with-ids", "--out", str(out), "--json"]
    data, samples = run_folder / "data" / "eval.parquet", run_folder / "samples.parquet"
    found = json.loads(duel("rewards", *given, "--data", str(data), "--samples", str(samples)).stdout)
    of_run = json.loads((run_folder / "results.json").read_text())["implicit_vs_explicit"]["on_samples"]
    by_source = found["implicit_vs_explicit"]["samples"]
    assert by_source.keys() == {"sft and base", "PPO", "DPO"}
    for source, figures in by_source.items():
        assert figures["n_pairs"] == of_run[source]["n_pairs"]
        for name in ("accuracy_explicit", "accuracy_implicit", "agreement", "margin_correlation"):
            assert figures[name]["value"] == pytest.approx(of_run[source][name]["value"], abs=1e-3), name
    drawn = pq.read_table(samples).to_pylist()
    written = [row for row in pq.read_table(out).to_pylist() if row["source"] != "data"]

    def sampled(rows: list[dict[str, Any]], policy: str, reward: str) -> list[tuple[Any, ...]]:
        return sorted((row["prompt_id"], row[policy], row["response_ids"], round(row[reward], 3)) for row in rows)

    expected = [row for row in drawn if row["kind"] != "best_of_n"]
    assert sampled(written, "source", "explicit_reward") == sampled(expected, "policy", "explicit_reward")
    assert found["n_prompts"] == 12
    wrong = duel("rewards", *given, "--data", str(data), "--samples", str(out), "--force", check=2)
    assert "samples.parquet" in wrong.stderr


def test_labels_by_principles_are_a_data_source(tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl.gz"
    shared = ["--data", "reviews", "--limit", "12", "--judge", "llm:tiny", "--principles", "hhh", "--out", str(out)]
    made = json.loads(duel("label", *shared, "--json").stdout)
    assert made["n_prompts"] == 12 and made["n_failed"] == 0
    assert made["judge_usage"]["n_questions"] == 2 * made["n_comparisons"] and made["judge_usage"]["prompt_tokens"] > 0
    plan = duel("run", "smoke", f"--set=data.source={out}", "--dry-run", "--out", str(tmp_path / "x"),
                "--set=data.eval_fraction=0.4", "--set=data.eval_prompts=4")  # fmt: skip
    assert "reward_model" in plan.stdout and "dpo" in plan.stdout
    assert "exists" in duel("label", *shared, check=2).stderr


def test_compare_simulate_and_winrate(run_folder: Path, tmp_path: Path) -> None:
    sft, dpo = (str(run_folder / name / "model") for name in ("sft", "dpo"))
    shared = ["--data", "reviews", "--limit", "10", "--max-new-tokens", "10"]
    rows = json.loads(
        duel("compare", dpo, sft, "tiny", *shared, "--judge", "gold", "--out", str(tmp_path / "c"), "--json").stdout
    )["win_rates"]
    assert len(rows) == 3 and all(row["n_judged"] == 10 for row in rows)
    [ranking] = json.loads((tmp_path / "c" / "results.json").read_text())["bradley_terry"]
    assert {row["policy"] for row in ranking["policies"]} == {dpo, sft, "tiny"} and ranking["n_judged"] == 30
    again = json.loads(duel("winrate", str(tmp_path / "c" / "judgements.parquet"), "--json").stdout)["win_rates"]
    assert [row["win_rate"] for row in again] == [row["win_rate"] for row in rows]
    out = tmp_path / "sim.jsonl.gz"
    made = json.loads(duel("simulate", "--policy", "tiny", "--k", "3", *shared, "--out", str(out), "--json").stdout)
    assert made["n_prompts"] == 10
    plan = duel(
        "run",
        "smoke",
        f"--set=data.source={out}",
        "--dry-run",
        "--out",
        str(tmp_path / "x"),
        "--set=data.eval_fraction=0.4",
    )
    assert "comparisons" in plan.stdout


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


def test_sweep_shares_equal_stages(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    done = duel("sweep", "smoke", "--grid", "dpo.beta=0.1,0.5", "--out", str(out), *SMALL, "--json")
    rows = json.loads(done.stdout)["runs"]
    assert [row["settings"] for row in rows] == [{"dpo.beta": "0.1"}, {"dpo.beta": "0.5"}]
    assert done.stderr.count("taken from another run") == 4  # data, sft, reward_model, ppo of the second point


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


def test_conversations_without_a_chat_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    import shutil

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


def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    out = tmp_path / "full"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    # A limit on the size of files is what a test can set; the write fails in the same place as on a full disk.
    done = duel("run", "smoke", "--out", str(out), *SMALL, check=None, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "disk" in done.stderr
    assert not (out / "sft").exists()
    duel("run", "smoke", "--out", str(out), *SMALL, "--until", "sft")
    assert (out / "sft" / "model").is_dir()


@pytest.mark.skipif(not os.environ.get("DUEL_REAL_DATA"), reason="DUEL_REAL_DATA names no folder of real data")
def test_hh_harmless_on_real_human_pairs(tmp_path: Path) -> None:
    source = Path(os.environ["DUEL_REAL_DATA"]) / "hh_harmless" / "pairs.jsonl.gz"
    limits = [
        "data.train_prompts=48",
        "data.eval_prompts=24",
        "data.max_prompt_tokens=128",
        "data.max_response_tokens=24",
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
