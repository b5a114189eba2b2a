"""What an evaluation takes as evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import run_folder
from support.run_folder import write_run

from toolkit.evals.summary import overoptimization_by_arm
from toolkit.files import read_json


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_run(
        tmp_path_factory.mktemp("run") / "run", checkpoints=4, n_prompts=40, judge_names=("gold", "implicit")
    )
    return dict(read_json(folder / "results.json"))


def test_dpos_implicit_reward_on_its_own_samples_is_no_evidence(results: dict[str, Any]) -> None:
    for row in results["policies"]:
        of_dpo = row["arm"] == "dpo"
        assert (row["implicit_reward"]["value"] is None) == of_dpo
        assert (row["implicit_reward_reason"] is not None) == of_dpo
    for row in results["frontier"]:
        assert (row["implicit_reward"]["value"] is None) == (row["arm"] == "dpo")
        assert ("implicit" in row["win_rate_over_sft"]) == (row["arm"] not in ("dpo", "sft"))
    dpo, ppo = (results["overoptimization"][arm] for arm in ("dpo", "rm_ppo"))
    assert all(row["implicit_reward"] is None for row in dpo["rows"])
    assert dpo["fits"]["implicit_reward"]["rl"] is None and "beta times" in dpo["fits"]["implicit_reward"]["reason"]
    assert all(row["implicit_reward"] is not None for row in ppo["rows"])  # PPO was not trained on it


def test_an_accuracy_has_one_interval(results: dict[str, Any]) -> None:
    held_out = results["implicit_vs_explicit"]["held_out"]
    for name in ("explicit", "implicit"):
        assert results["rm_quality"][name]["accuracy"] == held_out[f"accuracy_{name}"]


def test_the_fits_have_intervals(results: dict[str, Any]) -> None:
    for arm, rewards in (("rm_ppo", 3), ("dpo", 2)):
        fits = [fit["rl"] for fit in results["overoptimization"][arm]["fits"].values() if fit["rl"] is not None]
        assert len(fits) == rewards
        assert all(fit["a_ci_low"] < fit["a"] < fit["a_ci_high"] for fit in fits)


def test_a_checkpoint_of_fewer_prompts_is_compared_with_sft_on_these() -> None:
    """SFT has a gold reward of 1 on half of the prompts and 0 on the others; each policy adds 1/2 everywhere."""
    prompts = [f"p{i}" for i in range(20)]

    def sampled(policy: str, gain: float, kl: float, of: list[str]) -> list[dict[str, Any]]:
        rewards = {"explicit_reward": 0.0, "implicit_reward": None}
        return [
            {"prompt_id": p, "policy": policy, "kl_nats": kl, "gold_reward": (p > "p15") + gain, **rewards} for p in of
        ]

    tables = {
        "sft": sampled("sft", 0.0, 0.0, prompts),
        **{f"rm_ppo@{k}": sampled(f"rm_ppo@{k}", 0.5, k, prompts[:6]) for k in (1, 2, 3)},
        "rm_ppo": sampled("rm_ppo", 0.5, 4.0, prompts),
    }
    arms = {"sft": "sft", "dpo": "dpo"}
    policies = [
        {
            **{"policy": name, "arm": arms.get(name, "rm_ppo"), "kind": "sft" if name == "sft" else "final", "step": 1},
            **{reward: {"value": rows[0][reward]} for reward in ("gold_reward", "explicit_reward", "implicit_reward")},
            "kl_nats": rows[0]["kl_nats"],
        }
        for name, rows in tables.items()
    ]
    ppo = overoptimization_by_arm(policies, tables, {"n_resamples": 50, "confidence": 0.95, "seed": 0})["rm_ppo"]
    assert [row["gold_reward"] for row in ppo["rows"]] == [0.5] * 4
    assert [row["implicit_reward"] for row in ppo["rows"]] == [None] * 4
    assert ppo["fits"]["gold_reward"]["rl"]["n"] == 4
    assert ppo["fits"]["implicit_reward"] == {"rl": None, "reason": "the reward is not known"}


def test_pairs_of_equal_gold_are_in_no_accuracy_against_gold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that is gold, on prompts half of which have equal gold rewards, where it is anything."""
    made = run_folder._held_out

    def half_tied(*args: Any) -> Any:
        rewards, comparisons = made(*args)
        for row in rewards:
            row["gold_reward"] = row["explicit_reward"] if int(row["prompt_id"], 16) % 2 else 0.0
        return rewards, comparisons

    monkeypatch.setattr(run_folder, "_held_out", half_tied)
    results = read_json(run_folder.write_run(tmp_path / "run") / "results.json")
    assert results["rm_quality"]["explicit"]["accuracy_against_gold"]["value"] == 1.0
