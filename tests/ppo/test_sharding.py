"""PPO with sharded models (FSDP2) in two processes: the logs and weights of one process, up to the order of sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_models import timeless
from support.ppo_training import results, train
from support.running import in_two_processes
from support.sharded_training import group_of_one

pytestmark = pytest.mark.invariant

FULL: dict[str, Any] = {"full": True, "learning_rate": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "policy and critic": {},
    "checkpointed": {"gradient_checkpointing": True, "center_samples": 5},
    # Two prompts go into one pass where their responses are short, and into two where they are not.
    "unequal passes": {"num_mini_batches": 1, "token_budget": 30},
    "averages": {"ema_decay": 0.9, "reference_decay": 0.8, "ptx_coef": 0.5, "ptx_batch_size": 3},
    "trunk": {"share_trunk": True, "critic_warmup_rollouts": 1},
    "no critic": {"advantage": "rloo", "weight_decay": 0.1},
    # Behind step 4 the policy has no gradient yet, and the optimiser no state of it.
    "critic's warm-up": {"critic_warmup_rollouts": 1, "weight_decay": 0.1},
}
INTERRUPTED = ("averages", "trunk", "critic's warm-up")


@pytest.mark.parametrize("options", [{"share_trunk": True}, {"critic_warmup_rollouts": 1, "ema_decay": 0.9}])
def test_the_shards_of_one_process_train_as_whole_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    """Bit for bit, since no gradient is added up."""
    options = {"per_device_train_batch_size": 4, "total_episodes": 8, **FULL, **options}
    train(str(tmp_path / "whole"), **options)
    with group_of_one():
        train(str(tmp_path / "shards"), sharded=True, interrupted=True, **options)
    (whole, logs, _), (shards, logs_of_shards, _) = (results(tmp_path / name) for name in ("whole", "shards"))
    assert [timeless(log) for log in logs] == [timeless(log) for log in logs_of_shards]
    assert all(torch.equal(weight, shards[name]) for name, weight in whole.items())


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train, each with half of the batch: a folder for each case."""
    root = tmp_path_factory.mktemp("sharded")
    of_each = {"per_device_train_batch_size": 4, "sharded": True, **FULL}
    settings = [{"output_dir": str(root / name), **of_each, **options} for name, options in CASES.items()]
    settings += [
        {"output_dir": str(root / f"{name}, interrupted"), **of_each, **CASES[name], "interrupted": True}
        for name in INTERRUPTED
    ]
    in_two_processes("support.ppo_training", json.dumps(settings))
    return root


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES)
def test_two_sharded_processes_equal_one(of_two: Path, tmp_path: Path, case: str) -> None:
    train(str(tmp_path), per_device_train_batch_size=8, **FULL, **CASES[case])
    (one, ones, evaluated), (two, twos, evaluated_by_two) = results(tmp_path), results(of_two / case)
    assert len(ones) == len(twos) > 0
    for log, same in zip(ones, twos, strict=True):
        assert timeless(log) == pytest.approx(timeless(same), rel=1e-3, abs=1e-4)
    assert ones[0]["objective/kl"] == twos[0]["objective/kl"] == 0
    assert max(log["grad_norm"] for log in ones) > 1  # so the norm of all shards was clipped
    for name in ("eval_objective/score", "eval_objective/kl", "eval_length/mean"):
        assert evaluated[name] == pytest.approx(evaluated_by_two[name], rel=1e-3, abs=1e-4)
    assert one.keys() <= two.keys()  # tied weights have two names
    for name, weight in one.items():
        assert float((weight - two[name]).abs().max()) < 1e-5, name


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.fault
@pytest.mark.parametrize("case", INTERRUPTED)
def test_resumed_from_shards(of_two: Path, case: str) -> None:
    (whole, logs, evaluated), (again, logs_again, evaluated_again) = (
        results(folder) for folder in (of_two / case, of_two / f"{case}, interrupted")
    )
    for name, weight in whole.items():
        assert bool((weight == again[name]).all()), name
    assert [timeless(log) for log in logs] == [timeless(log) for log in logs_again]
    assert evaluated == evaluated_again
