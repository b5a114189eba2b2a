"""Sharded models in a group of one process: when weights are whole, and whose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.sharded_training import group_of_one
from torch import nn

from toolkit.models.sharding import Sharding, gathered, is_shard, placed, sharded_training, through_root


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]), nn.Linear(4, 1)

    def compute(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            states = layer(states)
        return self.head(states)


@pytest.fixture
def stacks() -> Iterator[tuple[Any, Stack]]:
    """A sharded model, and a whole one with the same weights."""
    whole, sharded = Stack(), Stack()
    sharded.load_state_dict(whole.state_dict())
    with group_of_one(), sharded_training(Sharding()):
        yield placed(sharded), whole


def test_a_pass_without_gradients_takes_the_weights_of_the_last_step(stacks: tuple[Any, Stack]) -> None:
    """No backward pass follows that would let go of what was gathered."""
    sharded, whole = stacks
    weights, states = list(sharded.parameters()), torch.randn(3, 4)
    for _ in range(2):
        with torch.no_grad():
            got = through_root(sharded, lambda: sharded.compute(states))
            assert torch.equal(got, whole.compute(states))
            for weight in [*weights, *whole.parameters()]:
                weight.mul_(1.5)  # as an optimiser does, which holds the shards


def test_what_is_gathered_stays_whole_until_the_outermost_end(stacks: tuple[Any, Stack]) -> None:
    sharded, whole = stacks
    states = torch.randn(3, 4)
    with torch.no_grad(), gathered(sharded):
        with gathered(sharded):
            pass
        assert not any(is_shard(weight) for weight in sharded.parameters())
        assert torch.equal(through_root(sharded, lambda: sharded.compute(states)), whole.compute(states))
        assert not any(is_shard(weight) for weight in sharded.parameters())
    assert all(is_shard(weight) for weight in sharded.parameters())
