"""An exponential moving average of the policy's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from toolkit.models.sharding import is_shard, local


class WeightAverage(TrainerCallback):
    """After every optimiser step: average = decay * average + (1 - decay) * weight (Zheng et al. 2023).

    With ``every``, after every such number of steps. Of shards each process has the averages of its own.
    """

    def __init__(self, weights: Sequence[nn.Parameter], decay: float, every: int = 1) -> None:
        self.weights, self.decay, self.every = weights, decay, every
        self.averages = [weight.detach().clone() for weight in weights]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (state.global_step + 1) % self.every:  # the step is counted afterwards
            return
        for average, weight in zip(self.averages, self.weights, strict=True):
            local(average).lerp_(local(weight.detach()), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the context the weights are their averages; after it they are what they were, bit for bit."""
        latest = [_exchanged(weight, average) for weight, average in zip(self.weights, self.averages, strict=True)]
        try:
            yield
        finally:
            for weight, data in zip(self.weights, latest, strict=True):
                _exchanged(weight, data)

    def save(self, path: Path) -> None:
        save_file({str(i): average.contiguous().cpu() for i, average in enumerate(self.averages)}, path)

    def load(self, path: Path) -> None:
        saved = load_file(path)
        self.averages = [saved[str(i)].to(weight.device) for i, weight in enumerate(self.weights)]


def _exchanged(weight: nn.Parameter, data: torch.Tensor) -> torch.Tensor:
    """Put data in the place of a weight's. Returns what it had."""
    if is_shard(weight):  # what is gathered lies in memory that stays
        had = weight.detach().clone()
        weight.detach().copy_(data)
        return had
    had, weight.data = weight.data, data
    return had
