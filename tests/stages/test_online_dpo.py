"""DPO on the policy's own samples: one step against a loop, what must not change it, and a run with it."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.running import SMALL, duel
from support.small_models import one_response

from toolkit.engine.engine import Engine
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import resolve, training_record
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.recipe.training import ModelSection
from toolkit.stages import dpo
from toolkit.stages.contexts import DpoContext, context_of
from toolkit.training.online import OnlineTrainer, SampledPrompts
from toolkit.training.trainer import EngineTrainer

pytestmark = [pytest.mark.invariant, pytest.mark.e2e]

SETTINGS = [setting.removeprefix("--set=") for setting in SMALL]
FP32 = ModelSection(name="tiny", dtype="float32", lora=None)


def context_with(*sets: str) -> DpoContext:
    context = context_of("dpo", load_recipe("smoke", [*SETTINGS, "dpo.online={labels: rm}", *sets]).recipe)
    assert isinstance(context, DpoContext)
    return context


def inputs_of(run: Path) -> dict[str, Path]:
    return {name: run / name for name in ("data", "sft", "reward_model")}


def scores_by_first_id(sampled: SampledPrompts) -> list[list[float]]:
    return [[float(ids[0] % 5) for ids in tree.response_ids] for tree in sampled.trees]


def test_a_step_is_what_a_loop_over_pairs_gives(small_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The samples are the policy's, the comparisons the reward model's, the loss is Rafailov et al.'s equation 7."""
    monkeypatch.setattr(dpo, "best_device", lambda: torch.device("cpu"))
    seen: list[tuple[list[Any], list[float]]] = []
    step = EngineTrainer.training_step

    def recorded(self: Any, model: Any, inputs: Any, n: Any = None) -> torch.Tensor:
        loss = step(self, model, inputs, n)
        trees = [tree for batch in inputs["batch"] for tree in batch.trees.trees]
        seen.append((trees, [float(loss), *(float(v) for v in self.values["objective/score"][-1])]))
        return loss

    monkeypatch.setattr(EngineTrainer, "training_step", recorded)
    sets = ("dpo.max_steps=2", "dpo.online={labels: rm, samples_per_prompt: 3}", "dpo.warmup_ratio=0")
    dpo.run(context_with(*sets, "dpo.num_checkpoints=2"), inputs_of(small_run), tmp_path, Reporter(quiet=True))
    # The first step starts at the reference; the second has the policy of the first checkpoint.
    sft = load_policy(resolve(str(small_run / "sft" / "model")), FP32)
    policy = load_policy(resolve(str(tmp_path / "checkpoints" / "step-1")), FP32)
    reward = load_reward_model(resolve(str(small_run / "reward_model" / "model")), FP32)
    beta = context_with().dpo.beta
    for number, (trees, (loss, *_)) in enumerate(seen):
        total = n_pairs = 0.0
        for tree in trees:
            with torch.no_grad():
                inputs = [torch.tensor([tree.prompt_ids + ids]) for ids in tree.response_ids]
                scores = [reward(input_ids=ids).logits.item() for ids in inputs]
                ratios = [
                    float(
                        (
                            one_response(p, tree.prompt_ids, ids, 1.0)[0]
                            - one_response(sft, tree.prompt_ids, ids, 1.0)[0]
                        ).sum()
                    )
                    for p in [policy if number else sft]
                    for ids in tree.response_ids
                ]
            losses = [
                math.log1p(math.exp(-beta * (ratios[i] - ratios[j])))
                for i in range(3)
                for j in range(3)
                if scores[i] > scores[j] and tree.response_ids[i] != tree.response_ids[j]
            ]
            n_pairs += len(losses)
            total += sum(losses) / len(losses) / len(trees) if losses else 0.0
        assert n_pairs > 10 and loss == pytest.approx(total, abs=1e-4)
        assert loss == pytest.approx(math.log(2), abs=1e-4) or number == 1


@pytest.mark.parametrize("lora", ["null", "{r: 4, alpha: 8}"])
def test_resume_and_accumulation_change_nothing(small_run: Path, tmp_path: Path, monkeypatch: Any, lora: str) -> None:
    sets = (f"model.lora={lora}", "dpo.max_steps=4", "dpo.logging_steps=1", "dpo.lr_scheduler_type=constant")
    sets += ("dpo.adam_epsilon=1", "dpo.learning_rate=1", "dpo.kl_milestones=[50]")
    monkeypatch.setattr(dpo, "labels_by", lambda *_: scores_by_first_id)
    whole = dpo.run(context_with(*sets), inputs_of(small_run), tmp_path / "whole", Reporter(quiet=True))
    assert whole["labels"] == 4 * 16 * 2 - 2 * 2 * (16 - 8)  # two steps of an epoch of 24 prompts: 16 and 8
    assert whole["response_tokens_trained"] > 0 and whole["prompts_seen"] == 24
    assert all("objective/kl" in entry and "objective/score" in entry for entry in whole["history"])

    cut = ("dpo.per_device_train_batch_size=8", "dpo.gradient_accumulation_steps=2")
    parts = dpo.run(context_with(*sets, *cut), inputs_of(small_run), tmp_path / "parts", Reporter(quiet=True))
    assert parts["history"][0]["objective/score"] == pytest.approx(whole["history"][0]["objective/score"], abs=1e-9)

    training_step, steps = OnlineTrainer.training_step, []

    def interrupted(self: Any, *args: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return training_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dpo.run(context_with(*sets), inputs_of(small_run), tmp_path / "part", Reporter(quiet=True))
    resumed = dpo.run(context_with(*sets), inputs_of(small_run), tmp_path / "part", Reporter(quiet=True))
    for name in ("labels", "response_tokens_trained", "steps"):
        assert resumed[name] == whole[name]
    [weights] = (tmp_path / "whole" / "model").glob("*model.safetensors")
    for name, weight in load_file(weights).items():
        torch.testing.assert_close(weight, load_file(tmp_path / "part" / "model" / weights.name)[name], msg=name)


def test_a_run_with_online_dpo_ends_in_its_report(small_run: Path, tmp_path: Path) -> None:
    """Behind the stages that a run with offline DPO has as well."""
    run = shutil.copytree(small_run, tmp_path / "run")
    done = duel("run", "smoke", *SMALL, "--set", "dpo.online={labels: rm}", "--out", str(run), "--json")
    assert (run / "report.html").is_file() and json.loads(done.stdout)
    record = json.loads((run / "dpo" / "stage.json").read_text(encoding="utf-8"))
    assert "input reward_model" in record["fields"] and record["fields"]["dpo.online.labels"] == "rm"
    assert record["metrics"]["labels"] == 2 * 24 and "pairs" not in record["metrics"]
    written = training_record(resolve(str(run / "dpo" / "model")))
    assert (written["arm"], written["online"]) == ("dpo", "rm")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    [said] = [d["sentence"] for d in results["arm_differences"] if d["name"] == "online"]
    assert "DPO trains on the policy's samples" in said


def test_labels_of_other_judges(small_run: Path, tmp_path: Path) -> None:
    rows = from_parquet(small_run / "data" / "train.parquet")
    assert rows[0].gold is not None
    inputs = inputs_of(small_run)
    for labels in ("gold", f"rm:{inputs['reward_model'] / 'model'}"):
        context = context_with(f"dpo.online.labels={labels}", "dpo.max_steps=1")
        del_rm = {name: folder for name, folder in inputs.items() if name != "reward_model"}
        record = dpo.run(context, del_rm, tmp_path / labels[:2], Reporter(quiet=True))
        assert record["labels"] == 2 * 16
    with pytest.raises(Exception, match="no gold reward"):
        context = context_with("dpo.online.labels=gold")
        bare = [type(row)(row.prompt_id, row.prompt, row.responses, row.comparisons) for row in rows]
        engine = Engine(load_policy(resolve("tiny"), FP32), 0, dtype=torch.float32)
        assert context.dpo.online is not None
        dpo.online_data(context, context.dpo.online, bare, partial(str), engine, None, inputs)  # type: ignore[arg-type]
