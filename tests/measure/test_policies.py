"""Which policies an evaluation compares, and how many samples each of them draws."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toolkit.measure.policies import EvaluationSettings, Policy, find_policies
from toolkit.models.resolve import resolve
from toolkit.preferences.rows import PreferenceRow
from toolkit.recipe.schema import EvaluateSection
from toolkit.recipe.training import ModelSection


def trained(folder: Path, **record: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "duel.json").write_text(json.dumps(record))
    return folder


def test_several_samples_go_to_the_policies_that_are_compared(tmp_path: Path) -> None:
    sft = resolve(str(trained(tmp_path / "sft" / "model")))
    for stage in ("ppo", "dpo"):
        trained(tmp_path / stage / "checkpoints" / "step-8", step=8)
        trained(tmp_path / stage / "checkpoints" / "kl-1", step=3, kl_milestone=1.0)
        trained(tmp_path / stage / "model", step=20)
    section = EvaluateSection(samples_per_prompt=3, best_of_n=4)
    base = SimpleNamespace(name="tiny", revision=None)
    context: Any = SimpleNamespace(evaluate=section, sft=SimpleNamespace(enabled=True), model=base)
    policies = find_policies(context, {"ppo": tmp_path / "ppo", "dpo": tmp_path / "dpo"}, sft)
    assert {policy.name: policy.n_samples for policy in policies} == {
        "base": 1, "sft": 3 + 4,
        "rm_ppo@kl-1": 1, "rm_ppo@8": 1, "rm_ppo": 3,
        "dpo@kl-1": 1, "dpo@8": 1, "dpo": 3,
    }  # fmt: skip
    assert [policy.name for policy in policies][2:5] == ["rm_ppo@kl-1", "rm_ppo@8", "rm_ppo"]


def test_policies_that_decide_nothing_may_be_sampled_on_fewer_prompts() -> None:
    rows = [PreferenceRow(f"p{i}", f"prompt {i}", ["a", "b"], []) for i in range(20)]
    ref: Any = None

    def prompts(kind: str, n: int | None, of: list[PreferenceRow] = rows) -> list[str]:
        encoder: Any = None
        settings = EvaluationSettings(
            of, [], encoder, EvaluateSection(checkpoint_prompts=n), ModelSection(name="tiny"), 8, 8, 0
        )
        return [of[i].prompt_id for i in settings.prompts_of(Policy("name", "arm", kind, 0, ref, 1))]

    every = [row.prompt_id for row in rows]
    assert all(prompts(kind, 5) == every for kind in ("sft", "round", "final"))
    few = prompts("base", 5)
    assert len(few) == 5 and few == prompts("checkpoint", 5) and few == [name for name in every if name in few]
    assert few != every[:5] and set(few) == set(prompts("base", 5, rows[::-1]))  # whatever the order of the rows
    assert prompts("base", None) == prompts("base", 99) == every
