"""How long a stage trains: its optimiser steps, or what its arm may spend. Without torch: a dry run asks, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.recipe.training import Arm, Training


@dataclass(frozen=True)
class Cost:
    """``train_tokens``: response tokens, each once for every training pass over it. ``wall_s``: seconds.

    >>> Cost(100, 2.0) + Cost(50, 0.25)
    Cost(train_tokens=150, wall_s=2.25)
    """

    train_tokens: int = 0
    wall_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.train_tokens + other.train_tokens, self.wall_s + other.wall_s)

    def facts(self) -> dict[str, object]:
        """For the record of a policy's training."""
        return {"train_tokens": self.train_tokens, "wall_s": round(self.wall_s, 3)}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Cost:
        """What a policy cost up to where it was saved, by the record of its training; nothing without one."""
        return cls(record.get("train_tokens", 0), record.get("wall_s", 0.0))


NOTHING = Cost()


@dataclass(frozen=True)
class Limit:
    """How much an arm may spend. ``key`` is the recipe's: train_tokens, or train_seconds."""

    key: str
    amount: float

    def of(self, cost: Cost) -> float:
        """A cost in this budget's unit."""
        return cost.train_tokens if self.key == "train_tokens" else cost.wall_s

    @property
    def most_units(self) -> int:
        """More steps, or rollouts, than fit: each trains on one token at least, and takes a millisecond at least."""
        return math.ceil(self.amount if self.key == "train_tokens" else 1000 * self.amount)

    def words(self, amount: float) -> str:
        """
        >>> Limit("train_tokens", 5000).words(1200), Limit("train_seconds", 90.0).words(61.25)
        ('1,200 response tokens', '61.2 s')
        """
        return f"{self.number(amount)} {self.unit}"

    @property
    def unit(self) -> str:
        return "response tokens" if self.key == "train_tokens" else "s"

    def number(self, amount: float) -> str:
        """An amount without its unit."""
        return f"{amount:,.0f}" if self.key == "train_tokens" else f"{amount:,.1f}"


def limit_of(section: Training) -> Limit | None:
    """The budget that an arm's settings name; None where they say how many steps or episodes it trains."""
    if not isinstance(section, Arm):
        return None
    for key, amount in (("train_tokens", section.train_tokens), ("train_seconds", section.train_seconds)):
        if amount is not None:
            return Limit(key, amount)
    return None


def step_size(section: Training, processes: int | None = None) -> int:
    """Prompts of an optimiser step: those of all processes. None takes the number that was launched."""
    if processes is None:
        from toolkit.engine.distributed import launched_processes

        processes = launched_processes()
    return section.per_device_train_batch_size * section.gradient_accumulation_steps * processes


def total_steps(section: Training, n_items: int, processes: int | None = None) -> int:
    """Optimiser steps of a stage whose epoch has ``n_items`` prompts; under a budget, more than it pays for.

    None takes the number of processes that was launched.
    """
    if (limit := limit_of(section)) is not None:
        return limit.most_units
    if section.max_steps > 0:
        return section.max_steps
    return max(1, math.ceil(math.ceil(n_items / step_size(section, processes)) * section.num_train_epochs))
