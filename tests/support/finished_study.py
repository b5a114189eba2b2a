"""A finished study that tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.running import duel
from support.shared import made_once

# Two seeds and two settings of either arm, each part in its smallest useful size.
SMALL_STUDY = [
    "--seeds=2",
    "--trials=2",
    "--set=data.train_prompts=24",
    "--set=data.eval_prompts=48",
    "--set=data.max_responses=3",
    "--set=data.max_response_tokens=12",
    "--set=ppo.per_device_train_batch_size=16",
    "--set=ppo.num_checkpoints=2",
    "--set=dpo.num_checkpoints=2",
    "--set=study.budget.tokens=3000",
    "--set=study.controls=[online_dpo]",
    "--set=evaluate.checkpoint_prompts=2",
]
# The same as settings of the recipe.
SMALL_STUDY_SETS = (
    *(option.removeprefix("--set=") for option in SMALL_STUDY if option.startswith("--set=")),
    "study.seeds=2",
    "study.trials=2",
)


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A finished study of study-tiny in the smallest useful size, one for all workers. Copy it before you change it."""

    def study(out: Path) -> None:
        duel("study", "study-tiny", "--out", str(out), *SMALL_STUDY)

    return made_once(tmp_path_factory, worker_id, "finished-study", study, "report.html")
