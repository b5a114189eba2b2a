"""Sampling and scoring in two processes have the results of one, bit for bit: a batch is what it is in one process."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.running import SMALL, duel_process, in_two_processes

from toolkit.files import read_json, write_json
from toolkit.recipe.files import load_recipe
from toolkit.runs.plan import plan_stages
from toolkit.runs.store import RunFolder
from toolkit.stages.contexts import to_json

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
# Batches of few responses, so that every process has some. A reward model that stays as it is has one mean.
SETS = [
    "evaluate.batch_size=8",
    "evaluate.token_budget=256",
    "evaluate.temperatures=[0.7]",
    "rounds.number=2",
    "rft.n=3",
    "reward_model.learning_rate=1e-12",
]
TABLES = ("samples.parquet", "rewards.parquet", "judgements.parquet", "temperatures/0.7/samples.parquet")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("shared") / "run"
    duel_process("run", "smoke", *SMALL, *(f"--set={setting}" for setting in SETS), "--out", str(out))
    return out


def in_two(run: Path, stage: str) -> tuple[Path, dict[str, object]]:
    """The folder of a stage that two processes compute from the same inputs, and its metrics."""
    small = [word.removeprefix("--set=") for word in SMALL]
    [planned] = [s for s in plan_stages(load_recipe("smoke", [*small, *SETS]), RunFolder(run)) if s.spec.name == stage]
    work = run / ".work" / f"{stage}-two"
    work.mkdir(parents=True)
    inputs = {role: str(run / name) for role, name in planned.reads.items()}
    request = {"stage": stage, "context": to_json(planned.context), "inputs": inputs, "processes": 2}
    request |= {"trackers": {"names": [], "run_name": "two"}, "trust_remote_code": False, "sharding": None}
    write_json(work / "request.json", request)
    in_two_processes("toolkit.stages", str(work / "request.json"))
    answer = read_json(work / "answer.json")
    assert answer["processes"] == 2
    return work, answer


def test_the_evaluation_of_two_processes_is_that_of_one(alone: Path) -> None:
    work, _ = in_two(alone, "evaluate")
    for table in TABLES:
        assert pq.read_table(work / table) == pq.read_table(alone / "evaluate" / table), table
    assert read_json(work / "evaluation.json") == read_json(alone / "evaluate" / "evaluation.json")


def test_two_processes_label_what_one_would(alone: Path) -> None:
    work, _ = in_two(alone, "labels@2")
    for name in ("rm_ppo.parquet", "dpo.parquet", "rm_ppo_samples.parquet", "dpo_samples.parquet"):
        assert pq.read_table(work / name) == pq.read_table(alone / "labels@2" / name), name


def test_two_processes_sample_for_rejection_sampling_what_one_would(alone: Path) -> None:
    work, _ = in_two(alone, "rft")
    assert pq.read_table(work / "samples.parquet") == pq.read_table(alone / "rft" / "samples.parquet")


def test_two_processes_centre_a_reward_model_as_one_would(alone: Path) -> None:
    work, answer = in_two(alone, "reward_model")
    mean = read_json(alone / "reward_model" / "model" / "reward_head.json")["mean"]
    assert read_json(work / "model" / "reward_head.json")["mean"] == answer["mean"]
    assert answer["mean"] == pytest.approx(mean, abs=1e-5) and mean  # two steps moved the head's weights, by rounding
