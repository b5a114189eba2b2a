"""What ``duel run --dry-run`` says before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import LlamaConfig

from toolkit.errors import StoreError
from toolkit.models.resolve import resolve
from toolkit.preferences.rows import Comparison, PreferenceRow
from toolkit.recipe.files import load_recipe
from toolkit.runs.dry_run import describe, memory_estimate, model_config, render, training_steps
from toolkit.runs.pipeline import RunOptions
from toolkit.runs.plan import STAGE_NAMES

FEW = ("data.train_prompts=20", "data.eval_prompts=5", "data.max_responses=3", "data.max_response_tokens=12")


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return describe(load_recipe("smoke", FEW), tmp_path_factory.mktemp("run") / "new")


def test_what_would_run(described: dict[str, Any]) -> None:
    assert [stage["stage"] for stage in described["stages"]] == list(STAGE_NAMES)
    assert {stage["state"] for stage in described["stages"]} == {"missing"}
    steps = {stage["stage"]: stage["steps"] for stage in described["stages"]}
    recipe = load_recipe("smoke").recipe
    batch = recipe.dpo.per_device_train_batch_size
    assert steps["dpo"] == -(-20 // batch) * recipe.dpo.num_train_epochs
    per_rollout = recipe.ppo.num_ppo_epochs * recipe.ppo.num_mini_batches
    rollouts = recipe.ppo.total_episodes // recipe.ppo.per_device_train_batch_size
    assert (steps["ppo"], described["ppo_rollouts"]) == (rollouts * per_rollout, rollouts)
    assert steps["data"] is steps["evaluate"] is steps["report"] is None
    assert described["data"]["train"]["n_prompts"] == 20 and described["data"]["eval"]["n_prompts"] == 5
    assert described["data"]["train"]["n_responses"] == 60
    assert described["data"]["train"]["n_left_out_responses"] == 60  # of six each


def test_it_says_what_the_limits_leave_out_and_cut(tmp_path: Path) -> None:
    """Every second prompt is too long: others take their place until the numbers are reached."""
    rows = [
        {"prompt": f"Film {i} was {'very ' * (60 * (i % 2))}", "chosen": "good " * 9, "rejected": "bad"}
        for i in range(90)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [f"data.source={data}", "data.eval_fraction=0.3", "data.max_prompt_tokens=50", "data.max_response_tokens=6"]
    sets = [*sets, "data.max_responses=2"]
    enough = describe(
        load_recipe("smoke", [*sets, "data.train_prompts=20", "data.eval_prompts=8"]), tmp_path / "enough"
    )
    assert (enough["data"]["train"]["n_prompts"], enough["data"]["eval"]["n_prompts"]) == (20, 8)
    short = describe(load_recipe("smoke", [*sets, "data.train_prompts=50", "data.eval_prompts=20"]), tmp_path / "short")
    n, n_held_out = (short["data"][side]["n_prompts"] for side in ("train", "eval"))
    assert n + n_held_out == 45 and n < 50
    text = render(short)
    assert f"{n} prompts are there, and data.train_prompts asks for 50" in text
    assert f"{n} of {2 * n} responses (50%) are cut: they have more tokens than data.max_response_tokens = 6" in text
    n_long = short["data"]["train"]["n_long_prompts"]
    assert f"{n_long} prompts are left out: they have more tokens than data.max_prompt_tokens = 50" in text
    assert "are there, and" not in render(enough)


def test_findings_in_the_data_are_listed(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "chosen": f" Good {i}.", "rejected": f" Poor {i}!"} for i in range(40)]
    rows[7]["chosen"] = " caf\u00c3\u00a9"
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    described = describe(load_recipe("smoke", [f"data.source={data}", "data.eval_fraction=0.3"]), tmp_path / "run")
    [finding] = described["findings"]
    assert (finding["kind"], finding["rows"]) == ("encoding", [8])
    [line] = [line for line in render(described).splitlines() if line.strip().startswith("encoding")]
    assert "1 row: " in line and finding["fix"] in line


def test_processes_count_in_the_steps(tmp_path: Path, described: dict[str, Any]) -> None:
    doubled = describe(load_recipe("smoke", FEW), tmp_path / "new", RunOptions(launch=["--num_processes", "2"]))
    steps, alone = ({stage["stage"]: stage["steps"] for stage in run["stages"]} for run in (doubled, described))
    recipe = load_recipe("smoke").recipe
    assert (doubled["processes"], described["processes"]) == (2, 1)
    assert steps["ppo"] == alone["ppo"] // 2 and doubled["ppo_rollouts"] == described["ppo_rollouts"] // 2
    assert steps["dpo"] == -(-20 // (2 * recipe.dpo.per_device_train_batch_size)) * recipe.dpo.num_train_epochs
    assert "2 processes train" in render(doubled) and "processes train" not in render(described)


def test_it_says_which_stages_are_asked_for(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", FEW)
    until = describe(recipe, tmp_path / "new", RunOptions(until="sft"))
    assert [stage["stage"] for stage in until["stages"] if stage["asked"]] == ["data", "sft"]
    [dpo] = (line for line in render(until).splitlines() if line.strip().startswith("dpo "))
    assert dpo.split() == ["dpo", "not", "asked", "for"]
    only = describe(recipe, tmp_path / "new", RunOptions(only="data", force=True))
    assert [(stage["stage"], stage["state"]) for stage in only["stages"] if stage["asked"]] == [("data", "forced")]
    assert {stage["state"] for stage in only["stages"] if not stage["asked"]} == {"missing"}
    with pytest.raises(StoreError, match="needs data, sft"):
        describe(recipe, tmp_path / "new", RunOptions(only="dpo"))


def test_a_budget_takes_the_place_of_the_steps(tmp_path: Path) -> None:
    sets = [*FEW, "ppo.train_tokens=20000", "dpo.train_seconds=90"]
    described = describe(load_recipe("smoke", sets), tmp_path / "new")
    stages = {stage["stage"]: (stage["steps"], stage["until"]) for stage in described["stages"]}
    assert stages["ppo"] == (None, "20,000 response tokens") and stages["dpo"] == (None, "90.0 s")
    assert described["ppo_rollouts"] is None and stages["sft"][0] > 0 and stages["sft"][1] is None
    rows = {row["name"]: row for row in described["arm_differences"]}
    assert "prompts_seen" not in rows and (rows["train_tokens"]["ppo"], rows["train_tokens"]["dpo"]) == (20_000, None)
    text = render(described)
    assert "until 20,000 response tokens" in text and "until 90.0 s" in text


def test_the_example_marks_the_response(described: dict[str, Any]) -> None:
    tokens = described["example"]
    borders = [a["response"] != b["response"] for a, b in zip(tokens, tokens[1:], strict=False)]
    assert sum(borders) == 1 and not tokens[0]["response"] and tokens[-1]["response"]
    text = render(described)
    assert "first training example" in text and f"[{tokens[-1]['text']}]" in text
    assert "train: 20 prompts, 60 responses" in text and "memory: about" in text
    assert not Path(described["out"]).exists()


def test_what_the_arms_will_differ_in(described: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe("smoke").recipe
    rows = {row["name"]: row for row in described["arm_differences"]}
    assert (rows["kl_coef, beta"]["ppo"], rows["kl_coef, beta"]["dpo"]) == (recipe.ppo.kl_coef, recipe.dpo.beta)
    assert (rows["prompts_seen"]["ppo"], rows["prompts_seen"]["dpo"]) == (20, 20) and not rows["prompts_seen"][
        "differs"
    ]
    assert "the arms differ in learning_rate: RM + PPO" in render(described)
    assert "the prompts that their policies" not in render(described)
    short = load_recipe("smoke", [*FEW, "ppo.total_episodes=64", "ppo.samples_per_prompt=4", "dpo.max_steps=1"])
    [seen] = [row for row in describe(short, tmp_path)["arm_differences"] if row["name"] == "prompts_seen"]
    assert (seen["ppo"], seen["dpo"]) == (16, recipe.dpo.per_device_train_batch_size)


def test_steps_count_prompts_for_the_engine_and_pairs_for_trl() -> None:
    def row(name: str, *comparisons: tuple[int, int]) -> PreferenceRow:
        chosen = [Comparison(a, b) for a, b in comparisons]
        return PreferenceRow(prompt_id=name, prompt=name, responses=["a", "b", "c"], comparisons=chosen)

    rows = [row("p", (0, 1), (1, 2)), row("q", (0, 1), (1, 0)), row("r")]  # q's comparisons are a tie
    size = [f"{stage}.per_device_train_batch_size=1" for stage in ("sft", "reward_model", "dpo")]
    size += [f"{stage}.num_train_epochs=2" for stage in ("sft", "reward_model", "dpo")]
    recipe = load_recipe("smoke", [*size, "dpo.trainer=trl"]).recipe
    assert training_steps(recipe, rows) == {"sft": 4, "reward_model": 4, "dpo": 4}  # of r nothing is preferred
    assert training_steps(load_recipe("smoke", [*size, "sft.train_on=all"]).recipe, rows)["sft"] == 6
    off = load_recipe("smoke", [*size, "sft.enabled=false"]).recipe
    assert training_steps(off, rows) == {"sft": 0, "reward_model": 4, "dpo": 4}


def test_memory_by_hand() -> None:
    """A made-up model with a million weights a layer, so that GiB can be added up by hand."""
    config = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=64,
        vocab_size=65536,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    parameters = 64 * 7 * 2**20 + 2**26  # 7 matrices of 1024 x 1024 in a layer, and the embeddings
    sets = ["dpo.per_device_train_batch_size=16"]
    full = memory_estimate(load_recipe("smoke", [*sets, "model.lora=null"]).recipe, config, 128.0)
    assert full == {
        "weights": round(4 * 4 * parameters / 2**30, 2),
        "gradients_and_optimiser": round(2 * 16 * parameters / 2**30, 2),
        "activations": 8.5,  # 34 * 2 bytes of 2048 tokens, 1024 units and 64 layers
        "logits": 0.75,  # 3 * 4 bytes of 1024 tokens and 65536 words
        "total": 33.85,  # 8, 16, 8.5 and 0.75, and 0.6 for the process
    }
    sets += ["model.lora={r: 8, alpha: 16}", "model.dtype=bfloat16"]
    lora = memory_estimate(load_recipe("smoke", sets).recipe, config, 128.0)
    assert (lora["weights"], lora["activations"], lora["logits"]) == (1.0, 4.25, 0.75)
    assert lora["gradients_and_optimiser"] == round(16 * 64 * 8 * (6 * 1024 + 3 * 2048) / 2**30, 2)


def test_the_configuration_of_an_adapter_is_its_bases(folders: Any) -> None:
    assert model_config(resolve(str(folders.rm_adapter))).hidden_size == model_config(resolve("tiny")).hidden_size


@pytest.mark.parametrize("own_source", [True, False])
def test_leaks_are_looked_for_in_the_held_out_split(tmp_path: Path, own_source: bool) -> None:
    """Of another source, which need not have the split to train on, or of the same one."""

    def pairs(first: int, n: int) -> datasets.Dataset:
        numbers = range(first, first + n)
        rows = [{"prompt": f"{k}, {k * k}?", "chosen": f" Good {k}.", "rejected": " Bad."} for k in numbers]
        return datasets.Dataset.from_list(rows)

    train, held_out = pairs(100, 20), pairs(119, 10)
    folders = {"all": {"train": train, "test": held_out}, "train": {"train": train}, "held": {"test": held_out}}
    for name, splits in folders.items():
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / name))
    sets = ["data.eval_split=test", f"data.source={tmp_path / ('train' if own_source else 'all')}"]
    sets += [f"data.eval_source={tmp_path / 'held'}"] if own_source else []
    described = describe(load_recipe("smoke", sets), tmp_path / "run")
    [leak] = [finding for finding in described["findings"] if finding["kind"] == "leak"]
    assert leak["rows"] == [20]  # the one prompt of both, and not every row
    counts = described["data"]
    assert (counts["train"]["n_prompts"], counts["eval"]["n_prompts"]) == (19, 10)
