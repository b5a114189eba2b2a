"""Full fine-tuning with sharded models (FSDP2) in two processes: the losses and weights of one process, to 1e-5.

The tolerance is that of sums in another order: gradients are added up over the processes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.running import in_two_processes
from support.sharded_training import STEPS, train
from torch import nn

from toolkit.models.sharding import blocks

pytestmark = [pytest.mark.slow, pytest.mark.invariant, pytest.mark.e2e]
# A kind with a plus is interrupted behind its second step, and resumed from the shards of its checkpoint.
KINDS = ("sft", "rm", "dpo", "dpo+interrupted", "sft-checkpointed")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train, a folder for each kind."""
    root = tmp_path_factory.mktemp("sharded")
    in_two_processes("support.sharded_training", "2", str(root), "frees", *KINDS)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_two_sharded_processes_equal_one_with_twice_the_batch(kind: str, of_two: Path, tmp_path: Path) -> None:
    train(kind.partition("+")[0], 4, tmp_path)
    logs, sharded_logs = (json.loads((folder / "logs.json").read_text()) for folder in (tmp_path, of_two / kind))
    assert [log["step"] for log in sharded_logs] == list(range(1, STEPS + 1))
    for log, same in zip(logs, sharded_logs, strict=True):
        names = ("loss", "grad_norm", "tokens")
        assert {n: log[n] for n in names} == pytest.approx({n: same[n] for n in names}, rel=1e-4, abs=1e-6)
    assert max(log["grad_norm"] for log in logs) > 0.5  # so the norm of all shards was clipped
    weights, sharded = (load_file(folder / "state.safetensors") for folder in (tmp_path, of_two / kind))
    assert weights.keys() == sharded.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=1e-5, msg=name)
    # Sampling goes on with the whole model, and the processes sample different numbers of responses.
    assert (of_two / kind / "sampled.json").read_text() == (tmp_path / "sampled.json").read_text()


def test_blocks_that_stay_gathered_give_the_same(of_two: Path, tmp_path: Path) -> None:
    in_two_processes("support.sharded_training", "2", str(tmp_path), "keeps", "dpo")
    frees, keeps = (load_file(root / "dpo" / "state.safetensors") for root in (of_two, tmp_path))
    assert all(torch.equal(weight, keeps[name]) for name, weight in frees.items())


def test_the_blocks_of_a_model_are_its_outermost_lists() -> None:
    """The experts of a layer are a part of it."""
    layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1)])}) for _ in range(2)])
    model = nn.ModuleDict(
        {"trunk": nn.ModuleDict({"layers": layers, "norm": nn.LayerNorm(1)}), "head": nn.Linear(1, 1)}
    )
    assert blocks(model) == list(layers)
