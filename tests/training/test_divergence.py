"""A training that diverges ends with words, and not with a finished stage of NaN."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.running import SMALL, duel
from transformers import TrainerControl, TrainerState, TrainingArguments

from toolkit.engine.engine import Engine
from toolkit.errors import DivergedError, NotFiniteError
from toolkit.models.encoding import Tree
from toolkit.progress import Reporter
from toolkit.stages.sft import check_likelihood, nats_per_token
from toolkit.training.callbacks import StageProgress

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(value: float, tmp_path: Path) -> None:
    """A callback of every training stage. The error has the step, the setting and the last whole checkpoint."""
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "files.json").write_text("{}", encoding="utf-8")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    progress, state = StageProgress(Reporter(quiet=True), "dpo", 10), TrainerState(global_step=6)
    progress.on_pre_optimizer_step(args, state, TrainerControl(), model=model)
    assert model.bias.grad is not None
    model.bias.grad[1] = value
    with pytest.raises(NotFiniteError) as caught:
        progress.on_pre_optimizer_step(args, state, TrainerControl(), model=model)
    assert "the loss or its gradient is not finite at step 7" in caught.value.what and caught.value.where == "stage dpo"
    assert caught.value.fix == "lower dpo.learning_rate; the last checkpoint before it is that of step 4"


def test_sft_that_is_worse_than_a_guess_ends_the_run(tiny: Any) -> None:
    """Its losses are finite: weights times 1e4 give a response token thousands of nats."""
    trees, n_tokens = [Tree([5, 6, 7], [[8, 9], [10]])], tiny.get_input_embeddings().weight.shape[0]
    broken = copy.deepcopy(tiny)
    for weight in broken.parameters():
        weight.mul_(1e4 if weight.dim() > 1 else 1.0)
    whole, exploded = (nats_per_token(Engine(model, 2, dtype=torch.float32), trees) for model in (tiny, broken))
    guess = math.log(n_tokens)
    assert guess < whole < 2 * guess < exploded
    check_likelihood(whole, whole, n_tokens)
    check_likelihood(whole, guess, n_tokens)
    for before, after, named in [
        (whole, exploded, "sft.learning_rate"),
        (guess - 2, guess + 2, "sft.learning_rate"),
        (exploded, exploded, "model.name"),
        (whole, math.nan, "sft.learning_rate"),
        (math.nan, math.nan, "model.name"),
    ]:
        with pytest.raises(DivergedError, match="guessing among all") as caught:
            check_likelihood(before, after, n_tokens)
        assert named in str(caught.value.fix)


@pytest.mark.e2e
@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_it_names_stage_step_and_setting(stage: str, small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rate = ["--set", f"{stage}.learning_rate=1e30", "--set", f"{stage}.logging_steps=1", "--set=dpo.num_train_epochs=3"]
    done = duel("run", "smoke", "--out", str(out), "--until", stage, *SMALL, *rate, check=2)
    assert "training diverged: " in done.stderr and " step " in done.stderr
    assert f"lower {stage}.learning_rate" in done.stderr and "Traceback" not in done.stderr
    assert not (out / stage).exists()


@pytest.mark.e2e
def test_a_policy_that_has_lost_the_end_of_text_decides_nothing(tmp_path: Path) -> None:
    """Its weights and losses are finite, so training ends as always."""
    out = tmp_path / "run"
    duel("run", "smoke", "--out", str(out), *SMALL, "--set=ppo.learning_rate=1e3", "--set=data.eval_prompts=24")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    verdict = results["verdict"]
    assert (verdict["winner"], verdict["finding"], verdict["doubt"]) == ("undecided", "undecided", "broken arm")
    assert list(verdict["broken_arms"]) == ["rm_ppo"] and verdict["broken_arms"]["rm_ppo"] in verdict["sentence"]
    assert results["warnings"][0].startswith("RM + PPO ") and verdict["next_step"].startswith("Train RM + PPO again")
