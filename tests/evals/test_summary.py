"""What an evaluation takes as evidence."""

from __future__ import annotations

from typing import Any

import pytest
from support.run_folder import write_run

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


def test_the_fits_have_intervals(results: dict[str, Any]) -> None:
    for arm, rewards in (("rm_ppo", 3), ("dpo", 2)):
        fits = [fit["rl"] for fit in results["overoptimization"][arm]["fits"].values() if fit["rl"] is not None]
        assert len(fits) == rewards
        assert all(fit["a_ci_low"] < fit["a"] < fit["a_ci_high"] for fit in fits)
