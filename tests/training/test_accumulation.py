"""A step's gradient does not depend on its split into batches, microbatches and processes, for all four trainers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from support.running import in_two_processes
from support.step_gradients import gradient

pytestmark = pytest.mark.invariant

Whole = Callable[[str], torch.Tensor]

KINDS = ("sft", "dpo", "reward_model", "ppo")
# Six prompts in one step: even splits, and splits whose last batch is smaller. PPO counts responses and divides them.
SPLITS = [(3, 2, None), (2, 3, None), (1, 6, None), (4, 2, None), (5, 2, None), (6, 1, 60), (4, 2, 1)]
# In two processes; the last two leave the second process a smaller batch, or none.
OF_TWO = [(3, 1), (1, 3), (2, 2), (6, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    return cache(lambda kind: gradient(kind, 12 if kind == "ppo" else 6, 1, None, folder))


def difference(step: torch.Tensor, expected: torch.Tensor) -> float:
    return float((step - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize(("size", "accumulation", "token_budget"), SPLITS)
def test_no_split_of_a_step_changes_its_gradient(
    kind: str, size: int, accumulation: int, token_budget: int | None, whole: Whole, tmp_path: Path
) -> None:
    assert difference(gradient(kind, size, accumulation, token_budget, tmp_path), whole(kind)) < 1e-5


@pytest.mark.parametrize("passes", [2, 3, 4, 6])
def test_no_number_of_passes_changes_the_gradient_of_ppo(passes: int, whole: Whole, tmp_path: Path) -> None:
    assert difference(gradient("ppo", 12, passes, None, tmp_path), whole("ppo")) < 1e-5


@pytest.mark.e2e
def test_no_number_of_processes_changes_the_gradient(whole: Whole, tmp_path: Path) -> None:
    cases = [(kind, *split) for kind in KINDS[:3] for split in OF_TWO] + [("ppo", 6, 1), ("ppo", 6, 2)]
    in_two_processes("support.step_gradients", json.dumps(cases), str(tmp_path))
    for kind, size, accumulation in cases:
        step = torch.load(tmp_path / f"{kind}-{size}x{accumulation}.pt", weights_only=True)
        assert difference(step, whole(kind)) < 1e-5, (kind, size, accumulation)
