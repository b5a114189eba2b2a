"""Reward models and DPO in two processes: the steps, the losses and the weights of one process with twice the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.pair_training import train
from support.running import in_two_processes

pytestmark = [pytest.mark.invariant, pytest.mark.e2e]

KINDS = ("dpo", "rm", "budget")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train, a folder for each kind."""
    root = tmp_path_factory.mktemp("two")
    in_two_processes("support.pair_training", "2", str(root), *KINDS)
    return root


def results(folder: Path) -> tuple[Any, Any]:
    return load_file(folder / "state.safetensors"), json.loads((folder / "logs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_with_twice_the_batch(kind: str, of_two: Path, tmp_path: Path) -> None:
    train(kind, 4, tmp_path)
    (one, ones), (two, twos) = results(tmp_path), results(of_two / kind)
    assert len(ones) == len(twos) == 4  # two epochs over 16 prompts, 8 of them in a step
    # Not the accuracies: at the first step the rewards are all equal, up to rounding.
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm", "tokens"]
    for log, same in zip(ones, twos, strict=True):
        assert {n: log[n] for n in names} == pytest.approx({n: same[n] for n in names}, rel=1e-4, abs=1e-5)
    spent, spent_by_two = (json.loads((root / "spent.json").read_text()) for root in (tmp_path, of_two / kind))
    assert spent == spent_by_two and spent["tokens"] > 0 and len(spent["kept"]) == (kind == "budget")
    moved = max(float(weight.abs().max()) for name, weight in one.items() if "lora_B" in name)
    assert moved > 1e-4 and one.keys() == two.keys()
    for name, weight in one.items():
        assert float((weight - two[name]).abs().max()) < 1e-4 * moved, name
