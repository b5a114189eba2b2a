"""What training has cost so far."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from toolkit.engine.distributed import all_sum


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


NOTHING = Cost()


def saved_attributes(callback: ExportableState, state: TrainerState) -> dict[str, Any]:
    """What a callback's ``state`` was in the checkpoint that training resumes from."""
    states: Any = state.stateful_callbacks
    attributes: dict[str, Any] = states[type(callback).__name__]["attributes"]
    return attributes


class Spending(TrainerCallback, ExportableState):
    """Counts what a stage has cost up to its last optimiser step: ``tokens`` of all processes, and ``seconds``.

    A trainer tells :meth:`add` what this process trains on. The clock starts when the object is made, and ``before`` is
    what other stages of the arm had cost. A resumed training goes on with the counts of its checkpoint: what it repeats
    counts once.
    """

    def __init__(self, before: Cost = NOTHING) -> None:
        self.before = before
        self.tokens, self.seconds = 0, 0.0
        self.started = time.monotonic()
        self.uncounted = 0  # this process's tokens since the last optimiser step

    def add(self, n_response_tokens: int) -> None:
        """This process trains on these many response tokens."""
        self.uncounted += n_response_tokens

    def cost(self) -> Cost:
        """The cost until now, that of earlier stages included."""
        return self.before + Cost(self.tokens, time.monotonic() - self.started)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step:
            saved = saved_attributes(self, state)
            self.tokens, self.started = saved["tokens"], time.monotonic() - saved["seconds"]
        self._count(args, state)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        # Before the Trainer steps the learning rate, which may follow the counts.
        self._count(args, state)

    def _count(self, args: TrainingArguments, state: TrainerState) -> None:
        """Add up over the processes. All take the main one's clock, so that they decide alike."""
        seconds = time.monotonic() - self.started if state.is_world_process_zero else 0.0
        totals = torch.tensor([self.uncounted, seconds], dtype=torch.float64, device=args.device)
        tokens, self.seconds = all_sum(totals).tolist()
        self.tokens, self.uncounted = self.tokens + int(tokens), 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in ``trainer_state.json``."""
        return {"args": {}, "attributes": {"tokens": self.tokens, "seconds": time.monotonic() - self.started}}
