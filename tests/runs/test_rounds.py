"""Further rounds of a run: what they go on from, what stays fixed, what is reused, what is refused before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.running import SMALL, duel

from toolkit.engine.engine import Engine
from toolkit.errors import RecipeError
from toolkit.files import read_json, read_table
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.load import load_policy
from toolkit.models.resolve import resolve, training_record
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo.assembly import models_of_run
from toolkit.preferences.fresh import FRESH_REWARDS_FILE
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.recipe.rounds import seed_of_round
from toolkit.recipe.training import Lora, ModelSection
from toolkit.runs.dry_run import describe, render
from toolkit.runs.plan import PlannedStage, plan_stages, stages_of
from toolkit.runs.store import STAGE_FILE, RunFolder
from toolkit.stages import dpo, labels, ppo, reward_model
from toolkit.stages.contexts import context_of
from toolkit.training.labelled import read_labelled

pytestmark = pytest.mark.e2e
ROUNDS = "rounds={number: 2, prompts: 16, samples_per_prompt: 3, label_budget: 20}"
SETTINGS = [setting.removeprefix("--set=") for setting in SMALL]
FURTHER = ["labels@2", "reward_model@2", "ppo@2", "dpo@2"]
ARMS = ("rm_ppo", "dpo")


@pytest.fixture(scope="module")
def rounds_run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished small run with a second round, which was added to it."""
    out = tmp_path_factory.mktemp("rounds") / "small"
    shutil.copytree(small_run, out)
    done = duel("run", "smoke", "--out", str(out), *SMALL, f"--set={ROUNDS}")
    for stage in ("data", "sft", "reward_model", "ppo", "dpo"):
        assert f"{stage}] cached" in done.stderr
    return out


def plan(folder: Path, *sets: str) -> list[PlannedStage]:
    return plan_stages(load_recipe("smoke", [*SETTINGS, *sets]), RunFolder(folder))


def record(run: Path, stage: str) -> dict[str, Any]:
    return read_json(run / stage / STAGE_FILE)


# ---------------------------------------------------------------- a run of two rounds


def test_both_arms_go_on_with_the_same_number_of_labels(rounds_run: Path) -> None:
    manifest, results = read_json(rounds_run / "manifest.json"), read_json(rounds_run / "results.json")
    assert list(manifest["stages"]) == ["data", "sft", "reward_model", "ppo", "dpo", *FURTHER, "evaluate", "report"]
    first, second = results["rounds"]
    policies = {row["policy"]: row for row in results["policies"]}
    for arm, stage in zip(ARMS, ("ppo", "dpo"), strict=True):
        assert second[arm]["labels"]["labels"] == second[arm]["labels_so_far"] == 20 and first[arm]["labels"] is None
        assert (first[arm]["policy"], second[arm]["policy"]) == (f"{arm}@round-1", arm)
        for entry in (first[arm], second[arm]):
            assert entry["kl_nats"] == policies[entry["policy"]]["kl_nats"]
            assert entry["win_rate_over_sft"]["gold"]["n_judged"] == 12
        assert first[arm]["fresh_accuracy"]["n"] == 16 and second[arm]["fresh_accuracy"] is None
        before, after = (training_record(resolve(str(rounds_run / name / "model"))) for name in (stage, f"{stage}@2"))
        assert after["reference_fingerprint"] == before["reference_fingerprint"]
        assert after["step"] == 2 * before["step"] if arm == "rm_ppo" else after["step"] > before["step"]
        assert after["train_tokens"] > before["train_tokens"] and after["wall_s"] > before["wall_s"]
    assert first["rm_ppo_over_dpo"]["gold"]["n_judged"] == second["rm_ppo_over_dpo"]["gold"]["n_judged"] == 12
    assert [row["step"] for row in results["policies"] if row["arm"] == "rm_ppo"] == [4, 8, 12, 16]
    spent = results["cost"]["labels"]
    assert {arm: spent[arm]["labels"] for arm in ARMS} == {"rm_ppo": 20, "dpo": 20}
    assert {row["stage"]: row["arm"] for row in results["cost"]["stages"]}["reward_model@2"] == "rm_ppo"
    tokens = results["cost"]["arms"]["dpo"]["response_tokens_trained"]
    assert tokens == sum(record(rounds_run, name)["metrics"]["response_tokens_trained"] for name in ("dpo", "dpo@2"))
    # The reward model saw the data and the new labels, DPO the new labels alone.
    assert record(rounds_run, "dpo@2")["metrics"]["pairs"] == 20
    assert record(rounds_run, "reward_model@2")["metrics"]["steps"] > record(rounds_run, "dpo@2")["metrics"]["steps"]


def test_reports_logs_and_commands_know_the_rounds(rounds_run: Path) -> None:
    page = (rounds_run / "report.html").read_text(encoding="utf-8")
    assert '<section id="rounds"' in page and "PPO, round 2" in page and "labels (round 2)" in page
    logged = {json.loads(line)["stage"] for line in (rounds_run / "metrics.jsonl").read_text().splitlines()}
    assert {"ppo", "ppo@2"} <= logged
    for arguments in (("report",), ("runs",)):
        duel(*arguments, str(rounds_run))
    again = duel("run", "smoke", "--out", str(rounds_run), *SMALL, f"--set={ROUNDS}", "--only", "ppo@2")
    assert "ppo@2] cached" in again.stderr
    wrong = duel("run", "smoke", "--out", str(rounds_run), *SMALL, f"--set={ROUNDS}", "--until", "ppo@3", check=2)
    assert "there is no stage 'ppo@3'" in wrong.stderr and "'ppo@2'" in wrong.stderr


def test_a_further_round_reuses_the_earlier_ones(rounds_run: Path) -> None:
    more = plan(rounds_run, ROUNDS.replace("number: 2", "number: 3"))
    states = {planned.spec.name: planned.state.status for planned in more}
    assert [name for name, status in states.items() if status == "cached"] == [
        *("data", "sft", "reward_model", "ppo", "dpo", "labels@2", "reward_model@2", "ppo@2", "dpo@2")
    ]
    fewer = {planned.spec.name: planned.state.status for planned in plan(rounds_run)}
    assert fewer["evaluate"] == "shelved" and "ppo@2" not in fewer
    other = {p.spec.name: p.state.status for p in plan(rounds_run, ROUNDS.replace("budget: 20", "budget: 19"))}
    assert other["dpo"] == "cached" and {other[name] for name in FURTHER} == {"stale"}


# ---------------------------------------------------------------- what training goes on from


def trees_of(run: Path) -> list[Tree]:
    rows = from_parquet(run / "data" / "eval.parquet")[:4]
    encoder = text_encoder(load_tokenizer(resolve(str(run / "sft" / "model"))), rows[0].prompt)
    return [encoder.encode(row.prompt, row.responses, 12).tree for row in rows]


def logps_of(folder: Path, trees: list[Tree]) -> torch.Tensor:
    engine = Engine(load_policy(resolve(str(folder)), ModelSection(dtype="float32")), 0, dtype=torch.float32)
    return torch.cat([logps for of_tree in engine.logps(trees) for logps in of_tree])


@pytest.fixture(scope="module")
def adapters_run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both arms and the labels of a second round with LoRA, on the SFT policy of the small run."""
    out = tmp_path_factory.mktemp("adapters")
    for name in ("data", "sft"):
        shutil.copytree(small_run / name, out / name)
    for name, stage in (("reward_model", reward_model), ("ppo", ppo), ("dpo", dpo), ("labels@2", labels)):
        (out / name).mkdir()
        inputs = {role: out / role for role in ("data", "sft", "reward_model", "ppo", "dpo")}
        stage.run(with_adapters(name), inputs, out / name, Reporter(quiet=True))  # type: ignore[attr-defined]
    return out


def with_adapters(stage: str, *sets: str) -> Any:
    learns = ("ppo.learning_rate=0.02", "dpo.learning_rate=0.02")
    return context_of(
        stage, load_recipe("smoke", [*SETTINGS, "model.lora={r: 4, alpha: 8}", *learns, ROUNDS, *sets]).recipe
    )


@pytest.mark.invariant
@pytest.mark.parametrize("kind", ["adapters", "all weights"])
def test_the_reference_of_a_further_round_is_sft(
    small_run: Path, adapters_run: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """A policy that comes with a trained adapter is not its own reference: the KL is measured to SFT."""
    run, lora = (adapters_run, Lora(r=4, alpha=8)) if kind == "adapters" else (small_run, None)
    sft, before = (resolve(str(run / name / "model")) for name in ("sft", "ppo"))
    section = ModelSection(name="tiny", dtype="float32", lora=lora)
    reward, tokenizer = resolve(str(run / "reward_model" / "model")), load_tokenizer(sft)
    models, _ = models_of_run(sft, reward, section, tokenizer, value_head_init="zero", previous=before)
    trees = trees_of(run)
    batch = models.engine.pack(trees)
    policy, _ = models.policy_logps(batch, 1.0)
    reference = models.reference_logps(batch, 1.0)
    expected = [logps_of(run / name / "model", trees) for name in ("ppo", "sft")]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    assert torch.allclose(policy.detach().cpu(), expected[0], atol=1e-4)
    assert torch.allclose(reference.cpu(), expected[1], atol=1e-4)
    assert sum(weight.requires_grad for weight in models.policy_parameters()) == len(models.policy_parameters()) > 0


@pytest.mark.invariant
def test_adapters_go_on_from_the_round_before(adapters_run: Path, tmp_path: Path) -> None:
    """With a learning rate of almost 0 a round ends with the policy and the reward model that it began with."""
    still = [f"{section}.learning_rate=1e-30" for section in ("reward_model", "ppo", "dpo")]
    base = {name: adapters_run / name for name in ("data", "sft")}
    read = {
        "reward_model@2": {"previous": adapters_run / "reward_model", "labels@2": adapters_run / "labels@2"},
        "ppo@2": {"previous": adapters_run / "ppo", "reward_model": adapters_run / "reward_model"},
        "dpo@2": {"previous": adapters_run / "dpo", "labels": adapters_run / "labels@2"},
    }
    metrics = {}
    for name, stage in (("reward_model@2", reward_model), ("ppo@2", ppo), ("dpo@2", dpo)):
        (tmp_path / name).mkdir()
        context = with_adapters(name, *still)
        metrics[name] = stage.run(context, {**base, **read[name]}, tmp_path / name, Reporter(quiet=True))  # type: ignore[attr-defined]
    trees = trees_of(adapters_run)
    for arm in ("ppo", "dpo"):
        logps = logps_of(tmp_path / f"{arm}@2" / "model", trees)
        assert torch.allclose(logps, logps_of(adapters_run / arm / "model", trees), atol=1e-5), arm
    # PPO's first rollout is of the policy before, and already away from SFT.
    assert metrics["ppo@2"]["history"][0]["objective/kl"] > 0.05
    assert metrics["ppo@2"]["history"][0]["policy/first_ratio_error"] < 1e-4

    sft = resolve(str(adapters_run / "sft" / "model"))
    rows = from_parquet(adapters_run / "labels@2" / "dpo.parquet")
    examples = read_labelled(adapters_run / "labels@2", "dpo", text_encoder(load_tokenizer(sft), rows[0].prompt))
    fresh = [row["rewards"] for row in read_table(tmp_path / "dpo@2" / FRESH_REWARDS_FILE)]
    beta = with_adapters("dpo").dpo.beta
    scored = [Tree(example.tree.prompt_ids, [ids]) for example in examples for ids in example.tree.response_ids]
    sums = [
        [part.sum() for part in logps_of(adapters_run / name / "model", scored).split(list(map(n_ids, scored)))]
        for name in ("dpo", "sft")
    ]
    expected = [beta * float(policy - reference) for policy, reference in zip(*sums, strict=True)]
    assert [reward for rewards in fresh for reward in rewards] == pytest.approx(expected, abs=1e-4)


def n_ids(tree: Tree) -> int:
    return sum(map(len, tree.response_ids))


# ---------------------------------------------------------------- the plan, and what is refused


def test_stages_of_rounds_read_what_they_go_on_from() -> None:
    of = {stage.name: stage for stage in stages_of(3)}
    assert of["labels@3"].inputs == {"data": "data", "sft": "sft", "ppo": "ppo@2", "dpo": "dpo@2"}
    assert of["reward_model@3"].inputs["previous"] == "reward_model@2"
    assert [name for name in of["reward_model@3"].inputs if name.startswith("labels")] == ["labels@2", "labels@3"]
    assert of["ppo@3"].inputs | {} == {
        "data": "data",
        "sft": "sft",
        "reward_model": "reward_model@3",
        "previous": "ppo@2",
    }
    assert of["dpo@3"].inputs["labels"] == "labels@3" and of["dpo@3"].inputs["previous"] == "dpo@2"
    evaluated = of["evaluate"].inputs
    assert (evaluated["ppo"], evaluated["ppo@1"], evaluated["ppo@2"]) == ("ppo@3", "ppo", "ppo@2")
    assert [stage.name for stage in stages_of(1)] == [
        *("data", "sft", "reward_model", "ppo", "dpo", "evaluate", "report")
    ]
    assert len({seed_of_round(0, round_) for round_ in range(1, 9)}) == 8 and seed_of_round(7, 1) == 7


def test_keys_without_rounds_are_those_of_one_round(tmp_path: Path) -> None:
    alone, one = ({p.spec.name: p.key for p in plan(tmp_path, *sets)} for sets in ((), ("rounds=1",)))
    assert {name for name in alone if alone[name] != one[name]} == {"report"}  # the page shows the recipe


def test_the_dry_run_names_the_rounds(tmp_path: Path) -> None:
    text = render(describe(load_recipe("smoke", [*SETTINGS, ROUNDS]), tmp_path / "run"))
    assert "labels@2" in text and "at most 20 labels for each arm" in text
    assert len([line for line in text.splitlines() if line.startswith("  ppo") and "8 steps" in line]) == 2


@pytest.mark.parametrize(
    ("rounds", "what", "where"),
    [
        ("{prompts: 25}", "asks for 25 training prompts, and there are 24", "rounds.prompts"),
        ("{labels: 'python:no_such_module:f'}", "there is no module 'no_such_module'", "rounds.labels"),
        ("{labels: 'llm:tiny', principles: missing.txt}", "no such file of principles", "missing.txt"),
        ("{labels: 'llm:tiny', principles: hhh, judge: {template: choice}}", "does not show the principle", "template"),
        ("{labels: 'llm:tiny', judge: {template: nope.yaml}}", "no such judge template", "nope.yaml"),
    ],
)
def test_what_cannot_label_is_refused_before_training(rounds: str, what: str, where: str, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        refused = duel("run", "smoke", "--out", str(tmp_path), *SMALL, f"--set=rounds={rounds}", *more, check=2)
        assert what in refused.stderr and where in refused.stderr
    assert not (tmp_path / "sft").exists()


def test_gold_labels_need_a_gold_reward(tmp_path: Path) -> None:
    pairs = [{"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(40)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    sets = [f"--set=data.source={data}", "--set=rounds=2"]
    refused = duel("run", "smoke", "--out", str(tmp_path / "run"), *SMALL, *sets, check=2)
    assert "the data has no gold reward" in refused.stderr and "rounds.labels" in refused.stderr
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    ("sets", "what"),
    [
        (["rounds=2", "ppo.reward=length"], "ppo.reward"),
        (["rounds=2", "dpo.online={labels: rm}"], "dpo.online"),
        (["rounds=2", "dpo.trainer=trl"], "dpo.trainer"),
        (["rounds=2", "reward_model.trainer=trl"], "reward_model.trainer"),
        (["rounds=2", "reward_model.annotators=heads"], "reward_model.annotators"),
        (["rounds=2", "ppo.train_tokens=1000"], "ppo.train_tokens"),
        (["rounds=2", "dpo.kl_milestones=[1]"], "dpo.kl_milestones"),
        (["rounds=2", "study.seeds=2", "evaluate.judges=[gold]"], "a study trains each trial once"),
        (["rounds={labels: rm}"], "own reward model cannot label"),
        (["rounds={labels: 'file:x.jsonl'}"], "cannot label new samples"),
        (["rounds={labels: 'python:x'}"], "is incomplete"),
        (["rounds={labels: gold, principles: hhh}"], "only a language model reads principles"),
        (["rounds={labels: gold, judge: {template: choice}}"], "options of language models"),
        (["rounds=0"], "rounds.number must be a whole number > 0"),
        (["rounds={label_budget: 0}"], "rounds.label_budget must be a whole number > 0"),
        (["rounds={samples_per_prompt: 1}"], "rounds.samples_per_prompt must be a whole number >= 2"),
        (["rounds=true"], "rounds must be a section"),
        (["rounds=three"], "rounds must be a section"),
    ],
)
def test_settings_that_rounds_do_not_take(sets: list[str], what: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe("smoke", sets)
    assert what in str(refused.value) and refused.value.fix


def test_a_number_is_short_for_a_section(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nmodel: tiny\nrounds: 3\n", encoding="utf-8")
    loaded = load_recipe(str(file), ["rounds.labels=rm:tiny"])
    assert loaded.recipe.rounds is not None
    assert (loaded.recipe.rounds.number, loaded.recipe.rounds.labels) == (3, "rm:tiny")
    assert loaded.origins["rounds.number"] == "file:mine.yaml:3"
    assert load_recipe(str(file), ["rounds=1", "ppo.reward=length"]).recipe.rounds is not None
