"""A training that diverges ends with words, and not with a finished stage of NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.running import SMALL, duel

pytestmark = [pytest.mark.fault, pytest.mark.e2e]


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_it_names_stage_step_and_setting(stage: str, small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rate = ["--set", f"{stage}.learning_rate=1e30", "--set", f"{stage}.logging_steps=1", "--set=dpo.num_train_epochs=3"]
    done = duel("run", "smoke", "--out", str(out), "--until", stage, *SMALL, *rate, check=2)
    assert "training diverged: " in done.stderr and " step " in done.stderr
    assert f"lower {stage}.learning_rate" in done.stderr and "Traceback" not in done.stderr
    assert not (out / stage).exists()


def test_a_policy_that_has_lost_the_end_of_text_decides_nothing(tmp_path: Path) -> None:
    """Its weights and losses are finite, so training ends as always."""
    out = tmp_path / "run"
    duel("run", "smoke", "--out", str(out), *SMALL, "--set=ppo.learning_rate=1e3", "--set=data.eval_prompts=24")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    verdict = results["verdict"]
    assert (verdict["winner"], verdict["finding"], verdict["doubt"]) == ("undecided", "undecided", "broken arm")
    assert list(verdict["broken_arms"]) == ["rm_ppo"] and verdict["broken_arms"]["rm_ppo"] in verdict["sentence"]
    assert results["warnings"][0].startswith("RM + PPO ") and verdict["next_step"].startswith("Train RM + PPO again")
